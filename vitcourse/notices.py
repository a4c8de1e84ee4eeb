"""Where one line for the reader goes: into a notebook as a plain output, elsewhere to stderr."""

import html
import sys
from functools import cache

NOTICE = {"vitcourse": "notice"}  # metadata of such an output: it differs from machine to machine, and is not stored


def in_notebook() -> bool:
    """Is this a Jupyter kernel, whose stderr is shown, though it is no terminal?

    >>> in_notebook()
    False
    """
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def notice(text: str) -> None:
    """Say what is no warning. Jupyter shows stderr in red; this is an output, in HTML alone, which nbval skips."""
    if not in_notebook():
        print(text, file=sys.stderr)
        return
    from IPython.display import display

    display({"text/html": f"<pre>{html.escape(text)}</pre>"}, metadata=NOTICE, raw=True)


@cache
def say_once(line: str) -> None:
    """Write ``vitcourse: line`` to stderr, the first time in a process that it is said."""
    print(f"vitcourse: {line}", file=sys.stderr)
