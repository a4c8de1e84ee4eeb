"""Run both notebooks of a lesson, store their outputs, and tell whether they still are what the source says.

The outputs are what nbval compares later runs with. Figures are stored as HTML: neither JupyterLab nor nbconvert
takes the description of a PNG from anywhere.
"""

import json
import os
import platform
import re
from base64 import b64decode, b64encode
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from PIL import Image

from vitcourse.notices import NOTICE

from . import checks
from .lessons import EDITIONS, METADATA, BuildError, Lesson, find_lessons, fingerprint, render

CATALOGUE = "solutions/README.md"
MOST_BYTES = 800_000  # of a notebook: the whole course has to stay small enough to clone and to open


def execute(notebook: NotebookNode, folder: Path, seconds: int) -> None:
    """Run every cell in a fresh kernel whose working directory is `folder`; outputs are stored in `notebook`.

    Raises:
        BuildError: a cell fails, or takes longer than `seconds`.
    """
    client = NotebookClient(
        notebook,
        timeout=seconds,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    package = str(Path(__file__).parents[2])  # the kernel shall see the very vitcourse that builds
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {
        "VITCOURSE_PROGRESS": "off",
        "VITCOURSE_PROFILE": "quick",
        "VITCOURSE_STRICT": "1",
        "PYTHONPATH": path,
    }
    try:
        client.execute(env=environment)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise BuildError(_failure(notebook, error)) from None
    for cell in notebook.cells:
        if cell.cell_type == "code":
            _tidy(cell)
    notebook.metadata = json.loads(json.dumps(METADATA)) | {"vitcourse": notebook.metadata["vitcourse"]}
    notebook.metadata["vitcourse"]["executed"] = fingerprint(notebook)


def _failure(notebook: NotebookNode, error: Exception) -> str:
    """Which cell failed, how, and what it says."""
    code = [(i, cell) for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    failed = [(i, cell) for i, cell in code if any(output.output_type == "error" for output in cell.outputs)]
    i, cell = failed[0] if failed else next(((i, c) for i, c in code if c.execution_count is None), code[-1])
    told = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else str(error)
    return f"cell {i} ({cell.id}): {told}\n" + "\n".join(f"    {line}" for line in cell.source.split("\n"))


def _tidy(cell: NotebookNode) -> None:
    """Keep of the outputs what every run repeats: no stderr or notices, one stream of stdout, described figures."""
    kept: list[NotebookNode] = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stderr" or output.get("metadata") == NOTICE:
            continue
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output, text in zip(_figures(kept), cell.metadata.get("alt", "").splitlines(), strict=False):
        _describe(output, text)
    for output in _figures(kept):
        output.data["image/png"] = b64encode(with_few_colours(b64decode(output.data["image/png"]))).decode()
    cell.outputs = kept
    cell.metadata.pop("execution", None)


def with_few_colours(png: bytes) -> bytes:
    """The image with a palette of 256 colours: about a third of the bytes, and hardly a difference to be seen.

    Photos are what weighs in a notebook, and a PNG has no other way to lose anything. One that would not become
    smaller, or lets the page shine through, is left as it is.
    """
    image = Image.open(BytesIO(png))
    if image.mode == "P" or image.convert("RGBA").getextrema()[3] != (255, 255):
        return png
    few = BytesIO()
    palette = image.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=3)
    palette.save(few, "PNG", optimize=True)
    return min(png, few.getvalue(), key=len)


def _figures(outputs: list[NotebookNode]) -> list[NotebookNode]:
    return [output for output in outputs if "image/png" in output.get("data", {})]


def _describe(output: NotebookNode, text: str) -> None:
    """Keep a figure's description where nbconvert and nbviewer templates look for it.

    The image stays a PNG, which every reader of notebooks shows; HTML, with a real ``alt``, some may clean of its data.
    """
    output.metadata.setdefault("image/png", {})["alt"] = text


def build(lessons: list[Lesson], *, force: bool = False, jobs: int = 1, seconds: int = 600) -> list[str]:
    """Make the notebooks of these lessons that are not as their source says; returns the lessons that failed, with why.

    The notebooks of a lesson that fails stay as they were.
    """

    def one(lesson: Lesson) -> str:
        try:
            if not force and not any(problems(lesson, edition) for edition in EDITIONS):
                print(f"{lesson.stem}: up to date", flush=True)
                return ""
            notebooks = {edition: render(lesson, edition) for edition in EDITIONS}
            for edition, notebook in notebooks.items():
                print(f"{lesson.stem}: running the {edition} edition", flush=True)
                try:
                    execute(notebook, lesson.root / EDITIONS[edition], seconds)
                except BuildError as error:
                    raise BuildError(f"{edition} edition, {error}") from None
        except BuildError as error:
            return f"{lesson.stem}: {error}"
        for edition, notebook in notebooks.items():
            _replace(lesson.notebook(edition), nbformat.writes(notebook) + "\n")
        left = [problem for edition in EDITIONS for problem in problems(lesson, edition)]
        return "\n".join(left)

    for folder in {lesson.root / folder for lesson in lessons for folder in EDITIONS.values()}:
        folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        failures = list(filter(None, pool.map(one, lessons)))
    for root in {lesson.root for lesson in lessons}:
        _replace(root / CATALOGUE, catalogue())
    return failures


def _replace(file: Path, text: str) -> None:
    """Write in one step: a reader, or a crash, finds the old file or the new one."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


# -------------------------------------------------------------------------------------------------------------- check


def problems(lesson: Lesson, edition: str) -> list[str]:
    """How the stored notebook differs from what its source says; empty when it is in sync. Executes nothing."""
    file, fresh = lesson.notebook(edition), render(lesson, edition)
    name = f"{EDITIONS[edition]}/{file.name}"
    if not file.exists():
        return [f"{name}: missing"]
    notebook = nbformat.read(file, as_version=4)
    found = _drift(fresh, notebook)
    if not found and notebook.metadata.get("vitcourse", {}).get("executed") != fingerprint(notebook):
        found.append("its outputs are of an older source")
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            found += [f"cell {i} ({cell.id}) {problem}" for problem in _cell_problems(cell, edition)]
    if file.stat().st_size > MOST_BYTES:
        found.append(
            f"{file.stat().st_size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.1f}: lower the dpi of its figures"
        )
    return [f"{name}: {problem}" for problem in found]


def _drift(fresh: NotebookNode, stored: NotebookNode) -> list[str]:
    if len(fresh.cells) != len(stored.cells):
        return [f"{len(stored.cells)} cells, the source has {len(fresh.cells)}"]
    different = [
        f"cell {i} ({new.id}) is not what the source says"
        for i, (new, old) in enumerate(zip(fresh.cells, stored.cells, strict=True))
        if (new.id, new.cell_type, new.source, new.metadata) != (old.get("id"), old.cell_type, old.source, old.metadata)
    ]
    return different[:5] + ([f"and {len(different) - 5} more cells"] if len(different) > 5 else [])


def _cell_problems(cell: NotebookNode, edition: str) -> Iterable[str]:
    printed = "".join(output.text for output in cell.outputs if output.output_type == "stream").split("\n")
    if cell.execution_count is None and cell.source.strip():
        yield "was not executed"
    if any(output.output_type == "error" for output in cell.outputs) and "raises-exception" not in cell.metadata.get(
        "tags", []
    ):
        yield "ended in an error"
    if not all(output.metadata.get("image/png", {}).get("alt") for output in _figures(cell.outputs)):
        yield "has a figure without a description: add a line '# alt: …'"
    if re.search(r"^@(course\.)?exercise\(", cell.source, re.MULTILINE):
        expected = "○" if edition == "student" and re.search(r"^ *raise TODO$", cell.source, re.MULTILINE) else "✓"
        marks = [line[0] for line in printed if line.startswith(("✓", "○", "✗"))]
        if not marks or set(marks) != {expected}:
            yield f"should print {expected}, not {' '.join(marks) or 'nothing'}"


def check(lessons: list[Lesson]) -> list[str]:
    """Every way in which the stored files of a course differ from their sources; empty when all are in sync."""
    found = []
    for lesson in lessons:
        for edition in EDITIONS:
            try:
                found += problems(lesson, edition)
            except BuildError as error:
                found.append(str(error))
    for root in {lesson.root for lesson in lessons}:
        stems = {lesson.stem for lesson in find_lessons(root)}
        for folder in EDITIONS.values():
            orphans = sorted(file.name for file in (root / folder).glob("*.ipynb") if file.stem not in stems)
            found += [f"{folder}/{name}: has no source in solutions/" for name in orphans]
        file = root / CATALOGUE
        if not file.exists() or file.read_text(encoding="utf-8") != catalogue():
            found.append(f"{CATALOGUE}: the table of exercises and mistakes is not up to date")
    return found


# ----------------------------------------------------------------------------------------- for teachers, for learners


def catalogue() -> str:
    """Markdown: every exercise of the course, and the mistakes that its check knows by name."""
    lines = [
        "# Solutions, and the mistakes that the checks know",
        "",
        "`NN_topic.py` is the one source of a lesson. Both notebooks, and this page, are made from it:",
        "",
        "    python -m vitcourse.course build",
        "",
        "Every wrong answer below is tried on its check by the tests: it must be rejected, with its own message and no",
        "other. An answer that is wrong in a way nobody has catalogued is told what differs, and gets a hint.",
    ]
    topics = dict.fromkeys(spec.topic for spec in checks.load_all().values())
    for topic in topics:
        if topic in checks.TOPICS:
            lines += ["", f"## {checks.TOPICS.index(topic):02d} {topic}", ""]
            lines += [
                "| exercise | level | minutes | mistake | what the learner is told |",
                "| --- | --- | --- | --- | --- |",
            ]
            lines += [row for spec in checks.load_all().values() if spec.topic == topic for row in _rows(spec)]
    return "\n".join(lines) + "\n"


def _rows(spec: checks.Check) -> Iterable[str]:
    head = f"`{spec.short_name}` | {spec.level} | {spec.minutes}"
    for mistake in spec.mistakes:
        message = mistake.message.replace("|", "\\|")
        yield f"| {head} | {mistake.key} | {message} |"
        head = " | | "


def start(root: Path, folder: Path) -> list[str]:
    """Copy the student notebooks that are not in `folder` yet; what is there is the learner's, and is left alone.

    The copy names this Python's version, as JupyterLab would do when it is opened, and then call it unsaved.

    Returns a line for each notebook that was copied, or that has a newer edition than the learner's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for file in sorted((root / EDITIONS["student"]).glob("*.ipynb")):
        own = folder / file.name
        if not own.exists():
            notebook = nbformat.read(file, as_version=4)
            notebook.metadata.setdefault("language_info", {})["version"] = platform.python_version()
            _replace(own, nbformat.writes(notebook) + "\n")
            lines.append(f"{own}: new")
        elif _edition_id(own) != _edition_id(file):
            lines.append(f"{own}: yours is kept; the course has a newer edition, {file}")
    return lines


def _edition_id(file: Path) -> str | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["metadata"]["vitcourse"]["executed"]
    except (ValueError, KeyError, TypeError):
        return None
