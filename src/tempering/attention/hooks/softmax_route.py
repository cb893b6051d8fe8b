"""The softmax route: attention code of a model's own, reached where it calls softmax.

While a handle needs it, PyTorch's softmax functions, the method of tensors, and
`scaled_dot_product_attention` are replaced by functions that do the same, except in a thread
that runs the forward of a tempered module: there they divide its attention logits by T first.
The replacement costs well under a microsecond a call. (A TorchFunctionMode, which sees every
operator, made the whole decoding step of small models 1.1 to 1.9 times as long.)

`torch.nn.functional.softmax` is written in Python and calls the method of tensors, so it is reached
under any name that a model's code has given it. The functions written in C are reached where a
model looks them up in PyTorch at each call. Attention that is not reached raises an error
(`forward.py`).
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tempering.attention import axes
from tempering.attention.hooks.dividing import (
    adds_too_much,
    divided,
    in_float,
    query_over_t,
    scaled_mask,
    shift_of,
)
from tempering.attention.hooks.site import OutsideProfile
from tempering.attention.hooks.temperature_state import TemperatureState
from tempering.errors import ArchitectureError

_F_SOFTMAX, _TORCH_SOFTMAX, _SPECIAL = F.softmax, torch.softmax, torch.special.softmax
_METHOD, _PRODUCT = torch.Tensor.softmax, F.scaled_dot_product_attention


class _Current(threading.local):
    """The tempered module whose forward this thread runs, if any."""

    def __init__(self) -> None:
        # Set on the instance of every thread: a compiled graph looks for it there.
        self.running: Running | None = None


_CURRENT = _Current()
_LOCK = threading.RLock()
_USERS = 0


class Running:
    """While active, the attention softmaxes that this thread calls are given logits times beta.

    A module on the interface route is tempered there (`interface_route.py`); for it, only `met` is
    kept. met: whether a call of the module met its temperature. before: the module around it.
    """

    def __init__(self, state: TemperatureState | OutsideProfile) -> None:
        self.state = state
        self.divides = isinstance(state, OutsideProfile) or state.layer.route == "softmax"
        self.met = False
        self.before: Running | None = None

    def __enter__(self) -> Running:
        self.before = _CURRENT.running
        _CURRENT.running = self
        return self

    def __exit__(self, *exception: object) -> None:
        _CURRENT.running = self.before


def note_met(state: TemperatureState) -> None:
    """Note that a call of the module that runs with `state` has met its temperature."""
    running = _CURRENT.running
    while running is not None and running.state is not state:
        running = running.before
    if running is not None:
        running.met = True


def acquire() -> None:
    """Replace the softmax functions while anyone needs it."""
    global _USERS
    with _LOCK:
        _USERS += 1
        if _USERS == 1:
            F.softmax, torch.softmax, torch.special.softmax = _f_softmax, _softmax, _special
            F.scaled_dot_product_attention = _product
            torch.Tensor.softmax = _method  # type: ignore[method-assign, assignment]


def release() -> None:
    """Undo `acquire` when the last user leaves."""
    global _USERS
    with _LOCK:
        _USERS -= 1
        if _USERS == 0:
            F.softmax, torch.softmax, torch.special.softmax = _F_SOFTMAX, _TORCH_SOFTMAX, _SPECIAL
            F.scaled_dot_product_attention = _PRODUCT
            del torch.Tensor.softmax  # the class inherits it


def _dividing() -> TemperatureState | OutsideProfile | None:
    """The state that divides the softmaxes of this thread at the moment."""
    running = _CURRENT.running
    return running.state if running is not None and running.divides else None


def _f_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Tensor:
    state = _dividing()
    if state is None or dim is None:
        return _F_SOFTMAX(input, dim, _stacklevel, dtype)
    return _tempered_softmax(state, input, dim, dtype)


def _softmax(input: Tensor, dim: Any, dtype: Any = None, **kwargs: Any) -> Tensor:
    state = _dividing()
    if state is None:
        return _TORCH_SOFTMAX(input, dim, dtype=dtype, **kwargs)
    if not kwargs:
        return _tempered_softmax(state, input, dim, dtype)
    return _TORCH_SOFTMAX(tempered_logits(state, input, dim), dim, dtype=dtype, **kwargs)


def _special(input: Tensor, dim: Any, dtype: Any = None) -> Tensor:
    state = _dividing()
    if state is None:
        return _SPECIAL(input, dim, dtype=dtype)
    return _tempered_softmax(state, input, dim, dtype)


def _method(self: Tensor, dim: Any, dtype: Any = None) -> Tensor:
    state = _dividing()
    if state is None:
        return _METHOD(self, dim, dtype=dtype)
    return _tempered_softmax(state, self, dim, dtype)


def _product(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    state = _dividing()
    if state is None:
        return _PRODUCT(query, key, value, *args, **kwargs)
    mask = args[0] if args else kwargs.pop("attn_mask", None)
    half = isinstance(state, TemperatureState) and adds_too_much(
        query, mask, state.shift, state.layer.mask_floor
    )
    if half:
        query, key, value, mask = query.float(), key.float(), value.float(), in_float(mask)
    query, mask, kwargs = tempered_product(state, query, key, value, mask, args[1:], kwargs)
    output = _PRODUCT(query, key, value, mask, *args[1:], **kwargs)
    return output.half() if half else output


def _plain(logits: Tensor, dim: Any, dtype: Any) -> Tensor:
    """The softmax itself, never tempered once more.

    Under a function mode (`with torch.device(...)` is one) PyTorch looks the method up by its name
    again, and so finds the replacement.
    """
    before = _CURRENT.running
    _CURRENT.running = None
    try:
        return _METHOD(logits, dim, dtype=dtype)
    finally:
        _CURRENT.running = before


# Every function that a model's code may call, as a function mode sees it.
SOFTMAXES: tuple[Any, ...] = (
    *(F.softmax, torch.softmax, torch.Tensor.softmax, torch.special.softmax),
    *(_f_softmax, _method),
)
PRODUCTS = (F.scaled_dot_product_attention,)


# On a CPU, so many logits are tempered and normalised at a time. They stay in its cache: one more
# pass over 2048 x 2048 logits a head, from memory, costs a fifth of a layer.
_PIECE = 2**18


def _tempered_softmax(
    state: TemperatureState | OutsideProfile, logits: Tensor, dim: Any, dtype: Any
) -> Tensor:
    """What a replaced function gives: the softmax of the tempered logits."""
    if isinstance(state, OutsideProfile):
        raise state.error
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
    if at_once:
        return _plain(tempered_logits(state, logits, dim), dim, dtype)
    reading = _read(state, logits, dim)
    if reading is None:
        return _plain(logits, dim, dtype)
    _, beta, floor = reading
    rows = logits.view(-1, logits.shape[-1])
    betas = beta.expand(*logits.shape[:-1], 1).reshape(-1, 1)
    step = max(1, _PIECE // rows.shape[1])
    weights = None
    for start in range(0, len(rows), step):
        piece = slice(start, start + step)
        over_t = divided(rows[piece], betas[piece], floor, state.layer.masking)
        softmax = _plain(over_t, -1, dtype)
        if weights is None:  # its dtype is known only now: under autocast it is float32
            weights = softmax.new_empty(rows.shape)
        weights[piece] = softmax
    assert weights is not None
    return weights.view(logits.shape)


def tempered_logits(state: TemperatureState | OutsideProfile, logits: Tensor, dim: Any) -> Tensor:
    """The logits divided by T if they are attention's, as they are if they are known not to be.

    ArchitectureError where it is unknown.
    """
    if isinstance(state, OutsideProfile):
        raise state.error
    reading = _read(state, logits, dim)
    if reading is None:
        return logits
    pattern, beta, floor = reading
    layer = state.layer
    over_t = divided(logits, beta, floor, layer.masking)
    if state.trial is not None:
        state.trial.softmax(state, pattern, logits, over_t)
    if state.observer is not None:
        state.observer.see_logits(layer, axes.standard(over_t, pattern, layer.heads))
    return over_t


def _read(state: TemperatureState, logits: Tensor, dim: Any) -> tuple[str, Tensor, float] | None:
    """The axes of attention's logits, beta shaped to multiply them, and the floor of masking.

    None for a softmax that is known not to be attention's.
    """
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
    note_met(state)
    count = axes.rows(pattern, logits.shape, layer.heads)
    if not torch.compiler.is_compiling():
        state.calls += 1
        state.fit_call(count, logits.device)
    floor = max(layer.mask_floor, torch.finfo(logits.dtype).min / 2)
    if state.rule is None:
        beta = axes.shaped_for(state.beta[:, :, 0, 0], pattern, count)
    else:
        seen = (axes.standard(logits, pattern, layer.heads) > floor).sum(-1)
        beta = state.rule.of_seen(state, seen)
        beta = beta.flatten(0, 1) if pattern == axes.FOLDED else beta
    return pattern, beta, floor


def tempered_product(
    state: TemperatureState | OutsideProfile,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Query, mask and keyword arguments of a scaled dot product attention with logits over T."""
    if isinstance(state, OutsideProfile):
        raise state.error
    layer = state.layer
    if query.ndim != 4 or query.shape[1] != layer.heads:
        raise ArchitectureError(
            f"{layer.name} has queries of shape {list(query.shape)}; "
            f"axis 1 should hold its {layer.heads} heads"
        )
    note_met(state)
    if not torch.compiler.is_compiling():
        state.calls += 1
        state.fit_call(query.shape[0], query.device)
    before = (query, key, value, mask)
    beta, shift = _of_product(state, query, key, mask, args, kwargs)
    query, shift = query_over_t(query, beta, shift)
    if shift != 1:
        scale = kwargs.get("scale")
        kwargs = {**kwargs, "scale": shift * (query.shape[-1] ** -0.5 if scale is None else scale)}
    mask = scaled_mask(mask, beta, layer.mask_floor)
    if state.trial is not None:
        state.trial.product(state, before, (query, key, value, mask), args, kwargs)
    if state.observer is not None:
        state.observer.see_product(layer, (query, key, value, mask, *args), kwargs)
    return query, mask, kwargs


def _of_product(
    state: TemperatureState,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Tensor, int]:
    """beta of a scaled dot product attention, and a power of two that no entry of it exceeds."""
    if state.rule is None:
        return state.beta, state.shift
    causal = args[1] if len(args) > 1 else kwargs.get("is_causal", False)
    if mask is not None:  # only which keys are seen matters to a rule that counts them
        floor = max(state.layer.mask_floor, torch.finfo(query.dtype).min / 2)
        mask = mask if mask.dtype == torch.bool else mask > floor
        mask = mask[(None,) * (4 - mask.ndim)]
    beta = state.rule(state, query, key, mask, {"is_causal": causal})
    return beta, shift_of(float(beta.max())) if query.dtype == torch.float16 else 1
