"""Which images train, which validate and choose the best weights, and which only tell at the end how good these are."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import TrainConfig, check_choice

if TYPE_CHECKING:
    from torch.utils.data import Dataset

VALIDATION = ("val", "train", "test", "none")
VAL_SHARE = 0.1


@dataclass(frozen=True)
class Splits:
    """The images of a run; ``test`` is None where a data set has none, or where it validates.

    Attributes:
        chosen_on: what validates, as the run's folder keeps it.
        notice: one line about images that validate and might have done something else, or None.
    """

    train: "Dataset"
    val: "Dataset | None"
    test: "Dataset | None"
    chosen_on: str
    notice: str | None = None


def open_splits(spec: str, val: str | None = None, val_share: float = VAL_SHARE, **where: Any) -> Splits:
    """Open a data set to train on.

    Args:
        spec: what ``open_dataset`` takes.
        val: what validates: ``"val"``, the data set's own split of that name; ``"train"``, a part of the training
            images, the same in every run, which then do not train; ``"test"``, the test images, which can then no
            longer tell how good the chosen weights are; ``"none"``. By default ``"val"`` where there is one, else
            ``"train"``.
        val_share: the share of the training images that validates under ``"train"``, of each class alike.
        where: ``root`` and ``download`` of ``open_dataset``, and options of the data set.

    Raises:
        ValueError: as ``open_dataset`` and ``hold_out`` do, and for an unknown ``val``.
    """
    from vitcourse.data import hold_out, open_dataset, split_names

    names = split_names(spec)
    val = val or ("val" if "val" in names else "train")
    check_choice("val", val, VALIDATION)
    if val == "val" and "val" not in names:
        raise ValueError(f"{spec} has no val split; use --val train, which holds out a part of its training images")
    train_set = open_dataset(spec, "train", **where)
    test_set = open_dataset(spec, "test", **where) if "test" in names or val == "test" else None
    if val == "test":
        notice = "the test images validate, as asked: best.safetensors is chosen on them, and its accuracy promises too"
        return Splits(train_set, test_set, None, "test", f"{notice} much")
    if val == "train":
        rest, held = hold_out(train_set, val_share)
        notice = (
            f"{len(held)} of the {len(train_set)} training images of {spec} validate and choose best.safetensors, the "
            "same in every run; --val-share changes how many, --val none lets all of them train"
        )
        return Splits(rest, held, test_set, f"{val_share:g} of train", notice)
    return Splits(train_set, open_dataset(spec, "val", **where) if val == "val" else None, test_set, val)


def validation_of_earlier_run(folder: str | Path, spec: str) -> str | None:
    """What a run validates on that was begun when runs did not note it: the test images, or val where there were none.

    None if the folder has no such run.
    """
    from vitcourse.data import split_names

    config, checkpoint = Path(folder) / "config.json", Path(folder) / "last.pt"
    if not (config.exists() and checkpoint.exists()):
        return None
    if "val" in json.loads(config.read_text(encoding="utf-8"))["about"]:
        return None
    return "test" if "test" in split_names(spec) else "val"


def measure_on_test(
    folder: str | Path, test_set: "Dataset", config: TrainConfig, evaluate: Callable[..., dict[str, float | None]]
) -> dict[str, dict[str, float]]:
    """Measure a finished run's weights, the best and the final ones, on images that had no part in it.

    Every process of several calls this and takes its share of the images; they all read ``folder``.

    Args:
        folder: of the run.
        test_set: the images, or clips.
        config: of the run.
        evaluate: the task's.

    Returns:
        ``{"best": {"epoch", "test_loss", "test_accuracy"}, "final": …}``, or what else the task measures; this is also
        written to ``test.json`` in ``folder``, and into the headers of both files.
    """
    from vitcourse import create_model
    from vitcourse.weights import read_metadata

    from .record import write_atomically
    from .runtime import Processes, memory_errors

    processes, results = Processes(config), {}
    measured: dict[int, dict[str, float]] = {}  # by step: the last weights are often the best
    for file in (Path(folder) / f"{name}.safetensors" for name in ("best", "final")):
        if not file.exists():
            continue
        facts, model = read_metadata(file), create_model(file).to(processes.device)
        if facts["step"] not in measured:
            with memory_errors(config):
                found = evaluate(model, test_set, config, share=processes.share(1), reduce=processes.sum)
            measured[facts["step"]] = {f"test_{key.removeprefix('val_')}": value for key, value in found.items()}
        results[file.stem] = {"epoch": facts["epoch"], **measured[facts["step"]]}
        if processes.is_main:
            _note(file, model, config, {**facts, **measured[facts["step"]]})
    if processes.is_main:
        text = json.dumps({"images": len(test_set), **results}, indent=2)
        write_atomically(Path(folder) / "test.json", lambda f: f.write(text.encode()))
    return results


def _note(file: Path, model: Any, config: TrainConfig, facts: dict[str, Any]) -> None:
    from vitcourse.weights import HEADER_KEYS, save_weights

    facts = {key: value for key, value in facts.items() if key not in HEADER_KEYS}  # which save_weights adds
    save_weights(model, file, half=config.save_dtype == "fp16", **facts)
