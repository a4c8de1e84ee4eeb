"""The benchmark of detectors, segmenters and models of clips compares models that say and do the same."""

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import dense_video


def multiply_adds(step) -> int:
    """Those of a step, attention by the kernel that PyTorch's counter knows on every device."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", dense_video.PAIRS)
def test_benchmarked_steps_do_the_same_work(name):
    """In place of times, which depend on the machine: the operations, counted. The answers are compared before."""
    if name not in ("fcos", "swin3d"):
        pytest.importorskip("transformers")
    pair = dense_video.same_pair(name, False, "cpu")
    answers = {whose: side.infer for whose, side in pair.items()}
    for steps in (answers, dense_video.steps(pair, "train")):
        ours, theirs = (multiply_adds(step) for step in steps.values())
        assert 0.95 < ours / theirs <= 1.03


def test_models_that_say_something_else_are_not_timed():
    pair = dense_video.same_pair("fcos", False, "cpu")
    pair["ours"].model[1].distances.bias.data += 0.5
    with pytest.raises(RuntimeError, match="the two models differ by .*; nothing was timed"):
        dense_video.check_same(pair)
