"""Run an answer once, out of harm's way: on copies, seeded, under a time limit, whatever it raises."""

import copy
import inspect
import random
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitcourse.devices import kept_random_state, map_tensors, seed_all

from .cases import Case
from .limits import TimeLimit, time_limit


class WrongParameters(Exception):
    """The learned parameters of the answer are not those of the reference, in name or in shape."""


class KernelFault(Exception):
    """A kernel has broken one of the rules that are watched over; what it says is for the learner."""


class OutOfBounds(KernelFault):
    """A kernel has written outside the tensors that it was given."""


@dataclass
class Outcome:
    """What one call did: its output, its effects on the inputs, its gradients, or its error."""

    output: Any = None
    before: dict[str, Any] = field(default_factory=dict)  # the inputs' leaves as they were
    after: dict[str, Any] = field(default_factory=dict)  # and after the call
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    attached: bool = False  # can a gradient flow from the output to anything?
    backward_error: Exception | None = None
    error: BaseException | None = None


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed every generator inside the block, and give them, and PyTorch's global settings, back as they were."""
    states = random.getstate(), np.random.get_state()
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    with kept_random_state(), torch.enable_grad():
        random.seed(seed)
        np.random.seed(seed)
        seed_all(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_default_dtype(dtype)
            torch.use_deterministic_algorithms(deterministic)


# ---------------------------------------------------------------------------------------------------------- trees


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The named leaves of nested containers and modules: ``("boxes[0]", tensor)``, ``("model.fc.weight", tensor)``."""
    if isinstance(tree, nn.Module):
        for key, tensor in tree.state_dict(prefix=f"{name}.").items():
            yield key, tensor
        for key, parameter in tree.named_parameters(prefix=name):
            yield f"{key}.requires_grad", parameter.requires_grad
            if parameter.grad is not None:
                yield f"{key}.grad", parameter.grad
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{name}[{key!r}]" if name else str(key))
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from leaves(value, f"{name}[{i}]")
    elif isinstance(tree, (Tensor, np.ndarray, bool, int, float, str)) or tree is None:
        yield name, tree


def _frozen(tree: Any) -> dict[str, Any]:
    return {name: copy.deepcopy(leaf.detach() if isinstance(leaf, Tensor) else leaf) for name, leaf in leaves(tree)}


def named_inputs(signature_of: Callable, case: Case) -> dict[str, Any]:
    """The arguments of `case` under the names that the reference gives them."""
    if case.init is None:
        target, args = signature_of, case.args
    else:
        method = "forward" if case.method == "__call__" and issubclass(signature_of, nn.Module) else case.method
        target, args = getattr(signature_of, method), (None, *case.args)
    names = list(inspect.signature(target).bind(*args, **case.kwargs).arguments.items())
    return dict(names if case.init is None else names[1:])


# ---------------------------------------------------------------------------------------------------------- modules


def learned(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes. Fixed tables are left out: an answer may hold them as it likes."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _like(case: Case) -> Tensor:
    """An empty tensor with the device and the precision of the inputs."""
    tensors = [leaf for _, leaf in leaves((case.args, case.kwargs)) if isinstance(leaf, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float64)
    return torch.empty(0, dtype=dtype, device=device)


def construct(cls: type, case: Case) -> Any:
    """An instance with the constructor arguments of `case`, in the precision and on the device of its inputs."""
    args, kwargs = copy.deepcopy(case.init)
    instance = cls(*args, **kwargs)
    if isinstance(instance, nn.Module):
        instance.to(_like(case)).train(case.training)
    return instance


def random_weights(reference: type, case: Case, seed: int) -> dict[str, Tensor]:
    """Random values for every learned parameter of the reference; zeros and ones at the start would hide mistakes."""
    with isolated(seed):
        module = construct(reference, case)
        if not isinstance(module, nn.Module):
            return {}
        weights = {}
        for name, parameter in learned(module).items():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            center = 1.0 if "norm" in name and "weight" in name else 0.0
            weights[name] = center + torch.randn_like(parameter) / fan_in**0.5
        return weights


def load(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy the reference's weights in, by name."""
    own = learned(module)
    problems = []
    if missing := [name for name in weights if name not in own]:
        problems.append(f"missing {_enumerate(missing)}")
    if unexpected := [name for name in own if name not in weights]:
        problems.append(f"unexpected {_enumerate(unexpected)}")
    for name in weights.keys() & own.keys():
        if own[name].shape != weights[name].shape:
            problems.append(f"{name} of shape {tuple(own[name].shape)}, expected {tuple(weights[name].shape)}")
    if problems:
        raise WrongParameters("parameters: " + "; ".join(sorted(problems)))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def _enumerate(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---------------------------------------------------------------------------------------------------------- one call


def _attach(tensor: Tensor) -> Tensor:
    """The same values, strides kept, with gradients. Not a leaf: a change in place is then noticed, not refused."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    memory = tensor.new_empty(0).set_(tensor.untyped_storage()).requires_grad_().clone()
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def execute(
    answer: Callable, case: Case, weights: dict[str, Tensor], names: Callable, gradients: bool | tuple[str, ...]
) -> Outcome:
    """Make the call and let its exceptions through; `names` is the callable whose signature names the inputs.

    `gradients` are taken with regard to everything, or to the inputs of these names.
    """
    if case.init is None:
        return _call(answer, None, case, names, gradients)
    instance = _loaded(answer, case, weights if not case.earlier else _untrained(weights))
    for earlier in case.earlier:
        _call_method(instance, earlier, names, gradients)
    if case.earlier:
        _load_into(instance, weights)
    return _call_method(instance, case, names, gradients)


def _untrained(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they may have been before some steps of training."""
    return {name: 0.75 * weight for name, weight in weights.items()}


def _loaded(cls: type, case: Case, weights: dict[str, Tensor]) -> Any:
    instance = construct(cls, case)
    _load_into(instance, weights)
    return instance


def _load_into(instance: Any, weights: dict[str, Tensor]) -> None:
    if isinstance(instance, nn.Module):
        load(instance, weights)


def _call_method(instance: Any, case: Case, names: Callable, gradients: bool | tuple[str, ...]) -> Outcome:
    module = instance.train(case.training) if isinstance(instance, nn.Module) else None
    target = instance if case.method == "__call__" else getattr(instance, case.method)
    return _call(target, module, case, names, gradients)


def _call(
    target: Callable, module: nn.Module | None, case: Case, names: Callable, gradients: bool | tuple[str, ...]
) -> Outcome:
    args, kwargs = copy.deepcopy((case.args, case.kwargs))
    if gradients:
        args, kwargs = map_tensors(args, _attach), map_tensors(kwargs, _attach)
    inputs = named_inputs(names, replace(case, args=args, kwargs=kwargs))
    sources = _sources(inputs, module) if isinstance(gradients, bool) else _sources(_only(inputs, gradients), None)
    outcome = Outcome(before=_frozen(inputs))
    output = target(*args, **kwargs)
    output = list(output) if isinstance(output, types.GeneratorType) else output
    outcome.after = _frozen(inputs)
    if gradients:
        _differentiate(outcome, output, sources)
    outcome.output = map_tensors(output, Tensor.detach)
    return outcome


def _only(inputs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name in names}


def _sources(inputs: dict[str, Any], module: nn.Module | None) -> dict[str, Tensor]:
    """Everything that a gradient may reach: float inputs, parameters of modules among them, those of the answer."""
    found = {name: leaf for name, leaf in leaves(inputs) if isinstance(leaf, Tensor) and leaf.requires_grad}
    for name, value in inputs.items():
        if isinstance(value, nn.Module):
            found |= {f"{name}.{key}": parameter for key, parameter in learned(value).items()}
    return found | (learned(module) if module is not None else {})


def _differentiate(outcome: Outcome, output: Any, sources: dict[str, Tensor]) -> None:
    """Gradients of a fixed random combination of all outputs: no symmetry of a plain sum can hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    total = 0
    for _, leaf in leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            weight = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            if leaf.requires_grad:
                outcome.attached = True
                finite = torch.where(leaf.isfinite(), leaf, 0)
                total = total + (finite * weight.to(leaf)).sum()
    if not outcome.attached or not sources:
        return
    try:
        gradients = torch.autograd.grad(total, list(sources.values()), allow_unused=True)
    except RuntimeError as error:
        outcome.backward_error = error
    else:
        outcome.gradients = dict(zip(sources, gradients, strict=True))


def run(
    answer: Callable,
    case: Case,
    weights: dict[str, Tensor],
    names: Callable,
    *,
    gradients: bool | tuple[str, ...],
    seconds: float,
    seed: int,
) -> Outcome:
    """Make the call in this process; whatever it raises, or running over `seconds`, becomes the outcome's error."""
    try:
        with isolated(seed), time_limit(seconds):
            return execute(answer, case, weights, names, gradients)
    except (Exception, SystemExit, TimeLimit) as error:
        return Outcome(error=error)


class Kept:
    """An answer that is kept from call to call: of a class one instance, so that what that keeps is seen.

    The first call of an instance is made with other weights, as before some steps of training; nobody looks at it.
    """

    def __init__(
        self,
        answer: Callable,
        first: Case,
        weights: dict[str, Tensor],
        names: Callable,
        *,
        seconds: float,
        seed: int,
        runner: Callable[..., Outcome] = run,
    ) -> None:
        self.answer, self.first, self.weights, self.names = answer, first, weights, names
        self.runner, self.limits = runner, {"seconds": seconds, "seed": seed}
        self.instance: Any = None

    def __call__(self, case: Case, gradients: bool | tuple[str, ...]) -> Outcome:
        """Make a call; whatever it raises becomes the outcome's error."""
        if case.init is None:
            return self.runner(self.answer, case, self.weights, self.names, gradients=gradients, **self.limits)
        try:
            with isolated(self.limits["seed"]), time_limit(self.limits["seconds"]):
                self._begin(gradients)
                return _call_method(self.instance, case, self.names, gradients)
        except (Exception, SystemExit, TimeLimit) as error:
            return Outcome(error=error)

    def _begin(self, gradients: bool | tuple[str, ...]) -> None:
        if self.instance is None:
            self.instance = _loaded(self.answer, self.first, _untrained(self.weights))
            _call_method(self.instance, self.first, self.names, gradients)
            _load_into(self.instance, self.weights)

    def output(self, case: Case) -> Any:
        """What comes out, in a hurry: for a reference, which does no harm. None after an error."""
        if self.runner is not run:
            return self(case, False).output
        target = self.answer
        if case.init is not None:
            self._begin(False)
            instance = self.instance
            if isinstance(instance, nn.Module):
                instance.train(case.training)
            target = instance if case.method == "__call__" else getattr(instance, case.method)
        args, kwargs = map_tensors((case.args, case.kwargs), Tensor.clone)
        try:
            with torch.no_grad():
                return target(*args, **kwargs)
        except Exception:
            return None
