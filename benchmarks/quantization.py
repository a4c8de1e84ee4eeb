"""Are quantized layers faster than the real ones they replace, how small are the files, and what does accuracy pay?

    python -m benchmarks.quantization                     everything, on a GPU where there is one
    python -m benchmarks.quantization --parts accuracy    some of it; the other rows of the file are kept

* layers: every linear layer of ViT-B and ViT-L at batch 1 and 8, and on a GPU also 64 and a single token, against
  ``F.linear`` (float32 on a CPU, 16 bits by cuBLAS on a GPU) and against torchao's layers, in turns.
* models: a whole ViT-B in the same way.
* sizes: bytes of the saved file over those of float32's.
* accuracy: of the weights that come with the course, for each scheme, and for weights of 2 to 8 bits.
* kernels: registers, spills, shared memory and instructions of every Triton kernel with every tiling and group size on
  every generation of chips, compiled ahead of time; no GPU is needed.

On a GPU everything is captured in CUDA graphs: the clock sees kernels, not Python. Each graph runs many copies of a
layer one after the other, more than the cache holds: weights come from memory, as they do within a whole model.

Results: ``quantization_<device type>.json``; those of the kernels: ``quantization_kernels.json``.
"""

import argparse
import itertools
import math
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import captured, default_device, in_turns, ratio, with_earlier, write_results
from vitcourse import create_model
from vitcourse.data import open_dataset
from vitcourse.devices import half_dtype
from vitcourse.hardware.quantize import SCHEMES, dequantize, model_bytes, quantize, quantize_model
from vitcourse.hardware.quantize.checks import GROUP_SIZES
from vitcourse.hardware.quantize.tilings import kernel_for, tilings
from vitcourse.inference import find_mean_std, normalise
from vitcourse.paths import data_dir
from vitcourse.train import evaluate
from vitcourse.weights import save_weights

TARGETS = {"w8a8": 1 / 1.4, "int4": 1 / 2}  # of a GPU's time, ours over bfloat16's, at most; int4 at batch 1
TOKENS = 197
SIZES = {"cpu": ((1, TOKENS), (8, TOKENS)), "cuda": ((1, 1), (1, TOKENS), (8, TOKENS), (64, TOKENS))}  # batch, tokens
WIDTHS = {"vit_base": 768, "vit_large": 1024}


def layer_shapes(width: int) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of the linear layers of a block."""
    return {
        "attn.qkv": (width, 3 * width),
        "attn.proj": (width, width),
        "mlp.fc1": (width, 4 * width),
        "mlp.fc2": (4 * width, width),
    }


def torchao_peers(device: str) -> dict[str, Callable[[nn.Module], None]]:
    """What quantizes a module in place by torchao, by the scheme of ours that does the same; empty without torchao."""
    try:
        from torchao import quantization as ao
    except ImportError:
        return {}
    configs = {
        "int8": ao.Int8WeightOnlyConfig(version=2),
        "w8a8": ao.Int8DynamicActivationInt8WeightConfig(version=2),
        "int4": ao.Int4WeightOnlyConfig(group_size=64),
    }
    if device == "cpu":
        configs.pop("int4")  # it asks for bfloat16 and a layout of its own
    return {scheme: lambda module, config=config: ao.quantize_(module, config) for scheme, config in configs.items()}


def candidates(
    model: nn.Module, x: Tensor, copies: int, capture: Callable[[Callable[[], Any]], Callable[[], Any]]
) -> dict[str, Callable[[], Any]]:
    """A step for the real model, for every scheme of ours, and for those of torchao's that run here."""
    models = {"real": model}
    for scheme in SCHEMES:
        models[scheme] = quantize_model(model, scheme, batches=[x] if scheme == "w8a8_static" else None)
    steps = {name: capture(step(module, x, copies)) for name, module in models.items()}
    for scheme, apply in torchao_peers(x.device.type).items():
        peer = deepcopy(model)
        try:
            apply(peer)
            peers = capture(step(peer, x, copies))
            peers()
        except (ImportError, NotImplementedError, RuntimeError) as error:
            print(f"torchao's {scheme} does not run here: {str(error).splitlines()[0]}", flush=True)
        else:
            steps[f"torchao {scheme}"] = peers
    return steps


def step(module: nn.Module, x: Tensor, copies: int) -> Callable[[], None]:
    """Run a module and its copies, each of which has weights of its own."""
    modules = [module, *(deepcopy(module) for _ in range(copies - 1))]

    def run() -> None:
        with torch.inference_mode():
            for each in modules:
                each(x)

    return run


def copies_beyond_cache(model: nn.Module, device: torch.device) -> int:
    """So many that even their 4-bit weights fill a GPU's cache twice; one on a CPU, where time goes into computing."""
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return math.ceil(2 * cache / model_bytes(quantize_model(model, "int4")))


def compare(
    model: nn.Module, x: Tensor, rounds: int, mark: dict[str, Any], keep: Callable[[list[dict[str, Any]]], None]
) -> None:
    """A row for each scheme and each of its peers."""
    copies = copies_beyond_cache(model, x.device)
    steps = candidates(model, x, copies, captured if x.is_cuda else lambda work: work)
    taken = in_turns(steps, x.device.type, rounds)
    rows = []
    for scheme in SCHEMES:
        for peer in ("real", f"torchao {scheme}"):
            if peer in taken:
                against = {"scheme": scheme, "peer": peer}
                if peer != "real":
                    against["peer_version"] = version("torchao")
                times = {"ours_seconds": min(taken[scheme]) / copies, "theirs_seconds": min(taken[peer]) / copies}
                rows.append({**mark, **against, **ratio(taken[scheme], taken[peer]), **times})
    for row in rows:
        late = x.is_cuda and row["peer"] == "real" and row["ratio"] > target(row["scheme"], mark["batch"])
        print(
            " ".join(str(row[k]) for k in (*mark, "scheme", "peer")), f"{row['ratio']:.3f}", "missed" * late, flush=True
        )
    keep(rows)


def target(scheme: str, batch: int) -> float:
    return 1.0 if scheme == "int4" and batch > 1 else TARGETS.get(scheme, 1.0)


def measure_layers(device: str, rounds: int, keep: Callable[[list[dict[str, Any]]], None]) -> None:
    dtype = torch.float32 if device == "cpu" else half_dtype(torch.device(device))
    for model, width in WIDTHS.items():
        for layer, (inputs, outputs) in layer_shapes(width).items():
            for batch, tokens in SIZES[torch.device(device).type]:
                torch.manual_seed(0)
                linear = nn.Sequential(nn.Linear(inputs, outputs)).to(device, dtype)
                x = torch.randn(batch * tokens, inputs, device=device, dtype=dtype)
                mark = {"part": "layers", "model": model, "layer": layer, "batch": batch, "tokens": batch * tokens}
                compare(linear, x, rounds, mark, keep)


def measure_models(device: str, rounds: int, keep: Callable[[list[dict[str, Any]]], None]) -> None:
    dtype, batches = (torch.float32, (1,)) if device == "cpu" else (half_dtype(torch.device(device)), (1, 8))
    for batch in batches:
        torch.manual_seed(0)
        model = create_model("vit_base_patch16_224").eval().to(device, dtype)
        images = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
        mark = {"part": "models", "model": "vit_base_patch16_224", "batch": batch, "tokens": batch * TOKENS}
        compare(model, images, rounds, mark, keep)


def measure_sizes(device: str, rounds: int, keep: Callable[[list[dict[str, Any]]], None]) -> None:
    for name in ("vit_tiny_patch16_224", "vit_base_patch16_224", "shipped"):
        model = shipped() if name == "shipped" else create_model(name)
        real = file_bytes(model)
        for scheme, group_size in (("int8", None), ("int4", 32), ("int4", 64), ("int4", 128)):
            size = file_bytes(quantize_model(model, scheme, group_size=group_size or 64))
            row = {"part": "sizes", "model": name, "scheme": scheme, "group_size": group_size}
            print(*row.values(), f"{size / real:.4f}", flush=True)
            keep([{**row, "bytes": size, "ratio": size / real}])


def file_bytes(model: nn.Module) -> int:
    """Bytes of the file that ``save_weights`` writes."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_weights(model, path)
        return path.stat().st_size


def shipped() -> nn.Module:
    return create_model(data_dir() / "weights" / "fashion_mnist_vit.safetensors").eval()


def measure_accuracy(device: str, rounds: int, keep: Callable[[list[dict[str, Any]]], None]) -> None:
    test = open_dataset("fashion_mnist_subset", "test")
    for mark, small in quantized_models(shipped().to(device)):
        measured = evaluate(small, test)
        row = {"part": "accuracy", **mark, "accuracy": measured["val_accuracy"], "loss": measured["val_loss"]}
        print(*mark.values(), f"{row['accuracy']:.4f}", flush=True)
        keep([row])


def quantized_models(model: nn.Module) -> Iterator[tuple[dict[str, Any], nn.Module]]:
    """The real model, that of every scheme, and models whose weights are rounded to 2 to 8 bits, with what they are."""
    batches = calibration_batches(model)
    yield {"scheme": "real", "weight_bits": 32, "group_size": None}, model
    yield {"scheme": "int8", "weight_bits": 8, "group_size": None}, quantize_model(model, "int8")
    yield {"scheme": "w8a8", "weight_bits": 8, "group_size": None}, quantize_model(model, "w8a8")
    for observer in ("minmax", "percentile"):
        small = quantize_model(model, "w8a8_static", batches=batches, observer=observer)
        yield {"scheme": f"w8a8_static {observer}", "weight_bits": 8, "group_size": None}, small
    for group_size in (32, 64, 128):
        small = quantize_model(model, "int4", group_size=group_size)
        yield {"scheme": "int4", "weight_bits": 4, "group_size": group_size}, small
    for group_size in (None, 32):
        for bits in range(8, 1, -1):
            yield {"scheme": "rounded", "weight_bits": bits, "group_size": group_size}, rounded(model, bits, group_size)


def calibration_batches(model: nn.Module, count: int = 512) -> list[Tensor]:
    """Training images as the model takes them."""
    train = open_dataset("fashion_mnist_subset", "train")
    mean_std = find_mean_std(model, train, next(model.parameters()).device)
    return list(normalise(torch.stack([train[i][0] for i in range(count)]).to(mean_std[0].device), mean_std).split(64))


def rounded(model: nn.Module, bits: int, group_size: int | None) -> nn.Module:
    """A copy whose linear layers have weights of few bits, kept as real numbers."""
    model = deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                q, scale = quantize(module.weight, bits, group_size, half_scale=True)
                module.weight.copy_(dequantize(q, scale, group_size))
    return model


# ------------------------------------------------------------------------------------------------------------- kernels


KERNELS = ("w8a8", "w8a16", "w4a16")


def kernel_variants(capability: int) -> Iterator[tuple[dict[str, Any], Any, dict, dict, dict]]:
    """For ``compile_for``: every kernel with every tiling that a chip may launch, in both types; first, what it is."""
    width, chip = 3072, divmod(capability, 10)
    integers = dict.fromkeys(("M", "N", "K"), "i32:16") | {"M": "i32"}
    scales = dict.fromkeys(("x_scale_ptr", "weight_scale_ptr"), "*fp32:16")
    for kernel in KERNELS:
        group_sizes = GROUP_SIZES if kernel == "w4a16" else (None,)
        tiles = dict.fromkeys(tile for tokens in (1, 16, 10_000) for tile in tilings(kernel, tokens, chip))
        for tile, group_size, dtype in itertools.product(tiles, group_sizes, ("bf16", "fp16")):
            real = dict.fromkeys(("bias_ptr", "out_ptr", "x_ptr"), f"*{dtype}:16")
            stored = dict.fromkeys(("weight_ptr", "packed_ptr", *["x_ptr"] * (kernel == "w8a8")), "*i8:16")
            constants = tile.constants(width, group_size) | ({"PER_TOKEN": 1} if kernel == "w8a8" else {})
            function = kernel_for(kernel, tile)
            types = integers | scales | real | stored
            signature = {name: types[name] for name in function.arg_names if name in types}
            size = f"{tile.block_m}x{tile.block_n}x{constants['BLOCK_K']}"
            mark = {"kernel": function.__name__, "tile": size, "group_size": group_size, "dtype": dtype}
            yield mark, function, signature, constants, tile.options


def measure_kernels() -> None:
    from benchmarks.aot import SHARED_LIMIT

    rows = []
    for capability in SHARED_LIMIT:
        for row in kernel_rows(capability):
            print(*row.values(), flush=True)
            rows.append(row)
    write_results("quantization_kernels", rows)
    over = [row for row in rows if row["shared"] > row["shared_limit"]]
    if over:
        raise SystemExit(f"{len(over)} kernels want more shared memory than their chip has, such as {over[0]}")


def kernel_rows(capability: int, **only: Any) -> Iterator[dict[str, Any]]:
    """What every kernel becomes on a chip; of some, if ``only`` says what their rows hold."""
    from benchmarks.aot import SHARED_LIMIT, compile_for

    for mark, kernel, signature, constants, options in kernel_variants(capability):
        if any(mark[key] != value for key, value in only.items()):
            continue
        built = compile_for(kernel, signature, constants, capability, **options)
        yield {
            "capability": capability,
            **mark,
            "registers": built.registers,
            "spills": built.spills,
            "shared": built.shared,
            "shared_limit": 1024 * SHARED_LIMIT[capability],
            "instructions": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[^ ;]*", built.ptx))),
        }


PARTS = {
    "layers": measure_layers,
    "models": measure_models,
    "sizes": measure_sizes,
    "accuracy": measure_accuracy,
}
NUMBERS = ("ratio", "ratio_low", "ratio_high", "ours_seconds", "theirs_seconds", "bytes", "accuracy", "loss")


def merged(name: str, rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """These rows, and those of an earlier run, part by part."""

    def key(row: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
        return tuple((name, value) for name, value in row.items() if name not in NUMBERS)

    return sorted(with_earlier(name, rows, device, key), key=lambda row: list(PARTS).index(row["part"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "kernels"), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, for both sides alike")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = f"quantization_{torch.device(args.device).type}"
    for part in args.parts:
        if part == "kernels":
            measure_kernels()
            continue
        PARTS[part](
            args.device, args.rounds, lambda rows: write_results(name, merged(name, rows, args.device), args.device)
        )


if __name__ == "__main__":
    main()
