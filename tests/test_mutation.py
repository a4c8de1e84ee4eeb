"""The mutation test of the graders: its parts, and that its report is about the sources as they are."""

import dataclasses
import random

import pytest
import torch

from tests.mutation import domain, operators, report, trials
from tests.mutation.answers import Solution, solution
from vitcourse.course import catalogue, checks, probes
from vitcourse.course.cases import build

CELL = '''\
@exercise("demo.scaled")
def scaled(x, factor):
    """Not to be changed: 1 + 1."""
    y = x.mean(dim=1, keepdim=True)
    return factor * x - y[:, :1]
'''


def changed(source, lines):
    return {(m.operator, m.source) for m in operators.mutants(source, lambda n: getattr(n, "lineno", 0) in lines)}


def test_mutants_change_one_place_between_the_marks_and_are_all_different():
    made = operators.mutants(CELL, lambda node: getattr(node, "lineno", 0) in {4, 5})
    assert len({m.source for m in made}) == len(made) > 30
    assert all("Not to be changed: 1 + 1." in m.source and "def scaled(x, factor):" in m.source for m in made)
    lines = {(m.operator, m.source.splitlines()[-1].strip()) for m in made}
    assert lines >= {
        ("operator", "return factor * x + y[:, :1]"),
        ("operand order", "return y[:, :1] - factor * x"),
        ("operand dropped", "return factor * x"),
        ("name", "return x * x - y[:, :1]"),
        ("off by one", "return factor * x - y[:, :2]"),
        ("slice", "return factor * x - y[:, 1:]"),
        ("index dropped", "return factor * x - y"),
        ("order", "return factor * x - y[:1, :]"),
        ("detached", "return (factor * x - y[:, :1]).detach()"),
    }
    means = {(m.operator, m.source.splitlines()[-2].strip()) for m in made}
    assert means >= {
        ("statement dropped", "pass"),
        ("keyword dropped", "y = x.mean(dim=1)"),
        ("argument order", "y = x.mean(dim=True, keepdim=1)"),
        ("function", "y = x.sum(dim=1, keepdim=True)"),
        ("call dropped", "y = x"),
        ("constant", "y = x.mean(dim=-1, keepdim=True)"),
        ("constant", "y = x.mean(dim=1, keepdim=False)"),
    }


def test_mutants_of_control_flow_and_patterns():
    source = (
        "def f(xs, n):\n    if n > 0:\n        for x in xs:\n            n += x\n    return rearrange(n, 'a b -> b a')"
    )
    texts = {text for _, text in changed(source, {2, 3, 4, 5})}

    def variant(old, new):
        return source.replace(old, new) in texts

    assert variant("if n > 0", "if n >= 0") and variant("if n > 0", "if n < 0") and variant("if n > 0", "if not n > 0")
    assert variant("in xs", "in list(xs)[1:]") and variant("in xs", "in list(xs)[:-1]")
    assert variant("in xs", "in list(xs)[:2]")
    assert variant("n += x", "n += x\n            break") and variant("n += x", "n -= x") and variant("+=", "=")
    assert variant("a b -> b a", "a b -> a b")


def test_what_examples_and_single_calls_hide_has_mutants_of_its_own():
    forward = "class M:\n\n    def forward(self, x, s):\n        y = x * self.n\n        return y[s // 2]"
    lines = {line.strip() for _, text in changed(forward, {4, 5}) for line in text.splitlines()}
    assert {"y = x * 1", "y = x * 3", "y = 2 * self.n", "return y[(s + 1) // 2]", "return y[(s - 1) // 2]"} <= lines
    assert "y = self.__dict__.setdefault('kept x * self.n', x * self.n)" in lines
    assert "y = x * self.n / 2 if self.training else x * self.n" in lines


def test_the_order_of_mutants_takes_all_kinds_in_turn_and_depends_on_the_seed():
    inside = lambda node: getattr(node, "lineno", 0) in {4, 5}  # noqa: E731
    first, again, other = (operators.mutants(CELL, inside, seed) for seed in (0, 0, 1))
    assert first == again != other and {m.source for m in first} == {m.source for m in other}
    kinds = len({m.operator for m in first})
    assert len({m.operator for m in first[:kinds]}) == kinds


# ------------------------------------------------------------------------------------------------- a check with a hole


@pytest.fixture
def examiner(monkeypatch):
    """Of an exercise whose check never sees a map that is not square, nor a second call."""
    monkeypatch.setattr(catalogue, "CHECKS", dict(catalogue.CHECKS))
    nothing = dict.fromkeys(probes.KINDS, "to leave the hole open")

    @checks.check("demo.Halves", reference="tests.test_mutation.Halves", level=1, minutes=1, why="…", exempt=nothing)
    def halves(rng):
        yield build(2).call(rng.normal(1, 4, 4))

    monkeypatch.setattr(checks, "find", {"demo.Halves": halves}.__getitem__)
    monkeypatch.setattr(trials, "solution", lambda name: Solution(name, "import torch", HALVES, frozenset({3, 7, 8})))
    monkeypatch.setattr(domain, "import_module", lambda name: None)
    monkeypatch.setitem(domain._DOMAINS, "demo.Halves", draw_halves)
    return trials.Examiner("demo.Halves")


HALVES = """\
class Halves(torch.nn.Module):
    def __init__(self, n):
        super().__init__(); self.n = n
        self.scale = torch.nn.Parameter(torch.ones(n))

    def forward(self, x):
        h, w = x.shape[1:]
        return self.scale[0] * x[:, :h // 2].sum() + w * x.mean()
"""
exec(HALVES, globals())


def draw_halves(rng):
    return [build(2).call(rng.floats(2, rng.size(2, 5), rng.size(2, 5))) for _ in range(2)]


def test_a_mutant_that_slips_through_a_hole_survives(examiner):
    assert examiner.verdict() == trials.Verdict("equivalent", on=200, accepted=(0, 1, 2))
    survivor = examiner.verdict(HALVES.replace("h, w = x.shape[1:]", "w, h = x.shape[1:]"))
    assert survivor.status == "survived" and survivor.accepted == (0, 1, 2) and "max error" in survivor.differs
    assert survivor.on <= 10 and not survivor.raises
    assert examiner.verdict(HALVES.replace("x[:, :h // 2]", "x[:, :1]")).status == "rejected"
    assert examiner.verdict(HALVES.replace("x[:, :h // 2]", "x[:, :h // 2, :]")).status == "equivalent"
    raises = examiner.verdict(HALVES.replace("w * x", "v * x"))
    assert raises.status == "rejected" and raises.raises and "NameError" in raises.differs
    assert examiner.verdict("def").status == examiner.verdict("1 / 0").status == "broken"


def test_a_mutant_that_differs_in_its_second_call_counts(examiner):
    kept = HALVES.replace("return ", "self.w = w = getattr(self, 'w', w)\n        return ")
    verdict = examiner.verdict(kept)
    assert verdict.status == "survived" and verdict.on <= 10


def test_a_mutant_without_end_is_stopped(examiner, monkeypatch):
    monkeypatch.setattr(domain, "SECONDS", 0.2)
    examiner.trials = [trial for trial in examiner.trials if trial.seed == 0]
    examiner.trials[0].spec = dataclasses.replace(examiner.trials[0].spec, seconds=0.2)
    endless = examiner.verdict(HALVES.replace("return ", "while h: pass\n        return "))
    assert endless.status == "rejected" and endless.raises and "ran too long" in endless.differs


def test_a_worker_outlives_what_hangs_or_ends_it(monkeypatch):
    worker = trials.Worker()
    monkeypatch.setattr(trials, "PATIENCE", 30.0)
    name = "hierarchical.relative_position_index"
    source = solution(name).source
    assert worker.verdict(name, source.replace("p, q = window_size", "import os; os._exit(1)")).status == "hung"
    assert worker.verdict(name, source.replace("p, q = window_size", "q, p = window_size")).status == "rejected"
    worker.stop()


# ------------------------------------------------------------------------------------------------------ the real course


@pytest.mark.parametrize("name", report.exercises())
def test_a_domain_is_varied_and_the_solution_does_on_it_what_the_reference_does(name):
    own = domain.Domain(checks.find(name))
    assert own.difference(solution(name).answer(), inputs=3) is None
    assert len({shapes(own.cases(i)) for i in range(25)}) >= 8
    assert repr(own.cases(0)) == repr(own.cases(0))


def shapes(cases):
    described = lambda value: tuple(value.shape) if isinstance(value, torch.Tensor) else repr(value)  # noqa: E731
    return tuple((repr(c.init), c.training, *map(described, (*c.args, *c.kwargs.values()))) for c in cases)


def test_domains_do_not_read_the_checks():
    for file in (report.HERE / "domains").glob("*.py"):
        source = file.read_text(encoding="utf-8")
        assert ".checks" not in source and "mistakes" not in source, file.name


def test_the_report_is_about_the_sources_as_they_are_and_few_mutants_survive():
    entries = report.read()
    stale = [
        name for name in report.exercises() if entries.get(name, {}).get("fingerprint") != report.fingerprint(name)
    ]
    assert not stale, "python -m tests.mutation brings the report up to date"
    for name, entry in entries.items():
        all_made = len(entry["verdicts"]) == entry["possible"]
        assert entry["counted"] >= report.AT_LEAST or all_made, f"{name}: only {entry['counted']} mutants count"
    total = report.totals(entries)
    assert total["survived"] <= report.MOST_SURVIVE * total["counted"]
    assert report.TABLE.read_text(encoding="utf-8") == report.table(entries)


def test_comments_docstrings_and_blank_lines_are_no_change():
    source = (report.ROOT / "vitcourse" / "course" / "cases.py").read_text(encoding="utf-8")
    code = report.code_of(source)
    assert report.code_of(source.replace("Standard normal", "Gaussian").replace("\n\n", "  # more\n\n\n")) == code
    assert report.code_of(source.replace("low + (high", "low - (high")) != code


@pytest.mark.thorough
@pytest.mark.parametrize("name", report.exercises())
def test_a_sample_gets_the_verdicts_of_the_report(name):
    verdicts, examiner = report.read()[name]["verdicts"], trials.Examiner(name)
    mutants = examiner.solution.mutants()
    for i in random.Random(name).sample(range(len(verdicts)), min(8, len(verdicts))):
        assert report.LETTERS[examiner.verdict(mutants[i].source).status] == verdicts[i], mutants[i].source
