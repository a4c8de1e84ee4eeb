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

from benchmarks.aot import SHARED_LIMIT, wanted_instructions
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


def scaling_table() -> str:
    """How the cost of each attention grows with the tokens."""
    parts = []
    for result in load("scaling*"):
        times = {(r["name"], r["tokens"]): r["milliseconds"] for r in result["rows"] if "tokens" in r}
        shortest, longest = min(n for _, n in times), max(n for _, n in times)
        rows = [
            [
                r["name"],
                *(f"{times[r['name'], n]:,.2f} ms" if (r["name"], n) in times else "" for n in (shortest, longest)),
                f"{r['slope']:.2f}",
                f"{r['slope_bytes']:.2f}",
            ]
            for r in result["rows"]
            if "slope" in r
        ]
        ends = [f"{n:,} tokens".replace(",", " ") for n in (shortest, longest)]
        header = ["attention", *ends, "slope of time", "slope of memory"]
        parts.append(markdown(header, rows, numbers=4) + origin(result))
    return "\n".join(parts)


def quantization_table() -> str:
    """Bytes, time and accuracy of each scheme, a table for each device."""
    parts = []
    for result in load("quantization_c*"):
        rows = []
        for scheme in ("int8", "w8a8", "int4"):
            group, stored = (64, "int4") if scheme == "int4" else (None, "int8")
            size = _where(result, part="sizes", model="vit_base_patch16_224", scheme=stored, group_size=group)[0]
            times = _where(result, part="models", scheme=scheme)
            peers = {r["peer"].partition(" ")[0]: f"{r['ratio']:.2f}" for r in times}
            accuracy = _where(result, part="accuracy", scheme=scheme, group_size=group)[0]["accuracy"]
            cells = [f"{size['ratio']:.3f}", peers.get("real", ""), peers.get("torchao", ""), f"{100 * accuracy:.2f} %"]
            rows.append([f"`{scheme}`", *cells])
        real = _where(result, part="accuracy", scheme="real")[0]["accuracy"]
        rows.insert(0, ["float32", "1", "1", "", f"{100 * real:.2f} %"])
        header = [
            "scheme",
            "bytes of ViT-B",
            "time of ViT-B",
            "time over torchao's, both eager",
            "accuracy, shipped ViT",
        ]
        parts.append(markdown(header, rows, numbers=4) + origin(result))
    return "\n".join(parts)


def pruning_table() -> str:
    """Accuracy and speed of the shipped ViT with 40 % fewer multiply–adds, and what the training alone does."""
    (result,) = load("pruning")
    (whole,) = _where(result, question="whole")
    rows = [["whole", "1", "1", f"{100 * whole['accuracy']:.2f} %", "", "", ""]]
    trained = _percents(_where(result, question="control"))
    rows.append(["whole, trained alike, its own teacher", "1", "1", f"{trained} %", "", "", ""])
    pruned = _where(result, question="finetuned")
    speeds = [row for row in _where(result, question="speed") if row["target"] == pruned[0]["target"]]
    rows.append(
        [
            "pruned and trained",
            f"{pruned[0]['macs']:.2f}",
            f"{pruned[0]['parameters']:.2f}",
            f"{_percents(pruned)} %",
            *(f"{row['ratio']:.2f}" for row in speeds),
        ]
    )
    header = ["model", "MACs", "parameters", "accuracy", *(f"speed-up, batch {row['batch']}" for row in speeds)]
    return markdown(header, rows, numbers=6) + origin(result)


def _percents(rows: list[dict[str, Any]]) -> str:
    """The accuracy of each seed."""
    return ", ".join(f"{100 * row['accuracy']:.2f}" for row in rows)


def _where(result: dict[str, Any], **values: Any) -> list[dict[str, Any]]:
    """The rows that have these values."""
    return [row for row in result["rows"] if all(row.get(key) == value for key, value in values.items())]


def attention_table() -> str:
    """Our attention against the fastest of PyTorch's, in the layout that models have: what `auto` goes by."""
    parts = []
    for result in load("attention"):
        rows = [
            [
                f"{row['head_dim']}{', bias' * row['bias']}",
                str(row["n"]),
                str(row["batch"]),
                "forward + backward" if row["backward"] else "forward",
                row["best_peer"],
                f"{row['speedup']:.2f}",
                f"{row['target']:.1f}",
                f"{row['times_the_floor']:.2f}",
                "flash" if row["views_speedup"] >= 1 else "sdpa",
            ]
            for row in _where(result, inputs="packed")
        ]
        header = [
            "D",
            "N",
            "batch",
            "pass",
            "fastest peer",
            "speed-up",
            "target",
            "time over the floor's",
            "`auto` takes",
        ]
        parts.append(markdown(header, rows, numbers=4) + origin(result))
    return "\n".join(parts) or "Not measured yet: no GPU has been at hand.\n"


def aot_table() -> str:
    """What the attention kernels become on each chip, a row each."""
    (result,) = load("aot")
    rows = []
    for capability in dict.fromkeys(row["capability"] for row in result["rows"]):
        half = [row for row in _where(result, capability=capability) if row["dtype"] != "fp32"]
        spilling = [row["spills"] for row in half if row["spills"]]
        rows.append(
            [
                f"sm_{capability}",
                f"`{wanted_instructions(capability)}`",
                str(len(half)),
                str(max(row["registers"] for row in half)),
                f"{len(spilling)} (≤ {max(spilling)} words)" if spilling else "none",
                f"{max(row['shared_kib'] for row in half):.0f} of {SHARED_LIMIT[capability]} KiB",
            ]
        )
    header = ["chip", "tensor cores by", "configurations", "most registers", "that spill", "most shared memory"]
    return markdown(header, rows, numbers=4) + origin(result)


TABLES = {
    "attention": attention_table,
    "aot": aot_table,
    "models": models_table,
    "importtime": importtime_table,
    "scaling": scaling_table,
    "quantization": quantization_table,
    "pruning": pruning_table,
}


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
