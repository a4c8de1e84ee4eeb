"""Where the committed data and benchmark results live, in a clone and in an installed wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _find(in_clone: str, in_wheel: str) -> Path:
    for path in (_PACKAGE.parent / in_clone, _PACKAGE / "_data" / in_wheel):
        if path.is_dir():
            return path
    raise FileNotFoundError(
        f"neither {_PACKAGE.parent / in_clone} nor {_PACKAGE / '_data' / in_wheel} exists; "
        "reinstall vitcourse (pip install --force-reinstall) or restore the folder with git checkout"
    )


def data_dir() -> Path:
    """The folder of embedded data: images, photos, trained weights."""
    return _find("data", "data")


def results_dir() -> Path:
    """The folder of committed benchmark results (``*.json``)."""
    return _find("benchmarks/results", "results")
