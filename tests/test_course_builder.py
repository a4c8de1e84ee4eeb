"""From the source of a lesson to its two executed notebooks, and back: what `build` makes, and what `check` finds."""

import json
import os
import platform
import shutil
import subprocess
import sys
from io import BytesIO, StringIO
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from vitcourse.course import builder, checks, lessons
from vitcourse.course.__main__ import main

ROOT = Path(__file__).parents[1]

SOURCE = '''\
# %% [markdown]
# # A tiny lesson

# %%
import sys

import torch

from vitcourse import course
from vitcourse.course import TODO, exercise, expect
from vitcourse.course.checks import call, check

session = course.setup()


@check("demo.normalize", reference="torch.nn.functional.normalize", level=1, minutes=1, why="Short.")
def _(rng):
    yield call(rng.normal(2, 3))
    yield call(rng.normal(2, 1))


# %%
@exercise("demo.normalize")
def normalize(x):
    """x / |x|."""
    # <solution>
    length = x.norm(dim=1, keepdim=True)
    return x / length
    # </solution>


# %% tags=["hide"]
# NBVAL_IGNORE_OUTPUT
print("one", flush=True)
print("a notice", file=sys.stderr, flush=True)
print("two", flush=True)

# %%
# alt: A "line" that rises
# from left to right.
import matplotlib.pyplot as plt

plt.figure(figsize=(1, 1), dpi=40)
plt.plot([1, 2])
plt.show()
expect("length", normalize(torch.ones(1, 4)).norm(), close_to=1, tol=1e-6)
print("an error to be skipped", session.profile)
print("and its notice", file=sys.stderr)
'''


def write_lesson(root, source=SOURCE):
    for folder in lessons.EDITIONS.values():
        (root / folder).mkdir(parents=True)
    (root / "solutions" / "00_demo.py").write_text(source, encoding="utf-8")
    return lessons.Lesson(root, "00_demo")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A course of one lesson, built; tests change copies of it."""
    root = tmp_path_factory.mktemp("course")
    lesson = write_lesson(root)
    assert builder.build([lesson]) == []
    return lesson


@pytest.fixture
def course_copy(built, tmp_path):
    shutil.copytree(built.root, tmp_path / "course")
    return lessons.Lesson(tmp_path / "course", built.stem)


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


# ------------------------------------------------------------------------------------------------------------ editions


def test_the_student_edition_has_blanks_and_circles_the_solved_one_ticks(built):
    student, solved = (nbformat.read(built.notebook(edition), 4) for edition in ("student", "solved"))
    nbformat.validate(student)
    assert [cell.id for cell in student.cells] == [f"00-demo-{i:03d}" for i in range(6)]
    assert student.cells[3].source.endswith('"""x / |x|."""\n    raise TODO')
    assert solved.cells[3].source.endswith("length = x.norm(dim=1, keepdim=True)\n    return x / length")
    assert printed(student.cells[3]) == "○ normalize: not attempted yet, the course uses its own\n"
    assert printed(solved.cells[3]) == "✓ normalize\n"
    assert printed(student.cells[5]) == "✓ length = 1 ± 1e-06 (measured 1)\nan error to be skipped quick\n"


@pytest.mark.parametrize("edition", lessons.EDITIONS)
def test_outputs_are_stored_without_what_changes_from_run_to_run(built, edition):
    notebook = nbformat.read(built.notebook(edition), 4)
    streams, figure = notebook.cells[4], notebook.cells[5].outputs[0]
    assert [(output.name, output.text) for output in streams.outputs] == [("stdout", "one\ntwo\n")]
    assert streams.metadata == {"tags": ["hide", "nbval-ignore-output"]} and streams.source.startswith("print(")
    assert set(figure.data) == {"image/png", "text/plain"}
    assert figure.metadata["image/png"]["alt"] == 'A "line" that rises from left to right.'
    assert notebook.cells[5].source.startswith("import matplotlib")
    assert [cell.metadata for cell in notebook.cells if cell is not streams and cell.metadata] == [
        {"alt": 'A "line" that rises from left to right.'}
    ]
    assert notebook.cells[2].outputs == []  # what the machine's device is called
    assert set(notebook.metadata) == {"kernelspec", "language_info", "vitcourse"}
    assert "version" not in notebook.metadata.language_info


def test_a_second_run_gives_the_same_bytes(built):
    notebook = lessons.render(built, "solved")
    builder.execute(notebook, built.root / "solutions", 100)
    assert nbformat.writes(notebook) + "\n" == built.notebook("solved").read_text(encoding="utf-8")


def test_answers_pasted_into_the_student_edition_are_judged(built, tmp_path):
    """A right answer, then an endless loop, in a real kernel. Only the loop is in a hurry."""
    notebook = nbformat.read(built.notebook("student"), 4)
    answer = notebook.cells[3].source
    notebook.cells[3].source = answer.replace("raise TODO", "return x / (x * x).sum(1, True) ** 0.5")
    limit = "checks.find('demo.normalize').seconds = 0.5\n"
    loop = "from vitcourse.course import checks\n" + limit + answer.replace("raise TODO", "while True:\n        pass")
    notebook.cells.insert(4, nbformat.v4.new_code_cell(loop))
    builder.execute(notebook, tmp_path, 100)
    assert printed(notebook.cells[3]) == "✓ normalize\n"
    assert printed(notebook.cells[4]).startswith("✗ normalize: stopped, it ran too long")
    assert printed(notebook.cells[6]).startswith("✓ length")


def test_nbval_passes_in_strict_mode_and_finds_a_changed_output(course_copy):
    file = course_copy.notebook("student")
    command = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "conftest", "-p", "no:cacheprovider"]
    content = file.read_text(encoding="utf-8")
    assert content.count("to be skipped quick") == 1
    assert content.count("(measured 1)") == 1  # on another machine, 0.9999999
    content = content.replace("to be skipped quick", "to be skipped slow").replace("(measured 1)", "(measured 0.99)")
    file.write_text(content, encoding="utf-8")
    edit(course_copy, "student", lambda nb: nb.cells[4].update(source=f"{nb.cells[4].source}\nexpect('', 1, equals=2)"))
    # at home with somebody who has habits
    home = course_copy.root / "home"
    for name, habit in {
        ".ipython/profile_default/startup/hello.py": "get_ipython().events.register('pre_run_cell', print)",
        ".config/matplotlib/matplotlibrc": "text.usetex: True",
    }.items():
        (home / name).parent.mkdir(parents=True)
        (home / name).write_text(habit, encoding="utf-8")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("IPYTHON", "JUPYTER", "MATPL"))
    }
    result = subprocess.run(
        [*command, "--nbval", str(file)],
        cwd=ROOT,
        env=environment | {"HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "2 failed, 3 passed" in result.stdout, result.stdout[-3000:]
    assert "Cell 3: Cell execution caused" in result.stdout and "measured 1, expected = 2" in result.stdout
    assert "Cell 4: Cell outputs differ" in result.stdout and "skipped slow" in result.stdout
    assert "notice\n" not in result.stdout


def test_a_failing_cell_is_named_and_the_old_notebooks_stay(course_copy, monkeypatch, capsys):
    before = {edition: course_copy.notebook(edition).read_bytes() for edition in lessons.EDITIONS}
    monkeypatch.setattr(lessons, "setup_cell", lambda *_: "1")  # spares the kernel importing torch
    course_copy.source.write_text("# %% [markdown]\n# # T\n# %%\nx = 1\n# %%\nprint(x)\nx / 0\n", encoding="utf-8")
    (failure,) = builder.build([course_copy])
    assert "00_demo: solved edition, cell 3 (00-demo-003): ZeroDivisionError: division by zero" in failure
    assert "    x / 0" in failure
    assert {edition: course_copy.notebook(edition).read_bytes() for edition in lessons.EDITIONS} == before
    monkeypatch.setattr(lessons, "setup_cell", lambda *_: "")  # it, too, may take a second where much else runs
    course_copy.source.write_text("# %%\nimport time\ntime.sleep(60)\n", encoding="utf-8")
    (failure,) = builder.build([course_copy], seconds=1)
    assert "cell 1 (00-demo-001)" in failure and "time.sleep(60)" in failure


def test_build_leaves_alone_what_is_up_to_date(built, capsys, monkeypatch):
    monkeypatch.setattr(builder, "execute", lambda *_: pytest.fail("executed"))
    assert builder.build([built]) == []
    assert capsys.readouterr().out == "00_demo: up to date\n"
    with pytest.raises(pytest.fail.Exception, match="executed"):
        builder.build([built], force=True)


# -------------------------------------------------------------------------------------------------------- setup cell


def run_setup_cell(source, folder, *, gpu=False):
    """Run the cell in a bare interpreter that has no vitcourse; returns what it prints and what it dies of."""
    prelude = (
        "import sys, types; sys.path = [p for p in sys.path if 'vitcourse' not in p]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "import subprocess; subprocess.run = lambda command, check: sys.stderr.write(f'RUN {command[1:]}')\n"
    )
    epilogue = (
        "\nimport importlib.util; spec = importlib.util.find_spec('vitcourse')\n"
        "sys.stderr.write(f'FOUND {spec and spec.origin} TRITON {os.environ.get(\"TRITON_INTERPRET\")}')"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    code = f"GPU = {gpu}\n{prelude}{source}{epilogue}"
    return subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


def test_the_setup_cell_finds_the_clone_it_is_in(tmp_path):
    (tmp_path / "clone" / "vitcourse" / "course").mkdir(parents=True)
    (tmp_path / "clone" / "vitcourse" / "__init__.py").touch()
    (tmp_path / "clone" / "vitcourse" / "devices.py").write_text(
        "import __main__, types\n"
        "def resolve_device(): return types.SimpleNamespace(type='cuda' if __main__.GPU else 'mps')\n"
    )
    (tmp_path / "clone" / "work" / "deep").mkdir(parents=True)
    source = lessons.setup_cell(lessons.Lesson(tmp_path, "00_demo"), "student")
    result = run_setup_cell(source, tmp_path / "clone" / "work" / "deep")
    assert result.stdout == ""
    assert f"FOUND {tmp_path / 'clone' / 'vitcourse' / '__init__.py'} TRITON 1" in result.stderr, result.stderr
    assert "TRITON None" in run_setup_cell(source, tmp_path / "clone" / "work", gpu=True).stderr


def test_the_setup_cell_is_not_fooled_by_a_folder_of_the_same_name(tmp_path):
    (tmp_path / "vitcourse").mkdir()
    result = run_setup_cell(lessons.setup_cell(lessons.Lesson(tmp_path, "00_demo"), "student"), tmp_path)
    assert "ModuleNotFoundError: vitcourse is not here: open this notebook in a clone of it" in result.stderr


def test_the_setup_cell_installs_from_the_one_address(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project.urls]\nRepository = "https://example.org/vitcourse"\n', encoding="utf-8"
    )
    source = lessons.setup_cell(lessons.Lesson(tmp_path, "00_demo"), "student")
    assert source.count("https://example.org/vitcourse") == 1
    result = run_setup_cell(source, tmp_path)
    assert (
        "RUN ['-m', 'pip', 'install', '--quiet', 'vitcourse[lessons] @ git+https://example.org/vitcourse']"
        in result.stderr
    )


def test_solutions_are_not_counted_as_progress(built):
    cells = {edition: lessons.render(built, edition).cells[1].source for edition in lessons.EDITIONS}
    assert 'os.environ["VITCOURSE_PROGRESS"] = "off"' in cells["solved"]
    assert "VITCOURSE_PROGRESS" not in cells["student"]


# -------------------------------------------------------------------------------------------------------------- blanks


CLASS = """\
class A:
    def a(self):
        # <solution>
        x = 1

        return x
        # </solution>

    y = 2
    # <solution>
    z = 3
    # </solution>"""


def test_every_solution_of_a_class_becomes_a_blank():
    assert lessons.blank(CLASS) == "class A:\n    def a(self):\n        raise TODO\n\n    y = 2\n    raise TODO"
    assert lessons.solved(CLASS) == "\n".join(line for line in CLASS.split("\n") if "solution>" not in line)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("# <solution>\nx = 1", "a <solution> is not closed"),
        ("x = 1\n# </solution>", "closes nothing"),
        ("# <solution>\n# <solution>\n# </solution>", "opens inside another"),
        ("def f():\n    # <solution>\n    return 1\n    # </solution>\nx = (", "was never closed"),
    ],
)
def test_marks_that_do_not_fit_are_refused_by_both_commands(tmp_path, capsys, cell, message):
    lesson = write_lesson(tmp_path, f"# %%\n{cell}\n")
    (failure,) = builder.build([lesson])
    assert "00_demo.py, cell 1" in failure and message in failure
    assert main(["check", "--root", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_descriptions_stop_at_code_and_at_marks():
    source = "# NBVAL_IGNORE_OUTPUT\n# alt: one\n# more\n# alt: two\n# NBVAL_SKIP\n# a comment\nx  # alt: no"
    assert lessons.unmarked(source, {"tags": ["hide"]}) == (
        "# a comment\nx  # alt: no",
        {"tags": ["hide", "nbval-ignore-output", "nbval-skip"], "alt": "one more\ntwo"},
    )


# --------------------------------------------------------------------------------------------------------------- check


def check_errors(lesson, capsys):
    status = main(["check", "--root", str(lesson.root)])
    lines = capsys.readouterr().err.splitlines()
    assert status == (1 if lines else 0)
    return lines


def test_check_is_content_with_what_build_makes(course_copy, capsys):
    assert check_errors(course_copy, capsys) == []


def edit(lesson, edition, change):
    """Let `change` modify a stored notebook in place."""
    file = lesson.notebook(edition)
    notebook = nbformat.read(file, 4)
    change(notebook)
    nbformat.write(notebook, file)


def set_output(cell, text):
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]


FIGURE = nbformat.v4.new_output("display_data", data={"image/png": "iVBOR"})
ERROR = nbformat.v4.new_output("error", ename="E", evalue="e", traceback=[])
DRIFT = {
    "source": (lambda nb: nb.cells[4].update(source="2"), "cell 4 (00-demo-004) is not what the source says"),
    "id": (lambda nb: nb.cells[4].update(id="x"), "cell 4 (00-demo-004) is not what the source says"),
    "tags": (lambda nb: nb.cells[4].update(metadata={}), "cell 4 (00-demo-004) is not what the source says"),
    "missing cell": (lambda nb: nb.cells.pop(), "5 cells, the source has 6"),
    "not executed": (lambda nb: nb.cells[4].update(execution_count=None), "cell 4 (00-demo-004) was not executed"),
    "error": (lambda nb: nb.cells[4].outputs.append(ERROR), "cell 4 (00-demo-004) ended in an error"),
    "cross": (lambda nb: set_output(nb.cells[3], "✗ normalize: no\n"), "cell 3 (00-demo-003) should print "),
    "no mark": (lambda nb: set_output(nb.cells[3], "ok\n"), "cell 3 (00-demo-003) should print "),
    "no alt": (lambda nb: nb.cells[5].outputs.append(FIGURE), "has a figure without a description"),
    "alt": (lambda nb: nb.cells[5].metadata.update(alt="x"), "cell 5 (00-demo-005) is not what the source says"),
    "stale": (lambda nb: nb.metadata.vitcourse.update(executed="0"), "its outputs are of an older source"),
}


@pytest.mark.parametrize("edition", lessons.EDITIONS)
@pytest.mark.parametrize("drift", DRIFT)
def test_check_finds_drift(course_copy, capsys, edition, drift):
    change, told = DRIFT[drift]
    edit(course_copy, edition, change)
    (line,) = check_errors(course_copy, capsys)
    assert line.startswith(f"{lessons.EDITIONS[edition]}/00_demo.ipynb: ") and told in line


def test_check_finds_ticks_in_the_wrong_edition(course_copy, capsys):
    edit(course_copy, "student", lambda nb: set_output(nb.cells[3], "✓ normalize\n"))
    edit(course_copy, "solved", lambda nb: set_output(nb.cells[3], "○ normalize: not attempted yet\n"))
    solved, student = check_errors(course_copy, capsys)
    assert "should print ✓, not ○" in solved and "should print ○, not ✓" in student


def test_check_finds_a_changed_source_orphans_and_missing_or_heavy_files(course_copy, capsys, monkeypatch):
    course_copy.source.write_text(SOURCE.replace('print("two"', 'print("three"'), encoding="utf-8")
    assert len(check_errors(course_copy, capsys)) == 2
    course_copy.source.write_text(SOURCE, encoding="utf-8")
    course_copy.notebook("student").rename(course_copy.root / "notebooks" / "01_gone.ipynb")
    (course_copy.root / "solutions" / "README.md").write_text("old", encoding="utf-8")
    assert check_errors(course_copy, capsys) == [
        "notebooks/00_demo.ipynb: missing",
        "notebooks/01_gone.ipynb: has no source in solutions/",
        "solutions/README.md: the table of exercises and mistakes is not up to date",
    ]
    monkeypatch.setattr(builder, "MOST_BYTES", 100)
    assert "lower the dpi" in check_errors(course_copy, capsys)[0]


def test_the_notebooks_of_this_course_are_light():
    """The whole course has to stay small enough to clone and to open."""
    files = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("solutions/*.ipynb")]
    heavy = {file.name: file.stat().st_size for file in files if file.stat().st_size > 800_000}
    assert files
    assert not heavy


def picture(colours, mode="RGB"):
    file = BytesIO()
    Image.fromarray(colours, mode).save(file, "PNG")
    return file.getvalue()


def test_figures_are_stored_with_few_colours():
    y, x = np.mgrid[:128, :128]
    photo = np.stack([x + y // 2, 2 * y, 255 - x], -1) + np.random.default_rng(0).integers(0, 9, (128, 128, 3))
    figure = np.full((160, 400, 3), 255, np.uint8)
    figure[16:144, 16:144] = photo.clip(0, 255)
    figure[40:44, 180:380] = figure[60:100, 200:203] = (0, 114, 178)
    png = picture(figure)
    stored = builder.with_few_colours(png)
    assert len(stored) < 0.5 * len(png)
    image = np.asarray(Image.open(BytesIO(stored)).convert("RGB")).astype(int)
    assert (image[:, 150:] == figure[:, 150:]).all(), "paper and lines keep their colours"
    assert np.abs(image - figure).mean() < 5
    assert builder.with_few_colours(stored) == stored
    glass = np.concatenate([figure, np.full((160, 400, 1), 128, np.uint8)], -1)
    assert builder.with_few_colours(picture(glass, "RGBA")) == picture(glass, "RGBA")


# ---------------------------------------------------------------------------------------- as JupyterLab would write it


def test_a_kernel_has_nothing_to_add_to_a_notebook(course_copy, tmp_path):
    """JupyterLab writes what the kernel says of itself into a notebook that it opens: if it is new, it is "unsaved"."""
    kernel = pytest.importorskip("ipykernel.ipkernel").IPythonKernel.language_info
    spec = pytest.importorskip("ipykernel.kernelspec").get_kernel_dict()
    main(["start", str(tmp_path / "work"), "--root", str(course_copy.root)])
    own, version = tmp_path / "work" / "00_demo.ipynb", {"version": platform.python_version()}
    for file in (own, course_copy.notebook("student"), course_copy.notebook("solved")):
        notebook = nbformat.read(file, nbformat.NO_CONVERT)
        stored = notebook.metadata.language_info if file == own else {**notebook.metadata.language_info, **version}
        assert stored == kernel
        assert notebook.metadata.kernelspec == {"name": "python3", **{k: spec[k] for k in ("display_name", "language")}}
        assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
        saved = StringIO()
        nbformat.write(nbformat.read(file, nbformat.NO_CONVERT), saved, version=nbformat.NO_CONVERT)
        assert saved.getvalue() == file.read_text(encoding="utf-8"), "what it would save is what is there"


# ------------------------------------------------------------------------------------------------------------ commands


def test_start_names_the_python_that_will_open_it(course_copy, tmp_path):
    edit(course_copy, "student", lambda nb: nb.metadata.language_info.update(version="3.0.0"))
    main(["start", str(tmp_path / "work"), "--root", str(course_copy.root)])
    copied = nbformat.read(tmp_path / "work" / "00_demo.ipynb", nbformat.NO_CONVERT)
    assert copied.metadata.language_info.version == platform.python_version()
    assert copied.metadata.vitcourse == nbformat.read(course_copy.notebook("student"), 4).metadata.vitcourse


def test_start_never_overwrites_a_learners_file(course_copy, tmp_path, capsys):
    work = tmp_path / "work"
    arguments = ["start", str(work), "--root", str(course_copy.root)]
    assert main(arguments) == 0 and "00_demo.ipynb: new" in capsys.readouterr().out
    own = work / "00_demo.ipynb"
    notebook = json.loads(own.read_text(encoding="utf-8"))
    notebook["cells"].append({"cell_type": "raw", "id": "mine", "metadata": {}, "source": "mine"})
    own.write_text(json.dumps(notebook), encoding="utf-8")
    before = own.read_bytes()
    assert main(arguments) == 0 and capsys.readouterr().out.strip() == ""
    edit(course_copy, "student", lambda nb: nb.metadata.vitcourse.update(executed="newer"))
    assert main(arguments) == 0 and "yours is kept; the course has a newer edition" in capsys.readouterr().out
    assert own.read_bytes() == before


def test_lessons_are_chosen_by_number_topic_or_both(tmp_path):
    lesson = write_lesson(tmp_path)
    (tmp_path / "solutions" / "01_other_topic.py").touch()
    for name in ("00", "demo", "00_demo", "solutions/00_demo.py"):
        assert lessons.find_lessons(tmp_path, [name]) == [lesson]
    assert [found.stem for found in lessons.find_lessons(tmp_path)] == ["00_demo", "01_other_topic"]
    assert [found.stem for found in lessons.find_lessons(tmp_path, ["other_topic"])] == ["01_other_topic"]
    with pytest.raises(lessons.BuildError, match="no lesson is called '02'; there are 00_demo, 01_other_topic"):
        lessons.find_lessons(tmp_path, ["02"])


def test_a_folder_without_lessons_is_an_error(tmp_path, capsys):
    assert main(["build", "--root", str(tmp_path)]) == 1
    assert "has no lessons" in capsys.readouterr().err


def test_the_catalogue_shows_every_exercise_and_mistake(capsys):
    assert main(["mistakes"]) == 0
    page = capsys.readouterr().out
    for spec in checks.load_all().values():
        if spec.topic in checks.TOPICS:
            assert f"`{spec.short_name}` | {spec.level} | {spec.minutes} |" in page
            assert all(f"| {mistake.key} |" in page for mistake in spec.mistakes)


def test_progress_of_one_lesson_is_shown(capsys):
    assert main(["progress", "00"]) == 0
    assert capsys.readouterr().out.endswith("exercises solved\n")
    with pytest.raises(SystemExit, match="no lesson is called 'x'"):
        main(["progress", "x"])


def test_the_notebooks_of_this_course_are_in_sync(capsys):
    assert main(["check"]) == 0, capsys.readouterr().err
