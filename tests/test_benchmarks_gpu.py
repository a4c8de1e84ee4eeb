"""`make gpu` on pretended stages: budgets, failures, and how it goes on."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import common, gpu
from benchmarks.gpu import Record, Stage, Step, run_stage, show


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "results_dir", lambda: tmp_path)
    monkeypatch.setattr(gpu, "results_dir", lambda: tmp_path)
    monkeypatch.setattr(gpu, "PRINTED", tmp_path / "printed")
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    return tmp_path


def python(name: str, code: str) -> Step:
    return Step(name, (sys.executable, "-c", code))


def outcomes(stage: Stage, record: Record) -> list[str | None]:
    return [record.outcome(stage, step) for step in stage.steps]


def test_steps_are_written_down_as_they_end_and_not_run_again(folder):
    ran = folder / "ran.txt"
    note = f"open({str(ran)!r}, 'a').write('{{}}')\n"
    fails = note.format("b") + "print('two of three'); print(); raise SystemExit(1)"
    stage = Stage("toy", 600, (python("good", note.format("a") + "print('all three')"), python("bad", fails)))
    run_stage(stage, Record("cpu", "1", folder / "saved"))
    rows = json.loads((folder / "saved" / "gpu.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["step"], row["outcome"], row["last_line"]) for row in rows] == [
        ("good", "passed", "all three"),
        ("bad", "failed", "two of three"),
    ]
    assert (folder / "saved" / "toy bad.txt").read_text(encoding="utf-8") == "two of three\n\n"

    run_stage(stage, Record("cpu", "1"))
    assert ran.read_text() == "ab", "what ended by itself is not run again"
    run_stage(stage, Record("cpu", "1"), again=True)
    assert ran.read_text() == "abb", "but for what failed, if it is asked for"
    record = Record("cpu", "2")
    assert outcomes(stage, record) == [None, None], "other sources are another matter"
    run_stage(stage, record)
    assert ran.read_text() == "abbab"


def test_a_stage_that_overruns_stops_with_what_it_has_and_goes_on_later(folder, monkeypatch):
    now, takes, ran = [0.0], {"quick": 40.0, "slow": 100.0, "last": 10.0}, []
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def pretended(step, seconds, printed):
        ran.append(step.name)
        now[0] += min(seconds, takes[step.name])
        return "passed" if takes[step.name] <= seconds else "stopped", takes[step.name], ""

    monkeypatch.setattr(gpu, "run_step", pretended)
    stage = Stage("toy", 120, tuple(Step(name, ()) for name in takes))
    record = Record("cpu", "1")
    run_stage(stage, record)
    assert (ran, now) == (["quick", "slow"], [120.0])
    assert outcomes(stage, record) == ["passed", "stopped", None]
    assert not show([stage], record)

    resumed = Record("cpu", "1")
    run_stage(stage, resumed)
    assert ran == ["quick", "slow", "slow", "last"], "with a budget of its own again, from the step that was stopped on"
    assert outcomes(stage, resumed) == ["passed", "passed", "passed"]
    assert show([stage], resumed)


def test_a_step_that_does_not_end_is_stopped(folder):
    printed = folder / "printed.txt"
    waits = python("waits", "import time; time.sleep(10**6)")
    outcome, seconds, _ = gpu.run_step(waits, 1, printed)
    assert outcome == "stopped"
    assert seconds >= 1


def test_what_a_step_has_started_ends_with_it(folder):
    alive, child = folder / "alive", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nimport time\n"
    child += f"while True:\n    open({str(alive)!r}, 'a').write('.')\n    time.sleep(0.01)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    stage = Stage("toy", 600, (python("parent", parent),))
    step, printed = stage.steps[0], folder / "printed.txt"
    assert gpu.run_step(step, 5, printed)[0] == "stopped"
    before = alive.stat().st_size if alive.exists() else 0
    time.sleep(0.5)
    assert (alive.stat().st_size if alive.exists() else 0) == before


def test_a_stage_says_what_it_lacks(folder):
    stage = Stage("toy", 600, (python("a", ""),), needs=("json", "no_such_module"))
    record = Record("cpu", "1")
    run_stage(stage, record)
    assert outcomes(stage, record) == ["missing no_such_module"]
    there = Stage("toy", 600, stage.steps, needs=("json",))
    run_stage(there, record)
    assert outcomes(there, record) == ["passed"]


def test_the_first_three_stages_fit_into_ten_minutes():
    kernels, attention, lessons, rest = gpu.stages()
    assert kernels.seconds + attention.seconds + lessons.seconds <= 600
    steps = [step for stage in gpu.stages() for step in stage.steps]
    assert len({(stage.name, step.name) for stage in gpu.stages() for step in stage.steps}) == len(steps)
    tested = {Path(word).stem for step in kernels.steps for word in step.command if word.startswith("tests/")}
    assert tested == {file.stem for file in Path("tests/gpu").glob("test_*.py")}, "every file of tests/gpu has its turn"
    assert len(lessons.steps) == len(list(Path("solutions").glob("*.ipynb")))


def test_without_cuda_it_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "needs a CUDA device" in capsys.readouterr().err
    assert gpu.main(["--list"]) == 0
    assert "240 s" in capsys.readouterr().out
