"""Masked autoencoders of clips (Tong et al. 2022, "VideoMAE"): hide the same patches in all frames, nine in ten.

A patch that moves little is seen in the next frame: what is hidden in one frame alone could be copied. The rest is
:mod:`vitcourse.pretraining.mae`'s.
"""

import torch
from einops import repeat
from torch import Tensor

from vitcourse.layers import widened
from vitcourse.pretraining.mae import Decoder, Shuffle, random_masking, take
from vitcourse.pretraining.objective import Pretrainer
from vitcourse.video.positions import sincos_3d
from vitcourse.video.timesformer import TimeSformer
from vitcourse.video.tubelets import clip_to_tubelets, tubelets_to_clip


def tube_masking(noise: Tensor, visible: int, moments: int) -> Shuffle:
    """Keep the ``visible`` places with the least ``noise`` (B, h · w) of each clip, in all moments (sec. 3.3, "tubes").

    Args:
        noise: (B, N), a number for each place in a frame.
        visible: places V that are seen.
        moments: moments t of a clip, frames over ``tubelet_size``.

    Returns:
        what :func:`vitcourse.pretraining.random_masking` gives, of t · N tubelets by time: ``keep`` (B, t · V),
        ``restore`` and ``mask`` (B, t · N).

    >>> shuffle = tube_masking(torch.tensor([[0.3, 0.1, 0.9]]), visible=1, moments=2)
    >>> shuffle.keep.tolist(), shuffle.mask.int().tolist(), shuffle.restore.tolist()
    ([[1, 4]], [[1, 0, 1, 1, 0, 1]], [[2, 0, 3, 4, 1, 5]])
    """
    places, count = random_masking(noise, visible), noise.shape[1]
    moment = torch.arange(moments, device=noise.device)[:, None]
    keep = (places.keep[:, None] + count * moment).flatten(1)
    # In the shuffled order all that is seen comes first, moment by moment, and then all that is hidden.
    rank, hidden = places.restore[:, None], count - visible
    restore = torch.where(
        rank < visible, moment * visible + rank, moments * visible + moment * hidden + rank - visible
    ).flatten(1)
    return Shuffle(keep, restore, places.mask.repeat(1, moments))


def tubelet_targets(
    clips: Tensor, tubelet_size: int, patch_size: int | tuple[int, int], norm_pix: bool = True
) -> Tensor:
    """What is to be predicted of each tubelet: its pixels (B, N, s · p · p · C), by default normalised within it.

    Each channel is normalised by itself, its deviation is the unbiased one, and 1e-6 is added to that, as in the
    authors' code. MAE takes all channels of a patch together.

    >>> tubelet_targets(torch.rand(2, 3, 4, 16, 16), 2, 8).shape
    torch.Size([2, 8, 384])
    """
    target = widened(clip_to_tubelets(clips, tubelet_size, patch_size))
    if not norm_pix:
        return target
    mean, std = _moments_of(target, clips.shape[1])
    pixels = target.unflatten(2, (-1, clips.shape[1]))
    return ((pixels - mean) / std).flatten(2)


def _moments_of(tubelets: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation (B, N, 1, C) of each channel of each tubelet (B, N, s · p · p · C)."""
    pixels = tubelets.unflatten(2, (-1, channels))
    return pixels.mean(2, keepdim=True), pixels.var(2, keepdim=True).sqrt() + 1e-6


class VideoMaskedAutoencoder(Pretrainer):
    """An encoder that sees a tenth of the tubelets, and a light decoder that predicts the others (sec. 3.2, fig. 2).

    The loss is :func:`vitcourse.pretraining.mae.masked_error` of what ``forward`` returns, to ``targets``. VideoMAE's
    encoder has no [CLS] token and fixed positions; this is a TimeSformer with joint attention, which has both learnt,
    as MAE's encoder has [CLS].

    Args:
        encoder: a :class:`vitcourse.video.TimeSformer` with joint attention and without a head.
        mask_ratio: share of the places that are hidden; int(N · mask_ratio) of a frame's, as the authors round.
        norm_pix: see :func:`tubelet_targets`.
        decoder_dim, decoder_depth, decoder_heads: of the decoder.

    Raises:
        ValueError: another encoder; a mask ratio that leaves no place to see, or none to predict; in ``forward``, clips
            of another size than the encoder is for.

    >>> small = dict(embed_dim=48, depth=1, num_heads=4, num_classes=0, attention_type="joint")
    >>> encoder = TimeSformer(32, patch_size=8, num_frames=4, tubelet_size=2, **small)
    >>> model = VideoMaskedAutoencoder(encoder, decoder_dim=32, decoder_depth=1, decoder_heads=4)
    >>> pred, mask = model(torch.zeros(3, 3, 4, 32, 32), torch.rand(3, 16))
    >>> pred.shape, mask.sum(1).tolist()  # of 16 places two are seen, in both moments
    (torch.Size([3, 32, 384]), [28, 28, 28])
    """

    def __init__(
        self,
        encoder: TimeSformer,
        mask_ratio: float = 0.9,
        norm_pix: bool = True,
        decoder_dim: int = 384,
        decoder_depth: int = 4,
        decoder_heads: int = 6,
    ) -> None:
        super().__init__(encoder)
        if getattr(encoder, "attention_type", None) != "joint":
            raise ValueError(
                f"encoder is a {type(encoder).__name__}, and a masked autoencoder leaves tubelets out, which joint "
                "attention alone can bear; use a TimeSformer with attention_type='joint'"
            )
        self.grid = (encoder.num_frames // encoder.tubelet_size, *encoder.grid_size)
        self.num_places, self.norm_pix = encoder.grid_size[0] * encoder.grid_size[1], norm_pix
        self.visible = self.num_places - int(self.num_places * mask_ratio)
        if not 0 < self.visible < self.num_places:
            what = "see" if self.visible <= 0 else "predict"
            raise ValueError(
                f"mask_ratio {mask_ratio} leaves none of {self.num_places} places to {what}; use 0.9 as the paper has "
                "it, or a smaller patch_size"
            )
        t, h, w = self.grid
        p, q = encoder.patch_size
        out_dim = encoder.tubelet_size * p * q * encoder.in_chans
        sizes = (decoder_dim, decoder_depth, decoder_heads)
        self.decoder = Decoder(encoder.embed_dim, out_dim, (t * h, w), 1, *sizes)
        with torch.no_grad():
            self.decoder.pos_embed[:, 1:] = sincos_3d(t, h, w, decoder_dim)

    def encode(self, clips: Tensor, keep: Tensor) -> Tensor:
        """Tokens (B, 1 + V, D) of the tubelets that ``keep`` (B, V) names; no other enters a block."""
        x, _ = self.encoder.tokens(clips)
        x = torch.cat([x[:, :1], take(x[:, 1:], keep)], dim=1)
        return self.encoder.fc_norm(self.encoder.norm(self.encoder.forward_tokens(x, None)))

    def forward(self, clips: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions (B, t · N, s · p · p · C) for all tubelets, and the mask (B, t · N), True where one was hidden.

        Args:
            clips: (B, C, T, H, W), of the encoder's ``num_frames`` and ``img_size``.
            noise: (B, N); the places with the least are seen, in all frames.
        """
        wanted = (self.encoder.num_frames, *self.encoder.img_size)
        if tuple(clips.shape[2:]) != wanted:
            raise ValueError(
                f"clips are {tuple(clips.shape[2:])}, and the encoder is for (num_frames, *img_size) = {wanted}; build "
                "it with those of the clips"
            )
        shuffle = tube_masking(noise, self.visible, self.grid[0])
        return self.decoder(self.encode(clips, shuffle.keep), shuffle.restore), shuffle.mask

    def targets(self, clips: Tensor) -> Tensor:
        return tubelet_targets(clips, self.encoder.tubelet_size, self.encoder.patch_size, self.norm_pix)

    @torch.no_grad()
    def reconstruct(self, clips: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Clips (B, C, T, H, W) with the hidden tubelets painted in, and the mask (B, 1, T, H, W), True where they are.

        Pixels that were normalised within their tubelet get its true mean and deviation back, which the model has not
        predicted.
        """
        pred, mask = self(clips, noise)
        size = (self.encoder.tubelet_size, self.encoder.patch_size)
        tubelets = clip_to_tubelets(clips, *size)
        if self.norm_pix:
            mean, std = _moments_of(tubelets, clips.shape[1])
            pred = (pred.unflatten(2, (-1, clips.shape[1])) * std + mean).flatten(2)
        painted = torch.where(mask[..., None], pred.to(tubelets), tubelets)
        shown = repeat(mask, "b n -> b n p", p=tubelets.shape[2] // clips.shape[1])
        return tubelets_to_clip(painted, *size, self.grid), tubelets_to_clip(shown, *size, self.grid)
