"""The softmax route: attention code of a model's own, reached where it calls softmax.

While a handle needs it, `torch.nn.functional.softmax`, `torch.softmax` and
`scaled_dot_product_attention` are replaced by functions that do the same, except in a thread
that runs the forward of a tempered module: there they divide its attention logits by T first.
A replaced function costs well under a microsecond a call; a TorchFunctionMode, which sees every
operator, cost 1.1 to 1.9 times the whole decoding step of small models.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tempering.attention import axes
from tempering.attention.state import TemperatureState, divided, scaled_mask
from tempering.errors import ArchitectureError

_F_SOFTMAX, _TORCH_SOFTMAX = F.softmax, torch.softmax
_PRODUCT = F.scaled_dot_product_attention


class _Current(threading.local):
    """The state of the tempered module whose forward this thread runs, if any."""

    state: TemperatureState | None = None


_CURRENT = _Current()
_LOCK = threading.RLock()
_USERS = 0


class TemperedSoftmax:
    """While active, the attention softmaxes that this thread calls see logits times beta."""

    def __init__(self, state: TemperatureState | None) -> None:
        self.state = state
        self.before: TemperatureState | None = None

    def __enter__(self) -> None:
        self.before = _CURRENT.state
        _CURRENT.state = self.state

    def __exit__(self, *exception: object) -> None:
        _CURRENT.state = self.before


def acquire() -> None:
    """Replace the softmax functions while anyone needs it."""
    global _USERS
    with _LOCK:
        _USERS += 1
        if _USERS == 1:
            F.softmax, torch.softmax = _f_softmax, _torch_softmax
            F.scaled_dot_product_attention = _product


def release() -> None:
    """Undo `acquire` when the last user leaves."""
    global _USERS
    with _LOCK:
        _USERS -= 1
        if _USERS == 0:
            F.softmax, torch.softmax = _F_SOFTMAX, _TORCH_SOFTMAX
            F.scaled_dot_product_attention = _PRODUCT


def _f_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Tensor:
    state = _CURRENT.state
    if state is None or dim is None:
        return _F_SOFTMAX(input, dim, _stacklevel, dtype)
    logits = tempered_logits(state, input, dim)
    # What the function replaced does; calling it would lead back here under a function mode.
    return logits.softmax(dim) if dtype is None else logits.softmax(dim, dtype=dtype)


def _torch_softmax(input: Tensor, dim: Any, dtype: Any = None, **kwargs: Any) -> Tensor:
    state = _CURRENT.state
    if state is not None:
        input = tempered_logits(state, input, dim)
    return _TORCH_SOFTMAX(input, dim, dtype=dtype, **kwargs)


def _product(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    state = _CURRENT.state
    if state is not None:
        mask = args[0] if args else kwargs.pop("attn_mask", None)
        query, mask = tempered_product(state, query, key, value, mask, args[1:], kwargs)
        return _PRODUCT(query, key, value, mask, *args[1:], **kwargs)
    return _PRODUCT(query, key, value, *args, **kwargs)


# Every function that the models' code may call, as modes that watch it see them.
SOFTMAXES = (F.softmax, torch.softmax, torch.Tensor.softmax, torch.special.softmax, _f_softmax)
PRODUCTS = (F.scaled_dot_product_attention,)


def tempered_logits(state: TemperatureState, logits: Tensor, dim: int) -> Tensor:
    """The logits divided by T, if they are attention; ArchitectureError where that is unknown."""
    layer = state.layer
    last = dim in (-1, logits.ndim - 1)
    pattern = next(
        (item for item in layer.axes if last and axes.fits(item, logits.shape, layer.heads)), None
    )
    if pattern is None:
        if (logits.ndim, last) in layer.other_softmaxes:
            return logits
        raise ArchitectureError(
            f"{layer.name} calls softmax over axis {dim} of logits {list(logits.shape)}, which it "
            f"did not when it was examined ({' or '.join(layer.axes)}, {layer.heads} heads), so "
            "its attention can't be controlled exactly here"
        )
    count = axes.rows(pattern, logits.shape, layer.heads)
    if not torch.compiler.is_compiling():
        state.calls += 1
        state.meet(count, logits.device)
    beta = axes.spread(state.beta[:, :, 0, 0], pattern, count)
    floor = max(layer.mask_floor, torch.finfo(logits.dtype).min / 2)
    cool = divided(logits, beta, floor, layer.masking)
    if state.trial is not None:
        state.trial.softmax(state, pattern, logits, cool)
    if state.observer is not None:
        state.observer.see_logits(layer, axes.standard(cool, pattern, layer.heads))
    return cool


def tempered_product(
    state: TemperatureState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Query and mask of a scaled dot product attention whose logits are divided by T."""
    layer = state.layer
    if query.ndim != 4 or query.shape[1] != layer.heads:
        raise ArchitectureError(
            f"{layer.name} has queries of shape {list(query.shape)}; "
            f"axis 1 should hold its {layer.heads} heads"
        )
    if not torch.compiler.is_compiling():
        state.calls += 1
        state.meet(query.shape[0], query.device)
    before = (query, key, value, mask)
    query = (query * state.beta).to(query.dtype)
    mask = scaled_mask(mask, state.beta, layer.mask_floor)
    if state.trial is not None:
        state.trial.product(state, before, (query, key, value, mask), args, kwargs)
    if state.observer is not None:
        state.observer.see_product(layer, (query, key, value, mask, *args), kwargs)
    return query, mask
