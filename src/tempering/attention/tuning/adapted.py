"""What temperatures are compared with: other small sets of numbers in the same frozen model.

output temperature    logits / T, one number
biases of q           q_proj(x) + b, one number for each output of q_proj
LoRA of rank 1 on q   q_proj(x) + B A x, through peft; A starts at random, B at 0  (Hu et al. 2021)

Each is a `Tunable`, so that the same data, stopping rule and constraint serve it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.attention.examining.layout_of import layout
from tempering.attention.tuning.objectives import Piece
from tempering.attention.tuning.tunable import Tunable, frozen
from tempering.errors import MissingExtraError, RefusedError


class OutputTemperature(Tunable):
    """Divides the output logits by T = exp(theta)."""

    size = 1

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.level: Tensor | None = None

    def set(self, theta: Float[Tensor, "*rows numbers"]) -> None:
        self.level = theta.reshape(-1, 1, 1)

    def untempered(self) -> None:
        self.level = None

    def extent(self, theta: Float[Tensor, "numbers"]) -> tuple[float, float]:
        return float(theta.exp()), float(theta.exp())

    def moved(self, before: Float[Tensor, "numbers"], after: Float[Tensor, "numbers"]) -> str:
        return f"T {float(after.exp()):.3f}"

    def trouble(self, theta: Tensor | None, piece: Piece, gradient: Tensor | None) -> str:
        return "the output temperature has no part in that; look at the data"

    def divide(self, module: nn.Module, args: Any, output: Any) -> Any:
        """A forward hook of the model."""
        if self.level is not None:
            output.logits = output.logits * torch.exp(-self.level).to(output.logits)
        return output


class Slots(Tunable):
    """Numbers that stand where parameters stood: each slot holds its start plus its part.

    slots: modules, names of their parameters, and the values at theta = 0.
    relative: parts are shares of the values at theta = 0.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[tuple[nn.Module, str, Tensor]],
        what: str,
        *,
        relative: bool = False,
    ) -> None:
        self.model, self.slots, self.what, self.relative = model, slots, what, relative
        self.size = sum(start.numel() for _, _, start in slots)

    def set(self, theta: Float[Tensor, "*rows numbers"]) -> None:
        parts = theta.reshape(-1).split([start.numel() for _, _, start in self.slots])
        for (module, name, start), part in zip(self.slots, parts, strict=True):
            base = start.to(part.dtype).to(part.device)
            value = base + part.view(start.shape) * (base if self.relative else 1.0)
            setattr(module, name, value.to(start))

    def untempered(self) -> None:
        for module, name, start in self.slots:
            setattr(module, name, start)

    def extent(self, theta: Float[Tensor, "numbers"]) -> tuple[float, float]:
        return 1.0, 1.0

    def moved(self, before: Float[Tensor, "numbers"], after: Float[Tensor, "numbers"]) -> str:
        return f"{self.what}: largest change {float((after - before).abs().max()):.3g}"

    def trouble(self, theta: Tensor | None, piece: Piece, gradient: Tensor | None) -> str:
        return f"{self.what} went too far; try a smaller rate"


@contextlib.contextmanager
def output_temperature(model: nn.Module) -> Iterator[OutputTemperature]:
    """The model with an output temperature, until the end."""
    tunable = OutputTemperature(model)
    with frozen(model):
        hook = model.register_forward_hook(tunable.divide)
        try:
            yield tunable
        finally:
            hook.remove()


@contextlib.contextmanager
def query_biases(model: nn.Module, target: str = "q_proj") -> Iterator[Slots]:
    """The model with a bias of its own on every q_proj, until the end.

    Raises RefusedError when the attention modules have no such linear layer.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(model))
        slots = []
        for linear in _targets(model, target).values():
            start = linear.bias
            if start is None:
                start = linear.weight.new_zeros(linear.out_features)
            slots.append((linear, "bias", start.detach().clone()))
            stack.enter_context(opened_parameter(linear, "bias"))
        tunable = Slots(model, slots, f"biases of {target}")
        tunable.untempered()
        yield tunable


@contextlib.contextmanager
def query_lora(model: nn.Module, target: str = "q_proj", seed: int = 0) -> Iterator[Slots]:
    """The model with LoRA adapters of rank 1 on every q_proj, until the end.

    Raises MissingExtraError without peft, RefusedError without such a layer or with adapters on.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft", "tune") from error
    if hasattr(model, "peft_config"):
        raise RefusedError("the model has adapters of its own; compare on the model without them")
    names = _targets(model, target)
    network: Any = model
    with frozen(model), contextlib.ExitStack() as stack:
        config = peft.LoraConfig(
            r=1, lora_alpha=1, lora_dropout=0.0, bias="none", target_modules=list(names)
        )
        stack.callback(_restore, model, names)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, network)
        slots = []
        for name in names:
            adapted: Any = model.get_submodule(name)
            for part in (adapted.lora_A["default"], adapted.lora_B["default"]):
                slots.append((part, "weight", part.weight.detach().clone()))
                stack.enter_context(opened_parameter(part, "weight"))
        tunable = Slots(model, slots, f"LoRA on {target}")
        tunable.untempered()
        yield tunable


def _restore(model: nn.Module, names: dict[str, nn.Linear]) -> None:
    for name, linear in names.items():
        model.set_submodule(name, linear)
    if hasattr(model, "peft_config"):
        del model.peft_config


@contextlib.contextmanager
def opened_parameter(module: nn.Module, name: str) -> Iterator[None]:
    """A parameter taken out of a module, so that a tensor with a history can stand there."""
    before = dict(module._parameters)
    del module._parameters[name]
    try:
        yield
    finally:
        module.__dict__.pop(name, None)
        module._parameters.clear()
        module._parameters.update(before)


def _targets(model: nn.Module, target: str) -> dict[str, nn.Linear]:
    return {
        f"{layer.name}.{target}": _linear_in(model, layer.name, target)
        for layer in layout(model).layers
    }


def _linear_in(model: nn.Module, attention: str, target: str) -> nn.Linear:
    """The linear layer of that name in an attention module; RefusedError without one."""
    inside = dict(model.get_submodule(attention).named_children())
    module = inside.get(target)
    if not isinstance(module, nn.Linear):
        raise RefusedError(
            f"{attention} has no linear layer '{target}' to adapt; it has {', '.join(inside)}. "
            "Name the one that is meant: target=..."
        )
    return module
