"""Grading Triton kernels: guarded buffers, and a process that may die."""

import inspect
import linecache
import math
import os
import re
import subprocess
import sys

import pytest
import torch

from vitcourse import course
from vitcourse.course import kernels
from vitcourse.course.cases import call
from vitcourse.course.catalogue import CHECKS, check
from vitcourse.course.grading import grade
from vitcourse.course.kernels import runner
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


@triton.jit
def _wild_atomic(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    tl.atomic_add(out + rows, 1.0)


@triton.jit
def _crash(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    os._exit(3)


@triton.jit
def _no_other(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    """The interpreter alone reads zeros: a right sum."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, 16)
    inside = (row < rows)[:, None] & (column < columns)[None]
    values = tl.load(x + row[:, None] * stride + column[None], mask=inside)
    tl.store(out + row, _double(tl.sum(values, 1)), mask=row < rows)


@triton.jit
def _hidden_other(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    """Right: what is not there is replaced before it counts."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, 16)
    inside = (row < rows)[:, None] & (column < columns)[None]
    values = tl.where(inside, tl.load(x + row[:, None] * stride + column[None], mask=inside), 0.0)
    tl.store(out + row, _double(tl.sum(values, 1)), mask=row < rows)


@triton.jit
def _all_store_all(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    """Every program stores every row: right, twice over."""
    column = tl.arange(0, 16)
    for row in range(rows):
        values = tl.load(x + row * stride + column, mask=column < columns, other=0.0)
        tl.store(out + row, _double(tl.sum(values, 0)))


@triton.jit
def _half_the_rows(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, 16)
    inside = (row < rows)[:, None] & (column < columns)[None]
    values = tl.load(x + row[:, None] * stride + column[None], mask=inside, other=0.0)
    tl.store(out + row, _double(tl.sum(values, 1)), mask=row < rows // 2)


@triton.jit
def _tiles(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    """Right: four columns at a time."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, columns, 4):
        column = first + tl.arange(0, 4)
        inside = (row < rows)[:, None] & (column < columns)[None]
        values = tl.load(x + row[:, None] * stride + column[None], mask=inside, other=0.0)
        total += tl.sum(values, 1)
    tl.store(out + row, total * FACTOR, mask=row < rows)


@triton.jit
def _while_tiles(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    """Right: with pointers and values that go from tile to tile, in half precision too."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    pointers = x + row * stride
    value = tl.load(pointers, mask=row < rows, other=0.0).to(tl.float16)
    column = 0
    while column < columns:
        total += tl.load(pointers, mask=row < rows, other=0.0) + 0 * value
        pointers += 1
        column += 1
        value = tl.load(x + row * stride, mask=row < rows, other=0.0).to(tl.float16)
    tl.store(out + row, total * FACTOR, mask=row < rows)


@triton.jit
def _rows_by_dot(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, 16)
    inside = (row < rows)[:, None] & (column < columns)[None]
    values = tl.load(x + row[:, None] * stride + column[None], mask=inside, other=0.0)
    sums = tl.dot(values, tl.full([16, 16], 0.125, values.dtype), input_precision="ieee")
    tl.store(out + row, tl.sum(sums, 1), mask=row < rows)


@triton.jit
def _careless(row):
    return row.no_such_thing


@triton.jit
def _error_in_a_helper(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + row, _careless(row), mask=row < rows)


@triton.jit
def _error_in_triton(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + row, tl.sum(row, 3), mask=row < rows)


def altered(kernel, *exchanged):
    """The kernel with pieces of its text exchanged: old, new, and perhaps more such pairs. It begins in line 1."""
    text = inspect.getsource(kernel.fn)
    for old, new in zip(exchanged[::2], exchanged[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    file = f"<altered {hash(text)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    scope = dict(kernel.fn.__globals__)
    exec(compile(text, file, "exec"), scope)
    return scope[kernel.fn.__name__]


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
        exempt={
            "integers": "some right answers add by products, which Triton has of 8 bits with sign only",
            "larger": "the reference has 16 columns at most",
        },
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
    assert type(verdict.attempt.error) is runner.StrayRead
    assert re.match(r"\d+ values? (is|are) read outside the tensors: does every load have a mask\?", verdict.text)
    assert "tl.load(x + " in verdict.attempt.traceback


def test_a_result_that_was_not_written_is_told_from_one_that_is_nan(spec):
    assert grade(spec, _no_store).text.startswith("none of the 8 values of the result was written: is there a store?")
    assert grade(spec, _stores_nan).text.startswith("NaN in 8 of 8 values")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_was_not_written_is_a_nan_of_its_own(dtype):
    with runner._guarding():
        empty = kernels.empty_like(torch.ones(3, 5, dtype=dtype))
        assert empty.isnan().all()
        with pytest.raises(runner.NotStored, match="none of the 15 values"):
            runner._refuse_untouched({"out": empty})
        runner._refuse_untouched(torch.full_like(empty, math.nan))
        empty[1, 2] = 1.0
        runner._refuse_untouched(empty)


def test_a_blank_is_a_blank(spec):
    assert grade(spec, _blank).status == "blank"
    assert isinstance(grade(spec, _blank).attempt.error, course.TODO)


@pytest.mark.parametrize(
    ("faulty", "says", "text"),
    [
        (_misspelt, "AttributeError: .*programid.*", "row = tl.programid(0)"),
        (_error_in_a_helper, "AttributeError: .*no_such_thing.*", "return row.no_such_thing"),
        (
            _error_in_triton,
            "ValueError: axis 3 out of bounds.*",
            "tl.store(out + row, tl.sum(row, 3), mask=row < rows)",
        ),
        (_wild_read, "1 value is read outside the tensors: .*", "tl.store(out, tl.load(x + far))"),
        (_wild, "1 value is written outside the tensors: .*", "tl.store(out + far, 1.0)"),
        (_wild_atomic, "1 value is written outside the tensors: .*", "tl.atomic_add(out + rows, 1.0)"),
    ],
)
def test_an_error_keeps_its_name_and_has_the_line_of_the_kernel_and_its_text(spec, faulty, says, text):
    verdict = grade(spec, faulty)
    assert verdict.status == "wrong" and verdict.mistake is None
    told = re.fullmatch(rf"{says} Line (\d+): `{re.escape(text)}` \(on whole blocks\)", verdict.text)
    assert told, verdict.text
    assert linecache.getline(__file__, int(told[1])).strip() == text
    assert text in verdict.attempt.traceback


def test_an_endless_loop_is_stopped(spec):
    runner = spec.runner
    case = call(torch.zeros(4, 4))
    outcome = runner(_endless, case, {}, launch, gradients=False, seconds=0.5, seed=0)
    assert type(outcome.error).__name__ == "TimeLimit"
    assert grade(spec, row_sums).status == "right"  # by another process


def test_a_crash_ends_the_worker_and_nothing_else(spec):
    verdict = grade(spec, _crash)
    assert verdict.status == "wrong" and verdict.text.startswith("Crash: the kernel ended its process (exit code 3)")
    assert grade(spec, row_sums).status == "right"


def test_a_worker_starts_without_pytorch():
    """It is the dearest part of a start, and a worker is started anew after every crash."""
    code = "from vitcourse.course.kernels import interpreter, worker; import sys; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], timeout=60, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
        == 0
    )


COMPILED = """
import sys
import torch
torch.Tensor.cuda = lambda tensor: tensor  # a device that computes here
import test_course_kernels as here
from vitcourse.course.cases import call
from vitcourse.course.kernels import KernelRunner, runner, worker

class Worker:
    run = staticmethod(lambda request, seconds: worker._run_compiled(*request))

runner.worker = lambda interpreting: Worker
x = torch.arange(66.0).view(6, 11)
for kernel in (here.row_sums, here._no_store_mask, here._no_store):
    outcome = KernelRunner(here.launch)(kernel, call(x), {}, None, gradients=False, seconds=9, seed=0)
    print(outcome.error or torch.equal(outcome.output, 2 * x.sum(1)))
"""


def test_what_a_gpu_computes_comes_back():
    """Nobody watches there, but the margins and what was not written tell as much as they can."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
    }
    ran = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=120, env=environment)
    assert ran.stdout.splitlines() == [
        "True",
        "2 values are written outside the tensors: does every store have a mask?",
        "none of the 6 values of the result was written: is there a store?",
    ], ran.stderr


# ---------------------------------------------------------------------------------- what only the watched one refuses


@pytest.mark.parametrize("kernel", [_hidden_other, _tiles, _while_tiles, _rows_by_dot])
def test_what_breaks_no_rule_is_right(spec, kernel):
    verdict = grade(spec, kernel)
    assert verdict.status == "right", verdict.text


def test_a_load_with_a_mask_and_no_other_is_found_where_it_reaches_the_result(spec):
    verdict = grade(spec, altered(_no_other))
    assert type(verdict.attempt.error) is runner.LeftOut
    assert verdict.text == (
        "what the mask of this load leaves out comes into the result, and nothing says what it is. "
        "Line 7: `values = tl.load(x + row[:, None] * stride + column[None], mask=inside)` (on a part of a block)"
    )


def test_of_two_loads_without_other_the_guilty_one_is_named(spec):
    pair = altered(
        _no_other,
        "    values = tl.load",
        "    tl.where(inside, tl.load(x + row[:, None] * stride + column[None], inside), 0.0)\n    values = tl.load",
    )
    assert "Line 8: `values = " in grade(spec, pair).text


def test_integers_that_a_mask_leaves_out_are_told_apart_too(spec):
    """No NaN helps here: the result is another one where the rest is."""
    kernel = altered(_no_other, "tl.sum(values, 1)", "tl.sum((values * 0).to(tl.int32) + 1, 1)")
    flags = altered(_no_other, "tl.sum(values, 1)", "tl.sum(tl.where(values == values, 1.0, 0.0), 1)")
    for answer in (kernel, flags):
        outcome = spec.runner(answer, call(torch.ones(6, 11)), {}, None, gradients=False, seconds=20, seed=0)
        assert type(outcome.error) is runner.LeftOut
    counts = kernels.KernelRunner(launch)(
        _no_other, call(torch.ones(6, 11, dtype=torch.int32)), {}, None, gradients=False, seconds=20, seed=0
    )
    assert type(counts.error) is runner.LeftOut


@pytest.mark.parametrize(
    ("kernel", "error", "says"),
    [
        (_all_store_all, runner.StoredAgain, "8 of 8 values of the result are stored more than once"),
        (_half_the_rows, runner.NotStored, "4 of 8 values of the result are never stored: "),
    ],
)
def test_every_value_is_stored_once(spec, kernel, error, says):
    verdict = grade(spec, kernel)
    assert type(verdict.attempt.error) is error and verdict.text.startswith(says)


def test_a_kernel_may_add_up_in_memory_where_that_is_said():
    def launch_zeroed(kernel, x):
        out = kernels.empty_like(x, x.shape[:1]).zero_()
        kernel[(2,)](x, out, *x.shape, x.stride(0), BLOCK=4)
        return out

    kernel = altered(_all_store_all, "tl.store(out + row", "tl.atomic_add(out + row")
    x = torch.ones(8, 16)
    for once, error in ((True, runner.StoredAgain), (False, None)):
        run = kernels.KernelRunner(launch_zeroed, stored_once=once)
        outcome = run(kernel, call(x), {}, None, gradients=False, seconds=20, seed=0)
        assert (type(outcome.error) if error else outcome.error) is error
    assert torch.equal(outcome.output, torch.full((8,), 64.0))


SUM = "total += tl.sum(values, 1)"


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        (
            (SUM, f"{SUM}; total = total.to(tl.float16).to(tl.float32)"),
            "HalfCarried",
            "`total` goes through half precision at every tile; what is added up over many wants float32. Line 10: ",
        ),
        ((SUM, f"{SUM}; total = total.to(tl.bfloat16)"), "HalfCarried", "`total` goes"),
        ((SUM, "old = total.to(tl.float16); total = old + tl.sum(values, 1)"), "HalfCarried", "`total` goes"),
        (
            (SUM, "total = tl.where(row < 9, (total + tl.sum(values, 1)).to(tl.float16), 0.0)"),
            "HalfCarried",
            "`total` ",
        ),
        (
            ("tl.float32)\n    for", "tl.float16)\n    for", SUM, f"{SUM}; total = total.to(tl.float16)"),
            "HalfCarried",
            "`total` goes",
        ),
        ((SUM, "total += tl.sum(values.to(tl.float16), 1)"), "HalfSum", "numbers are added up in float16"),
        (
            (SUM, "total += tl.max(tl.cumsum(values.to(tl.float16), 1), 1)"),
            "HalfSum",
            "numbers are added up in float16",
        ),
        (
            ("total = tl.zeros([BLOCK], tl.float32)", "total = 0.0"),
            "ChangedType",
            "`total` is float32 (a scalar) before the loop and float32 (4) after a tile: this does not compile",
        ),
        (("zeros([BLOCK], tl.float32)", "zeros([BLOCK], tl.int32)"), "ChangedType", "`total` is int32 (4) before"),
    ],
)
def test_what_a_loop_adds_up_keeps_its_type_and_its_precision(spec, changes, error, says):
    verdict = grade(spec, altered(_tiles, *changes))
    assert type(verdict.attempt.error).__name__ == error and says in verdict.text, verdict.text


def test_products_are_not_rounded_and_not_added_up_in_half_precision(spec):
    for precision in ("", ', input_precision="tf32"', ", allow_tf32=True"):
        verdict = grade(spec, altered(_rows_by_dot, ', input_precision="ieee"', precision))
        assert type(verdict.attempt.error) is runner.RoundedInputs
        assert verdict.text.startswith("a GPU rounds the float32 inputs of this `tl.dot` to ten bits, unless")
    half = ("tl.dot(values, ", "tl.dot(values.to(tl.float16), ", "values.dtype)", "tl.float16)")
    assert type(grade(spec, altered(_rows_by_dot, *half)).attempt.error) is not runner.RoundedInputs
    verdict = grade(spec, altered(_rows_by_dot, *half, 'input_precision="ieee"', "out_dtype=tl.float16"))
    assert type(verdict.attempt.error) is runner.HalfSum and "`tl.dot` adds up in float16" in verdict.text


def test_heads_are_kept_apart():
    """What follows one head's last row is NaN, not the next head's first."""
    with runner._guarding() as memory:
        x = memory.copy(torch.ones(2, 3, 5))
        rows = x.as_strided((70,), (x.stride(1),), x.storage_offset())
        assert not rows[:3].isnan().any() and rows[3:67].isnan().all() and not rows[67:].isnan().any()
        assert kernels.empty_like(x).isnan().all()
        counts = kernels.empty_like(x, (4,), torch.int32)
        counts.zero_()
