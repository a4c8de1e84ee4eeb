"""Where a run happens: device, precision, one process or several, and what it must leave as it was."""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vitcourse.devices import device_of, half_dtype, resolve_device

from .batches import Share
from .config import TrainConfig, TrainingError


def choose_device(name: str, model: nn.Module | None) -> torch.device:
    """Where to train ``model``: on the device ``name``, by ``"auto"`` where it lies already, if that is no CPU.

    A model that somebody has put on an accelerator, be it the second one, stays with the tensors around it. One that
    still lies on the CPU, where every model is made, goes where :func:`vitcourse.devices.resolve_device` says.

    Raises:
        ValueError: there is no such device here.
    """
    lies = device_of(model) if model is not None else None
    placed = lies is not None and lies.type not in ("cpu", "meta")
    return lies if name == "auto" and placed else resolve_device(name)


def resolve_precision(name: str, device: torch.device) -> str:
    """What ``"auto"`` means on a device: bf16 where it is native (compute capability 8), fp16 on older GPUs.

    >>> resolve_precision("auto", torch.device("cpu"))
    'fp32'
    """
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if half_dtype(device) == torch.bfloat16 else "fp16"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Mixed precision on ``device``; ``precision`` as in TrainConfig."""
    precision = resolve_precision(precision, device)
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


class Processes:
    """One process, or several under Accelerate: all that differs between the two.

    Args:
        config, model: what says on which device.
        partly_trained: some parameters get no gradient in some steps, and processes must not wait for it.

    Raises:
        TrainingError: several processes, and no Accelerate.
    """

    def __init__(self, config: TrainConfig, model: nn.Module | None = None, partly_trained: bool = False) -> None:
        self.accelerator = None
        self.device = choose_device(config.device, model)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import Accelerator, DistributedDataParallelKwargs
            except ImportError as error:
                raise TrainingError("several processes need Accelerate: pip install accelerate") from error
            # Precision is the engine's own affair, so that one process and many take the same path.
            replicas = DistributedDataParallelKwargs(find_unused_parameters=partly_trained)
            self.accelerator = Accelerator(
                cpu=self.device.type == "cpu", mixed_precision="no", kwargs_handlers=[replicas]
            )
            self.device = self.accelerator.device

    def share(self, accum: int) -> Share:
        if self.accelerator is None:
            return Share(0, 1, accum)
        return Share(self.accelerator.process_index, self.accelerator.num_processes, accum)

    @property
    def is_main(self) -> bool:
        return self.accelerator is None or self.accelerator.is_main_process

    def wrap(self, model: nn.Module) -> nn.Module:
        return model if self.accelerator is None else self.accelerator.prepare_model(model)

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.accelerator is None else self.accelerator.no_sync(model)

    def sum(self, values: Tensor) -> Tensor:
        return values if self.accelerator is None else self.accelerator.reduce(values, "sum")

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Do something that only the main process does; if it fails there, stop everywhere instead of waiting.

        Raises:
            TrainingError: in the other processes, if the main one has failed.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failures = self.sum(torch.tensor(float(failure is not None), device=self.device))
        if failure is not None:
            raise failure
        if failures:
            raise TrainingError("the main process has stopped, for the reason that it gives")

    def wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Only deterministic kernels, where ``wanted``; PyTorch raises where there is none."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may choose kernels by timing
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def memory_errors(config: TrainConfig) -> Iterator[None]:
    """Turn a full memory into advice.

    Raises:
        TrainingError: in place of PyTorch's own error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(s in str(error) for s in _FULL):
            raise
        raise TrainingError(
            f"out of memory with --batch-size {config.batch_size} --accum {config.accum}; use --accum "
            f"{2 * config.accum} (same gradient, half the memory), --grad-checkpointing, or a smaller --batch-size"
        ) from error


_FULL = ("can't allocate memory", "not enough memory", "out of memory")  # of the CPU's allocators
