"""Grading Triton kernels: guarded buffers, and a process that may die."""

import math

import pytest
import torch

from vitcourse import course
from vitcourse.course import kernels
from vitcourse.course.cases import call
from vitcourse.course.grading import CHECKS, check, grade
from vitcourse.course.running import OutOfBounds

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

FACTOR = tl.constexpr(2.0)


@triton.jit
def _double(x):
    return x * FACTOR


@triton.jit
def row_sums(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    """Twice the sum of every row, a block of rows to a program."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, 16)
    inside = (row < rows)[:, None] & (column < columns)[None]
    values = tl.load(x + row[:, None] * stride + column[None], mask=inside, other=0.0)
    tl.store(out + row, _double(tl.sum(values, 1)), mask=row < rows)


def launch(kernel, x):
    out = kernels.empty_like(x, x.shape[:1])
    kernel[(math.ceil(x.shape[0] / 4),)](x, out, *x.shape, x.stride(0), BLOCK=4)
    return out


@triton.jit
def _no_load_mask(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, 16)
    values = tl.load(x + row[:, None] * stride + column[None])
    tl.store(out + row, _double(tl.sum(values, 1)), mask=row < rows)


@triton.jit
def _hidden_read(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    """Right on this chip today: what was read elsewhere is thrown away."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, 16)
    inside = (row < rows)[:, None] & (column < columns)[None]
    values = tl.where(inside, tl.load(x + row[:, None] * stride + column[None]), 0.0)
    tl.store(out + row, _double(tl.sum(values, 1)), mask=row < rows)


@triton.jit
def _no_store(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.load(x + row * stride, mask=row < rows, other=0.0)


@triton.jit
def _stores_nan(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    zero = (row * 0).to(tl.float32)
    tl.store(out + row, zero / zero, mask=row < rows)


@triton.jit
def _no_store_mask(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, 16)
    inside = (row < rows)[:, None] & (column < columns)[None]
    values = tl.load(x + row[:, None] * stride + column[None], mask=inside, other=0.0)
    tl.store(out + row, _double(tl.sum(values, 1)))


@triton.jit
def _blank(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    raise TODO  # noqa: F821


@triton.jit
def _misspelt(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    row = tl.programid(0)
    tl.store(out + row, 0.0)


@triton.jit
def _endless(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    while rows > 0:
        rows += 1


@triton.jit
def _wild_read(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    far = (tl.program_id(0).to(tl.int64) + 1_000_000) * 1_000_000
    tl.store(out, tl.load(x + far))


@triton.jit
def _wild(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    far = (tl.program_id(0).to(tl.int64) + 1_000_000) * 1_000_000
    tl.store(out + far, 1.0)


@pytest.fixture(scope="module")
def spec():
    name = "kernels_test.row_sums"

    @check(
        name,
        reference=f"{__name__}.row_sums",
        level=1,
        minutes=1,
        why="A test.",
        hints=["Mind the edge."],
        gradients=False,
        seconds=20,
        runner=kernels.KernelRunner(launch),
    )
    def row_sums_check(rng):
        yield call(rng.normal(8, 16, dtype=torch.float32)).on("whole blocks")
        yield call(rng.normal(6, 11, dtype=torch.float32)).on("a part of a block")

    row_sums_check.mistake("no-load-mask", "what lies beyond the last row is added too", _no_load_mask)
    row_sums_check.mistake("no-store-mask", "the last block writes rows that are not there", _no_store_mask)
    yield row_sums_check
    del CHECKS[name]


def test_the_reference_is_right(spec):
    assert grade(spec, row_sums).status == "right"


@pytest.mark.parametrize("faulty, key", [(_no_load_mask, "no-load-mask"), (_no_store_mask, "no-store-mask")])
def test_a_forgotten_mask_is_found_and_named(spec, faulty, key):
    verdict = grade(spec, faulty)
    assert verdict.status == "wrong" and verdict.mistake.key == key
    assert "a part of a block" in verdict.text
    assert list(verdict.attempt.inputs) == ["x"] and verdict.attempt.inputs["x"].shape == (6, 11)


def test_a_store_beyond_the_end_is_counted(spec):
    verdict = grade(spec, _no_store_mask)
    assert isinstance(verdict.attempt.error, OutOfBounds)
    assert verdict.text.startswith("2 values are written outside the tensors")
    with pytest.raises(OutOfBounds):
        verdict.attempt.replay()


@pytest.mark.parametrize("faulty", [_hidden_read, _no_load_mask, _wild_read])
def test_a_read_beyond_the_end_is_refused_even_if_it_changes_nothing(spec, faulty):
    verdict = grade(spec, faulty)
    assert type(verdict.attempt.error) is kernels.StrayRead
    assert " values are read outside the tensors: does every load have a mask?" in verdict.text
    assert "tl.load(x + " in verdict.attempt.traceback


def test_a_result_that_was_not_written_is_told_from_one_that_is_nan(spec):
    assert grade(spec, _no_store).text.startswith("none of the 8 values of the result was written: is there a store?")
    assert grade(spec, _stores_nan).text.startswith("NaN in 8 of 8 values")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_was_not_written_is_a_nan_of_its_own(dtype):
    with kernels._guarding():
        empty = kernels.empty_like(torch.ones(3, 5, dtype=dtype))
        assert empty.isnan().all()
        with pytest.raises(kernels.NotStored, match="none of the 15 values"):
            kernels._refuse_untouched({"out": empty})
        kernels._refuse_untouched(torch.full_like(empty, math.nan))
        empty[1, 2] = 1.0
        kernels._refuse_untouched(empty)


def test_a_blank_is_a_blank(spec):
    assert grade(spec, _blank).status == "blank"
    assert isinstance(grade(spec, _blank).attempt.error, course.TODO)


def test_an_error_keeps_its_name_and_its_place(spec):
    verdict = grade(spec, _misspelt)
    assert verdict.status == "wrong" and verdict.mistake is None
    assert verdict.text.startswith("AttributeError: ") and "programid" in verdict.text
    assert "tl.programid(0)" in verdict.attempt.traceback


def test_an_endless_loop_is_stopped(spec):
    runner = spec.runner
    case = call(torch.zeros(4, 4))
    outcome = runner(_endless, case, {}, launch, gradients=False, seconds=2, seed=0)
    assert type(outcome.error).__name__ == "TimeLimit"
    assert grade(spec, row_sums).status == "right"  # by another process


def test_a_wild_store_ends_the_worker_and_nothing_else(spec):
    verdict = grade(spec, _wild)
    assert verdict.status == "wrong" and verdict.text.startswith("Crash: the kernel ended its process")
    assert grade(spec, row_sums).status == "right"


def test_heads_are_kept_apart():
    """What follows one head's last row is NaN, not the next head's first."""
    with kernels._guarding():
        x = kernels._guard(torch.ones(2, 3, 5))
        rows = x.as_strided((70,), (x.stride(1),), x.storage_offset())
        assert not rows[:3].isnan().any() and rows[3:67].isnan().all() and not rows[67:].isnan().any()
        assert kernels.empty_like(x).isnan().all()
        counts = kernels.empty_like(x, (4,), torch.int32)
        counts.zero_()
