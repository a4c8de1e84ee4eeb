"""Numbers in the prose of the lessons: they are those of the results, and none is without a mark."""

import json
import re
from pathlib import Path

import jupytext
import pytest

from vitcourse.course import lessons, numbers

ROOT = Path(__file__).parents[1]

RESULTS = {
    "rows": [{"name": "a", "accuracy": 0.8085}, {"name": "a", "accuracy": 0.81}, {"name": "b", "loss": -16384.2}]
}

BY_SEED = {
    "rows": [
        {"name": "a", "seed": 1, "accuracy": 0.75, "ms": 1.0},
        {"name": "a", "seed": 0, "accuracy": 0.625, "ms": 3.0},
        {"name": "b", "seed": 0, "accuracy": 0.5, "ms": 2.0},
        {"name": "b", "seed": 1, "accuracy": 0.75, "ms": 2.0},
        {"name": "c", "seed": 1, "accuracy": 0.5},
    ]
}


def write_results(folder: Path) -> None:
    for name, results in (("r", RESULTS), ("by_seed", BY_SEED)):
        (folder / f"{name}.json").write_text(json.dumps(results), encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("no number, <!-- a comment -->", "no number, <!-- a comment -->"),
        ('it has 80.9<!--= percent(r, name="a") --> %', "it has 80.9 %"),
        ('it has 81<!--=\n  percent(r,\n name="a")--> %', "it has 81 %"),
        ('2 of −16 384<!--= mean(r, "loss") -->', "2 of −16 384"),
        ("it rises<!--? values(r)[1] > values(r)[0] -->.", "it rises."),
        ("16<!--= 4**2 --> times the work<!--~ setting -->.", "16 times the work."),
        ('6<!--= lead(by_seed, name=("a", "b")) --> points ahead', "6 points ahead"),
        ("on<!--? leads(by_seed, name=('a', 'b')) == [12.5, 0.0] --> one seed", "on one seed"),
        ('1.5<!--= ratio(by_seed, "ms", name=("a", "b"), seed=0) --> times', "1.5 times"),
    ],
)
def test_numbers_in_prose_are_those_of_the_results(tmp_path, text, plain):
    write_results(tmp_path)
    assert numbers.compared(text, tmp_path) == plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('it has 80.8<!--= percent(r, name="a") --> %', "the text says 80.8, the results 80.925: percent"),
        ("it falls<!--? values(r)[1] < values(r)[0] -->.", "the results say False: values"),
        ("it<!--? 3 -->.", "the results say 3"),
        ('1<!--= percent(r, name="c") -->', "LookupError: no row has 'accuracy' and {'name': 'c'}"),
        ("1<!--= mean(s) -->", "NameError: name 's' is not defined"),
        ("it has many<!--= mean(r) -->", "does not follow a number"),
        ("it has 1<!--= mean(r)", "is not closed"),
        ("it has 1 <!--~ guess -->", "<!--~ guess --> is none of <!--~ paper -->, <!--~ setting -->"),
        ('1<!--= lead(r, "accuracy", name=("a", "c")) -->', "LookupError: no row has 'accuracy' and {'name': 'c'}"),
        ('1<!--= lead(by_seed, name=("a", "c")) -->', "LookupError: seeds [0, 1] and [1]"),
    ],
)
def test_numbers_in_prose_that_the_results_do_not_have_are_refused(tmp_path, capsys, text, message):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    write_results(folder)
    for source in (f"# %% [markdown]\n# {text}\n", f"# %%\n# alt: {text}\nplot()\n"):
        lesson = lessons.Lesson(tmp_path, "00_demo")
        lesson.source.parent.mkdir(exist_ok=True)
        lesson.source.write_text(source, encoding="utf-8")
        with pytest.raises(lessons.BuildError, match=f"00_demo.py, cell [01]: .*{re.escape(message)}"):
            lessons.render(lesson, "student")


@pytest.mark.parametrize(
    "text",
    [
        "AdamW has 80.9 %.",
        "It loses 3 points, and 12<!--= 3 * 4 --> per cent.",
        "It takes 1.2 times as long.",
        "A quarter: 4 × memory.",
        "It takes 20 ms, or\n0.5 seconds.",
        "It is right nine times in ten. It rises.<!--? True -->",
        "It is twice as\nfast.",
        "It wins 9 to 10 points; 3<!--= 1 + 2 --> are chance.",
        "| int8 | 4 × memory |\n| int4 | 8<!--= 8 --> × memory |",
    ],
)
def test_a_quantity_without_a_mark_is_found(text):
    assert len(numbers.unbound(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "AdamW has 80.9<!--= 80.9 --> %, SGD 80.3<!--= 80.3 --> per cent.",
        "It is two points ahead.<!--? 2 > 1 --> It rises.",
        "It loses 3 points, or 4 (Dosovitskiy et al. 2021, table 5).<!--~ paper -->",
        "Three seeds, 500 steps of 100 images at the rate 0.003.",
        "Windows of 7 × 7 and 4 × 4 tokens; *about 10 minutes.*",
        "The error is $3 \\times 5 % $ and `2 %`, see [a page](https://example.org/10%25).",
        "It takes two thirds of the time; 1.4<!--= 1.4 --> times as fast, twice as fast on a GPU.",
    ],
)
def test_a_quantity_with_a_mark_or_none_at_all_is_not(text):
    assert numbers.unbound(text) == []


@pytest.mark.parametrize("lesson", lessons.find_lessons(ROOT), ids=lambda lesson: lesson.stem)
def test_every_quantity_in_the_prose_of_a_lesson_says_where_it_is_from(lesson):
    found = []
    for cell in jupytext.reads(lesson.source.read_text(encoding="utf-8"), fmt="py:percent").cells:
        alt = lessons.unmarked(cell.source, {})[1].get("alt", "")
        found += numbers.unbound(cell.source if cell.cell_type == "markdown" else alt)
    assert not found, "no <!--= … -->, <!--? … --> or <!--~ … --> in:\n" + "\n".join(found)
