"""Is time used at all? What a model of clips says when their frames are shuffled, reversed or frozen.

Many clips tell their class by one frame (Huang et al. 2018, "What Makes a Video a Video", and Lei et al. 2023,
"Revealing Single Frame Bias for Video-and-Language Learning"): a model that is right of them has not shown that it sees
motion.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from vitcourse.devices import device_of
from vitcourse.inference import evaluating
from vitcourse.train.augment import uniform

_SHUFFLES = 103  # among the random numbers that come of a seed and of a clip's number


def shuffle_frames(clips: Tensor, seed: int = 0, index: Tensor | None = None) -> Tensor:
    """The frames of each clip (B, C, T, H, W) in an order of its own: the same pictures, another motion.

    No clip of several frames stays as it is: the order in which they came is exchanged for one a frame later.

    Args:
        clips: (B, C, T, H, W).
        seed: another one, other orders.
        index: (B,), the clips' numbers in their data set, on which their orders depend beside the seed; 0 to B − 1
            where None.

    Raises:
        ValueError: not five axes.

    >>> clip = torch.arange(5.0).view(1, 1, 5, 1, 1)
    >>> shuffle_frames(clip, seed=1).flatten().sort().values.equal(clip.flatten())
    True
    """
    _check(clips)
    count, frames = len(clips), clips.shape[2]
    index = torch.arange(count) if index is None else index.cpu()
    order = uniform(frames, seed, index, _SHUFFLES).argsort(dim=1, stable=True)  # (B, T)
    unchanged = (order == torch.arange(frames)).all(1, keepdim=True)
    order = torch.where(unchanged, order.roll(-1, dims=1), order).to(clips.device)
    return clips[torch.arange(count, device=clips.device)[:, None], :, order].transpose(1, 2)


def reverse_frames(clips: Tensor) -> Tensor:
    """Clips (B, C, T, H, W) backwards.

    Raises:
        ValueError: not five axes.

    >>> reverse_frames(torch.arange(3).view(1, 1, 3, 1, 1)).flatten().tolist()
    [2, 1, 0]
    """
    _check(clips)
    return clips.flip(2)


def freeze_frames(clips: Tensor, frame: int | None = None) -> Tensor:
    """Clips (B, C, T, H, W) that show one of their frames all the time, the middle one where ``frame`` is None.

    Raises:
        ValueError: not five axes, or a frame that the clips do not have.

    >>> freeze_frames(torch.arange(4).view(1, 1, 4, 1, 1)).flatten().tolist()
    [2, 2, 2, 2]
    """
    _check(clips)
    frames = clips.shape[2]
    frame = frames // 2 if frame is None else frame
    if not -frames <= frame < frames:
        raise ValueError(f"frame {frame} does not exist; the clips have {frames}")
    return clips[:, :, frame].unsqueeze(2).expand_as(clips).contiguous()


def _check(clips: Tensor) -> None:
    if clips.ndim != 5:
        raise ValueError(f"clips must be (B, C, T, H, W), got shape {tuple(clips.shape)}")


def single_frame_bias(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    seed: int = 0,
    after_reversal: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Accuracy on clips as they are, and with their frames shuffled, reversed and frozen.

    A model that is as good on frozen clips has learnt what a single frame shows; one that is as good on shuffled clips
    sees which frames there are, and not in which order. Where the class is the direction of a motion, a model that
    sees time calls a reversed clip by the opposite class.

    Args:
        model: clips (B, C, T, H, W) to logits (B, K).
        batches: pairs of clips, ready for the model, and their classes (B,).
        seed: for the shuffled frames; the order in a clip does not depend on how many a batch holds.
        after_reversal: classes (B,) to those that the clips have when they run backwards; where None, the same.

    Returns:
        ``as_they_are``, ``shuffled``, ``reversed`` and ``frozen``, each in [0, 1], and ``follows_reversal``: the share
        of reversed clips that are called by what they show then, NaN where ``after_reversal`` is None.

    Raises:
        ValueError: no batch; clips and classes of different number.

    >>> class Rises(nn.Module):  # is the last frame brighter than the first?
    ...     def forward(self, x):
    ...         return torch.stack([x[:, 0, 0, 0, 0], x[:, 0, -1, 0, 0]], dim=1)
    >>> rising = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(2, -1, -1, 2, 2)
    >>> found = single_frame_bias(Rises(), [(rising, torch.ones(2, dtype=torch.long))], after_reversal=lambda y: 1 - y)
    >>> found["as_they_are"], found["reversed"], found["frozen"], found["follows_reversal"]
    (1.0, 0.0, 0.0, 1.0)
    """
    right: dict[str, int] = {}
    count, device = 0, device_of(model)
    with evaluating(model), torch.inference_mode():
        for clips, labels in batches:
            if len(clips) != len(labels):
                raise ValueError(f"a batch has {len(clips)} clips and {len(labels)} classes; give one for each clip")
            clips, labels = clips.to(device or clips.device), labels.to(device or clips.device)
            for name, said in _answers(model, clips, seed, torch.arange(count, count + len(clips))).items():
                right[name] = right.get(name, 0) + int((said == labels).sum())
                if name == "reversed" and after_reversal is not None:
                    follows = int((said == after_reversal(labels)).sum())
                    right["follows_reversal"] = right.get("follows_reversal", 0) + follows
            count += len(clips)
    if not count:
        raise ValueError("batches is empty; give at least one pair of clips and classes")
    return {"follows_reversal": float("nan"), **{name: n / count for name, n in right.items()}}


def _answers(model: nn.Module, clips: Tensor, seed: int, index: Tensor) -> dict[str, Tensor]:
    """The classes (B,) that a model gives to each view of the clips."""
    views = {
        "as_they_are": clips,
        "shuffled": shuffle_frames(clips, seed, index),
        "reversed": reverse_frames(clips),
        "frozen": freeze_frames(clips),
    }
    return {name: model(view).argmax(1) for name, view in views.items()}
