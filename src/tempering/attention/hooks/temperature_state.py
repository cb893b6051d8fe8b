"""The inverse temperatures that one attention module runs with."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.attention.hooks.dividing import shift_of
from tempering.attention.layout import AttentionLayer
from tempering.attention.limits import check_values
from tempering.errors import ProfileError

# Where a module computes, and in what precision its beta is kept.
Placement = tuple[torch.device, torch.dtype]


@contextlib.contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Tensors made in here can be used outside `torch.inference_mode` as well."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


class Inverse(NamedTuple):
    """One layer's 1/T, ready for use: see `TemperatureState`."""

    beta: Tensor
    uniform: float | None
    shift: int


def inverses(
    tables: Sequence[Float[Tensor, "_rows _heads"]], placements: Sequence[Placement]
) -> list[Inverse | None]:
    """1/T of many layers, computed together; None for a layer whose T takes gradients.

    Bit for bit what `TemperatureState.set` computes for one layer at a time.
    """
    alike: dict[Any, list[int]] = {}
    for index, (table, placement) in enumerate(zip(tables, placements, strict=True)):
        if not table.requires_grad:
            alike.setdefault((table.shape, table.dtype, table.device, *placement), []).append(index)
    computed: list[Inverse | None] = [None] * len(tables)
    for (*_, device, dtype), group in alike.items():
        with _ordinary_tensors():
            exact = torch.stack([tables[index] for index in group]).reciprocal()
            betas = exact[..., None, None].to(device, dtype).unbind()
            for index, beta, values in zip(group, betas, exact.flatten(1).tolist(), strict=True):
                # A clone has memory of its own: updates in place, and compiled models, need it.
                computed[index] = Inverse(beta.clone(), *_uniform_and_shift(values))
    return computed


def _uniform_and_shift(betas: list[float]) -> tuple[float | None, int]:
    """The number that all betas are, or None if they differ; and their `shift_of`."""
    return betas[0] if betas.count(betas[0]) == len(betas) else None, shift_of(max(betas))


class TemperatureState:
    """The inverse temperature that one attention module has from some handles together.

    It is the product of the handles' parts.

    beta: Float[Tensor, "rows heads 1 1"], rows = 1 (all rows alike) or the batch size.
    uniform: beta as a number when all rows and heads share it, else None.
    shift: the least power of two, from 1, that no beta exceeds.
    rule: for temperatures that depend on the query, an object that is called with (state, query,
        key, mask, kwargs) and gives beta, or whose `of_seen` is, with (state, keys seen);
        rule_owner: the handle that gave it, if one did.
    observer: an object whose `see_call` or `see_logits` is shown what reaches the softmax.
    trial: in the self-check, an object that compares the softmax's inputs, before and after they
        were divided, with a reference.
    parts: the temperatures of each handle, by its number.
    scale: Float[Tensor, "rows 1 heads 1"], the product of the handles' output scales, or None.
    calls: how many calls of the module met this temperature.
    """

    def __init__(
        self,
        layer: AttentionLayer,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        inverse: Inverse | None = None,
    ) -> None:
        self.layer = layer
        if inverse is None:
            with _ordinary_tensors():
                ones = torch.ones(1, layer.heads, 1, 1, device=device, dtype=dtype)
            inverse = Inverse(ones, 1.0, 1)
        self.beta, self.uniform, self.shift = inverse
        self.rule: Any = None
        self.rule_owner: object = None
        self.observer: Any = None
        self.trial: Any = None
        self.parts: dict[object, Tensor] = {}
        self.scales: dict[object, Tensor] = {}
        self.scale: Tensor | None = None
        self.calls = 0

    def set(self, owner: object, temperature: Float[Tensor, "rows heads"]) -> None:
        """Set the part of one handle."""
        self.combined(owner, temperature)
        self.parts[owner] = temperature
        self._apply()

    def set_scale(self, owner: object, scale: Float[Tensor, "rows heads"] | None) -> None:
        """Set the output scales of one handle; None for none."""
        if scale is None:
            self.scales.pop(owner, None)
        else:
            self.scales[owner] = scale
        parts = [part.to(self.beta) for part in self.scales.values()]
        with _ordinary_tensors():
            total = math.prod(parts[1:], start=parts[0]) if parts else None
            self.scale = None if total is None else total[:, None, :, None]

    def combined(self, owner: object, temperature: Tensor) -> Tensor:
        """The product of all parts, if `temperature` were the part of `owner`."""
        others = [part for other, part in self.parts.items() if other is not owner]
        if not others:
            return temperature
        parts = [*others, temperature]
        rows = sorted({len(part) for part in parts} - {1})
        if len(rows) > 1:
            raise ProfileError(
                f"{self.layer.name}: nested handles hold profiles for {rows[0]} and for {rows[1]} "
                "rows of one batch; give each handle one profile, or one for each row"
            )
        device = next((part.device for part in parts if part.device.type != "cpu"), None)
        if device is not None:
            parts = [part.to(device) for part in parts]
        total = math.prod(parts[1:], start=parts[0])
        check_values(total, f"{self.layer.name}, the product of nested handles")
        return total

    def _apply(self) -> None:
        owner, temperature = next(iter(self.parts.items()))
        with _ordinary_tensors():
            total = self.combined(owner, temperature)
            beta = total.reciprocal()[:, :, None, None].to(self.beta)
            if beta.requires_grad or beta.shape != self.beta.shape or self.beta.requires_grad:
                self.beta = beta
            else:
                # In place, so that a compiled model sees the change without compiling again.
                self.beta.copy_(beta)
            uniform, self.shift = _uniform_and_shift(total.detach().reciprocal().flatten().tolist())
            self.uniform = None if beta.requires_grad else uniform

    def fit_call(self, batch: int, device: torch.device) -> None:
        """Follow a model that was moved; ProfileError unless 1 or `batch` rows were given."""
        if self.beta.device != device:
            self.beta = self.beta.to(device)
        if self.scale is not None and self.scale.device != device:
            self.scale = self.scale.to(device)
        if self.beta.shape[0] not in (1, batch):
            raise ProfileError(
                f"{self.beta.shape[0]} profiles were given for a batch of {batch} rows "
                f"(at {self.layer.name}); give one profile, or one for each row "
                "(beams and returned sequences count as rows)"
            )
