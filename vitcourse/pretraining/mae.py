"""Masked autoencoders (He et al. 2022): hide three quarters of the patches, and paint them from the rest."""

from typing import NamedTuple

import torch
from einops import repeat
from torch import Tensor, nn

from vitcourse.layers import widened
from vitcourse.notices import say_once
from vitcourse.train.augment import uniform
from vitcourse.train.task import Part
from vitcourse.vit import Block, VisionTransformer, image_to_patch, patch_to_image, sincos_2d
from vitcourse.weights import unwrap

from .objective import Pretrainer, PreTraining, check_plain_vit, patch_tokens
from .options import MaeOptions


class Shuffle(NamedTuple):
    """Which patches of each image are seen.

    Attributes:
        keep: (B, V), the numbers of the patches that are seen, in the order in which the encoder gets them.
        restore: (B, N), where each patch is in the shuffled order, in which those that are seen come first.
        mask: (B, N), True where a patch is hidden.
    """

    keep: Tensor
    restore: Tensor
    mask: Tensor


def random_masking(noise: Tensor, visible: int) -> Shuffle:
    """Keep the ``visible`` patches with the least ``noise`` (B, N) of each image (appendix A.1, "shuffle").

    >>> shuffle = random_masking(torch.tensor([[0.3, 0.1, 0.9, 0.2]]), visible=2)
    >>> shuffle.keep.tolist(), shuffle.mask.tolist()
    ([[1, 3]], [[True, False, True, False]])
    """
    order = noise.argsort(dim=1, stable=True)
    restore = order.argsort(dim=1)
    return Shuffle(order[:, :visible], restore, restore >= visible)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens (B, N, D) that ``index`` (B, V) names: (B, V, D)."""
    return tokens.gather(1, repeat(index, "b v -> b v d", d=tokens.shape[2]))


def patch_targets(images: Tensor, patch_size: int | tuple[int, int], norm_pix: bool = True) -> Tensor:
    """What is to be predicted of each patch: its pixels (B, N, p · p · C), by default normalised within the patch.

    The variance is the unbiased one, and 1e-6 is added to it, as in the authors' code (section 3, "Reconstruction
    target"). A patch of one colour has targets of 0.
    """
    target = widened(image_to_patch(images, patch_size))
    if not norm_pix:
        return target
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    return (target - mean) / (var + 1e-6).sqrt()


def masked_error(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error (B,) of each image over the patches (B, N, P) where ``mask`` (B, N) is True."""
    error = (widened(pred) - target).square().mean(-1)
    return (error * mask).sum(1) / mask.sum(1)


class Decoder(nn.Module):
    """A small ViT that sees the encoder's tokens and, for each hidden patch, one learnt token with its position.

    Args:
        in_dim: width of the encoder's tokens.
        out_dim: numbers to predict for each patch.
        grid_size: rows and columns of patches.
        num_prefix_tokens: the encoder's tokens before the patches.
        embed_dim, depth, num_heads: of the decoder.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        grid_size: tuple[int, int],
        num_prefix_tokens: int = 1,
        embed_dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.embed = nn.Linear(in_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        prefix = torch.zeros(num_prefix_tokens, embed_dim)
        positions = torch.cat([prefix, sincos_2d(*grid_size, embed_dim)])[None]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, out_dim)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):  # as the authors' code has it
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, restore: Tensor) -> Tensor:
        """Tokens of what was seen (B, prefix + V, D) to predictions for all patches (B, N, out_dim)."""
        x = self.embed(x)
        prefix, seen = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        hidden = self.mask_token.to(x.dtype).expand(len(x), restore.shape[1] - seen.shape[1], -1)
        patches = take(torch.cat([seen, hidden], dim=1), restore)  # each in its place again
        x = torch.cat([prefix, patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, self.num_prefix_tokens :])


class MaskedAutoencoder(Pretrainer):
    """An encoder that sees some of the patches only, really fewer, and a light decoder that predicts the others.

    Args:
        encoder: a :class:`vitcourse.VisionTransformer` without a head.
        mask_ratio: share of the patches that are hidden; int(N · (1 - mask_ratio)) are seen, as the authors round.
        norm_pix: see :func:`patch_targets`.
        decoder_dim, decoder_depth, decoder_heads: of the decoder.

    Raises:
        ValueError: an encoder that is no plain ViT; a mask ratio that leaves no patch to see, or none to predict;
            ``norm_pix`` of patches of one number; in ``forward``, images of another size than the encoder is for.

    >>> encoder = VisionTransformer(img_size=28, patch_size=7, in_chans=1, num_classes=0, embed_dim=64, num_heads=4)
    >>> model = MaskedAutoencoder(encoder, decoder_dim=32, decoder_depth=1, decoder_heads=4)
    >>> pred, mask = model(torch.zeros(3, 1, 28, 28), torch.rand(3, 16))
    >>> pred.shape, mask.sum(1).tolist()
    (torch.Size([3, 16, 49]), [12, 12, 12])
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        mask_ratio: float = 0.75,
        norm_pix: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ) -> None:
        super().__init__(encoder)
        check_plain_vit(encoder, "a masked autoencoder")
        h, w = encoder.grid_size
        self.num_patches, self.norm_pix = h * w, norm_pix
        self.visible = int(self.num_patches * (1 - mask_ratio))
        if not 0 < self.visible < self.num_patches:
            what = "see" if self.visible <= 0 else "predict"
            raise ValueError(
                f"mask_ratio {mask_ratio} leaves none of {self.num_patches} patches to {what}; use 0.75 as the paper "
                "has it, or a smaller patch_size"
            )
        p, q = encoder.patch_size
        if norm_pix and p * q * encoder.in_chans == 1:
            raise ValueError(
                "norm_pix normalises within a patch, and patches of one number have no variance; use False"
            )
        self.decoder = Decoder(
            *(encoder.embed_dim, p * q * encoder.in_chans, encoder.grid_size, encoder.num_prefix_tokens),
            *(decoder_dim, decoder_depth, decoder_heads),
        )

    def encode(self, images: Tensor, keep: Tensor) -> Tensor:
        """Tokens (B, prefix + V, D) of the patches that ``keep`` (B, V) names; no other enters a block."""
        encoder, prefix = self.encoder, self.encoder.num_prefix_tokens
        x, _ = encoder.embed(images)
        x = torch.cat([x[:, :prefix], take(x[:, prefix:], keep)], dim=1)
        return patch_tokens(encoder, encoder.forward_tokens(x, None))

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions (B, N, p · p · C) for all patches, and the mask (B, N), True where a patch was hidden.

        Args:
            images: (B, C, H, W), of the encoder's ``img_size``.
            noise: (B, N); the patches with the least are seen.
        """
        if tuple(images.shape[-2:]) != tuple(self.encoder.img_size):
            raise ValueError(
                f"images are {tuple(images.shape[-2:])}, and the encoder's img_size is {tuple(self.encoder.img_size)}; "
                "build the encoder with img_size of the images"
            )
        shuffle = random_masking(noise, self.visible)
        return self.decoder(self.encode(images, shuffle.keep), shuffle.restore), shuffle.mask

    def targets(self, images: Tensor) -> Tensor:
        return patch_targets(images, self.encoder.patch_size, self.norm_pix)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) with the hidden patches painted in, and the mask (B, 1, H, W), True where they are.

        Pixels that were normalised within their patch get its true mean and variance back, which the model has not
        predicted.
        """
        pred, mask = self(images, noise)
        patches = image_to_patch(images, self.encoder.patch_size)
        if self.norm_pix:
            pred = pred * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
        painted = torch.where(mask[..., None], pred.to(patches), patches)
        p, q = self.encoder.patch_size
        shown = repeat(mask, "b n -> b n (p q)", p=p, q=q)
        grid = self.encoder.grid_size
        return patch_to_image(painted, (p, q), grid), patch_to_image(shown, (p, q), grid)


class MaskedAutoencoding(PreTraining):
    """The task of a :class:`MaskedAutoencoder`: the error of hidden patches, a mean over them and over the images."""

    name = "mae"
    augments = ("crop_padding", "hflip", "randaugment")

    def __init__(self, options: MaeOptions | None = None) -> None:
        super().__init__(options or MaeOptions())

    def setup(self, model, train_set, config, device) -> None:
        self.num_patches = model.num_patches
        super().setup(model, train_set, config, device)
        # Whoever predicts the mean of all targets, which is 0 where each patch is normalised, has the variance left.
        targets = model.targets(self.probe.views[0])
        self.chance_level = (targets - (0 if model.norm_pix else targets.mean())).square().mean().item()

    def inputs(self, images: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        noise = uniform(self.num_patches, self.config.seed, part.epoch, part.index, _NOISE)
        return self.cropped(images, part), noise.to(images.device)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        images, noise = batch
        pred, mask = model(images, noise)
        return masked_error(pred, unwrap(model).targets(images), mask).sum(), len(images)

    def chance(self) -> float:
        return self.chance_level


_NOISE = 101  # the "view" that masks are drawn as; no view of an image has this number


def make(encoder: VisionTransformer, options: MaeOptions) -> tuple[MaskedAutoencoder, MaskedAutoencoding]:
    model = MaskedAutoencoder(
        encoder,
        options.mask_ratio,
        options.norm_pix,
        options.decoder_dim,
        options.decoder_depth,
        options.decoder_heads,
    )
    encoding, decoding = (sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder))
    if decoding > encoding:  # the defaults are those of a ViT-B, whose decoder is a third of it
        say_once(
            f"the decoder has {decoding:,d} parameters, the encoder {encoding:,d}; decoder_dim, decoder_depth and "
            "decoder_heads make it lighter"
        )
    return model, MaskedAutoencoding(options)
