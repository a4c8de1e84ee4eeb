"""Numbers in the prose of a lesson, compared with the results that they come from.

A number is followed by a comment that computes it; the number stays what the author wrote, rounded as it is written. A
claim in words is followed by one that must be true::

    AdamW has 80.9<!--= percent(lesson_tuning, name="AdamW", stage="test") --> %, and a lot less at the high
    rate.<!--? percent(lesson_vit, name="adamw lr 0.01") < 80 -->

The names are those of the files in ``benchmarks/results``. Descriptions of figures may have such comments, too. The
notebooks are without them. A lesson cannot be built, or be in sync, whose numbers are not those of the results.
"""

import json
import re
from pathlib import Path
from statistics import mean as average
from typing import Any

_NUMBER = r"(?P<number>[−-]?\d+(?:[ \u00a0\u202f]\d{3})*(?:\.\d+)?)"
_MARK = re.compile(rf"(?:{_NUMBER}<!--=(?P<value>.*?)-->|<!--\?(?P<claim>.*?)-->)", re.DOTALL)


def values(results: dict[str, Any], key: str = "accuracy", **where: Any) -> list[float]:
    """The numbers `key` of all rows that have the values `where`; at least one.

    >>> values({"rows": [{"name": "a", "accuracy": 0.5}, {"name": "b", "accuracy": 0.75}]}, name="b")
    [0.75]
    """
    found = [row[key] for row in results["rows"] if key in row and where.items() <= row.items()]
    if not found:
        raise LookupError(f"no row has {key!r} and {where}")
    return found


def mean(results: dict[str, Any], key: str = "accuracy", **where: Any) -> float:
    """The mean of `values`."""
    return average(values(results, key, **where))


def percent(results: dict[str, Any], key: str = "accuracy", **where: Any) -> float:
    """The mean of `values`, in per cent."""
    return 100 * mean(results, key, **where)


def compared(text: str, folder: Path) -> str:
    """A text without the comments, if its numbers are those of the results in `folder`.

    Raises:
        ValueError: a number differs, a claim does not hold, or cannot be computed; the message has both sides.
    """
    if "<!--=" not in text and "<!--?" not in text:
        return text
    names = {"values": values, "mean": mean, "percent": percent}
    names |= {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")}
    plain = _MARK.sub(lambda mark: _without_comment(mark, names), text)
    if left := re.search(r"<!--[=?].{0,80}", plain):
        raise ValueError(f"{left[0]!r} does not follow a number, or is not closed")
    return plain


def _without_comment(mark: re.Match, names: dict[str, Any]) -> str:
    source = " ".join((mark["value"] or mark["claim"]).split())
    try:
        result = eval(source, dict(names))
    except Exception as error:
        raise ValueError(f"{source}: {type(error).__name__}: {error}") from error
    if mark["number"] is None:
        if result is not True:
            raise ValueError(f"the results say {result!r}: {source}")
        return ""
    written = re.sub(r"[ \u00a0\u202f]", "", mark["number"]).replace("−", "-")
    digits = len(written.partition(".")[2])
    if f"{result:.{digits}f}" != written:
        raise ValueError(f"the text says {mark['number']}, the results {result:.{digits + 2}f}: {source}")
    return mark["number"]
