"""Attention tile by tile, in PyTorch and in Triton, against attention all at once."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from vitcourse.hardware.tiled import attend_tile, tiled_attention


@pytest.mark.parametrize("block", [1, 3, 16, 17, 100])
@pytest.mark.parametrize(("n_q", "n_k"), [(17, 17), (1, 5), (16, 32), (9, 1)])
def test_tiles_give_what_softmax_gives(block, n_q, n_k):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64) for n in (n_q, n_k, n_k))
    torch.testing.assert_close(
        tiled_attention(q, k, v, block), F.scaled_dot_product_attention(q, k, v), rtol=1e-12, atol=1e-12
    )


def test_large_scores_do_not_overflow():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 40, 8, generator=generator)
    q, k = 100 * q, 100 * k
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(tiled_attention(q, k, v, 7).double(), expected, rtol=1e-2, atol=1e-2)


def test_the_order_of_the_tiles_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    scores, values = (
        5 * torch.randn(4, 12, generator=generator).double(),
        torch.randn(12, 3, generator=generator).double(),
    )
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        state = torch.full((4,), -torch.inf).double(), torch.zeros(4).double(), torch.zeros(4, 3).double()
        for i in order:
            state = attend_tile(*state, scores[:, 4 * i : 4 * i + 4], values[4 * i : 4 * i + 4])
        results.append(state)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results[0][0] + results[0][1].log(), scores.logsumexp(-1))


def test_hidden_keys_wait_without_nan():
    start = torch.full((2,), -torch.inf), torch.zeros(2), torch.zeros(2, 3)
    hidden = attend_tile(*start, torch.full((2, 4), -torch.inf), torch.ones(4, 3))
    assert torch.equal(hidden[0], start[0]) and not hidden[1].any() and not hidden[2].any()
    scores, values = torch.randn(2, 5), torch.randn(5, 3)
    _, total, out = attend_tile(*hidden, scores, values)
    torch.testing.assert_close(out / total[:, None], scores.softmax(-1) @ values)


def test_gradients_are_those_of_attention():
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(partial(tiled_attention, block=4), (q, k, v))


def test_a_block_needs_a_key():
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="block must be at least 1 key, got 0"):
        tiled_attention(q, q, q, 0)


@pytest.mark.parametrize(("heads", "n", "d"), [(2, 16, 16), (1, 37, 32), (2, 3, 16)])
def test_the_kernel_gives_what_softmax_gives(heads, n, d):
    pytest.importorskip("triton")
    from vitcourse.course.cases import call
    from vitcourse.course.checks.hardware.flash_kernel import launch
    from vitcourse.course.kernels import KernelRunner
    from vitcourse.hardware.tiled_kernel import flash_kernel

    q, k, v = torch.randn(3, heads, n, d, generator=torch.Generator().manual_seed(0))
    runner = KernelRunner(launch)
    got = runner(flash_kernel, call(3 * q, k, v, 0.4), {}, runner.signature_of, gradients=False, seconds=60, seed=0)
    assert got.error is None
    expected = F.scaled_dot_product_attention(3 * q, k, v, scale=0.4)
    torch.testing.assert_close(got.output, expected, rtol=1e-4, atol=1e-5)
