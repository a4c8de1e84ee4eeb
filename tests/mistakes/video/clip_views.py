"""Answers to `video.clip_views`."""

import torch
from einops import repeat

from mistakes import collect

VARIANTS, UNKNOWN, RIGHT, variant, unknown, right = collect("video.clip_views")


def by_gather(clips, order):
    index = order[:, None, :, None, None].expand(-1, clips.shape[1], -1, *clips.shape[3:])
    return clips.gather(2, index)


def backwards(clips):
    return clips[:, :, torch.arange(clips.shape[2] - 1, -1, -1)]


def still(clips):
    t = clips.shape[2]
    return repeat(clips[:, :, t // 2], "b c h w -> b c t h w", t=t)


def answer(clips, order, **other):
    return {"shuffled": by_gather(clips, order), "reversed": backwards(clips), "frozen": still(clips)} | other


@variant("one-order-for-all")
def first_row(clips, order):
    return answer(clips, order, shuffled=by_gather(clips, order[:1].expand_as(order)))


@variant("inverse-order")
def scattered(clips, order):
    index = order[:, None, :, None, None].expand_as(clips)
    return answer(clips, order, shuffled=torch.zeros_like(clips).scatter(2, index, clips))


@variant("frames-in-front")
def untransposed(clips, order):
    return answer(clips, order, shuffled=by_gather(clips, order).movedim(2, 1))


@variant("not-shuffled")
def as_it_was(clips, order):
    return answer(clips, order, shuffled=clips.clone())


@variant("mirrored")
def mirror(clips, order):
    return answer(clips, order, reversed=clips[..., torch.arange(clips.shape[-1] - 1, -1, -1)])


@variant("clips-reversed")
def last_clip_first(clips, order):
    return answer(clips, order, reversed=torch.stack(list(clips)[::-1]))


@variant("channels-reversed")
def blue_for_red(clips, order):
    return answer(clips, order, reversed=torch.stack(list(clips.unbind(1))[::-1], dim=1))


@variant("first-frame")
def begins_frozen(clips, order):
    return answer(clips, order, frozen=repeat(clips[:, :, 0], "b c h w -> b c t h w", t=clips.shape[2]))


@variant("before-the-middle")
def lower_middle(clips, order):
    t = clips.shape[2]
    return answer(clips, order, frozen=clips.select(2, -(-t // 2) - 1)[:, :, None].repeat(1, 1, t, 1, 1))


@variant("mean-frame")
def blurred(clips, order):
    t = clips.shape[2]
    return answer(clips, order, frozen=repeat(clips.sum(2) / t, "b c h w -> b c t h w", t=t))


@variant("one-frame")
def short(clips, order):
    return answer(clips, order, frozen=clips[:, :, [clips.shape[2] // 2]])


@variant("chained")
def one_after_the_other(clips, order):
    clips = by_gather(clips, order)
    return {"shuffled": clips, "reversed": backwards(clips), "frozen": still(clips)}


@variant("chained")
def overwritten(clips, order):
    for number, row in enumerate(order):
        clips[number] = clips[number][:, row]
    return {"shuffled": clips, "reversed": backwards(clips), "frozen": still(clips)}


@unknown
def last_frozen(clips, order):
    return answer(clips, order, frozen=clips[:, :, -1:].expand_as(clips))


@unknown
def turned(clips, order):
    return answer(clips, order, reversed=clips.flip(2, 3))


@unknown
def rolled(clips, order):
    return answer(clips, order, shuffled=by_gather(clips, order.roll(1, 1)))


@unknown
def orders_exchanged(clips, order):
    return answer(clips, order, shuffled=by_gather(clips, order.flip(0)))


@right
def gathered(clips, order):
    return answer(clips, order)


@right
def clip_by_clip(clips, order):
    rows = zip(clips, order.tolist(), strict=True)
    shuffled = torch.stack([torch.stack([clip[:, k] for k in row], dim=1) for clip, row in rows])
    frames = list(clips.unbind(2))
    middle = frames[len(frames) // 2]
    return {
        "frozen": torch.stack([middle] * len(frames), dim=2),
        "reversed": torch.stack(frames[::-1], dim=2),
        "shuffled": shuffled,
    }


@right
def by_index_select(clips, order):
    rows = [clip.index_select(1, row) for clip, row in zip(clips, order, strict=True)]
    t = clips.shape[2]
    return {
        "shuffled": torch.stack(rows),
        "reversed": torch.flip(clips, (2,)),
        "frozen": clips.index_select(2, torch.full((t,), t // 2)),
    }


@right
def frames_first(clips, order):
    by_frame = clips.transpose(1, 2)  # (B, T, C, H, W)
    number = torch.arange(len(clips)).unsqueeze(1).expand_as(order)
    half = by_frame.shape[1] // 2
    views = {"shuffled": by_frame[number, order], "reversed": by_frame.flip(1)}
    views["frozen"] = by_frame[:, half : half + 1].expand_as(by_frame)
    return {name: view.transpose(1, 2) for name, view in views.items()}
