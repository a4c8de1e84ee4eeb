"""A plugin of pytest: CPU seconds of each test file, and of what it waits for, as JSON into the file $VITCOURSE_CPU."""

import json
import os
import resource
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spent: Counter[str] = Counter()


def _seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _charge(path: Path) -> Generator[None, object, object]:
    before = _seconds()
    result = yield
    relative = path.relative_to(ROOT)
    spent[relative.as_posix() if relative.parts[0] == "tests" else relative.parts[0]] += _seconds() - before
    return result


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, object, object]:
    """A file is imported while it is collected; what two import is charged to the first."""
    if collector.path.is_file():
        return (yield from _charge(collector.path))
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _charge(item.path))


def pytest_unconfigure() -> None:
    Path(os.environ["VITCOURSE_CPU"]).write_text(json.dumps(spent), encoding="utf-8")
