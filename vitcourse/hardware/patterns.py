"""Modules named by shell wildcards, as the ``skip`` of quantization and of pruning has them."""

import difflib
import fnmatch
from collections.abc import Iterable, Sequence


def as_patterns(skip: str | Iterable[str], names: Sequence[str]) -> list[str]:
    """One pattern or several, as a list, after a look whether each matches one of the names.

    Raises:
        ValueError: a pattern that matches nothing, with the nearest names.

    >>> as_patterns("blocks.*", ["blocks.0", "head"])
    ['blocks.*']
    """
    patterns = [skip] if isinstance(skip, str) else list(skip)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "model.named_modules() names all"
            raise ValueError(f"skip pattern {pattern!r} matches no module; {hint}")
    return patterns


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern matches the name, or a parent's.

    >>> matches("blocks.0.mlp.fc1", ["*.mlp"]), matches("blocks.0.attn.qkv", ["*.mlp"])
    (True, False)
    """
    parts = name.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatch.fnmatchcase(path, pattern) for path in paths for pattern in patterns)
