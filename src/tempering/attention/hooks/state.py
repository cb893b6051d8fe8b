"""The temperature that a module carries, and what divides logits and masks by it.

A tempered module carries its state as the attribute `_tempering`; a module without one is
left alone, so models never share state.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tempering.attention.layout import AttentionLayer
from tempering.attention.limits import check_values
from tempering.errors import ProfileError

STATE = "_tempering"


@contextlib.contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """What is made in here serves outside `torch.inference_mode` as well."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


class TemperatureState:
    """The inverse temperature of one attention module.

    beta: Float[Tensor, "rows heads 1 1"], rows = 1 (all rows alike) or the batch size.
    uniform: beta as a number when all rows and heads share it, else None.
    rule: a function (query, key, mask, kwargs) -> beta, for temperatures that depend on the query;
        rule_owner: the handle that gave it, if one did.
    observer: an object whose `see_call` or `see_logits` is shown what reaches the softmax.
    trial: an object that compares softmax inputs before and after with a reference, in the
        self-check.
    parts: the temperatures of each handle; held by the handle itself, so that none is lost.
    """

    def __init__(
        self, layer: AttentionLayer, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.layer = layer
        with _ordinary_tensors():
            self.beta: Tensor = torch.ones(1, layer.heads, 1, 1, device=device, dtype=dtype)
        self.uniform: float | None = 1.0
        self.rule: Callable[..., Tensor] | None = None
        self.rule_owner: object = None
        self.observer: Any = None
        self.trial: Any = None
        self.parts: dict[object, Tensor] = {}
        self.inner: Callable[..., Any] | None = None
        self.calls = 0

    def set(self, owner: object, temperature: Float[Tensor, "rows heads"]) -> None:
        """Set one handle's part of the temperature; the parts of nested handles multiply."""
        self.combined(owner, temperature)
        self.parts[owner] = temperature
        self._apply()

    def drop(self, owner: object) -> None:
        """Forget one handle's part."""
        if self.parts.pop(owner, None) is not None and self.parts:
            self._apply()

    def combined(self, owner: object, temperature: Tensor) -> Tensor:
        """The product of all handles' temperatures, were this one's `temperature`."""
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
            exact = [] if beta.requires_grad else total.reciprocal().flatten().tolist()
            self.uniform = exact[0] if exact and exact.count(exact[0]) == len(exact) else None

    # A deep copy or a pickle of a tempered model is an untempered model.
    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())

    def meet(self, batch: int, device: torch.device) -> None:
        """Follow a model that was moved; ProfileError unless 1 or `batch` rows were given."""
        if self.beta.device != device:
            self.beta = self.beta.to(device)
        if self.beta.shape[0] not in (1, batch):
            raise ProfileError(
                f"{self.beta.shape[0]} profiles were given for a batch of {batch} rows "
                f"(at {self.layer.name}); give one profile, or one for each row "
                "(beams and returned sequences count as rows)"
            )


_MASKS: dict[int, tuple[weakref.ref[Tensor], int, bool]] = {}


def _has_bias(mask: Tensor, floor: float) -> bool:
    """Whether an additive mask holds a finite entry other than 0; remembered per tensor."""
    versioned = not mask.is_inference()
    known = _MASKS.get(id(mask)) if versioned else None
    if known is not None and known[0]() is mask and known[1] == mask._version:
        return known[2]
    answer = bool(((mask > floor) & (mask != 0)).any())
    if not versioned:
        return answer
    if len(_MASKS) > 64:
        _MASKS.clear()
    _MASKS[id(mask)] = (weakref.ref(mask), mask._version, answer)
    return answer


def scaled(logits: Tensor, beta: Tensor, floor: float) -> Tensor:
    """`logits * beta` where they are above `floor`; masking (at or below it) stays as it is."""
    live = logits > floor
    # The gradient of -inf * beta in beta is not a number, also where it is not wanted.
    product = (torch.where(live, logits, 0.0) if beta.requires_grad else logits) * beta
    return torch.where(live, product.to(logits.dtype), logits)


# Far below every logit times the largest beta, and far above the lowest number over the largest T.
_BETWEEN = -1e30


def divided(logits: Tensor, beta: Tensor, floor: float, masking: float | None) -> Tensor:
    """`scaled`, in fewer passes where all masked logits are known to be `masking`."""
    if masking == -torch.inf and not beta.requires_grad:
        return (logits * beta).to(logits.dtype)
    if masking == torch.finfo(logits.dtype).min < _BETWEEN:
        return F.threshold((logits * beta).to(logits.dtype), _BETWEEN, masking)
    return scaled(logits, beta, floor)


def scaled_mask(mask: Any, beta: Tensor, floor: float) -> Any:
    """An additive mask times beta; its masking entries, and boolean masks, stay as they are."""
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        return mask
    floor = max(floor, torch.finfo(mask.dtype).min / 2)
    if not torch.compiler.is_compiling() and not _has_bias(mask, floor):
        return mask
    return scaled(mask, beta, floor)
