"""From the source of a lesson to the answer that it holds, and to the answers that its mutants are."""

import ast
import builtins
import difflib
import itertools
import linecache
import symtable
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jupytext

from vitcourse.course.lessons import solved

from .operators import Mutant, mutants

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Solution:
    """The cell of an exercise, and whatever it uses of the lesson before it.

    Attributes:
        before: definitions that the cell needs, other exercises' solutions among them.
        source: the cell.
        lines: the numbers of the lines between the marks of a solution.
    """

    name: str
    before: str
    source: str
    lines: frozenset[int]

    def mutants(self, seed: int = 0) -> list[Mutant]:
        """Every mutant of what lies between the marks."""
        return mutants(self.source, lambda node: getattr(node, "lineno", 0) in self.lines, seed)

    def difference(self, changed: str) -> str:
        """The lines that a mutant's cell does not have, and those that it has instead."""
        right = ast.unparse(ast.parse(self.source)).splitlines()
        lines = list(difflib.unified_diff(right, changed.splitlines(), lineterm="", n=0))[2:]
        return "\n".join(f"{line[0]} {line[1:].strip()}" for line in lines if not line.startswith("@@"))

    def answer(self, source: str | None = None) -> Callable:
        """The function or class of the cell, or of one in its place.

        Raises:
            Exception: whatever a changed cell raises.
        """
        scope = dict(_scope(self.before))
        _execute(self.source if source is None else source, scope)
        return scope[self.name.partition(".")[2]]


@cache
def solution(name: str) -> Solution:
    """The reference solution of an exercise."""
    sources = _code_cells(name.partition(".")[0])
    (i,) = (i for i, source in enumerate(sources) if f'@exercise("{name}")' in source)
    numbered = _numbered(sources[i])
    source = "\n".join(line for line, _ in numbered)
    lines = frozenset(i for i, (_, inside) in enumerate(numbered, 1) if inside)
    return Solution(name, _needed([solved(earlier) for earlier in sources[:i]], source), source, lines)


@cache
def _code_cells(topic: str) -> list[str]:
    (file,) = (ROOT / "solutions").glob(f"*_{topic}.py")
    cells = jupytext.reads(file.read_text(encoding="utf-8"), fmt="py:percent").cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


def _numbered(source: str) -> list[tuple[str, bool]]:
    """The lines of a cell without its marks, and whether each is part of a solution."""
    lines, inside = [], False
    for line in source.split("\n"):
        if line.strip() in ("# <solution>", "# </solution>"):
            inside = "/" not in line
        else:
            lines.append((line, inside))
    return lines


def _needed(cells: list[str], source: str) -> str:
    """The definitions and imports of the cells that the source needs, and those that they need in turn."""
    statements = [statement for cell in cells for statement in ast.parse(cell).body]
    missing, chosen = _free(source), set()
    for i in reversed(range(len(statements))):
        if _bound(statements[i]) & missing:
            chosen.add(i)
            missing |= _free(ast.unparse(statements[i]))
    return "\n\n".join(ast.unparse(statements[i]) for i in sorted(chosen))


def _free(source: str) -> set[str]:
    """The global names that a piece of code reads."""
    tables, names = [symtable.symtable(source, "cell", "exec")], set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        outermost = table.get_type() == "module"
        names |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (outermost or s.is_global())}
    return names - set(dir(builtins)) - {"exercise"}


def _bound(statement: ast.stmt) -> set[str]:
    """The names that a statement defines for those after it."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
    if isinstance(statement, ast.Assign):
        return {node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return set()


@cache
def _scope(before: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "lesson", "exercise": lambda name: lambda answer: answer}
    _execute(before, scope)
    return scope


_numbers: Iterator[int] = itertools.count()


def _execute(source: str, scope: dict[str, Any]) -> None:
    """Run a cell; its text can be looked up afterwards, as the grading of kernels does."""
    file = f"<cell {next(_numbers)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), scope)
