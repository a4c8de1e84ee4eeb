"""Answers to the exercises of lesson 02, as learners write them: the proof that its checks diagnose rightly.

None of them knows the catalogue in ``checks/hybrid.py``: they reach the same numbers by other means.

* ``VARIANTS`` make a catalogued mistake, and have to be told that mistake.
* ``UNKNOWN`` are wrong in another way, and have to be rejected without a diagnosis.
* ``RIGHT`` are right, and have to be accepted.

Of a class the lesson gives most of ``__init__``, and the learner writes the rest; so do the answers here.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from mistakes_common import collect
from torch import nn

from vitcourse.hybrid import MBConv, RelativeBlock
from vitcourse.vit import resize_matrix

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect()


# ----------------------------------------------------------------------------------------------------------- ConvStem

STEM = "hybrid.ConvStem"


def stem(make):
    """The lesson's class, with the learner's ``make(self, patch_size, in_chans, embed_dim)`` for its layers."""

    class Stem(nn.Module):
        def __init__(self, patch_size=16, in_chans=3, embed_dim=768):
            super().__init__()
            make(self, patch_size, in_chans, embed_dim)

        def forward(self, x):
            return self.proj(self.convs(x))

    Stem.__name__ = make.__name__
    return Stem


ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "none": nn.Identity}


def chain(patch, dim_in, dim, widths=None, strides=None, norm=True, act="relu", order="cna", **options):
    """The layers of a stem in one list; ``order`` says where convolution, norm and activation stand."""
    count = int(math.log2(patch))
    widths = widths or [dim >> (count - 1 - i) for i in range(count)]
    options = {"kernel_size": 3, "padding": 1, "bias": False, **options}
    layers = []
    for i in range(count):
        conv = nn.Conv2d(dim_in, widths[i], stride=strides[i] if strides else 2, **options)
        parts = {
            "c": conv,
            "n": nn.BatchNorm2d(widths[i]),
            "a": {"relu": nn.ReLU, "gelu": nn.GELU}.get(act, nn.Identity)(),
        }
        layers += [parts[letter] for letter in order if norm or letter != "n"]
        dim_in = widths[i]
    return nn.Sequential(*layers)


def simple(key, decorate, last=None, **options):
    def make(self, patch_size, in_chans, embed_dim):
        given = {name: value(patch_size, embed_dim) if callable(value) else value for name, value in options.items()}
        self.convs = chain(patch_size, in_chans, embed_dim, **given)
        self.proj = last(embed_dim) if last else nn.Conv2d(embed_dim, embed_dim, kernel_size=(1, 1))

    make.__name__ = f"{key}_stem".replace("-", "_")
    return decorate(stem(make))


def halvings(patch):
    return len(bin(patch)) - 3


class Clipped(nn.Conv2d):
    def __init__(self, dim):
        super().__init__(dim, dim, 1)

    def forward(self, x):
        return super().forward(x).clamp(min=0)


for key, change in {
    "same-width": {"widths": lambda p, d: [d for _ in range(halvings(p))]},
    "with-bias": {"bias": True},
    "no-norm": {"norm": False},
    "norm-after-relu": {"order": "can"},
    "no-activation": {"act": "none"},
    "gelu": {"act": "gelu"},
    "no-padding": {"padding": "valid"},
    "one-big-step": {"strides": lambda p, d: [p, *[1 for _ in range(halvings(p) - 1)]]},
    "no-projection": {"last": lambda dim: nn.Sequential()},
    "relu-last": {"last": Clipped},
}.items():
    simple(key, variant(STEM, key), **change)


for key, change in {
    "mirrored-border": {"padding_mode": "circular"},
    "leaky": {"last": lambda dim: nn.Sequential(nn.Conv2d(dim, dim, 1), nn.Tanh())},
    "widest-first": {"widths": lambda p, d: [d >> i for i in range(halvings(p))]},
    "projection-without-bias": {"last": lambda dim: nn.Conv2d(dim, dim, 1, bias=False)},
}.items():
    simple(key, unknown(STEM), **change)


@unknown(STEM)
class SquaredInTheEnd(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.convs, self.proj = chain(patch_size, in_chans, embed_dim), nn.Conv2d(embed_dim, embed_dim, 1)

    def forward(self, x):
        return self.proj(self.convs(x) ** 2)


simple("plain", right(STEM))


@right(STEM)
@stem
def appended_one_by_one(self, patch_size, in_chans, embed_dim):
    self.convs, width = nn.Sequential(), in_chans
    while patch_size > 1:
        patch_size //= 2
        wider = embed_dim // patch_size
        for layer in (nn.Conv2d(width, wider, 3, 2, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU(inplace=True)):
            self.convs.append(layer)
        width = wider
    self.proj = nn.Conv2d(width, embed_dim, 1)


# ------------------------------------------------------------------------------------------------------ SqueezeExcite

GATE = "hybrid.SqueezeExcite"


def gate(forward):
    """The lesson's class, with the learner's ``forward``."""

    class Gate(nn.Module):
        def __init__(self, dim, hidden_dim):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, dim)

        def __call__(self, x):
            return forward(self, x)

    Gate.__name__ = forward.__name__
    return Gate


def opened(self, z, last=torch.sigmoid):
    """(B, C) -> (B, C, 1, 1)."""
    z = F.linear(F.silu(F.linear(z, self.fc1.weight, self.fc1.bias)), self.fc2.weight, self.fc2.bias)
    return last(z).unsqueeze(-1).unsqueeze(-1)


def averages(x):
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


@variant(GATE, "max")
@gate
def pooled_by_maximum(self, x):
    return opened(self, F.adaptive_max_pool2d(x, 1)[:, :, 0, 0]) * x


@variant(GATE, "sum")
@gate
def einsum_without_count(self, x):
    return opened(self, torch.einsum("bchw->bc", x)) * x


@variant(GATE, "no-gate")
@gate
def weights_as_they_come(self, x):
    return opened(self, averages(x), last=lambda z: z) * x


@variant(GATE, "softmax")
@gate
def channels_compete(self, x):
    return opened(self, averages(x), last=lambda z: z.exp() / z.exp().sum(1, keepdim=True)) * x


@variant(GATE, "linear-bottleneck")
@gate
def two_linear_layers(self, x):
    z = averages(x) @ self.fc1.weight.T + self.fc1.bias
    return torch.einsum("bc,bchw->bchw", torch.sigmoid(self.fc2(z)), x)


@variant(GATE, "added")
@gate
def plus_the_gate(self, x):
    return opened(self, averages(x)).expand_as(x) + x


@variant(GATE, "residual")
@gate
def one_plus_the_gate(self, x):
    return torch.addcmul(x, x, opened(self, averages(x)))


@variant(GATE, "gate-alone")
@gate
def forgets_the_map(self, x):
    return opened(self, averages(x)) * torch.ones_like(x)


@variant(GATE, "place-by-place")
@gate
def like_an_mlp(self, x):
    rows = x.permute(0, 2, 3, 1)
    return (rows * torch.sigmoid(self.fc2(self.act(self.fc1(rows))))).permute(0, 3, 1, 2)


@unknown(GATE)
@gate
def twice_the_sigmoid(self, x):
    return 2 * opened(self, averages(x)) * x


@unknown(GATE)
@gate
def relu_in_the_bottleneck(self, x):
    return self.fc2(F.relu(self.fc1(averages(x)))).sigmoid()[..., None, None] * x


@unknown(GATE)
@gate
def mean_over_rows(self, x):
    return opened(self, x.mean(3)[:, :, 0]) * x


@unknown(GATE)
@gate
def gate_of_another_image(self, x):
    return opened(self, averages(x).flip(1)) * x


@unknown(GATE)
@gate
def gate_cut_off(self, x):
    return opened(self, averages(x)).detach() * x


@right(GATE)
@gate
def pooled_and_multiplied(self, x):
    return opened(self, averages(x)) * x


@right(GATE)
@gate
def by_convolutions(self, x):
    """As in most published code: 1×1 convolutions on a map of 1 × 1."""
    z = x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
    z = F.conv2d(z, self.fc1.weight[..., None, None], self.fc1.bias)
    z = F.conv2d(z * z.sigmoid(), self.fc2.weight[..., None, None], self.fc2.bias)
    return x / (1 + torch.exp(-z))


# ------------------------------------------------------------------------------------------------------------- MBConv

BLOCK = "hybrid.MBConv"


class Squeeze(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return x * opened(self, averages(x))


class Shortcut(nn.Module):
    def __init__(self, in_dim, dim, stride):
        super().__init__()
        self.stride = stride
        if in_dim != dim:
            self.proj = nn.Conv2d(in_dim, dim, 1)

    def forward(self, x):
        if self.stride == 2:
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        return self.proj(x) if hasattr(self, "proj") else x


def inverted(forward):
    """The lesson's class, with the learner's ``forward``."""

    class Inverted(nn.Module):
        def __init__(self, in_dim, dim, stride=1, downsample="expand"):
            super().__init__()
            wide, first = 4 * dim, downsample == "expand"
            self.shortcut = Shortcut(in_dim, dim, stride)
            self.pre_norm = nn.BatchNorm2d(in_dim)
            self.expand = nn.Conv2d(in_dim, wide, 1, stride if first else 1, bias=False)
            self.norm1 = nn.BatchNorm2d(wide)
            self.depthwise = nn.Conv2d(wide, wide, 3, 1 if first else stride, 1, groups=wide, bias=False)
            self.norm2 = nn.BatchNorm2d(wide)
            self.act = nn.GELU()
            self.se = Squeeze(wide, max(1, dim // 4))
            self.project = nn.Conv2d(wide, dim, 1)

    Inverted.forward, Inverted.__name__ = forward, forward.__name__
    return Inverted


def through(self, x, names):
    """``names`` is what a learner's chain of calls says: "pre_norm expand norm1 act …"."""
    for name in names.split():
        x = getattr(self, name)(x)
    return x


WHOLE = "pre_norm expand norm1 act depthwise norm2 act se project"


def by_names(key, decorate, names=WHOLE, around=lambda self, x, y: self.shortcut(x) + y):
    def forward(self, x):
        return around(self, x, through(self, x, names))

    forward.__name__ = key.replace("-", "_")
    return decorate(inverted(forward))


for key, change in {
    "no-shortcut": {"around": lambda self, x, y: y},
    "shortcut-of-the-normed": {"around": lambda self, x, y: y.add(self.shortcut(self.pre_norm(x)))},
    "no-pre-norm": {"names": WHOLE.removeprefix("pre_norm ")},
    "activated-entry": {"names": WHOLE.replace("pre_norm", "pre_norm act")},
    "no-squeeze-excite": {"names": WHOLE.replace(" se", "")},
    "squeeze-excite-early": {"names": WHOLE.replace(" se", "").replace("depthwise", "se depthwise")},
    "no-depthwise": {"names": WHOLE.replace("depthwise ", "")},
    "norms-exchanged": {"names": "pre_norm expand norm2 act depthwise norm1 act se project"},
    "norm-after-activation": {"names": "pre_norm expand act norm1 depthwise act norm2 se project"},
    "linear-depthwise": {"names": WHOLE.replace("norm2 act", "norm2")},
    "linear-expansion": {"names": WHOLE.replace("norm1 act", "norm1")},
    "activated-exit": {"around": lambda self, x, y: F.gelu(y) + self.shortcut(x)},
}.items():
    by_names(key, variant(BLOCK, key), **change)

for key, change in {
    "activated-sum": {"around": lambda self, x, y: F.gelu(self.shortcut(x) + y)},
    "one-norm-twice": {"names": WHOLE.replace("norm2", "norm1")},
    "subtracted": {"around": lambda self, x, y: self.shortcut(x) - y},
    "neither-norm-nor-gate": {"names": "expand norm1 act depthwise norm2 act project"},
    "depthwise-cut-off": {"around": lambda self, x, y: self.shortcut(x) + y.detach()},
}.items():
    by_names(key, unknown(BLOCK), **change)

by_names("in_order", right(BLOCK))


@right(BLOCK)
@inverted
def written_out(self, x):
    y = F.gelu(self.norm1(self.expand(self.pre_norm(x))))
    step, wide = self.depthwise.stride, y.shape[1]
    y = F.conv2d(F.pad(y, (1, 1, 1, 1)), self.depthwise.weight, stride=step, groups=wide)
    y = F.gelu(self.norm2(y))
    y = y * opened(self.se, averages(y))
    return torch.einsum("oi,bihw->bohw", self.project.weight[..., 0, 0], y) + (
        self.project.bias[:, None, None] + self.shortcut(x)
    )


# -------------------------------------------------------------------------------------------------- resize_bias_table

TABLE = "hybrid.resize_bias_table"


def offsets(size):
    return [n + n - 1 for n in size]


def to_map(table, size):
    """(rows · columns, heads) -> (1, heads, rows, columns)."""
    return table.t().unflatten(1, offsets(size))[None]


def to_table(grid):
    return grid[0].flatten(1).t()


def bicubic(grid, size, **options):
    return F.interpolate(grid, size=tuple(size), **{"mode": "bicubic", "antialias": True, **options})


@variant(TABLE, "heads-mixed")
def viewed(table, old_size, new_size):
    rows, columns = offsets(old_size)
    return to_table(bicubic(table.contiguous().view(1, table.shape[1], rows, columns), offsets(new_size)))


@variant(TABLE, "left-as-a-map")
def returns_the_grid(table, old_size, new_size):
    return bicubic(to_map(table, old_size), offsets(new_size)).squeeze(0)


@variant(TABLE, "height-for-width")
def width_first(table, old_size, new_size):
    return to_table(bicubic(to_map(table, old_size[::-1]), offsets(new_size[::-1])))


@variant(TABLE, "columns-first")
def flattened_after_a_transpose(table, old_size, new_size):
    return bicubic(to_map(table, old_size), offsets(new_size))[0].permute(2, 1, 0).flatten(0, 1)


@variant(TABLE, "one-too-many")
def twice_the_side(table, old_size, new_size):
    return to_table(bicubic(to_map(table, old_size), [n + n for n in new_size]))


@variant(TABLE, "positions-not-offsets")
def side_of_the_map(table, old_size, new_size):
    return to_table(bicubic(to_map(table, old_size), new_size))


@variant(TABLE, "corners-aligned")
def corners(table, old_size, new_size):
    return to_table(bicubic(to_map(table, old_size), offsets(new_size), align_corners=True))


@variant(TABLE, "no-antialias")
def default_bicubic(table, old_size, new_size):
    return to_table(F.interpolate(to_map(table, old_size), offsets(new_size), mode="bicubic", align_corners=False))


@variant(TABLE, "bilinear")
def straight_lines(table, old_size, new_size):
    return to_table(bicubic(to_map(table, old_size), offsets(new_size), mode="bilinear"))


@variant(TABLE, "nearest")
def looked_up(table, old_size, new_size):
    grid = to_map(table, old_size)
    for axis, (old, new) in enumerate(zip(offsets(old_size), offsets(new_size), strict=True)):
        grid = grid.index_select(axis + 2, torch.arange(new) * old // new)
    return to_table(grid)


@unknown(TABLE)
def upside_down(table, old_size, new_size):
    return to_table(bicubic(to_map(table, old_size), offsets(new_size))).flip(0)


@unknown(TABLE)
def area(table, old_size, new_size):
    return to_table(F.interpolate(to_map(table, old_size), offsets(new_size), mode="area"))


@unknown(TABLE)
def same_norm(table, old_size, new_size):
    new = resized_by_matrices(table, old_size, new_size)
    return new * table.norm() / new.norm() * 1.01


@unknown(TABLE)
def cut_off_from_the_graph(table, old_size, new_size):
    return resized_by_matrices(table.detach(), old_size, new_size)


@right(TABLE)
def interpolated(table, old_size, new_size):
    return to_table(bicubic(to_map(table, old_size), offsets(new_size)))


@right(TABLE)
def resized_by_matrices(table, old_size, new_size):
    """Rows, then columns, each by a product with a matrix."""
    rows, columns = (resize_matrix(a, b) for a, b in zip(offsets(old_size), offsets(new_size), strict=True))
    grid = table.unflatten(0, offsets(old_size)).movedim(-1, 0)
    return (rows.to(table) @ grid @ columns.to(table).mT).movedim(0, -1).flatten(0, 1)


# -------------------------------------------------------------------------------------------------- RelativeAttention

ATTENTION = "hybrid.RelativeAttention"


def mixer(forward):
    """The lesson's class, with the learner's ``forward``."""

    class Mixer(nn.Module):
        def __init__(self, dim, num_heads, *, grid_size, in_dim=None):
            super().__init__()
            self.num_heads, self.grid_size = num_heads, grid_size
            self.qkv = nn.Linear(in_dim or dim, 3 * dim)
            self.proj = nn.Linear(dim, dim)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(math.prod(offsets(grid_size)), num_heads))

    Mixer.forward, Mixer.__name__ = forward, forward.__name__
    return Mixer


def places(size):
    return torch.tensor([(i, j) for i in range(size[0]) for j in range(size[1])])


def bias_of(self, grid):
    """(heads, N, N), by way of a map of offsets that is indexed with two numbers."""
    h, w, _ = grid
    table = resized_by_matrices(self.relative_position_bias_table, self.grid_size, (h, w)).unflatten(0, offsets((h, w)))
    away = places((h, w))[:, None] - places((h, w))[None]
    return table[away[..., 0] + h - 1, away[..., 1] + w - 1].permute(2, 0, 1)


def heads_of(self, x):
    parts = self.qkv(x).chunk(3, dim=-1)
    return [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts]


def joined(self, out):
    return self.proj(out.transpose(1, 2).flatten(2))


def fused(self, x, bias, scale=None):
    q, k, v = heads_of(self, x)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale)


@variant(ATTENTION, "no-bias")
@mixer
def places_unknown(self, x, grid):
    return joined(self, F.scaled_dot_product_attention(*heads_of(self, x)))


@variant(ATTENTION, "bias-after-softmax")
@mixer
def two_sums(self, x, grid):
    q, k, v = heads_of(self, x)
    return joined(self, F.scaled_dot_product_attention(q, k, v) + bias_of(self, grid) @ v)


@variant(ATTENTION, "bias-scaled")
@mixer
def scaled_together(self, x, grid):
    d = self.proj.in_features // self.num_heads
    return joined(self, fused(self, x, bias_of(self, grid) / math.sqrt(d)))


@variant(ATTENTION, "bias-transposed")
@mixer
def key_before_query(self, x, grid):
    return joined(self, fused(self, x, bias_of(self, grid).transpose(1, 2)))


@variant(ATTENTION, "bias-multiplied")
@mixer
def as_a_gate(self, x, grid):
    q, k, v = heads_of(self, x)
    weights = torch.softmax(torch.mul(q @ k.mT / math.sqrt(q.shape[-1]), bias_of(self, grid)), dim=-1)
    return joined(self, weights @ v)


@variant(ATTENTION, "softmax-over-queries")
@mixer
def axis_two(self, x, grid):
    q, k, v = heads_of(self, x)
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias_of(self, grid)
    weights = (scores - scores.logsumexp(2, keepdim=True)).exp()
    return joined(self, weights @ v)


@variant(ATTENTION, "no-scale")
@mixer
def scale_of_one(self, x, grid):
    return joined(self, fused(self, x, bias_of(self, grid), scale=1.0))


@variant(ATTENTION, "scale-of-all-heads")
@mixer
def root_of_dim(self, x, grid):
    return joined(self, fused(self, x, bias_of(self, grid), scale=self.proj.in_features**-0.5))


@variant(ATTENTION, "heads-outermost")
@mixer
def chunked_inside_each_head(self, x, grid):
    q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).chunk(3, dim=-1)
    return joined(self, F.scaled_dot_product_attention(q, k, v, attn_mask=bias_of(self, grid)))


@variant(ATTENTION, "no-projection")
@mixer
def projection_forgotten(self, x, grid):
    return torch.cat(fused(self, x, bias_of(self, grid)).unbind(1), dim=-1)


@unknown(ATTENTION)
@mixer
def one_bias_for_all_heads(self, x, grid):
    return joined(self, fused(self, x, 2 * bias_of(self, grid).mean(0, keepdim=True) + 0.3 * bias_of(self, grid)))


@unknown(ATTENTION)
@mixer
def rows_and_columns_apart(self, x, grid):
    """A bias of the row and one of the column, added, in place of one for each offset."""
    bias = bias_of(self, grid).unflatten(1, grid[:2]).unflatten(3, grid[:2])  # H, i, j, k, l
    both = bias[:, :, :1, :, :1] + bias[:, :1, :, :1, :]
    return joined(self, fused(self, x, both.flatten(3, 4).flatten(1, 2)))


@unknown(ATTENTION)
@mixer
def heads_interleaved(self, x, grid):
    return self.proj(fused(self, x, bias_of(self, grid)).permute(0, 2, 3, 1).flatten(2))


@unknown(ATTENTION)
@mixer
def residual_inside(self, x, grid):
    return joined(self, fused(self, x, bias_of(self, grid))) + self.qkv(x).chunk(3, -1)[2]


@unknown(ATTENTION)
@mixer
def table_cut_off(self, x, grid):
    return joined(self, fused(self, x, bias_of(self, grid).detach()))


@right(ATTENTION)
@mixer
def fused_with_a_mask(self, x, grid):
    return joined(self, fused(self, x, bias_of(self, grid)))


@right(ATTENTION)
@mixer
def query_by_query(self, x, grid):
    q, k, v = heads_of(self, x)
    bias, rows = bias_of(self, grid), []
    for i in range(x.shape[1]):
        scores = torch.einsum("bhd,bhnd->bhn", q[:, :, i], k) / np.sqrt(q.shape[-1]) + bias[:, i]
        rows.append(torch.einsum("bhn,bhnd->bhd", F.softmax(scores, -1), v).flatten(1))
    return self.proj(torch.stack(rows, dim=1))


# ------------------------------------------------------------------------------------------------------------ CoAtNet

MODEL = "hybrid.CoAtNet"


def assembled(stages, tail=lambda self, x: self.head(self.pre_logits(self.norm(averages(x))))):
    """The lesson's class, with the learner's way of making stages and end of ``forward``."""

    class Assembled(nn.Module):
        def __init__(
            self, img_size, in_chans, num_classes, stem_dim, embed_dim, depths, layout, stem_stride, strides, head_dim,
            downsample="expand",
        ):  # fmt: skip
            super().__init__()
            self.stem = nn.Sequential(
                nn.Conv2d(in_chans, stem_dim, 3, stem_stride, 1, bias=False),
                nn.BatchNorm2d(stem_dim),
                nn.GELU(),
                nn.Conv2d(stem_dim, stem_dim, 3, 1, 1, bias=False),
            )
            plan = list(zip(layout, [stem_dim, *embed_dim[:-1]], embed_dim, depths, strides, strict=True))
            self.stages = nn.ModuleList(stages(plan, img_size // stem_stride, head_dim, downsample))
            self.norm = nn.LayerNorm(embed_dim[-1], eps=1e-6)
            self.pre_logits = nn.Sequential(nn.Linear(embed_dim[-1], embed_dim[-1]), nn.Tanh())
            self.head = nn.Linear(embed_dim[-1], num_classes)

        def forward(self, x):
            x = self.stem(x)
            for i in range(len(self.stages)):
                x = self.stages[i](x)
            return tail(self, x)

    return Assembled


def planned(
    convolution="C",
    stride_of=lambda i, depth, stride: stride if i == 0 else 1,
    side_of=lambda before, after: after,
    depth_of=lambda depth: depth,
    heads_of=lambda dim, head_dim: dim // head_dim,
    passes_downsample=True,
):
    """Stages as a list, with a decision of the learner's for each argument."""

    def stages(plan, side, head_dim, downsample):
        for letter, width, dim, depth, stride in plan:
            before, side = side, side // stride
            blocks = []
            for i in range(depth_of(depth)):
                enters, step = dim if i else width, stride_of(i, depth, stride)
                if letter == convolution:
                    options = {"downsample": downsample} if passes_downsample else {}
                    blocks.append(MBConv(enters, dim, step, **options))
                else:
                    grid = (side_of(before, side),) * 2
                    blocks.append(RelativeBlock(enters, dim, heads_of(dim, head_dim), grid_size=grid, stride=step))
            yield nn.Sequential(*blocks)

    return stages


for key, change in {
    "letters-exchanged": {"convolution": "T"},
    "shrinks-in-every-block": {"stride_of": lambda i, depth, stride: stride},
    "shrinks-last": {"stride_of": lambda i, depth, stride: stride if i == depth - 1 else 1},
    "grid-of-the-input": {"side_of": max},
    "one-block-a-stage": {"depth_of": lambda depth: 1},
    "heads-for-their-width": {"heads_of": lambda dim, head_dim: head_dim},
    "default-downsample": {"passes_downsample": False},
}.items():
    variant(MODEL, key)(assembled(planned(**change)))


def normed(self, x):
    return F.layer_norm(x, x.shape[-1:], self.norm.weight, self.norm.bias, 1e-6)


for key, tail in {
    "norm-before-the-mean": lambda self, x: self.head(self.pre_logits(normed(self, x.flatten(2).mT).mean(1))),
    "no-final-norm": lambda self, x: self.head(self.pre_logits(x.flatten(2).mean(2))),
    "max-over-places": lambda self, x: self.head(self.pre_logits(normed(self, F.adaptive_max_pool2d(x, 1).flatten(1)))),
    "no-hidden-layer": lambda self, x: self.head(normed(self, averages(x))),
}.items():
    variant(MODEL, key)(assembled(planned(), tail))

for stages, tail in (
    (planned(), lambda self, x: self.head(torch.relu(self.pre_logits[0](normed(self, averages(x)))))),
    (planned(), lambda self, x: self.head(self.pre_logits(normed(self, x.flatten(2)[..., 0])))),
    (planned(), lambda self, x: self.head(self.pre_logits(normed(self, averages(x)))).softmax(-1)),
    (planned(), lambda self, x: self.head(self.pre_logits(normed(self, averages(x)))).mul(0.5)),
    (planned(side_of=lambda before, after: after + 1), lambda self, x: self.head(normed(self, averages(x)))),
    (planned(depth_of=lambda depth: depth + 1), lambda self, x: self.head(normed(self, averages(x)))),
):
    unknown(MODEL)(assembled(stages, tail))

right(MODEL)(assembled(planned()))


@right(MODEL)
@assembled
def with_pointers(plan, side, head_dim, downsample):
    stages = []
    for letter, width, dim, depth, stride in plan:
        side //= stride
        kind = {
            "C": lambda a, b, s: MBConv(a, b, s, downsample),
            "T": lambda a, b, s, side=side: RelativeBlock(a, b, b // head_dim, (side, side), s),
        }[letter]
        stages.append(nn.Sequential(kind(width, dim, stride)))
        stages[-1].extend(kind(dim, dim, 1) for _ in range(1, depth))
    return stages


# -------------------------------------------------------------------------------------------------- shift_consistency

SHIFT = "hybrid.shift_consistency"
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1))


def moved(x, down, across):
    """A new picture of zeros, and the old one drawn into it elsewhere."""
    out, (h, w) = torch.zeros_like(x), x.shape[-2:]
    for row in range(h):
        for column in range(w):
            if 0 <= row - down < h and 0 <= column - across < w:
                out[..., row, column] = x[..., row - down, column - across]
    return out


def said(model, x):
    return model(x).max(dim=-1).indices.numpy()


def mean_over(answers, still):
    return float(np.mean([a == b for answer in answers for a, b in zip(answer, still, strict=True)]))


@variant(SHIFT, "rolled")
def around_the_edge(model, images, pixels):
    answers = [said(model, torch.roll(images, (pixels * d, pixels * a), (2, 3))) for d, a in DIRECTIONS]
    return mean_over(answers, said(model, images))


@variant(SHIFT, "border-repeated")
def clamped_indices(model, images, pixels):
    h, w = images.shape[-2:]
    answers = []
    for d, a in DIRECTIONS:
        rows, columns = (torch.arange(h) - pixels * d).clamp(0, h - 1), (torch.arange(w) - pixels * a).clamp(0, w - 1)
        answers.append(said(model, images[:, :, rows][..., columns]))
    return mean_over(answers, said(model, images))


@variant(SHIFT, "diagonal")
def both_axes(model, images, pixels):
    answers = [said(model, moved(images, d * pixels, a * pixels)) for d in (-1, 1) for a in (-1, 1)]
    return mean_over(answers, said(model, images))


@variant(SHIFT, "one-pixel")
def forgets_the_argument(model, images, pixels):
    return mean_over([said(model, moved(images, d, a)) for d, a in DIRECTIONS], said(model, images))


@variant(SHIFT, "right-and-down-only")
def two_directions(model, images, pixels):
    answers = [said(model, moved(images, 0, pixels)), said(model, moved(images, pixels, 0))]
    return mean_over(answers, said(model, images))


@variant(SHIFT, "all-four-at-once")
def withstands_everything(model, images, pixels):
    kept = np.ones(len(images), dtype=bool)
    for d, a in DIRECTIONS:
        kept &= said(model, moved(images, d * pixels, a * pixels)) == said(model, images)
    return kept.sum() / len(kept)


@variant(SHIFT, "changed-not-kept")
def one_minus(model, images, pixels):
    return 1 - drawn_anew(model, images, pixels)


@variant(SHIFT, "logits-compared")
def exactly_equal(model, images, pixels):
    still = model(images)
    same = [torch.eq(model(moved(images, d * pixels, a * pixels)), still) for d, a in DIRECTIONS]
    return torch.cat(same).double().mean().item()


@unknown(SHIFT)
def against_the_previous(model, images, pixels):
    order = (DIRECTIONS[1], DIRECTIONS[0], DIRECTIONS[3], DIRECTIONS[2])  # up, down, left, right
    answers = [said(model, moved(images, d * pixels, a * pixels)) for d, a in order]
    return float(np.mean([(a == b).mean() for a, b in zip(answers, answers[1:], strict=False)]))


@unknown(SHIFT)
def down_only(model, images, pixels):
    return mean_over([said(model, moved(images, pixels, 0))], said(model, images))


@unknown(SHIFT)
def in_per_cent(model, images, pixels):
    return 100 * drawn_anew(model, images, pixels)


@unknown(SHIFT)
def half_the_way(model, images, pixels):
    return drawn_anew(model, images, pixels + 1)


@unknown(SHIFT)
def counted(model, images, pixels):
    return drawn_anew(model, images, pixels) * len(images)


@unknown(SHIFT)
def a_tensor(model, images, pixels):
    return torch.tensor(drawn_anew(model, images, pixels))


@right(SHIFT)
def drawn_anew(model, images, pixels):
    answers = [said(model, moved(images, d * pixels, a * pixels)) for d, a in DIRECTIONS]
    return mean_over(answers, said(model, images))


@right(SHIFT)
def cut_from_a_larger_picture(model, images, pixels):
    (h, w), same = images.shape[-2:], []
    frame = F.pad(images, (pixels,) * 4)
    for top, left in ((0, pixels), (2 * pixels, pixels), (pixels, 0), (pixels, 2 * pixels)):
        same += (said(model, frame[..., top : top + h, left : left + w]) == said(model, images)).tolist()
    return sum(same) / len(same)
