"""The check of `hierarchical.SwinTransformer`."""

from torch import nn

from vitcourse import hierarchical
from vitcourse.course.checks import build, check
from vitcourse.vit import PatchEmbed


@check(
    "hierarchical.SwinTransformer",
    reference="vitcourse.hierarchical.SwinTransformer",
    level=4,
    minutes=25,
    blanks=2,
    why="The parts are simple; what makes Swin is which block gets which windows.",
    hints=[
        "Blocks come in pairs: regular windows first, then displaced by half a window, rounded down.",
        "A map that fits into one window needs no displacement, and no larger window than itself.",
        "forward: embed; in each stage merge first, flatten the map, run the blocks with their grid (h, w, 0), and make it "
        "a map again; norm; mean over the map; head.",
    ],
    exempt={"smaller": "the exercise's windows have to divide the maps; the library fills smaller ones with zeros"},
)
def swin_transformer(rng):
    sizes = {"embed_dim": 4, "num_heads": (1, 2)}
    swin = build(img_size=16, patch_size=2, in_chans=2, num_classes=5, depths=(4, 1), window_size=4, **sizes)
    yield swin.call(rng.normal(3, 2, 16, 16))
    yield swin.call(rng.normal(1, 2, 16, 32)).on("an image that is not square")
    yield (
        build(img_size=15, patch_size=3, in_chans=1, num_classes=3, depths=(2, 3), window_size=5, **sizes)
        .call(rng.normal(1, 1, 15, 15))
        .on("maps no larger than a window")
    )
    deep = {"depths": (2, 1, 1), "embed_dim": 4, "num_heads": (1, 2, 1), "window_size": 6}
    yield (
        build(img_size=24, patch_size=2, in_chans=1, num_classes=7, **deep)
        .call(rng.normal(1, 1, 24, 24))
        .on("three stages, and windows of six")
    )


class _WrongSwin(hierarchical.SwinTransformer):
    """The model in its steps, each of which a mistake may replace."""

    def pool(self, x):
        return self.norm(x).mean(dim=(1, 2))

    def forward(self, x):
        x = self.embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.head(self.pool(x))


def _displace(model, rule):
    """Give each block the shift ``rule(number of the block in its stage, its window, its shift)``."""
    for stage in model.layers:
        for i, step in enumerate(stage.blocks):
            step.attn.shift_size = (rule(i, step.attn.window_size[0], step.attn.shift_size[0]),) * 2


@swin_transformer.mistake("never-shifted", "no block displaces its windows: they stay islands until patches are merged")
class _(_WrongSwin):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _displace(self, lambda i, window, shift: 0)


class _Shifting(_WrongSwin):
    """Shifts that follow ``rule`` where a stage has more than one window."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        size, most = kwargs["img_size"] // kwargs["patch_size"], kwargs["window_size"]
        for stage in self.layers:
            for i, step in enumerate(stage.blocks):
                shift = self.rule(i, step.attn.window_size[0]) if size > most or self.everywhere else 0
                step.attn.shift_size = (shift, shift)
            size = -(-size // 2)

    everywhere = False


@swin_transformer.mistake(
    "shifted-first",
    "the first block of a pair has displaced windows and the second regular ones; it should be the reverse",
)
class _(_Shifting):
    def rule(self, i, window):
        return 0 if i % 2 else window // 2


@swin_transformer.mistake(
    "always-shifted", "all blocks displace their windows alike, so again the same borders separate the same tokens"
)
class _(_Shifting):
    def rule(self, i, window):
        return window // 2


@swin_transformer.mistake(
    "shifted-single-window",
    "where one window holds the whole map it is displaced too: the mask then cuts into pieces what could be seen at once",
)
class _(_Shifting):
    everywhere = True

    def rule(self, i, window):
        return window // 2 if i % 2 else 0


@swin_transformer.mistake(
    "window-not-shrunk",
    "windows may become larger than the map: the table of positions is then larger than any distance",
)
class _(_WrongSwin):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for stage in self.layers:
            for step in stage.blocks:
                mixer = step.attn
                step.attn = hierarchical.WindowAttention(
                    mixer.qkv.in_features,
                    mixer.num_heads,
                    window_size=kwargs["window_size"],
                    shift_size=mixer.shift_size,
                )


@swin_transformer.mistake("no-final-norm", "the final norm is missing: nothing else tames the residual sum")
class _(_WrongSwin):
    def pool(self, x):
        return x.mean(dim=(1, 2))


@swin_transformer.mistake("norm-after-the-mean", "the mean is normalised; here each token is, before they are averaged")
class _(_WrongSwin):
    def pool(self, x):
        return self.norm(x.mean(dim=(1, 2)))


@swin_transformer.mistake(
    "first-token", "the head reads the first token; there is no [CLS] here, all tokens are averaged"
)
class _(_WrongSwin):
    def pool(self, x):
        return self.norm(x)[:, 0, 0]


@swin_transformer.mistake(
    "patches-unnormed", "the patch embedding has no norm of its own, which Swin's has: two parameters are missing"
)
class _(_WrongSwin):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.patch_embed = PatchEmbed(self.patch_size, self.in_chans, self.embed_dim)


@swin_transformer.mistake(
    "merged-last", "a stage ends with patch merging; in the names of the checkpoints the next stage begins with it"
)
class _(_WrongSwin):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for stage, after in zip(self.layers[:-1], self.layers[1:], strict=True):
            stage.downsample, after.downsample = after.downsample, nn.Identity()
