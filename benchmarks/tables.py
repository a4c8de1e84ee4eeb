"""The README's tables, made from ``benchmarks/results/*.json``.

    python -m benchmarks.tables            update them
    python -m benchmarks.tables --check    fail where they are out of date

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table -->``; NAME is one of ``TABLES``.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from vitcourse.paths import results_dir

README = Path(__file__).resolve().parent.parent / "README.md"
MARKED = re.compile(r"(<!-- table:(\w+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


def load(pattern: str) -> list[dict[str, Any]]:
    """Result files whose names match, sorted by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results_dir().glob(f"{pattern}.json"))]


def markdown(header: list[str], rows: list[list[str]], numbers: int) -> str:
    """A table whose last ``numbers`` columns are set to the right."""
    rule = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *rows))


def origin(result: dict[str, Any]) -> str:
    """Where and when a result was measured, as a line below its table."""
    installed = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if name != "vitcourse")
    return f"\n{result['device']}; {installed}; {result['date']}.\n"


def models_table() -> str:
    """Ours over theirs, a row for each pair of models, a table for each device."""
    columns = [(kind, mode) for kind in ("inference", "training") for mode in ("eager", "compiled")]
    header = ["ours", "peer", "batch", *(f"{kind}, {mode}" for kind, mode in columns)]
    parts = []
    for result in load("models_*"):
        cells = {(r["model"], r["peer"], r["step"], r["mode"]): f"{r['ratio']:.2f}" for r in result["rows"]}
        pairs = dict.fromkeys((r["model"], r["peer"], r["batch"]) for r in result["rows"])
        rows = []
        for model, peer, batch in pairs:
            ratios = [cells.get((model, peer, *column), "") for column in columns]
            rows.append([f"`{model}`", peer.replace(":", " `") + "`", str(batch), *ratios])
        parts.append(markdown(header, rows, numbers=5) + origin(result))
    return "\n".join(parts)


def importtime_table() -> str:
    """Seconds over ``import torch``."""
    (result,) = load("importtime")
    rows = [
        [f"`{r['statement']}`", f"{r['seconds']:.3f} s", f"{r['import_torch_seconds']:.2f} s"] for r in result["rows"]
    ]
    return markdown(["statement", "over `import torch`", "`import torch` itself"], rows, numbers=2) + origin(result)


TABLES = {"models": models_table, "importtime": importtime_table}


def fill(text: str) -> str:
    """``text`` with every marked table made anew.

    Raises:
        ValueError: a marker that names no table.
    """

    def table(match: re.Match) -> str:
        start, name, _, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}; the tables are {', '.join(TABLES)}")
        return f"{start}\n{TABLES[name]()}\n{end}"

    return MARKED.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a table is out of date")
    check = parser.parse_args().check
    old = README.read_text(encoding="utf-8")
    new = fill(old)
    if check and new != old:
        sys.exit("README.md: tables are out of date; run python -m benchmarks.tables")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
