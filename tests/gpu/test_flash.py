"""FlashAttention compiled: the whole fuzz of the interpreter once more, and what only a GPU can show."""

import pytest
import torch
from flash_fuzz import *  # noqa: F403
from flash_fuzz import HALF, bias_like, flash_attention_with_bias, inputs, results

from vitcourse import create_model
from vitcourse.hardware import flash_attention, flash_attention_qkvpacked
from vitcourse.hardware.flash import ops, plans

from .parity import assert_as_exact_as_theirs, logits_and_gradients, randomise, relative_error

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def compiled(cuda):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("n", [50, 128, 197, 256, 257, 577, 785, 1025])
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
def test_lengths_of_vision_transformers(n, dim, dtype, monkeypatch):
    """Many sequences, so that every program has neighbours, and one program a sequence is chosen."""
    monkeypatch.undo()
    q, k, v, dout = inputs(n, n, dim, dtype, batch=24, heads=12)
    exact = results(torch.nn.functional.scaled_dot_product_attention, (q, k, v), dout, torch.float64)
    found = results(flash_attention, (q, k, v), dout, dtype)
    for got, true in zip(found, exact, strict=True):
        assert relative_error(got, true) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("n", [50, 197, 577])
def test_the_same_bits_under_load(n, monkeypatch):
    """Twenty times, while another stream keeps the chip busy and programs come in another order."""
    monkeypatch.undo()
    q, k, v, dout = inputs(n, n, 64, torch.float16, batch=16, heads=12)
    bias = bias_like((1, 12, n, n), torch.float16)
    first = results(flash_attention_with_bias, (q, k, v, bias), dout, torch.float16)
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(other):
            noise = torch.tanh(noise @ noise)
        again = results(flash_attention_with_bias, (q, k, v, bias), dout, torch.float16)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_compiled_by_inductor(monkeypatch):
    monkeypatch.undo()
    q, k, v, dout = inputs(197, 197, 64, torch.bfloat16, batch=4)
    traced = torch.compile(flash_attention, fullgraph=True)
    eager, compiled = (results(f, (q, k, v), dout, torch.bfloat16) for f in (flash_attention, traced))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_captured_in_a_graph(monkeypatch):
    monkeypatch.undo()
    qkv = torch.randn(4, 197, 3, 12, 64, device="cuda", dtype=torch.bfloat16)
    expected = flash_attention_qkvpacked(qkv)
    graph, replayed = torch.cuda.CUDAGraph(), torch.empty_like(expected)
    with torch.cuda.graph(graph):
        replayed.copy_(flash_attention_qkvpacked(qkv))
    graph.replay()
    assert torch.equal(replayed, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one(monkeypatch):
    monkeypatch.undo()
    q, k, v, dout = inputs(50, 50, 64, torch.float16)
    expected = results(flash_attention, (q, k, v), dout, torch.float16)
    found = results(flash_attention, [t.to("cuda:1") for t in (q, k, v)], dout.to("cuda:1"), torch.float16)
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b.to("cuda:0")) for a, b in zip(expected, found, strict=True))


def test_an_exported_model_does_without_these_kernels(monkeypatch):
    """Also where they are the fastest: the graph shall run elsewhere."""
    monkeypatch.undo()
    key = torch.cuda.get_device_capability(), torch.bfloat16, 64, False, False
    monkeypatch.setattr(plans, "FASTER", {key: ((1, 10_000, 1),)})
    model = create_model("vit_tiny_patch16_224", depth=1).eval().to("cuda", torch.bfloat16)
    images = torch.randn(2, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    launch, ran = ops._launch, []
    monkeypatch.setattr(ops, "_launch", lambda plan, *rest: (ran.append(plan.kernel), launch(plan, *rest)))
    with torch.no_grad():
        model(images)
        assert ran == ["forward_short"]
        graph = torch.export.export(model, (images,)).graph
    assert not [node for node in graph.nodes if "vitcourse" in str(node.target)]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "coatnet_0"])
def test_models_are_as_exact_as_with_sdpa(name, monkeypatch):
    monkeypatch.undo()
    ours = randomise(create_model(name, num_classes=20))
    theirs = create_model(name, num_classes=20).eval()
    theirs.load_state_dict(ours.state_dict())
    for model, backend in ((ours, "flash"), (theirs, "sdpa")):
        for module in model.modules():
            if hasattr(module, "backend"):
                module.backend = backend
    assert_as_exact_as_theirs(ours, theirs, torch.randn(4, 3, 224, 224), torch.bfloat16)


def test_a_model_with_these_kernels_compiles_to_one_graph(monkeypatch, capsys):
    monkeypatch.undo()
    model, images = (
        randomise(create_model("vit_tiny_patch16_224")).to("cuda"),
        torch.randn(4, 3, 224, 224, device="cuda"),
    )
    for block in model.blocks:
        block.attn.backend = "flash"
    logits, gradients = logits_and_gradients(model, images, torch.float16)
    traced, traced_gradients = logits_and_gradients(torch.compile(model, fullgraph=True), images, torch.float16)
    assert relative_error(traced, logits) <= 2e-2
    assert traced_gradients.keys() == gradients.keys()
    assert "using 'sdpa' instead" not in capsys.readouterr().err
