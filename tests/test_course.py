"""Exercises that are blank, wrong in every way, and right; `expect`; progress; and all checks of the course."""

import functools
import importlib.util
import json
import math
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mistakes
import numpy as np
import pytest
import torch
from torch import nn

from vitcourse import course
from vitcourse.course import catalogue, checks, exercises, expectations, grading, limits, progress
from vitcourse.course.__main__ import main
from vitcourse.course.answers import blanks_in
from vitcourse.course.cases import Random
from vitcourse.course.checks import build, call, check, holds
from vitcourse.course.comparing import differs
from vitcourse.course.trial import Trial

# ------------------------------------------------------------------------------------------- two exercises of our own


def patches(image, p):
    """(B, C, H, W) -> (B, h w, p p C)."""
    b, c, h, w = image.shape
    return image.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)


class Gate(nn.Module):
    """x * softmax(fc(x))."""

    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, dim)

    def forward(self, x):
        return x * self.fc(x).softmax(-1)


def drop_half(x):
    return x * (torch.rand_like(x) > 0.5)


@check(
    "demo.patches", reference=f"{__name__}.patches", level=1, minutes=5, why="Sequences.", hints=["look again", "two"]
)
def demo_patches(rng):
    yield call(rng.normal(2, 3, 8, 8), 4)
    yield call(rng.normal(1, 2, 4, 8), 2).on("a non-square image")
    yield call(rng.strided(3, 2, 4, 4), 2).on("a strided image")


def permuted(*order):
    def faulty(image, p):
        b, c, h, w = image.shape
        return image.reshape(b, c, h // p, p, w // p, p).permute(*order).reshape(b, -1, p * p * c)

    return faulty


demo_patches.mistake("columns", "read row by row", permuted(0, 4, 2, 3, 5, 1))
demo_patches.mistake("transposed", "inside a patch too", permuted(0, 2, 4, 5, 3, 1))
demo_patches.mistake("channels-first", "channels come last", permuted(0, 2, 4, 1, 3, 5))
demo_patches.mistake("no-gradient", "let gradients through", lambda image, p: patches(image.detach(), p))


@check("demo.Gate", reference=f"{__name__}.Gate", level=2, minutes=10, why="Gates.")
def demo_gate(rng):
    yield build(4).call(rng.normal(2, 3, 4))
    yield build(dim=5).train().call(rng.normal(5, 2, 5)).on("another width")


@demo_gate.mistake("wrong-axis", "over the features, not the tokens")
class _(Gate):
    def forward(self, x):
        return x * self.fc(x).softmax(1)


@demo_gate.mistake("no-bias", "a bias is missing")
class _(Gate):
    def __init__(self, dim):
        super().__init__(dim)
        self.fc = nn.Linear(dim, dim, bias=False)


demo_gate.mistake("sum", "scaled, not shifted", type("Sum", (Gate,), {"forward": lambda s, x: x + s.fc(x).softmax(-1)}))


@check("demo.drop_half", reference=f"{__name__}.drop_half", level=1, minutes=5, why="Noise.")
def demo_drop_half(rng):
    x = rng.normal(64, 64)
    yield holds("more than half of it stays", lambda f: (f(x) != 0).float().mean() < 0.6, points_to="all")
    yield holds("less than half of it stays", lambda f: (f(x) != 0).float().mean() > 0.4, points_to="none")
    yield holds("what stays is not scaled", lambda f: set((f(x) / x).unique().tolist()) <= {0, 1})


demo_drop_half.mistake("all", "something has to go", lambda x: x)
demo_drop_half.mistake("none", "not everything has to go", lambda x: x * 0)


def weighted(x, size):
    return x * size


@check("demo.weighted", reference=f"{__name__}.weighted", level=1, minutes=5, why="Sizes.", gradients=("x",))
def demo_weighted(rng):
    yield call(rng.normal(3, 4), rng.uniform(3, 4, low=1, high=2))


@pytest.fixture(autouse=True)
def forget_attempts():
    for memory in (exercises._attempts, exercises._met, exercises._shown):
        memory.clear()


@pytest.fixture(autouse=True)
def long_lines(monkeypatch):
    """What is told, and not where it is wrapped."""
    monkeypatch.setattr(exercises, "WIDTH", 10_000)


def run_cell(source, name="demo.patches"):
    """Do what a notebook does with the cell of an exercise; returns its global names."""
    names = {"__name__": "__main__", "TODO": course.TODO, "exercise": course.exercise, "torch": torch, "nn": nn}
    exec(compile(f"@exercise({name!r})\n{source}", f"<cell {hash(source)}>", "exec"), names)
    return names


def told(capsys):
    """The lines of all verdicts. After a ✗ comes one more, which says where the answer is."""
    lines, after = capsys.readouterr().out.splitlines(), []
    for i, line in enumerate(lines):
        if line.startswith("✗"):
            name = re.match(r"✗ (\w+): ", line)[1]
            assert lines[i + 1] == f'  The course goes on with its own; yours is last_attempt("{name}").function.'
            after.append(i + 1)
    return [line for i, line in enumerate(lines) if i not in after]


def patches_cell(body):
    return f"def patches(image, p):\n    b, c, h, w = image.shape\n    {body}\n"


RIGHT = "y = torch.einsum('bchpwq->bhwpqc', image.reshape(b, c, h//p, p, w//p, p)).reshape(b, -1, p*p*c)"


def gate_cell(init="self.fc = nn.Linear(dim, dim)", forward="return x * self.fc(x).softmax(-1)", name="forward"):
    return f"""class Gate(nn.Module):
    def __init__(self, dim):
        super(Gate, self).__init__()
        {init}

    def {name}(self, x):
        {forward}
"""


# -------------------------------------------------------------------------------------------------------------- blank


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("demo.patches", patches_cell("raise TODO")),
        ("demo.Gate", gate_cell(init="raise TODO", forward="raise TODO")),
        ("demo.Gate", gate_cell(forward="raise TODO")),
        ("demo.drop_half", "def drop_half(x):\n    raise TODO"),
    ],
)
def test_a_blank_is_not_an_error_and_the_reference_takes_its_place(capsys, name, cell):
    names = run_cell(cell, name)
    short = name.split(".")[1]
    assert capsys.readouterr().out == f"○ {short}: not attempted yet, the course uses its own\n"
    assert names[short] is checks.find(name).reference


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ({"init": "raise TODO", "forward": "raise TODO"}, "not attempted yet"),
        ({"forward": "raise TODO"}, "`forward` still has a blank"),
        ({"init": "raise TODO"}, "`__init__` still has a blank"),
        ({"forward": "if not x.ndim:\n            raise TODO\n        raise TODO"}, "not attempted yet"),
    ],
)
def test_one_blank_of_two_that_is_left_is_named(capsys, monkeypatch, cell, says):
    monkeypatch.setattr(demo_gate, "blanks", 2)
    run_cell(gate_cell(**cell), "demo.Gate")
    assert told(capsys) == [f"○ Gate: {says}, the course uses its own"]


@pytest.mark.parametrize("body", ["raise NotImplementedError", "TODOO", "raise Exception('TODO')", "..."])
def test_only_todo_means_blank(capsys, body):
    run_cell(patches_cell(body))
    assert capsys.readouterr().out.startswith("✗ patches: ")


# -------------------------------------------------------------------------------------------------------------- right


def test_a_right_function_is_ticked_and_kept(capsys):
    names = run_cell(patches_cell(f"{RIGHT}; return y"))
    assert capsys.readouterr().out == "✓ patches\n"
    assert names["patches"].__globals__ is names


@pytest.mark.parametrize("seed", range(5))
def test_a_right_class_is_ticked_and_kept(capsys, seed):
    names = run_cell(gate_cell(forward="return self.fc(x).softmax(dim=x.ndim - 1) * x"), "demo.Gate")
    assert capsys.readouterr().out == "✓ Gate\n"
    assert names["Gate"] is not Gate
    assert isinstance(names["Gate"](3), nn.Module)
    assert grading.grade(demo_gate, names["Gate"], seed).status == "right"


def test_a_function_that_calls_itself_is_found_under_its_own_name(capsys):
    run_cell(patches_cell(f"if b > 1: return torch.cat([patches(i[None], p) for i in image])\n    {RIGHT}; return y"))
    assert capsys.readouterr().out == "✓ patches\n"


def test_the_name_is_given_back_after_the_check():
    names = {"Gate": "an older one"}
    exec("class Gate: \n  def __init__(self): pass", names | {"__name__": "cell"}, names)
    cls = names["Gate"]
    space = cls.__init__.__globals__
    assert space["Gate"] == "an older one"
    grading.grade(demo_gate, cls)
    assert space["Gate"] == "an older one"


def test_fixed_tables_may_be_held_in_any_way(capsys):
    init = "self.fc = nn.Linear(dim, dim); self.register_buffer('one', torch.ones(1))"
    run_cell(gate_cell(init=init, forward="return self.one * x * self.fc(x).softmax(-1)"), "demo.Gate")
    assert capsys.readouterr().out == "✓ Gate\n"


def test_what_an_answer_prints_is_shown_once(capsys):
    run_cell(patches_cell(f"print(image.shape); {RIGHT}; return y"))
    assert capsys.readouterr().out == "torch.Size([2, 3, 8, 8])\n✓ patches\n"


# -------------------------------------------------------------------------------------------------------------- wrong

HINTED = ("shape", "dtype", "nan", "infinite", "list", "numpy", "detached")  # the others say enough
INFINITE = "infinite, or finite, in the wrong place in {} of {} values"
WRONG = {
    "shape": (f"{RIGHT}; return y[:1]", "shape (1, 4, 48), expected (2, 4, 48)"),
    "dtype": (f"{RIGHT}; return y.float()", "dtype float32, expected float64"),
    "nan": (f"{RIGHT}; return 0 * y / 0", "NaN in 384 of 384 values"),
    "infinite": (f"{RIGHT}; return y / 0", INFINITE.format(384, 384)),
    "no-return": (RIGHT, "returns nothing: is a return missing?"),
    "list": (f"{RIGHT}; return [y]", "returns a sequence, expected a tensor"),
    "numpy": (f"{RIGHT}; return y.detach().numpy()", "returns a NumPy array, expected a tensor"),
    "exception": ("return image @ image[0, 0, :3]", "RuntimeError: "),
    "no-such-name": ("return patchez(image)", "NameError: name 'patchez' is not defined (line 4)"),
    "mutation": (f"{RIGHT}; image.mul_(2); return y", "changes its input `image` in place"),
    "resized": (f"{RIGHT}; image.unsqueeze_(0); return y", "changes its input `image` in place"),
    "detached": (f"{RIGHT}; return y.data.mul(3).div(3)", "right in value, but cut off from the graph"),
    "gradient": (
        f"{RIGHT}; return y.detach() * 2 - y",
        "right in value, but the gradient with regard to `image` is not: max error",
    ),
    "backward": (
        f"{RIGHT}; z = y * y; s = y.sqrt(); s += 1; return y + 0 * torch.where(y > 9, s, 0).nan_to_num()",
        "right in value, but the backward pass fails: RuntimeError: one of the variables needed for gradient "
        "computation was changed in place (by `+=`, `/=` or writing into a slice, say): make a new tensor",
    ),
    "one-case-only": (
        f"h = w = int((h * w) ** 0.5); image = image[:, :, :h, :w]; {RIGHT}; return y",
        "(on a non-square image",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_function_is_told_precisely_and_does_not_stop_the_notebook(capsys, case):
    body, says = WRONG[case]
    names = run_cell(patches_cell(body))
    (line,) = told(capsys)
    assert line.startswith("✗ patches: ") and says in line, line
    last = "let gradients through" if case == "detached" else "— hint: look again"
    assert line.endswith(last) == (case in HINTED), line
    assert names["patches"] is patches


def test_an_exercise_whose_cell_was_not_run_is_named(capsys, monkeypatch):
    monkeypatch.setattr(exercises, "_met", [])
    cell = patches_cell("return Gate(3)(image)")
    run_cell(cell)
    assert "— Gate is another exercise of this lesson: run its cell first" in " ".join(capsys.readouterr().out.split())
    run_cell(gate_cell(), "demo.Gate")
    run_cell(cell)
    assert "run its cell first" not in " ".join(capsys.readouterr().out.split())  # it was: the name is lost otherwise


WRONG_CLASS = {
    "missing": (
        {"init": "self.lin = nn.Linear(dim, dim)"},
        "missing fc.weight, fc.bias; unexpected lin.weight",
    ),
    "reshaped": ({"init": "self.fc = nn.Linear(dim, 1)"}, "fc.bias of shape (1,), expected (4,)"),
    "extra": (
        {"init": "self.fc = nn.Linear(dim, dim); self.scale = nn.Parameter(torch.ones(1))"},
        "parameters: unexpected scale",
    ),
    "misspelt": ({"name": "forwrad"}, 'missing the required "forward" function'),
    "shape": ({"forward": "return x[0]"}, "shape (3, 4), expected (2, 3, 4)"),
    "dtype": ({"forward": "return torch.zeros(x.shape)"}, "dtype float32, expected float64"),
    "nan": ({"forward": "return 0 * x / 0"}, "NaN in 24 of 24 values"),
    "exception": ({"forward": "return self.fd(x)"}, "AttributeError: 'Gate' object has no attribute 'fd' (line 8)"),
    "mutation": ({"forward": "x *= self.fc(x).softmax(-1); return x"}, "changes its input `x` in place"),
    "no-return": ({"forward": "x * self.fc(x).softmax(-1)"}, "returns nothing"),
    "detached-weights": (
        {"forward": "return x * nn.functional.linear(x, self.fc.weight.data, self.fc.bias).softmax(-1)"},
        "right in value, but no gradient reaches `fc.weight`",
    ),
    "detached": ({"forward": "return x.detach() * self.fc(x.detach()).softmax(-1)"}, "no gradient reaches `x`"),
    "untrained": ({"forward": "return x * self.fc(x).softmax(-1).detach()"}, "the gradient with regard to `x` is not"),
    "not-a-module": ({"init": "raise KeyError('dim')"}, "KeyError: 'dim' (line 5)"),
}


@pytest.mark.parametrize("case", WRONG_CLASS)
def test_a_wrong_class_is_told_precisely_and_does_not_stop_the_notebook(capsys, case):
    changes, says = WRONG_CLASS[case]
    names = run_cell(gate_cell(**changes), "demo.Gate")
    (line,) = told(capsys)
    assert line.startswith("✗ Gate: ") and says in line, line
    assert names["Gate"] is Gate


@pytest.mark.parametrize(
    "body", ["while True: pass", "while True:\n        try: x = 1\n        except Exception: pass"]
)
@pytest.mark.parametrize("in_main_thread", [True, False])
def test_an_endless_loop_is_stopped(capsys, monkeypatch, body, in_main_thread):
    monkeypatch.setattr(demo_patches, "seconds", 0.2)
    if in_main_thread:
        run_cell(patches_cell(body))
    else:
        thread = threading.Thread(target=run_cell, args=(patches_cell(body),))
        thread.start()
        thread.join(30)
    assert capsys.readouterr().out.startswith("✗ patches: stopped, it ran too long")


STOPPED_IN_A_THREAD = """
import sys, threading
from vitcourse.course.limits import TimeLimit, time_limit

def wait():
    try:
        with time_limit(0.1):
            while True: pass
    except TimeLimit:
        print("stopped", end=" ")

thread = threading.Thread(target=wait)
thread.start()
thread.join()
sys.settrace(lambda *_: None)
(lambda: print("and traced"))()
"""


def test_a_debugger_works_after_an_answer_was_stopped_in_a_thread():
    """In a process of its own, which else would not end: CPython 3.11 can be left looking for an exception forever."""
    ran = subprocess.run([sys.executable, "-c", STOPPED_IN_A_THREAD], capture_output=True, text=True, timeout=60)
    assert ran.stdout == "stopped and traced\n", ran.stderr


def test_an_answer_that_waits_is_stopped(capsys, monkeypatch):
    monkeypatch.setattr(demo_patches, "seconds", 0.2)
    run_cell(patches_cell("import time; time.sleep(60)"))
    assert capsys.readouterr().out.startswith("✗ patches: stopped, it ran too long")


def test_the_time_limit_gives_an_earlier_alarm_back():
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1000)
        with limits.time_limit(2000):
            time.sleep(0.01)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 1000
        signal.raise_signal(signal.SIGALRM)
        assert rang
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_interrupt_by_the_learner_is_let_through():
    with pytest.raises(KeyboardInterrupt):
        run_cell(patches_cell("raise KeyboardInterrupt"))


def test_checking_leaves_every_random_generator_alone():
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    body = f"import random; import numpy; random.seed(1); numpy.random.seed(1); torch.manual_seed(1); {RIGHT}; return y"
    run_cell(patches_cell(body))
    run_cell(gate_cell(), "demo.Gate")
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_inputs_are_fresh_every_time():
    seen = []
    demo_patches_inputs = lambda image, p: seen.append(image.detach()) or patches(image, p)  # noqa: E731
    grading.grade(demo_patches, demo_patches_inputs)
    grading.grade(demo_patches, demo_patches_inputs)
    assert not torch.equal(seen[0], seen[3])
    assert not seen[2].is_contiguous()


def test_a_tensor_left_on_the_cpu_is_found_where_there_is_an_accelerator(capsys, monkeypatch):
    monkeypatch.setattr(grading, "resolve_device", lambda: torch.device("meta"))
    run_cell(patches_cell(f"{RIGHT}; return y"))
    run_cell(gate_cell(), "demo.Gate")
    run_cell(patches_cell(f"{RIGHT}; return y + torch.zeros(y.shape, dtype=y.dtype)"))
    run_cell(patches_cell(f"{RIGHT}; return y if y.device.type == 'cpu' else torch.zeros(y.shape)"))
    ticks, gate, mixed, returned = told(capsys)
    assert (ticks, gate) == ("✓ patches", "✓ Gate")
    assert mixed.startswith("✗ patches: right on the CPU, but on meta: RuntimeError: ")
    assert returned.startswith("✗ patches: right on the CPU, but on meta the output is on cpu, expected on meta")


# ---------------------------------------------------------------------------------------------------------- diagnosis


def test_a_catalogued_mistake_is_named(capsys):
    run_cell(patches_cell(f"{RIGHT.replace('bhwpqc', 'bwhpqc')}; return y"))
    run_cell(gate_cell(forward="w = self.fc(x).exp(); return x * w / w.sum(1, True)"), "demo.Gate")
    run_cell(gate_cell(init="self.fc = nn.Linear(dim, dim, False)"), "demo.Gate")
    run_cell("def drop_half(x): return x + 0", "demo.drop_half")
    lines = told(capsys)
    assert [line.split(" — ")[1] for line in lines] == [
        "read row by row",
        "over the features, not the tokens",
        "a bias is missing",
        "something has to go",
    ]
    assert all("max error" in line for line in lines[:2])
    assert lines[3] == "✗ drop_half: more than half of it stays — something has to go"


@pytest.mark.parametrize(
    "body",
    [
        f"{RIGHT.replace('bhwpqc', 'bwhpqc')}; return y * 1.001",  # like a mistake, but not it
        f"{RIGHT}; return y.flip(1)",
        "q = image; " + RIGHT.replace("bhwpqc", "bwhpqc") + "; z = y; " + RIGHT + "; return z if h == w else y * 2",
    ],
)
def test_an_unknown_wrong_answer_gets_no_false_diagnosis(capsys, body):
    run_cell(patches_cell(body))
    (line,) = told(capsys)
    assert line.startswith("✗ patches: max error") and line.endswith("hint: look again")


NEARLY = "nearly right: {}, all over: is it an epsilon, or the precision of a step?"


@pytest.mark.parametrize(
    ("answer", "nearly"),
    [
        ("y + 1e-4", True),
        ("y.float().double() * 1.0001", True),
        ("y * 1.1", False),  # not tiny
        ("y + 1e-4 * (torch.arange(y.numel()).view(y.shape) == 0)", False),  # not all over
    ],
)
def test_a_tiny_error_all_over_is_nearly_right_and_gets_no_hint(capsys, answer, nearly):
    run_cell(patches_cell(f"{RIGHT}; return {answer}"))
    (line,) = told(capsys)
    assert line.startswith("✗ patches: nearly right: max error") == nearly
    assert line.endswith("precision of a step?" if nearly else "hint: look again")


def test_of_an_einops_error_the_part_is_kept_that_says_what_is_wrong(capsys):
    pattern = "b c (r p) (s q) -> b (r s) (p q c)"
    run_cell(patches_cell(f"from einops import rearrange; return rearrange(image, {pattern!r}, p=3, q=3)"))
    (line,) = told(capsys)
    assert line == "✗ patches: EinopsError: Shape mismatch, can't divide axis of length 8 in chunks of 3 (line 4)"


def test_what_is_told_is_wrapped_at_words(capsys, monkeypatch):
    monkeypatch.setattr(exercises, "WIDTH", 60)
    run_cell(patches_cell("raise ValueError('many words ' * 50)"))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60 and len(lines) > 4
    assert {word for line in lines[1:3] for word in line.split()} == {"many", "words"}


def test_two_mistakes_that_cannot_be_told_apart_are_not_guessed(monkeypatch):
    faulty = permuted(0, 4, 2, 3, 5, 1)
    twin = catalogue.Mistake("twin", "another", faulty)
    monkeypatch.setattr(demo_patches, "mistakes", [*demo_patches.mistakes, twin])
    verdict = grading.grade(demo_patches, faulty)
    assert verdict.status == "wrong" and verdict.mistake is None


def test_an_error_alone_is_no_evidence_of_a_mistake(monkeypatch):
    def fails(image, p):
        raise RuntimeError("whatever")

    monkeypatch.setattr(demo_patches, "mistakes", [catalogue.Mistake("fails", "you fail", fails)])
    assert grading.grade(demo_patches, fails).mistake is None


def test_gradients_that_are_only_rounding_are_not_compared(monkeypatch):
    """Normalised along an axis of one, everything is 1 or -1, and the gradient is zero but for rounding."""
    names = {"reference": "torch.nn.functional.normalize", "level": 1, "minutes": 1, "why": "Rounding."}
    names["exempt"] = {"larger": "an axis of one is the point"}
    monkeypatch.setattr(catalogue, "CHECKS", {})
    spec = check("demo.normalize", **names)(lambda rng: [call(rng.normal(5, 1))])
    for seed in range(20):
        assert grading.grade(spec, lambda x: x / (x * x).sum(1, True) ** 0.5, seed).status == "right"
        assert grading.grade(spec, lambda x: x.sign() + 0 * x, seed).status == "right"
        assert grading.grade(spec, lambda x: x.sign() + x - x.detach(), seed).status == "wrong"


def test_effects_of_an_in_place_reference_have_to_be_matched(monkeypatch):
    def freeze(model, total):
        model.requires_grad_(False)
        total.append(1)

    def half(model, total):
        model[0].requires_grad_(False)
        total.append(1)

    monkeypatch.setitem(sys.modules[__name__].__dict__, "freeze", freeze)
    monkeypatch.setattr(catalogue, "CHECKS", {})

    @check("demo.freeze", reference=f"{__name__}.freeze", level=1, minutes=1, why="It can.")
    def spec(rng):
        yield call(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), [])

    assert grading.grade(spec, freeze).status == "right"
    text = grading.grade(spec, half).text
    assert "`model.1.weight.requires_grad`" in text and "should change it" in text


# ------------------------------------------------------------------------------------------------ after a ✗, and hints


def test_last_attempt_keeps_what_is_needed_to_go_on(capsys):
    run_cell(patches_cell("return image.view(-1, 7)"))
    attempt = course.last_attempt("patches")
    assert attempt.function.__name__ == "patches" and attempt.function is not patches
    assert list(attempt.inputs) == ["image", "p"] and attempt.inputs["image"].shape == (2, 3, 8, 8)
    assert torch.equal(attempt.expected, patches(**attempt.inputs))
    assert isinstance(attempt.error, RuntimeError) and "image.view(-1, 7)" not in capsys.readouterr().out
    assert "line 4, in patches" in attempt.traceback
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        attempt.replay()

    again = grading.grade(demo_patches, attempt.function, attempt.seed).attempt
    assert torch.equal(again.inputs["image"], attempt.inputs["image"])
    assert "RuntimeError" in repr(attempt) and "seed=" in repr(attempt)


def test_last_attempt_of_a_class_replays_with_the_same_weights():
    run_cell(gate_cell(forward="return x * self.fc(x).softmax(1)"), "demo.Gate")
    attempt = course.last_attempt()
    assert attempt.error is None and attempt.traceback == ""
    assert torch.equal(attempt.replay(), attempt.output)
    assert not torch.allclose(attempt.output, attempt.expected)


def test_last_attempt_before_any_attempt_says_so():
    with pytest.raises(LookupError, match="no exercise has been run yet"):
        course.last_attempt()
    run_cell(gate_cell(), "demo.Gate")
    with pytest.raises(LookupError, match=r"demo\.patches has not been run yet"):
        course.last_attempt("demo.patches")


def test_hints_come_one_by_one(capsys):
    run_cell(patches_cell("return image[0]"))
    (line,) = told(capsys)
    assert line.endswith("hint: look again")
    for _ in range(2):
        course.hint()
    assert capsys.readouterr().out.splitlines() == [
        "patches, hint 2 of 2: two",
        f"patches: no more hints; read {__name__}.patches, close it, and write it again",
    ]
    course.hint("demo.Gate")
    assert "Gate: no more hints" in capsys.readouterr().out


def test_an_unknown_exercise_is_an_error_with_suggestions():
    with pytest.raises(ValueError, match=r"'demo.patchs'; did you mean demo\.patches"):
        course.exercise("demo.patchs")


def test_another_name_than_the_exercise_has_is_an_error():
    with pytest.raises(ValueError, match="called patches, not patch"):
        run_cell("def patch(image, p): return image")


# ----------------------------------------------------------------------------------------------------- writing checks


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"name": "patches"}, "should read"), ({"level": 6}, "level 6 should be 1 to 5"), ({"minutes": 0}, "minutes 0")],
)
def test_a_check_that_is_written_wrong_is_refused(changes, message):
    arguments = {"name": "demo.x", "reference": "x", "level": 1, "minutes": 1, "why": ""} | changes
    with pytest.raises(ValueError, match=message):
        check(arguments.pop("name"), **arguments)


def test_a_check_without_cases_or_with_a_reference_that_fails_it_is_refused(monkeypatch):
    monkeypatch.setattr(demo_patches, "cases", lambda rng: [])
    with pytest.raises(ValueError, match="yields no cases, so it cannot fail"):
        grading.grade(demo_patches, patches)
    monkeypatch.setattr(demo_patches, "cases", lambda rng: [holds("false", lambda f: False)])
    with pytest.raises(RuntimeError, match="fails its own check"):
        grading.grade(demo_patches, patches)
    monkeypatch.setattr(demo_patches, "cases", lambda rng: [holds("?", lambda f: True, points_to="nowhere")])
    with pytest.raises(ValueError, match="no mistake 'nowhere'"):
        grading.grade(demo_patches, patches)
    with pytest.raises(ValueError, match="already has a mistake 'columns'"):
        demo_patches.mistake("columns", "again", patches)


def test_checking_gives_pytorchs_settings_back():
    def answer(x):
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        return x

    grading.grade(demo_patches, answer, 0)
    assert torch.get_default_dtype() is torch.float32 and not torch.are_deterministic_algorithms_enabled()


def test_blanks_are_found_in_functions_within_functions():
    def answer(x):
        def inner():
            raise TODO  # noqa: F821

        return inner

    assert blanks_in(answer) == ["answer"]


def test_random_inputs_keep_their_promises():
    rng = Random(0)
    assert not rng.strided(2, 3, 4).is_contiguous() and rng.strided(2, 3, 4).shape == (2, 3, 4)
    assert rng.uniform(1000, low=-1, high=3).min() < -0.9 and rng.uniform(1000, low=-1, high=3).max() <= 3
    assert set(rng.integers(2, 5, (100,)).tolist()) == {2, 3, 4}
    assert rng.choice(["a"]) == "a" and rng.normal(2, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("expected", "got", "told"),
    [
        ((1, 2.0), (1, 2.0 + 1e-9), ""),
        ((1, 2.0), (1, 2.1), "output[1]: 2.1, expected 2"),
        ((1, 2), [1], "returns 1 items, expected 2"),
        ({"a": 1}, {"b": 1}, "output lacks the key 'a'"),
        ({"a": 1}, {"a": 1, "b": 1}, "output has a key too many, 'b'"),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, "output['a']: shape (3,), expected (2,)"),
        (1.0, math.nan, "is NaN"),
        (math.nan, math.nan, ""),
        (True, 1, "returns a number, expected a bool"),
        ("cls", "mean", "'mean', expected 'cls'"),
        (None, 3, "returns a number, expected None"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "1 of 2 values differ"),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, math.inf]), ""),
        (torch.tensor([1.0, -math.inf]), torch.tensor([1.0, -1e9]), "−1e+09, expected −inf, in 1 of 2 values"),
        (torch.tensor([1.0, -math.inf]), torch.tensor([math.inf, 0.0]), INFINITE.format(2, 2)),
        (np.ones(2), np.zeros(2), "max error 1, where values reach 1"),
        (torch.ones(2).double(), torch.ones(2).double() + 2e-6, NEARLY.format("max error 2e-06, where values reach 1")),
    ],
)  # fmt: skip
def test_differences_are_told(expected, got, told):
    assert differs(expected, got) == told


# ------------------------------------------------------------------------------------------------------------- expect


@pytest.mark.parametrize(
    ("value", "bounds", "told"),
    [
        (0.84321, {"at_least": 0.81}, "✓ it ≥ 0.81 (measured 0.8432)"),
        (torch.tensor(0.84), {"at_least": 0.81, "at_most": 0.9}, "✓ it ≥ 0.81 and ≤ 0.9 (measured 0.84)"),
        (np.float32(1.5e-7), {"at_most": 1e-6}, "✓ it ≤ 1e-06 (measured 1.5e-07)"),
        (86_567, {"at_most": 90_000}, "✓ it ≤ 90000 (measured 86567)"),
        (True, {"equals": True}, "✓ it = True"),
        ((2, 3), {"equals": (2, 3)}, "✓ it = (2, 3)"),
        (None, {"equals": None}, "✓ it = None"),
        (2.31, {"close_to": 2.3, "tol": 0.02}, "✓ it = 2.3 ± 0.02 (measured 2.31)"),
        (-math.inf, {"at_most": 0}, "✓ it ≤ 0 (measured -inf)"),
    ],
)
def test_expect_prints_the_bound_and_what_was_measured(capsys, value, bounds, told):
    course.expect("it", value, **bounds)
    assert capsys.readouterr().out == told + "\n"
    assert re.sub(expectations.MEASURED, "", told) == told.partition(" (measured")[0]


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (0.8, {"at_least": 0.81}),
        (0.95, {"at_least": 0.81, "at_most": 0.9}),
        (math.nan, {"at_least": 0}),
        (math.nan, {"at_most": 0}),
        (math.nan, {"close_to": 0, "tol": 1}),
        (math.nan, {"equals": math.nan}),
        ((2, 3), {"equals": (3, 2)}),
        (torch.tensor([1, 2]), {"equals": torch.tensor([1, 3])}),
    ],
)
def test_expect_raises_where_lessons_are_tested_and_goes_on_where_they_are_read(capsys, monkeypatch, value, bounds):
    with pytest.raises(course.ExpectationError) as error:
        course.expect("it", value, **bounds)
    assert f"it: measured {value}" in str(error.value)
    assert capsys.readouterr().out == ""
    monkeypatch.delenv("VITCOURSE_STRICT")
    course.expect("it", value, **bounds)
    assert capsys.readouterr().out.startswith(f"✗ it: measured {value}, expected ")


@pytest.mark.parametrize("bounds", [{}, {"close_to": 1}, {"equals": 1, "tol": 1}, {"at_least": math.nan}])
def test_an_expectation_that_cannot_fail_is_refused(bounds):
    with pytest.raises(ValueError, match="expect"):
        course.expect("it", 1, **bounds)


# -------------------------------------------------------------------------------------------------------------- setup


def test_setup_seeds_and_prints_nothing_that_a_notebook_would_keep(capsys, monkeypatch):
    monkeypatch.setenv("VITCOURSE_LESSON", "00_vit")
    session = course.setup()
    first = torch.rand(1), random.random(), np.random.rand()
    course.setup()
    assert (torch.rand(1), random.random(), np.random.rand()) == first
    out, err = capsys.readouterr()
    assert out == "" and "profile quick" in err
    assert session.quick and session.lesson == "00_vit" and session.device.type in ("cpu", "cuda")


def test_setup_takes_the_profile_from_argument_then_environment(monkeypatch):
    monkeypatch.setenv("VITCOURSE_PROFILE", "full")
    assert not course.setup().quick
    assert course.setup("quick").quick
    with pytest.raises(ValueError, match="profile 'fast' is not one of quick, full"):
        course.setup("fast")


# ----------------------------------------------------------------------------------------------------------- progress


@pytest.fixture
def kept(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "progress.json"
    monkeypatch.setenv("VITCOURSE_PROGRESS", str(file))
    return file


def test_progress_is_off_in_tests():
    assert progress.path() is None
    run_cell(gate_cell(), "demo.Gate")
    assert progress.load() == {}


def test_progress_is_recorded_and_a_tick_stays(kept):
    for body in ("raise TODO", "return image", f"{RIGHT}; return y", "return image"):
        run_cell(patches_cell(body))
    run_cell(gate_cell(init="pass"), "demo.Gate")
    entries = json.loads(kept.read_text(encoding="utf-8"))["exercises"]
    assert (entries["demo.patches"]["status"], entries["demo.patches"]["attempts"]) == ("right", 3)
    assert (entries["demo.Gate"]["status"], entries["demo.Gate"]["attempts"]) == ("wrong", 1)
    assert [file.name for file in kept.parent.iterdir()] == ["progress.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"exercises": 3}', '{"exercises": {"a": {"status": "fine"}}}'])
def test_a_damaged_file_is_set_aside_and_not_lost(kept, capsys, content):
    kept.parent.mkdir()
    for expected in ("progress.damaged.json", "progress.damaged1.json"):
        kept.write_text(content, encoding="utf-8")
        progress.record("demo.patches", "right")
        assert (kept.parent / expected).read_text(encoding="utf-8") == content
        assert expected in capsys.readouterr().err
    assert progress.load()["demo.patches"]["status"] == "right"


def test_a_place_that_cannot_be_written_is_a_notice(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("VITCOURSE_PROGRESS", str(tmp_path / "file" / "progress.json"))
    run_cell(patches_cell(f"{RIGHT}; return y"))
    out, err = capsys.readouterr()
    assert out == "✓ patches\n" and "progress is not kept" in err


def test_without_a_home_folder_progress_is_not_kept(monkeypatch, capsys):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    for name in ("VITCOURSE_PROGRESS", "XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(progress.Path, "home", nowhere)
    run_cell(patches_cell(f"{RIGHT}; return y"))
    out, err = capsys.readouterr()
    assert out == "✓ patches\n"
    assert err == (
        "vitcourse: progress is not kept (there is no home folder); set VITCOURSE_PROGRESS to another file\n"
    )
    with pytest.raises(SystemExit, match="there is no home folder; set VITCOURSE_PROGRESS"):
        main(["progress"])


def test_a_crash_while_writing_leaves_the_old_file(kept, monkeypatch):
    progress.record("demo.patches", "right")
    before = kept.read_text(encoding="utf-8")

    def crash(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(progress.json, "dump", crash)
    with pytest.raises(KeyboardInterrupt):
        progress.record("demo.patches", "wrong")
    assert kept.read_text(encoding="utf-8") == before and list(kept.parent.iterdir()) == [kept]


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, ".local/state/vitcourse/progress.json"),
        ("linux", {"XDG_STATE_HOME": "/state"}, "/state/vitcourse/progress.json"),
        ("darwin", {}, "Library/Application Support/vitcourse/progress.json"),
        ("win32", {}, "AppData/Local/vitcourse/progress.json"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/vitcourse/progress.json"),
    ],
)
def test_progress_lies_where_the_platform_keeps_state(monkeypatch, tmp_path, platform, environment, expected):
    for name in ("VITCOURSE_PROGRESS", "XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(progress.sys, "platform", platform)
    monkeypatch.setattr(progress.Path, "home", lambda: tmp_path)
    assert progress.path() == tmp_path / expected


def test_the_table_shows_the_whole_course(kept, monkeypatch):
    monkeypatch.setattr(checks, "TOPICS", ("demo",))
    monkeypatch.setattr(checks, "load_all", lambda: {c.name: c for c in (demo_patches, demo_gate, demo_drop_half)})
    progress.record("demo.patches", "right")
    progress.record("demo.Gate", "wrong")
    head, *lines, total = progress.table().splitlines()
    assert head == "00 demo: 1 of 3, about 15 min left"
    assert [line.split()[0] for line in lines] == ["✓", "✗", "○"]
    assert total == "1 of 3 exercises solved"
    assert progress.table(["other"]) == "0 of 0 exercises solved"


# ------------------------------------------------------------------------------------- every check of the whole course


def course_checks():
    return [spec for spec in checks.load_all().values() if spec.topic in checks.TOPICS]


def proofs(spec):
    """tests/mistakes/<topic>/<exercise>.py: VARIANTS of its mistakes, UNKNOWN and RIGHT answers; all written anew."""
    return importlib.import_module(f"mistakes.{spec.topic}.{checks.file_stem(spec.name)}")


def every(kind):
    return [entry for spec in course_checks() for entry in getattr(proofs(spec), kind)]


@pytest.mark.parametrize("package", [checks, mistakes], ids=lambda package: package.__name__)
def test_every_exercise_has_a_file_of_its_name_and_there_are_no_others(package):
    folder = Path(package.__file__).parent
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.suffix == ".py"]
    expected = ["__init__.py"]
    for topic in (topic for topic in checks.TOPICS if importlib.util.find_spec(f"{checks.__name__}.{topic}")):
        lesson = importlib.import_module(f"{checks.__name__}.{topic}")
        expected += [f"{topic}/{name}.py" for name in ("__init__", *map(checks.file_stem, lesson.EXERCISES))]
    assert sorted(file for file in files if not file.endswith("/_shared.py")) == sorted(expected)


@pytest.mark.parametrize("spec", course_checks(), ids=lambda spec: spec.name)
def test_the_files_of_an_exercise_are_about_it(spec):
    assert spec.cases.__module__ == f"{checks.__name__}.{spec.topic}.{checks.file_stem(spec.name)}"
    proof = proofs(spec)
    assert {name for name, *_ in (*proof.VARIANTS, *proof.UNKNOWN, *proof.RIGHT)} == {spec.name}


SOLUTIONS = Path(__file__).parents[1] / "solutions"


@pytest.mark.parametrize("spec", course_checks(), ids=lambda spec: spec.name)
def test_the_blanks_of_an_exercise_are_counted(spec):
    (source,) = SOLUTIONS.glob(f"*_{spec.topic}.py")
    _, _, rest = source.read_text(encoding="utf-8").partition(f'@exercise("{spec.name}")')
    assert rest.partition("\n# %%")[0].count("# <solution>") == spec.blanks


def prove(spec, seed):
    """On one seed: the reference passes; every mistake is rejected, with its own message."""
    trial = Trial(spec, seed)
    assert grading.judge(trial, spec.reference).status == "right"
    for mistake in spec.mistakes:
        verdict = grading.judge(trial, mistake.faulty)
        assert verdict.status == "wrong", f"{spec.name} accepts the mistake {mistake.key!r}"
        told = verdict.mistake.key if verdict.mistake else None
        assert told == mistake.key, f"{spec.name}: {mistake.key!r} is told {told!r}: {verdict.text}"


def test_only_the_named_gradients_count():
    assert grading.grade(demo_weighted, lambda x, size: x * size.detach(), 0).status == "right"
    for answer, told in (
        (lambda x, size: x.detach() * size, "no gradient reaches `x`"),
        (lambda x, size: 2 * x * size - (x * size).detach(), "the gradient with regard to `x` is not"),
        (lambda x, size: (x * size).detach(), "cut off from the graph"),
    ):
        assert told in grading.grade(demo_weighted, answer, 0).text


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("spec", [demo_patches, demo_gate, demo_drop_half], ids=lambda spec: spec.name)
def test_checks_of_this_file_are_proven(spec, seed):
    prove(spec, seed)


def test_the_proof_finds_a_mistake_that_passes_and_one_that_is_not_named(monkeypatch):
    monkeypatch.setattr(demo_patches, "mistakes", [catalogue.Mistake("right", "it is right", patches)])
    with pytest.raises(AssertionError, match="accepts the mistake 'right'"):
        prove(demo_patches, 0)
    monkeypatch.setattr(demo_patches, "mistakes", [catalogue.Mistake("raises", "it raises", lambda *_: 1 / 0)])
    with pytest.raises(AssertionError, match="'raises' is told None"):
        prove(demo_patches, 0)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("spec", course_checks(), ids=lambda spec: spec.name)
def test_every_check_of_the_course_is_proven(spec, seed):
    prove(spec, seed)


@pytest.mark.parametrize("spec", course_checks(), ids=lambda spec: spec.name)
def test_every_check_of_the_course_is_complete(spec):
    assert len(spec.mistakes) >= 3 and spec.hints and spec.why
    messages = [mistake.message for mistake in spec.mistakes]
    assert len(set(messages)) == len(messages)
    assert spec.reference.__name__ == spec.short_name
    proof = proofs(spec)
    made = {key for _, key, _ in proof.VARIANTS}
    assert made == {mistake.key for mistake in spec.mistakes}, "each mistake needs a variant"
    assert proof.UNKNOWN, "an unknown wrong answer is needed"
    assert proof.RIGHT, "an independent right answer is needed"


@functools.cache
def trials(name):
    return [Trial(checks.find(name), seed) for seed in range(3)]


@pytest.mark.parametrize(("name", "key", "answer"), every("VARIANTS"))
def test_a_variant_of_a_mistake_gets_the_same_diagnosis(name, key, answer):
    for trial in trials(name):
        verdict = grading.judge(trial, answer)
        assert verdict.status == "wrong" and verdict.mistake and verdict.mistake.key == key, verdict.text


@pytest.mark.parametrize(("name", "answer"), every("UNKNOWN"))
def test_an_unknown_wrong_answer_is_rejected_without_a_diagnosis(name, answer):
    for trial in trials(name):
        verdict = grading.judge(trial, answer)
        assert verdict.status == "wrong" and verdict.mistake is None, verdict.mistake


@pytest.mark.parametrize(("name", "answer"), every("RIGHT"))
def test_an_independent_right_answer_is_accepted(name, answer):
    for trial in trials(name):
        verdict = grading.judge(trial, answer)
        assert verdict.status == "right", verdict.text
