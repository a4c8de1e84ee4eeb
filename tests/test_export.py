"""Models as graphs: ``torch.export`` and ONNX, for any number of images of any size, traced with one.

Sizes are smaller, as large and larger than the one that a graph is traced with and than the one that positions are made
for, along one axis or both, and the first two ask for interpolation both ways.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim

from vitcourse.efficient_attention import LocalAttention, merge_tokens
from vitcourse.hardware.prune import keep_units
from vitcourse.hardware.quantize import quantize_model
from vitcourse.hierarchical import V2, SwinTransformer
from vitcourse.hybrid import CoAtNet, ConvStem
from vitcourse.vit import VisionTransformer

VIT = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 1, "num_heads": 2}
SWIN = {"img_size": 32, "num_classes": 5, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4}
ONE_STAGE = {"depths": (2,), "num_heads": (2,)}
COATNET = {"img_size": 32, "num_classes": 5, "stem_dim": 8, "embed_dim": (16, 32), "depths": (1, 1), "layout": "CT"}
COATNET |= {"strides": (2, 2), "head_dim": 16}
TRACED = 32, 48
WHOLE = [(1, 16, 96), (3, 32, 32), (2, 64, 40), (5, 24, 16), (2, 32, 48), (1, 48, 72)]  # multiples of 8
ODD = [(1, 13, 90), (3, 32, 32), (2, 61, 40), (5, 45, 17), (2, 32, 48), (1, 50, 70)]


def random(model: nn.Module) -> nn.Module:
    """Every parameter random, so that none hides behind a zero, and every image has logits of its own."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.3 * (parameter.ndim == 1))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.fill_(0.7)
    return model.eval()


def vit(**changes):
    return random(VisionTransformer(**VIT | changes))


def calibrated(scheme):
    batches = [torch.randn(4, 3, 32, 32)] if scheme == "w8a8_static" else None
    return quantize_model(vit(reg_tokens=1), scheme, batches=batches)


MODELS = {
    "learned positions, registers": lambda: vit(reg_tokens=1),
    "no positions": lambda: vit(pos_embed="none"),
    "positions of patches alone": lambda: vit(no_embed_class=True, init_values=0.5),
    "padded, fixed positions, mean": lambda: vit(pad=True, pos_embed="sincos", class_token=False, global_pool="avg"),
    "convolutional stem": lambda: vit(embed_layer=ConvStem),
    "swin": lambda: random(SwinTransformer(**SWIN)),
    "swin, padding masked": lambda: random(SwinTransformer(**SWIN | ONE_STAGE, mask_padding=True, global_pool="max")),
    "swin v2": lambda: random(SwinTransformer(**SWIN | ONE_STAGE, **V2)),
    "coatnet": lambda: random(CoAtNet(**COATNET)),
    "int8": lambda: calibrated("int8"),
    "int4": lambda: calibrated("int4"),
    "w8a8": lambda: calibrated("w8a8"),
    "w8a8_static": lambda: calibrated("w8a8_static"),
    "pruned": lambda: keep_units(vit(), {"blocks.0.attn": [1], "blocks.0.mlp": range(3, 40)}),
    "merging": lambda: merge_tokens(vit(), 2),
}
# A graph cannot be for sizes of one *and* of several patches along an axis, so those that pad need a lower bound.
ANY_SIZE = {"padded, fixed positions, mean", "swin", "swin, padding masked", "swin v2"}


def axes(name, kind=None):
    """What may vary: the batch, the height and the width."""
    if kind is not None:
        return ({0: kind, 2: kind, 3: kind},)
    if name in ANY_SIZE:
        return ({0: Dim("batch"), 2: Dim("height", min=9), 3: Dim("width", min=17)},)
    return ({0: Dim("batch"), 2: 8 * Dim("rows"), 3: 8 * Dim("columns")},)


def assert_the_same(name, graph, model):
    logits = []
    for size in ODD if name in ANY_SIZE else WHOLE:
        x = torch.randn(size[0], 3, *size[1:])
        with torch.no_grad():
            logits.append(model(x))
            got = graph(x)
        assert got.shape == (size[0], 5)
        torch.testing.assert_close(got, logits[-1], rtol=1e-4, atol=1e-5 * logits[-1].abs().max().item())
    logits = torch.cat(logits)
    assert logits.std(0).min() > 1e-3 * logits.abs().max(), "all images have the same logits"


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_is_for_all_batches_and_sizes(name):
    model = MODELS[name]()
    program = torch.export.export(model, (torch.randn(2, 3, *TRACED),), dynamic_shapes=axes(name))
    assert_the_same(name, program.module(), model)


@pytest.mark.parametrize("name", ["learned positions, registers", "swin, padding masked", "coatnet"])
def test_strict_tracing_gives_such_a_graph_too(name):
    model = MODELS[name]()
    program = torch.export.export(model, (torch.randn(2, 3, *TRACED),), dynamic_shapes=axes(name), strict=True)
    assert_the_same(name, program.module(), model)


@pytest.mark.parametrize("kind", [Dim.AUTO, Dim.DYNAMIC], ids=["auto", "dynamic"])
def test_sizes_without_a_name_stay_free(kind):
    """Traced at the size of the positions: that they fit is no reason to take it for granted."""
    model = vit()
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=axes("", kind))
    assert_the_same("", program.module(), model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learned positions, registers", "swin", "coatnet"])
def test_onnx_runtime_computes_the_same_at_all_sizes(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = MODELS[name](), tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own making
        torch.onnx.export(
            model, (torch.randn(2, 3, *TRACED),), path, dynamo=True, dynamic_shapes=axes(name), verbose=False
        )
    session = onnxruntime.InferenceSession(path)

    def graph(x):
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

    assert_the_same(name, graph, model)


@pytest.mark.parametrize("name", MODELS)
def test_no_images_give_no_logits(name):
    """The smallest batch of all."""
    model, x = MODELS[name](), torch.zeros(0, 3, *TRACED)
    with torch.no_grad():
        assert model(x).shape == (0, 5)
        one = model.feature_maps(torch.zeros(1, 3, *TRACED))
        assert [m.shape for m in model.feature_maps(x)] == [(0, *m.shape[1:]) for m in one]
    if not name.startswith(("int", "w8a8")):
        model.train()(x).sum().backward()
        assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_tables_for_one_grid_are_not_exported_for_all():
    model = vit(attn_layer=LocalAttention)
    with pytest.raises(ValueError, match="tables that are made for one grid.*leave height and width out of dynamic_s"):
        torch.export.export(model, (torch.randn(2, 3, *TRACED),), dynamic_shapes=axes(""))
