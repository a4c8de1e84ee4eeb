"""From the one source of a lesson to the cells of its two editions.

``solutions/NN_topic.py`` (jupytext's py:percent) becomes ``solutions/NN_topic.ipynb``, solved, and
``notebooks/NN_topic.ipynb``, in which the lines between ``# <solution>`` and ``# </solution>`` are a blank.

A comment ``# alt: …`` in a cell (more lines may follow it) describes the figure below the cell, for those who cannot
see it; a second ``# alt:`` describes a second figure. It would tell the result before the cell is run: it becomes
metadata of the cell, ``alt``, a line a figure. So do nbval's marks: ``# NBVAL_IGNORE_OUTPUT`` becomes the tag that
means the same.
"""

import ast
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from . import numbers

EDITIONS = {"solved": "solutions", "student": "notebooks"}  # edition to folder
_MARK = re.compile(r"# (NBVAL_[A-Z_]+)$")
_OPEN, _CLOSE = re.compile(r"^( *)# <solution>$"), re.compile(r"^ *# </solution>$")
# What JupyterLab writes into a notebook as soon as its kernel has started, but for the version of Python. Where it is
# there already, nothing is "unsaved" before anybody has typed.
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
    },
}


class BuildError(Exception):
    """A lesson cannot be built; the message says which, where and why."""


@dataclass(frozen=True)
class Lesson:
    """One lesson of a course folder: ``Lesson(root, "00_vit")``."""

    root: Path
    stem: str

    @property
    def source(self) -> Path:
        return self.root / "solutions" / f"{self.stem}.py"

    def notebook(self, edition: str) -> Path:
        """The file of the ``"solved"`` or the ``"student"`` edition."""
        return self.root / EDITIONS[edition] / f"{self.stem}.ipynb"


def find_lessons(root: Path, names: Iterable[str] = ()) -> list[Lesson]:
    """The lessons of a course folder; `names` ("00", "vit", "00_vit") choose some of them.

    Raises:
        BuildError: the folder has no lessons, or none of such a name.
    """
    lessons = [Lesson(root, file.stem) for file in sorted((root / "solutions").glob("[0-9][0-9]_*.py"))]
    if not lessons:
        raise BuildError(f"{root / 'solutions'} has no lessons (NN_topic.py); run this in a clone of the course")
    chosen = {}
    for name in names:
        wanted = Path(name).stem
        found = [lesson for lesson in lessons if wanted in (lesson.stem, *lesson.stem.split("_", 1))]
        if not found:
            raise BuildError(f"no lesson is called {name!r}; there are {', '.join(lesson.stem for lesson in lessons)}")
        chosen |= {lesson.stem: lesson for lesson in found}
    return list(chosen.values()) or lessons


def solved(source: str) -> str:
    """A cell without the marks around its solution."""
    return "\n".join(line for line in source.split("\n") if not (_OPEN.match(line) or _CLOSE.match(line)))


def blank(source: str) -> str:
    """A cell with ``raise TODO`` in place of each solution.

    >>> print(blank("def f(x):\\n    # <solution>\\n    return x + 1\\n    # </solution>"))
    def f(x):
        raise TODO
    """
    lines, inside = [], False
    for line in source.split("\n"):
        if opening := _OPEN.match(line):
            if inside:
                raise BuildError("a <solution> opens inside another")
            inside = True
            lines.append(f"{opening[1]}raise TODO")
        elif _CLOSE.match(line):
            if not inside:
                raise BuildError("a </solution> closes nothing")
            inside = False
        elif not inside:
            lines.append(line)
    if inside:
        raise BuildError("a <solution> is not closed")
    return "\n".join(lines)


def setup_cell(lesson: Lesson, edition: str) -> str:
    """The first code cell, which finds `vitcourse` wherever the notebook is opened."""
    keep = (
        'os.environ["VITCOURSE_PROGRESS"] = "off"  # solutions are not your progress\n' if edition == "solved" else ""
    )
    return f'''\
# The same in every lesson: find `vitcourse`, wherever this notebook was opened. Prints nothing.
import os, subprocess, sys
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = "{repository(lesson.root)}"
clone = next((folder for folder in Path.cwd().parents if (folder / "vitcourse" / "course").is_dir()), None)
if getattr(find_spec("vitcourse"), "origin", None):
    pass  # installed
elif clone:
    sys.path.insert(0, str(clone))
elif REPOSITORY:
    package = f"vitcourse[lessons] @ git+{{REPOSITORY}}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)
else:
    raise ModuleNotFoundError("vitcourse is not here: open this notebook in a clone of it, or `pip install` a clone")

from vitcourse.devices import resolve_device

if resolve_device().type != "cuda":
    os.environ["TRITON_INTERPRET"] = "1"  # without a GPU, Triton kernels run in Python; must be set before its import
os.environ["VITCOURSE_LESSON"] = "{lesson.stem}"
{keep}'''.rstrip()


def repository(root: Path) -> str:
    """The address of the course, from ``[project.urls]`` in pyproject.toml; "" while it has none."""
    file = root / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {}) if file.exists() else {}
    return project.get("urls", {}).get("Repository", "")


def render(lesson: Lesson, edition: str) -> NotebookNode:
    """The notebook that the source describes, not yet executed.

    Raises:
        BuildError: a solution is not closed, a blanked cell is no longer Python, or a number in the prose is not what
            the results say.
    """
    cells = jupytext.reads(lesson.source.read_text(encoding="utf-8"), fmt="py:percent").cells
    own = [(cell.cell_type, cell.source, {k: v for k, v in cell.metadata.items() if k == "tags"}) for cell in cells]
    title = 1 if own and own[0][0] == "markdown" else 0
    own.insert(title, ("code", setup_cell(lesson, edition), {}))

    notebook = nbformat.v4.new_notebook(metadata=json.loads(json.dumps(METADATA)))
    notebook.metadata["vitcourse"] = {"lesson": lesson.stem, "edition": edition}
    for i, (kind, source, metadata) in enumerate(own):
        if kind == "code":
            source, metadata = unmarked(source, metadata)
            if "alt" in metadata:
                metadata["alt"] = _compared(metadata["alt"], lesson, i)
            source = _edition_of(source, edition, f"{lesson.source.name}, cell {i}")
        else:
            source = _compared(source, lesson, i)
        make = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}[kind]
        identity = f"{re.sub('[^a-zA-Z0-9]', '-', lesson.stem)}-{i:03d}"
        notebook.cells.append(make(source, id=identity, metadata=metadata))
    return notebook


def unmarked(source: str, metadata: dict) -> tuple[str, dict]:
    """A cell without the comments that are not for its reader, and its metadata with what they say.

    >>> unmarked("# NBVAL_IGNORE_OUTPUT\\n# alt: a curve that\\n# falls\\nplot()", {})
    ('plot()', {'tags': ['nbval-ignore-output'], 'alt': 'a curve that falls'})
    """
    kept: list[str] = []
    alts: list[str] = []
    tags = list(metadata.get("tags", ()))
    following = False
    for line in source.split("\n"):
        if mark := _MARK.match(line):
            tags.append(mark[1].lower().replace("_", "-"))
            following = False
        elif line.startswith("# alt:"):
            alts.append(line.removeprefix("# alt:").strip())
            following = True
        elif following and line.startswith("# "):
            alts[-1] += " " + line[2:].strip()
        else:
            kept.append(line)
            following = False
    found = {"tags": tags} if tags else {}
    if alts:
        found["alt"] = "\n".join(alts)
    return "\n".join(kept).strip("\n"), metadata | found


def _compared(text: str, lesson: Lesson, i: int) -> str:
    try:
        return numbers.compared(text, lesson.root / "benchmarks" / "results")
    except ValueError as error:
        raise BuildError(f"{lesson.source.name}, cell {i}: {error}") from None


def _edition_of(source: str, edition: str, where: str) -> str:
    try:
        blanked = blank(source)
        if blanked != source:
            ast.parse(blanked)
    except (BuildError, SyntaxError) as error:
        raise BuildError(f"{where}: {error}\n{source}") from None
    return blanked if edition == "student" else solved(source)


def fingerprint(notebook: NotebookNode) -> str:
    """What the notebook says, outputs apart. Stored at execution, it tells whether outputs belong to these cells."""
    cells = [[cell.id, cell.cell_type, cell.source, cell.metadata] for cell in notebook.cells]
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()[:16]
