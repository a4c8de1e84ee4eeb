"""What the tests on CUDA share: random parameters, and errors against float64."""

import copy

import torch
from torch import Tensor, nn


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and running statistic random: zero biases, zero heads and unit norms hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(1 + 0.5 * noise.abs())
        elif tensor.ndim == 1 and name.endswith("weight"):  # of a norm
            tensor.copy_(1 + 0.3 * noise)
        elif tensor.ndim in (2, 4) and not name.endswith("table"):
            tensor.copy_(noise / tensor[0].numel() ** 0.5)
        else:
            tensor.copy_(0.3 * noise)
    return model.eval()


def pictures(batch: int, height: int, width: int) -> Tensor:
    """Noise on a tint of its own for each image: of plain noise a mean over the map sees little."""
    return torch.randn(batch, 3, height, width) + 3 * torch.randn(batch, 3, 1, 1)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """The largest error, as a part of the largest value."""
    assert got.shape == exact.shape
    exact = exact.double().cpu()
    return ((got.double().cpu() - exact).abs().max() / exact.abs().max()).item()


def logits_and_gradients(
    model: nn.Module, images: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a fixed random combination of them: of the images and of every parameter.

    With ``dtype`` the forward pass runs under autocast.
    """
    images = images.detach().clone().requires_grad_()
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        logits = model(images)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.device)
    parameters = {name.removeprefix("_orig_mod."): p for name, p in model.named_parameters() if p.requires_grad}
    named = {"images": images, **parameters}
    gradients = torch.autograd.grad((logits.to(images.dtype) * weight).sum(), list(named.values()))
    return logits.detach(), dict(zip(named, gradients, strict=True))


def assert_varies(logits: Tensor) -> None:
    """From image to image, and from class to class: constant logits would agree for no good reason."""
    assert logits.std(dim=0).mean() > 1e-2 * logits.abs().max()
    assert logits.std(dim=1).mean() > 1e-2 * logits.abs().max()


def assert_same_as_on_the_cpu(model: nn.Module, images: Tensor) -> None:
    """Logits and gradients in float32 on CUDA, against float64 on the CPU."""
    exact_logits, exact = logits_and_gradients(copy.deepcopy(model).double(), images.double())
    logits, gradients = logits_and_gradients(copy.deepcopy(model).to("cuda"), images.to("cuda"))
    assert logits.device.type == "cuda"
    assert_varies(exact_logits)
    assert relative_error(logits, exact_logits) <= 1e-5
    for name, gradient in gradients.items():
        assert exact[name].abs().max() > 0, name
        assert relative_error(gradient, exact[name]) <= 1e-4, name


def assert_compiled_is_eager(model: nn.Module, images: Tensor) -> None:
    """Forward and backward through Inductor, as one graph, against the same model eager."""
    model, images = model.to("cuda"), images.to("cuda")
    logits, gradients = logits_and_gradients(model, images)
    traced_logits, traced = logits_and_gradients(torch.compile(model, fullgraph=True), images)
    assert relative_error(traced_logits, logits) <= 1e-5
    for name, gradient in gradients.items():
        assert relative_error(traced[name], gradient) <= 1e-4, name


def assert_as_exact_as_theirs(ours: nn.Module, theirs: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
    """Under autocast on CUDA our error against float64, of logits and of gradients, is at most twice the peer's."""
    images = images.to("cuda")
    exact_logits, errors = [], []
    for model in (ours.to("cuda"), theirs.to("cuda")):
        exact, exact_gradients = logits_and_gradients(copy.deepcopy(model).double(), images.double())
        logits, gradients = logits_and_gradients(model, images, dtype)
        assert logits.dtype == dtype
        exact_logits.append(exact)
        errors.append((relative_error(logits, exact), total_error(gradients, exact_gradients)))
    assert_varies(exact_logits[0])
    assert relative_error(*exact_logits) <= 1e-5, "not the same model"  # some tables are made in float32
    for own, peer in zip(*errors, strict=True):
        assert 0 < own <= 2 * peer, errors


def total_error(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The length of the error of all gradients together, as a part of their own length."""
    error = torch.stack([(gradients[name] - right).norm() for name, right in exact.items()]).norm()
    return (error / torch.stack([right.norm() for right in exact.values()]).norm()).item()
