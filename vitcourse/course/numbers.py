"""Numbers in the prose of a lesson, compared with the results that they come from.

A number is followed by a comment that computes it; the number stays what the author wrote, rounded as it is written. A
claim in words is followed by one that must be true::

    AdamW has 80.9<!--= percent(lesson_tuning, name="AdamW", stage="test") --> %, and a lot less at the high
    rate.<!--? percent(lesson_vit, name="adamw lr 0.01") < 80 -->

The names are those of the files in ``benchmarks/results``; plain arithmetic needs none, ``16<!--= 4**2 --> times``. A
number that nothing here can compute says what it is instead: ``<!--~ paper -->`` (the sentence names which),
``<!--~ setting -->`` (chosen, not measured), ``<!--~ prediction -->`` (written down before a run). Descriptions of
figures may have such comments, too. The notebooks are without them. A lesson cannot be built, or be in sync, whose
numbers are not those of the results, and `unbound` finds those that say nothing of where they come from.
"""

import json
import re
from pathlib import Path
from statistics import mean as average
from typing import Any

_NUMBER = r"(?P<number>[−-]?\d+(?:[ \u00a0\u202f]\d{3})*(?:\.\d+)?)"
_MARK = re.compile(rf"(?:{_NUMBER}<!--=(?P<value>.*?)-->|<!--\?(?P<claim>.*?)-->|<!--~(?P<kind>.*?)-->)", re.DOTALL)
KINDS = ("paper", "setting", "prediction")


def values(results: dict[str, Any], key: str = "accuracy", **where: Any) -> list[float]:
    """The numbers `key` of all rows that have the values `where`; at least one.

    >>> values({"rows": [{"name": "a", "accuracy": 0.5}, {"name": "b", "accuracy": 0.75}]}, name="b")
    [0.75]
    """
    return [row[key] for row in _rows(results, key, where)]


def mean(results: dict[str, Any], key: str = "accuracy", **where: Any) -> float:
    """The mean of `values`."""
    return average(values(results, key, **where))


def percent(results: dict[str, Any], key: str = "accuracy", **where: Any) -> float:
    """The mean of `values`, in per cent."""
    return 100 * mean(results, key, **where)


def lead(results: dict[str, Any], key: str = "accuracy", **where: Any) -> float:
    """By how many points the first of the one pair among `where` is ahead of the second, on average over the seeds.

    >>> rows = [{"name": name, "seed": 0, "accuracy": value} for name, value in [("a", 0.75), ("b", 0.5)]]
    >>> lead({"rows": rows}, name=("a", "b"))
    25.0
    """
    return average(leads(results, key, **where))


def leads(results: dict[str, Any], key: str = "accuracy", **where: Any) -> list[float]:
    """The same for each seed, in their order."""
    first, second = ({row["seed"]: row[key] for row in rows} for rows in _pair(results, key, where))
    if first.keys() != second.keys():
        raise LookupError(f"seeds {sorted(first)} and {sorted(second)} for {where}")
    return [100 * (first[seed] - second[seed]) for seed in sorted(first)]


def ratio(results: dict[str, Any], key: str, **where: Any) -> float:
    """The first of the one pair among `where` over the second, each the mean of its rows."""
    first, second = (average(row[key] for row in rows) for rows in _pair(results, key, where))
    return first / second


def _pair(results: dict[str, Any], key: str, where: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The rows of either value of the one condition that has two."""
    ((name, both),) = [(name, value) for name, value in where.items() if isinstance(value, tuple)]
    return [_rows(results, key, where | {name: value}) for value in both]


def _rows(results: dict[str, Any], key: str, where: dict[str, Any]) -> list[dict[str, Any]]:
    found = [row for row in results["rows"] if key in row and where.items() <= row.items()]
    if not found:
        raise LookupError(f"no row has {key!r} and {where}")
    return found


def compared(text: str, folder: Path) -> str:
    """A text without the comments, if its numbers are those of the results in `folder`.

    Raises:
        ValueError: a number differs, a claim does not hold, or cannot be computed; the message has both sides.
    """
    if "<!--" not in text:
        return text
    names: dict[str, Any] = {f.__name__: f for f in (values, mean, percent, lead, leads, ratio)}
    names |= {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")}
    plain = _MARK.sub(lambda mark: _without_comment(mark, names), text)
    if left := re.search(r"<!--[=?~].{0,80}", plain):
        raise ValueError(f"{left[0]!r} does not follow a number, or is not closed")
    return plain


def _without_comment(mark: re.Match, names: dict[str, Any]) -> str:
    if mark["kind"] is not None:
        if mark["kind"].strip() not in KINDS:
            raise ValueError(f"{mark[0]} is none of {', '.join(f'<!--~ {kind} -->' for kind in KINDS)}")
        return ""
    if mark["kind"] is not None:
        if mark["kind"].strip() not in KINDS:
            raise ValueError(f"{mark[0]} is none of {', '.join(f'<!--~ {kind} -->' for kind in KINDS)}")
        return ""
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


# ------------------------------------------------------------------------------------------------- what is not marked

_SPELT_NUMBER = (
    r"(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|"
    r"twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred)"
)
_UNIT = r"\s*(?:%|per\s+cent\b|points?\b|×(?!\s*\d)|times\b|ms\b|(?:milli)?seconds?\b)"
_OR = r"(?:\s+(?:to|and|or)\s+[\w.]+)?(?:\s+more)?"  # "two or three points"
_DIGITS = re.compile(rf"(?<![\w.]){_NUMBER}{_OR}{_UNIT}")
_TWICE = r"twice\s+(?:as\s+(?:fast|slow|long|much|quick)|the\s+(?:time|work|cost))"
_SPELT = re.compile(rf"\b(?:{_SPELT_NUMBER}{_OR}{_UNIT}|{_TWICE}\b)", re.IGNORECASE)
_VALUE, _SENTENCE = "\ue000", "\ue001"  # stand for a mark behind its number, and for one that vouches for a sentence
_SILENT = re.compile(r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)", re.DOTALL)  # equations, code, addresses of links
_END = re.compile(rf"\n\s*\n|\n(?=[*|>#]|\d+\. )|(?<=[.!?])(?P<marks>[*)]*{_SENTENCE}*[*)]*)\s+(?=\D)")


def unbound(text: str) -> list[str]:
    """Sentences with a quantity (a number of per cent, points, times, seconds) and no mark that says where it is from.

    A number in digits is followed by its mark; a mark for the whole sentence, ``<!--? … -->`` or ``<!--~ … -->``,
    stands for all that it has. For a number in words any mark in its sentence will do.

    >>> unbound("It takes 1.5<!--= 3 / 2 --> times as long. It wins by two points.")
    ['It wins by two points.']
    """
    text = re.sub(r"<!--=.*?-->", _VALUE, text, flags=re.DOTALL)
    text = re.sub(r"<!--[?~].*?-->", _SENTENCE, text, flags=re.DOTALL)
    sentences = _END.sub(lambda end: (end["marks"] or "") + "\0", _SILENT.sub("", text)).split("\0")
    return [" ".join(sentence.replace(_VALUE, "").split()) for sentence in sentences if _is_unbound(sentence)]


def _is_unbound(sentence: str) -> bool:
    if _SENTENCE in sentence:
        return False
    return bool(_DIGITS.search(sentence) or (_VALUE not in sentence and _SPELT.search(sentence)))
