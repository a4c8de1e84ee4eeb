"""Pictures as words: a VQ-VAE (van den Oord et al. 2017) that makes of each patch one of a few hundred codes.

BEiT took the tokenizer of DALL-E; here it is trained on the same images as everything else.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vitcourse.layers import check_images, to_pair
from vitcourse.registry import Preprocess, register_model
from vitcourse.vit.patches import check_divisible
from vitcourse.vit.positions import full_precision


def nearest_code(z: Tensor, codes: Tensor) -> Tensor:
    """The number of the nearest of ``codes`` (K, D) for each of z (…, D).

    >>> nearest_code(torch.tensor([[0.1], [2.0]]), torch.tensor([[0.0], [1.0]])).tolist()
    [0, 1]
    """
    flat = z.detach().reshape(-1, z.shape[-1]).to(codes.dtype)
    with full_precision(codes.device.type):  # a rounded product would have other codes win
        distances = codes.square().sum(1) - 2 * flat @ codes.t()  # but for |z|², which is the same for all codes
    return distances.argmin(1).view(z.shape[:-1])


def straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """``quantized`` on the way forward, and the gradient handed on to ``z`` as if nothing had been rounded (eq. 3).

    >>> z = torch.tensor([0.3], requires_grad=True)
    >>> y = straight_through(z, torch.tensor([1.0]))
    >>> (2 * y).backward()
    >>> y.item(), z.grad.item()
    (1.0, 2.0)
    """
    return z + (quantized - z).detach()


class Codebook(nn.Module):
    """Codes (K, D) that are running means of what is assigned to them (van den Oord et al. 2017, appendix A.1).

    Buffers, not parameters: they move by :meth:`update`, not by gradients. A code to which nothing has been assigned
    for ``revive_after`` steps is dead: no gradient and no mean would ever move it again. It is put where some vector
    of the batch is. All codes begin dead, so the first batch places them, unless codes are never revived.

    Args:
        vocab_size: codes K.
        dim: width D.
        decay: memory γ of the running means.
        revive_after: steps; 0 for never.
    """

    def __init__(self, vocab_size: int, dim: int, decay: float = 0.99, revive_after: int = 100) -> None:
        super().__init__()
        self.decay, self.revive_after = decay, revive_after
        self.register_buffer("codes", torch.randn(vocab_size, dim))
        self.register_buffer("counts", torch.zeros(vocab_size))
        self.register_buffer("sums", torch.zeros(vocab_size, dim))
        self.register_buffer("idle", torch.full((vocab_size,), max(revive_after, 1)))  # steps without any vector

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor, candidates: Tensor, generator: torch.Generator) -> int:
        """Move the codes to where the vectors of a step were, and revive dead ones. Returns how many.

        Args:
            counts: (K,), vectors that were assigned to each code.
            sums: (K, D), their sums.
            candidates: (M, D), vectors of the step.
            generator: on the CPU; says where dead codes are put.
        """
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        used = self.counts > 1e-6
        self.codes.copy_(torch.where(used[:, None], self.sums / self.counts.clamp(min=1e-6)[:, None], self.codes))
        self.idle.copy_(torch.where(counts > 0, 0, self.idle + 1))
        dead = (self.idle > self.revive_after).nonzero()[:, 0] if self.revive_after else self.idle.new_empty(0)
        if len(dead):
            chosen = torch.randint(len(candidates), (len(dead),), generator=generator)
            fresh = candidates[chosen.to(candidates.device)].to(self.codes)
            self.codes[dead], self.sums[dead], self.counts[dead], self.idle[dead] = fresh, fresh, 1.0, 0
        return len(dead)


class ResidualBlock(nn.Module):
    """x + conv(gelu(conv(gelu(norm(x))))) on maps (B, D, h, w)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, dim)
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.conv1(F.gelu(self.norm(x)))))


class VQTokenizer(nn.Module):
    """Images (B, C, H, W) to code numbers (B, h · w), one for each patch, and back.

    Args:
        patch_size: side of a patch in pixels, or (height, width): that of the ViT which is to predict the codes.
        in_chans: channels of the image.
        vocab_size, code_dim: codes, and their width.
        embed_dim, depth: width and residual blocks of the convolutional encoder, and of the decoder.
        decay, revive_after: see :class:`Codebook`.

    Raises:
        ValueError: images that the patch size does not divide.

    >>> tokenizer = VQTokenizer(patch_size=4, in_chans=1, vocab_size=16, code_dim=8, embed_dim=8, depth=1)
    >>> tokenizer.tokenize(torch.rand(2, 1, 12, 8)).shape
    torch.Size([2, 6])
    """

    num_classes: ClassVar[int] = 0

    def __init__(
        self,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        vocab_size: int = 8192,
        code_dim: int = 32,
        embed_dim: int = 256,
        depth: int = 2,
        decay: float = 0.99,
        revive_after: int = 100,
    ) -> None:
        super().__init__()
        self.patch_size, self.in_chans, self.vocab_size = to_pair(patch_size, "patch_size"), in_chans, vocab_size
        blocks = [[ResidualBlock(embed_dim) for _ in range(depth)] for _ in range(2)]
        self.encoder = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size),
            *blocks[0],
            nn.Conv2d(embed_dim, code_dim, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(code_dim, embed_dim, 1),
            *blocks[1],
            nn.ConvTranspose2d(embed_dim, in_chans, self.patch_size, self.patch_size),
        )
        self.codebook = Codebook(vocab_size, code_dim, decay, revive_after)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to vectors (B, h, w, code_dim), not yet rounded to codes."""
        check_images(images, self.in_chans)
        check_divisible(images.shape[-2:], self.patch_size)
        return rearrange(self.encoder(images), "b d h w -> b h w d")

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to the numbers (B, h · w) of their codes, in reading order."""
        return nearest_code(self.encode(images), self.codebook.codes).flatten(1)

    def decode(self, vectors: Tensor) -> Tensor:
        """Vectors (B, h, w, code_dim), such as ``codebook.codes[ids]``, to images (B, C, H, W)."""
        return self.decoder(rearrange(vectors, "b h w d -> b d h w"))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The reconstruction (B, C, H, W), the vectors (B, h, w, code_dim), and their codes' numbers (B, h, w)."""
        z = self.encode(images)
        ids = nearest_code(z, self.codebook.codes)
        return self.decode(straight_through(z, self.codebook.codes[ids].to(z.dtype))), z, ids


register_model("vq_tokenizer", VQTokenizer, Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3))
