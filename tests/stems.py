"""What a test file or a notebook is about: the files whose change asks for it to run again.

For a test file: itself, the helpers in ``tests/`` that it names, and the modules that it imports by name, a package
with all its modules, but not what these import. For a notebook: its source, its direction, and the checks of its
exercises. So a change in ``vitcourse/vit/patches.py`` concerns ``tests/test_vit.py`` and lesson 00, and not every test
that builds a model. What this misses, the whole suite finds.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCTESTS = "vitcourse"  # the examples in its docstrings, all of them together


def files_of_tests() -> list[str]:
    """The entries that pytest runs."""
    return [DOCTESTS, *sorted(f"tests/{file.name}" for file in (ROOT / "tests").glob("test_*.py"))]


def notebooks() -> list[str]:
    """The entries that are lessons, the solved edition first."""
    sources = sorted((ROOT / "solutions").glob("[0-9][0-9]_*.py"))
    return [f"{folder}/{file.stem}.ipynb" for file in sources for folder in ("solutions", "notebooks")]


@cache
def sources(entry: str) -> frozenset[str]:
    """The files that an entry is about, relative to the root of the repository.

    >>> {"tests/flash_fuzz.py", "vitcourse/hardware/flash/ops.py"} < sources("tests/test_flash.py")
    True
    """
    if entry == DOCTESTS:
        return frozenset(_files("vitcourse"))
    if entry.endswith(".ipynb"):
        stem = Path(entry).stem
        topic = stem.split("_", 1)[1]
        folders = (f"vitcourse/{topic}", f"vitcourse/course/checks/{topic}")
        return frozenset([f"solutions/{stem}.py", *(file for folder in folders for file in _files(folder))])
    text = (ROOT / entry).read_text(encoding="utf-8")
    found = {entry}
    for helper in (ROOT / "tests").glob("*.py"):
        if not helper.name.startswith("test_") and helper.stem in text:
            found.add(f"tests/{helper.name}")
    for module in _imports(text):
        found |= set(_files(module.replace(".", "/")))
    return frozenset(found)


def fingerprint(entry: str) -> str:
    """Of the contents of its sources: whoever has another ran something else."""
    content = hashlib.sha256()
    for file in sorted(sources(entry)):
        content.update(file.encode() + b"\0" + (ROOT / file).read_bytes() + b"\0")
    return content.hexdigest()[:16]


def _imports(text: str) -> Iterator[str]:
    """The modules of this repository that Python code imports by name."""
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
        yield from (name for name in names if name.startswith(("vitcourse.", "benchmarks.")) or name == "mistakes")


def _files(module: str) -> Iterator[str]:
    """The file of a module, or all of a package."""
    path = ROOT / ("tests/mistakes" if module == "mistakes" else module)
    if path.is_dir():
        yield from (file.relative_to(ROOT).as_posix() for file in sorted(path.rglob("*.py")))
    elif path.with_suffix(".py").is_file():
        yield path.with_suffix(".py").relative_to(ROOT).as_posix()
