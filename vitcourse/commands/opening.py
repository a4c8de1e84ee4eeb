"""The data set that a command is asked to measure on."""

import argparse
from typing import Any

from torch.utils.data import Dataset

from vitcourse.data import open_dataset, split_names


def choose_split(options: argparse.Namespace) -> str:
    """``options.split``, or else test, or val where there is no test."""
    names = split_names(options.data)
    return options.split or next((name for name in ("test", "val") if name in names), names[0])


def open_split(options: argparse.Namespace, split: str, **follows: Any) -> Dataset:
    """A split of ``options.data``; what ``follows`` from the weights gives way to what is asked for."""
    on_error = {"on_error": options.on_error} if options.on_error else {}
    chosen = {**follows, **options.data_args, **on_error}
    return open_dataset(options.data, split, root=options.data_root, download=options.download, **chosen)
