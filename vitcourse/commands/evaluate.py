"""``vitcourse evaluate``: the metrics of a weights file on a data set, as JSON and as a figure."""

import argparse
import json
from pathlib import Path

from vitcourse.commands import add_running, add_weights, check_suffix, guarded, open_weights
from vitcourse.train.arguments import DATA_HELP, add_data_args


def main(argv: list[str] | None = None) -> int:
    """Measure as the arguments say. Returns 0, or 1 after one line on stderr that says what is wrong."""
    return guarded(run, argv)


def run(argv: list[str]) -> int:
    options = make_parser().parse_args(argv)
    if options.json != "-":
        check_suffix("--json", options.json, ".json")
    check_suffix("--figure", options.figure, ".png", ".pdf", ".svg")
    model, task = open_weights(options.weights, options.device)
    options.batch_size = options.batch_size or task.BATCH_SIZE
    result = {"weights": options.weights, **task.measure(model, options)}
    text = json.dumps(result, indent=2, ensure_ascii=False)
    if options.json == "-":
        print(text)
    else:
        print(task.report(result))
        if options.json:
            Path(options.json).write_text(text + "\n", encoding="utf-8")
    if options.figure:
        task.draw(result).savefig(options.figure)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vitcourse evaluate",
        description="Measure a weights file on a data set, as the task asks that stands in the file: a classifier's "
        "loss, accuracy, accuracy per class and confusion matrix, of images or clips; a detector's mean average "
        "precision and a segmenter's mean IoU, at the size of the model's images; of an encoder that was trained "
        "without labels, how well nearest neighbours, ridge regression and a linear probe read the classes out of its "
        "frozen features.",
        allow_abbrev=False,
    )
    add_weights(parser)
    parser.add_argument("--data", required=True, help=DATA_HELP)
    add_data_args(parser)
    parser.add_argument("--split", help="train, val or test; by default test, or val where there is no test")
    parser.add_argument("--data-root", help="folder of torchvision's data sets")
    parser.add_argument("--download", action="store_true", help="download the data set if it is not there")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there; - for stdout, in place of the report")
    parser.add_argument("--figure", metavar="FILE", help="draw them there, a .png, .pdf or .svg")
    add_running(parser)
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read images (%(default)s)")
    return parser
