"""The check of `finetuning.layer_scales`."""

from vitcourse.course.checks import call, check


@check(
    "finetuning.layer_scales",
    reference="vitcourse.finetuning.layer_scales",
    level=1,
    minutes=5,
    why="Most recipes for fine-tuning a large ViT contain this line, and it decides how much of the checkpoint survives.",
    hints=[
        "Begin at the end: the head has 1. What has the layer below it, and the one below that?",
        "How many steps is layer i away from the last one, number layers − 1?",
    ],
)
def layer_scales(rng):
    yield call(3, 0.5)
    yield call(rng.integer(5, 9), 0.75).on("more layers")
    yield call(4, 1.0).on("a decay of 1, which is none")
    yield call(1, 0.65).on("one layer")


layer_scales.mistake(
    "upside-down",
    "the stem moves fastest and the head slowest; it is the head that has everything to learn",
    lambda layers, decay: [decay**i for i in range(layers)],
)
layer_scales.mistake(
    "head-decayed",
    "the head is slowed down as well; it should have the full rate",
    lambda layers, decay: [decay ** (layers - i) for i in range(layers)],
)
layer_scales.mistake(
    "linear",
    "the rates fall by the same amount from layer to layer; they should fall by the same factor",
    lambda layers, decay: [1 - (1 - decay) * (layers - 1 - i) for i in range(layers)],
)
layer_scales.mistake(
    "same-for-all",
    "all layers of the body have the same rate; each should be slower than the one above it",
    lambda layers, decay: [decay] * (layers - 1) + [1.0],
)
layer_scales.mistake(
    "divided",
    "layers below the head move faster than it: the factor divides where it should multiply",
    lambda layers, decay: [(1 / decay) ** (layers - 1 - i) for i in range(layers)],
)
