"""The committed report: what became of every mutant, and of which sources that is true."""

import ast
import hashlib
import io
import json
import tokenize
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from vitcourse.course import checks
from vitcourse.course.running import run

from .answers import ROOT, Solution, solution
from .trials import Verdict

HERE = Path(__file__).parent
REPORT, TABLE = HERE / "report.json", HERE / "REPORT.md"
MOST_SURVIVE = 0.02  # of all that count, over the course
AT_LEAST = 30  # that count, of every exercise that has so many
# Of vitcourse.course: who gives the verdicts, and what runs kernels.
MACHINERY = ("answers", "cases", "catalogue", "comparing", "grading", "limits", "probes", "running", "trial")
KERNELS = "kernels"
LETTERS = {"equivalent": "=", "rejected": "x", "survived": "S", "hung": "?", "broken": "-"}


def exercises() -> list[str]:
    """Every exercise of the course, in its order."""
    return [spec.name for spec in checks.load_all().values() if spec.topic in checks.TOPICS]


# --------------------------------------------------------------------------------------------------------- fingerprints


def fingerprint(name: str) -> str:
    """Of all that the verdicts on an exercise's mutants depend on: solution, check, domain, grading, and these files.

    Comments, docstrings and blank lines make no difference.
    """
    topic, stem = name.partition(".")[0], checks.file_stem(name)
    folder = ROOT / "vitcourse" / "course"
    files = [folder / f"{part}.py" for part in MACHINERY]
    if checks.find(name).runner is not run:
        files += sorted((folder / KERNELS).glob("*.py"))
    files += [folder / "checks" / topic / f"{stem}.py", folder / "checks" / topic / "_shared.py"]
    files += [HERE / f"{part}.py" for part in ("answers", "domain", "operators", "trials")]
    files += [HERE / "domains" / f"{topic}.py"]
    texts = [file.read_text(encoding="utf-8") for file in files if file.exists()]
    own = solution(name)
    return hashlib.sha256("\0".join(map(code_of, [own.before, own.source, *texts])).encode()).hexdigest()[:16]


@cache
def code_of(source: str) -> str:
    """Python source without comments, docstrings and blank lines.

    >>> print(code_of(f"def f(x):  # a comment{chr(10)}    'Doc.'{chr(10) * 2}    return x"))
    def f(x):
        return x
    """
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for row in range(node.lineno - 1, node.end_lineno):
                lines[row] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


# ------------------------------------------------------------------------------------------------------------ one entry


@dataclass
class Tally:
    """The verdicts on the mutants of one exercise, as they come."""

    solution: Solution
    letters: str = ""
    raised: int = 0
    seconds: float = 0.0
    listed: list[dict[str, Any]] = field(default_factory=list)

    def add(self, operator: str, source: str, verdict: Verdict) -> None:
        """Note one; what survives, hangs, or is rejected though nothing tells it from the reference, is listed."""
        self.letters += LETTERS[verdict.status]
        self.raised += verdict.counts and verdict.raises
        refused = verdict.status == "equivalent" and not verdict.accepted
        if verdict.status in ("survived", "hung") or refused:
            kind = "rejected, but equivalent on the domain" if refused else verdict.status
            difference = self.solution.difference(source)
            entry = {"kind": kind, "operator": operator, "difference": difference, "is": verdict.differs}
            if verdict.status == "survived":
                entry |= {"inputs": verdict.on, "accepted": list(verdict.accepted)}
            self.listed.append(entry)

    @property
    def counted(self) -> int:
        return sum(self.letters.count(LETTERS[status]) for status in ("rejected", "survived"))

    def entry(self, fingerprint: str, possible: int) -> dict[str, Any]:
        """What the report says of the exercise."""
        number = {status: self.letters.count(letter) for status, letter in LETTERS.items()}
        return {
            "fingerprint": fingerprint,
            "possible": possible,
            "made": len(self.letters) - number["broken"],
            "equivalent": number["equivalent"],
            "counted": self.counted,
            "raised": self.raised,
            "rejected": number["rejected"],
            "survived": number["survived"],
            "hung": number["hung"],
            "seconds": round(self.seconds, 1),
            "verdicts": self.letters,
            "listed": self.listed,
        }


# ---------------------------------------------------------------------------------------------------------- the report


def read() -> dict[str, dict[str, Any]]:
    """The report by exercise; empty where there is none yet."""
    return json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else {}


def write(entries: dict[str, dict[str, Any]]) -> None:
    """The report for programs, and for readers."""
    known = {name: entries[name] for name in exercises() if name in entries}
    REPORT.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    TABLE.write_text(table(known), encoding="utf-8")


def totals(entries: dict[str, dict[str, Any]]) -> Counter:
    """The numbers over the course."""
    total: Counter = Counter()
    for entry in entries.values():
        total.update({key: value for key, value in entry.items() if isinstance(value, int | float)})
    return total


COLUMNS = ("possible", "made", "equivalent", "counted", "raised", "rejected", "survived", "hung")
PREFACE = """\
# The mutation test of the graders

Made by `python -m tests.mutation`; see `tests/mutation/__init__.py`. Of all *possible* mutants of an exercise's
reference solution so many were *made*, the kinds of change in turn: all, or until as many counted as were asked for.
*Equivalent*: does what the reference does on 200 inputs from the exercise's domain (outputs, changes of the inputs,
gradients; within the tolerance of grading: 1e-6 of the largest value in float64, 1e-4 in float32, 5e-3 in float16, or
the check's own). All others are *counted*; *raised* are those among them whose first difference is an exception, or
no end. *Rejected*: by the grader, on each of three seeds. *Survived*: accepted on one of them at least. *Hung*: no
verdict, its process had to be ended; not counted.
"""


def table(entries: dict[str, dict[str, Any]]) -> str:
    """The report as Markdown."""
    total = totals(entries)
    share = total["survived"] / max(total["counted"], 1)
    silent = total["counted"] - total["raised"]
    lines = [PREFACE, f"**{total['survived']} of {total['counted']} survive: {share:.2%}**"]
    lines[-1] += f" ({total['survived'] / max(silent, 1):.2%} of the {silent} that raise nothing)."
    lines[-1] += f" It took {total['seconds'] / 60:.0f} minutes of one core.\n"
    lines += ["| exercise | " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for name, entry in [*entries.items(), ("**all**", total)]:
        lines.append(f"| {name} | " + " | ".join(str(entry[column]) for column in COLUMNS) + " |")
    for kind in dict.fromkeys(item["kind"] for entry in entries.values() for item in entry["listed"]):
        lines += ["", f"## {kind[0].upper()}{kind[1:]}"]
        for name, entry in entries.items():
            for item in entry["listed"]:
                if item["kind"] == kind:
                    seen = f", first seen on input {item['inputs']}" if "inputs" in item else ""
                    told = f": {item['is']}{seen}" if item["is"] else ""
                    lines += ["", f"{name}, {item['operator']}{told}", "```diff", item["difference"], "```"]
    return "\n".join(lines) + "\n"
