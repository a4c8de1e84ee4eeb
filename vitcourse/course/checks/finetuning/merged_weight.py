"""The check of `finetuning.merged_weight`, and its reference: the library's layer merges itself."""

from collections.abc import Mapping

from torch import Tensor

from vitcourse.course.checks import call, check


def merged_weight(
    weight: Tensor,
    lora_A: Mapping[str, Tensor],
    lora_B: Mapping[str, Tensor],
    slices: Mapping[str, tuple[int, int]],
    scale: float,
) -> Tensor:
    """W (out, in) with scale · B A added to the rows of each slice, as a new tensor.

    >>> import torch
    >>> merged_weight(torch.zeros(2, 2), {"q": torch.ones(1, 2)}, {"q": torch.ones(1, 1)}, {"q": (1, 2)}, 0.5)
    tensor([[0.0000, 0.0000],
            [0.5000, 0.5000]])
    """
    merged = weight.clone()
    for name, (start, stop) in slices.items():
        merged[start:stop] += scale * lora_B[name] @ lora_A[name]
    return merged


@check(
    "finetuning.merged_weight",
    reference="vitcourse.course.checks.finetuning.merged_weight.merged_weight",
    level=2,
    minutes=10,
    why="This is why LoRA, unlike earlier adapters, adds nothing to the time of an answer.",
    gradients=False,  # merging comes after training
    hints=[
        "B A has the shape of the rows that it belongs to.",
        "A new matrix: what was there must still be there afterwards. `clone` makes one.",
    ],
    exempt={
        "batch": "the matrices belong together, and their sizes are those of a layer",
        "single": "the matrices belong together, and their sizes are those of a layer",
        "larger": "the matrices belong together, and their sizes are those of a layer",
        "smaller": "the matrices belong together, and their sizes are those of a layer",
    },
)
def merged_weight_cases(rng):
    def given(out, width, rank, slices, scale):
        lora_A = {name: rng.normal(rank, width) for name in slices}
        lora_B = {name: rng.normal(stop - start, rank) for name, (start, stop) in slices.items()}
        return call(rng.normal(out, width), lora_A, lora_B, slices, scale)

    yield given(12, 5, 2, {"q": (0, 4), "v": (8, 12)}, 1.5)
    yield given(9, 4, 1, {"k": (3, 6)}, 0.25).on("an update of k, by rank 1")
    yield given(6, 7, 2, {"q": (0, 2), "k": (2, 4), "v": (4, 6)}, 2.0).on("all three")
    yield given(6, 6, 3, {"all": (0, 6)}, 1.0).on("a square matrix")


def _merged(weight, lora_A, lora_B, slices, scale, *, first=False, add=True, copy=True):
    out = weight.clone() if copy else weight
    for place, (name, (start, stop)) in enumerate(slices.items()):
        start, stop = (place * (stop - start), (place + 1) * (stop - start)) if first else (start, stop)
        out[start:stop] = scale * lora_B[name] @ lora_A[name] + (out[start:stop] if add else 0)
    return out


merged_weight_cases.mistake(
    "no-factor",
    "the products are not scaled, though the unmerged layer scales them",
    lambda weight, lora_A, lora_B, slices, scale: _merged(weight, lora_A, lora_B, slices, 1.0),
)
merged_weight_cases.mistake(
    "update-alone",
    "the rows are replaced by the update; it should be added to them",
    lambda weight, lora_A, lora_B, slices, scale: _merged(weight, lora_A, lora_B, slices, scale, add=False),
)
merged_weight_cases.mistake(
    "one-after-the-other",
    "the updates are laid end to end from the first row on; each belongs to the rows of its slice",
    lambda weight, lora_A, lora_B, slices, scale: _merged(weight, lora_A, lora_B, slices, scale, first=True),
)
merged_weight_cases.mistake(
    "in-place",
    "the frozen weight itself is changed: merged twice, the update would be in it twice",
    lambda weight, lora_A, lora_B, slices, scale: _merged(weight.data, lora_A, lora_B, slices, scale, copy=False),
)
