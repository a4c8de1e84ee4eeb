"""What no exercise has to remember: the probes that are made from its cases, and the lint over all of them."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

from vitcourse.course import catalogue, checks, grading, lint, probes
from vitcourse.course.cases import Case
from vitcourse.course.checks import build, call, check
from vitcourse.course.trial import Trial


class Bias(nn.Module):
    """x plus a number for each place."""

    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, dim)
        self.places = nn.Parameter(torch.zeros(100))

    def forward(self, x, grid):
        return self.fc(x) + self.places[: x.shape[1], None]


@pytest.fixture
def bias(monkeypatch):
    monkeypatch.setattr(catalogue, "CHECKS", dict(catalogue.CHECKS))

    @check("demo.Bias", reference=f"{__name__}.Bias", level=1, minutes=1, why="It counts.")
    def spec(rng):
        yield build(7).call(rng.normal(2, 15, 7), (3, 5, 0))

    return spec


def kinds(trial):
    return {kind for series in trial.series for probe in series.probes for kind in probe.kinds}


# ------------------------------------------------------------------------------------------------------- deriving cases


def test_from_one_case_come_other_sizes_values_and_modes(bias):
    (series,) = Trial(bias, 0).series
    told = {probe.kinds: tuple(probe.case.args[0].shape) + probe.case.args[1] for probe in series.probes}
    assert told == {
        ("batch", "larger"): (3, 60, 7, 6, 10, 0),
        ("single", "smaller"): (1, 4, 7, 1, 4, 0),
        ("transposed",): (2, 15, 7, 5, 3, 0),
        ("large",): (2, 15, 7, 3, 5, 0),
        ("tiny",): (2, 15, 7, 3, 5, 0),
        ("training",): (2, 15, 7, 3, 5, 0),
        ("evaluation",): (2, 15, 7, 3, 5, 0),
    }


def test_what_the_check_exempts_is_not_tried(bias):
    bias.exempt.update(larger="no", batch="no", training="no", tiny="no")
    assert kinds(Trial(bias, 0)) == {"single", "smaller", "transposed", "large", "evaluation"}


def test_equal_sizes_change_together_and_new_rows_are_new_numbers():
    case = probes.resized(Case((torch.arange(3.0).add(0.5), torch.arange(6).view(2, 3)), {}), {3: 5})
    assert case.args[0].shape == (5,) and len(case.args[0].unique()) == 5
    assert case.args[1].tolist() == [[0, 1, 2, 0, 1], [3, 4, 5, 3, 4]]


def test_counts_stay_counts():
    sizes, tokens = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.25, 0.5]])
    scaled = probes.scaled(Case((sizes, tokens), {}), 1024.0)
    assert torch.equal(scaled.args[0], sizes) and torch.equal(scaled.args[1], 1024 * tokens)


def test_rows_and_columns_are_exchanged_in_grids_images_and_named_sides():
    image = torch.zeros(2, 3, 4, 5)
    first, last = probes.transposed(Case((image, (4, 5)), {}), ["x", "size"])
    assert first.args[0].shape == (2, 3, 5, 4) and first.args[1] == (5, 4)
    assert last.args[0].shape == (2, 4, 3, 5)
    (turned,) = probes.transposed(Case((3, 5, 16), {}), ["h", "w", "dim"])
    assert turned.args == (5, 3, 16)


# ---------------------------------------------------------------------------------------------------- what is then told


def wrong(forward):
    return type("Answer", (Bias,), {"forward": forward})


def kept(self, x, grid):
    if not hasattr(self, "first"):
        self.first = self.places[: x.shape[1], None]
    return self.fc(x) + self.first


def kept_for_each_size(self, x, grid):
    table = self.__dict__.setdefault("tables", {})
    return (
        self.fc(x)
        + table.setdefault(x.shape[1], self.places[: x.shape[1], None].detach().clone())
        + 0 * self.places.sum()
    )


TOLD = {
    "right when called once; called a second time, with another batch size, on larger inputs (x (3, 60, 7), grid "
    "(6, 10, 0)): RuntimeError": kept,
    "in training mode the output changes from call to call: is there dropout?": lambda self, x, grid: (
        nn.functional.dropout(Bias.forward(self, x, grid), 0.5, self.training)
    ),
    "right on other inputs, but with rows and columns exchanged (x (2, 15, 7), grid (5, 3, 0)): max error": (
        lambda self, x, grid: Bias.forward(self, x, grid) + (grid[:2] == (5, 3))
    ),
    "right on other inputs, but with a batch of one, on smaller inputs (x (1, 4, 7), grid (1, 4, 0)): shape (4, 7)": (
        lambda self, x, grid: Bias.forward(self, x, grid).squeeze(0)
    ),
    "right on other inputs, but with large values: max error": (
        lambda self, x, grid: Bias.forward(self, x.clamp(-50, 50), grid)
    ),
    "in training mode: max error": lambda self, x, grid: Bias.forward(self, x, grid) + self.training,
}


@pytest.mark.parametrize("told", TOLD)
def test_what_a_probe_finds_is_told_by_what_broke(bias, told):
    verdict = grading.grade(bias, wrong(TOLD[told]), 0)
    assert verdict.status == "wrong" and verdict.telling and verdict.mistake is None
    assert told in verdict.text


def test_what_is_kept_from_before_a_step_of_training_is_found_and_can_be_replayed(bias):
    bias.exempt.update(dict.fromkeys(probes.KINDS.keys() - {"training", "evaluation"}, "to see the others"))
    bias.gradients = False
    verdict = grading.grade(bias, wrong(kept_for_each_size), 0)
    assert "called a second time, in training mode: max error" in verdict.text
    assert "is something kept from an earlier call?" in verdict.text
    assert torch.equal(verdict.attempt.replay(), verdict.attempt.output)


def test_the_reference_passes_its_probes_and_so_does_a_batch_norm(bias, monkeypatch):
    class Norm(nn.Module):
        def __init__(self, dim, momentum=0.1):
            super().__init__()
            self.norm = nn.BatchNorm2d(dim, momentum=momentum)

        def forward(self, x):
            return self.norm(x)

    monkeypatch.setitem(globals(), "Norm", Norm)

    @check("demo.Norm", reference=f"{__name__}.Norm", level=1, minutes=1, why="It averages.")
    def spec(rng):
        yield build(3).call(rng.normal(2, 3, 4, 5))

    assert grading.grade(bias, Bias, 0).status == grading.grade(spec, Norm, 0).status == "right"
    slow = grading.grade(spec, lambda dim: Norm(dim, 0.01), 0)
    assert "on the first input, in evaluation mode" in slow.text


def flipped(x):
    return x.flip(1)


def sine(x):
    return x.sin()


def test_bytes_are_for_those_who_only_move_values(monkeypatch):
    monkeypatch.setattr(catalogue, "CHECKS", {})
    names = {"level": 1, "minutes": 1, "why": "Pixels."}

    @check("demo.flip", reference=f"{__name__}.flipped", **names)
    def flip(rng):
        yield call(rng.normal(2, 3))

    @check("demo.sin", reference=f"{__name__}.sine", **names)
    def sin(rng):
        yield call(rng.normal(2, 3))

    assert "integers" in kinds(Trial(flip, 0))
    assert "integers" not in kinds(Trial(sin, 0))
    told = grading.grade(flip, lambda x: flipped(x) * 1.0, 0).text
    assert told.startswith("right on other inputs, but on integers from 0 to 255: dtype float32, expected uint8")


# --------------------------------------------------------------------------------------------- the checks of the course


def course_checks():
    return [spec for spec in checks.load_all().values() if spec.topic in checks.TOPICS]


@functools.cache
def trial_of(name):
    return Trial(checks.find(name), 0)


@pytest.mark.parametrize("spec", course_checks(), ids=lambda spec: spec.name)
def test_the_cases_of_every_check_leave_nothing_unseen(spec):
    assert lint.flaws(trial_of(spec.name)) == []


@pytest.mark.parametrize("spec", [spec for spec in course_checks() if spec.exempt], ids=lambda spec: spec.name)
def test_nothing_is_exempted_without_need_or_reason(spec):
    assert all(len(reason) > 10 for reason in spec.exempt.values())
    bare = Trial(dataclasses.replace(spec, exempt={}), 0)
    missing = "\n".join(lint.flaws(bare))
    for name in spec.exempt:
        needed = (
            lint.flaws_of(bare, name) if name in lint.RULES else name in kinds(bare) or f"exempt {name!r}" in missing
        )
        assert needed, f"{spec.name} exempts {name!r}, which does not apply anyway"


@pytest.mark.parametrize("spec", course_checks(), ids=lambda spec: spec.name)
def test_every_class_is_called_again_and_trained(spec):
    if isinstance(spec.reference, type):
        assert {"batch", "training", "evaluation"} <= kinds(trial_of(spec.name))


class Deep(nn.Module):
    def __init__(self, depth, window_size):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, grid):
        return self.fc(x)


def test_the_lint_finds_each_of_the_five_causes(monkeypatch):
    monkeypatch.setattr(catalogue, "CHECKS", {})

    @check("demo.Deep", reference=f"{__name__}.Deep", level=1, minutes=1, why="It is deep.")
    def spec(rng):
        yield build(2, window_size=4).call(rng.normal(4, 4, 4), (2, 2, 0))

    text = "\n".join(lint.flaws(Trial(spec, 0)))
    for told in ("different sizes only", "`window_size` is never odd", "`depth` is never 3", "`grid` is always square"):
        assert told in text
    spec.exempt["deep"] = "for the sake of this test"
    assert "`depth` is never 3" not in "\n".join(lint.flaws(Trial(spec, 0)))


def test_an_exemption_of_nothing_that_is_known_is_refused():
    with pytest.raises(ValueError, match="demo.x exempts 'sizse', which is none of"):
        check("demo.x", reference="x", level=1, minutes=1, why="", exempt={"sizse": "a slip"})
    with pytest.raises(ValueError, match="demo.x exempts 'larger' without a reason"):
        check("demo.x", reference="x", level=1, minutes=1, why="", exempt={"larger": ""})
