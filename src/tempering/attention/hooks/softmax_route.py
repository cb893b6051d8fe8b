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
from tempering.attention.hooks.state import TemperatureState, divided, scaled_mask
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
    return _tempered_softmax(state, input, dim, dtype)


def _torch_softmax(input: Tensor, dim: Any, dtype: Any = None, **kwargs: Any) -> Tensor:
    state = _CURRENT.state
    if state is None:
        return _TORCH_SOFTMAX(input, dim, dtype=dtype, **kwargs)
    if not kwargs:
        return _tempered_softmax(state, input, dim, dtype)
    return _TORCH_SOFTMAX(tempered_logits(state, input, dim), dim, dtype=dtype, **kwargs)


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


# Logits that are tempered and normalised at a time where all is computed on a CPU: few enough to
# stay in its cache, since a pass more over 2048 x 2048 logits a head costs a fifth of a layer.
_PIECE = 2**18


def _tempered_softmax(state: TemperatureState, logits: Tensor, dim: int, dtype: Any) -> Tensor:
    """What the functions replaced do, of the tempered logits."""
    learned = torch.is_grad_enabled() and (logits.requires_grad or state.beta.requires_grad)
    watched = state.trial is not None or state.observer is not None
    at_once = (
        watched
        or learned
        or torch.compiler.is_compiling()
        or logits.device.type != "cpu"
        or logits.numel() < 2 * _PIECE
        or not logits.is_contiguous()
    )
    # The method: calling the function would lead back here under a function mode.
    if at_once:
        return tempered_logits(state, logits, dim).softmax(dim, dtype=dtype)
    reading = _read(state, logits, dim)
    if reading is None:
        return logits.softmax(dim, dtype=dtype)
    _, beta, floor = reading
    rows = logits.view(-1, logits.shape[-1])
    betas = beta.expand(*logits.shape[:-1], 1).reshape(-1, 1)
    step = max(1, _PIECE // rows.shape[1])
    found = None
    for start in range(0, len(rows), step):
        own = slice(start, start + step)
        cool = divided(rows[own], betas[own], floor, state.layer.masking)
        piece = cool.softmax(-1, dtype=dtype)
        if found is None:  # its dtype is known only now: under autocast it is float32
            found = piece.new_empty(rows.shape)
        found[own] = piece
    assert found is not None
    return found.view(logits.shape)


def tempered_logits(state: TemperatureState, logits: Tensor, dim: int) -> Tensor:
    """The logits divided by T, if they are attention; ArchitectureError where that is unknown."""
    reading = _read(state, logits, dim)
    if reading is None:
        return logits
    pattern, beta, floor = reading
    layer = state.layer
    cool = divided(logits, beta, floor, layer.masking)
    if state.trial is not None:
        state.trial.softmax(state, pattern, logits, cool)
    if state.observer is not None:
        state.observer.see_logits(layer, axes.standard(cool, pattern, layer.heads))
    return cool


def _read(state: TemperatureState, logits: Tensor, dim: int) -> tuple[str, Tensor, float] | None:
    """The axes of attention logits, beta shaped to multiply them, and the floor below which they
    mask; None if they are known not to be attention."""
    layer = state.layer
    last = dim in (-1, logits.ndim - 1)
    pattern = next(
        (item for item in layer.axes if last and axes.fits(item, logits.shape, layer.heads)), None
    )
    if pattern is None:
        if (logits.ndim, last) in layer.other_softmaxes:
            return None
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
    return pattern, beta, floor


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
