"""The interface route: attention that a model calls through transformers' attention interface.

The finished logits l become l / T, whatever the architecture puts before its softmax: queries (or
the scaling factor), finite entries of an additive mask, additive position biases, sink logits and
the soft cap are multiplied by beta = 1/T. For the soft cap this holds because

    cap tanh(l / cap) / T = (cap/T) tanh((l/T) / (cap/T))

Attention code of a model's own is reached at its softmax instead (`softmax_route.py`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tempering.attention.hooks.dividing import (
    adds_too_much,
    in_float,
    query_over_t,
    scaled,
    scaled_mask,
    shift_of,
)
from tempering.attention.hooks.softmax_route import note_met
from tempering.attention.hooks.temperature_state import TemperatureState
from tempering.errors import ArchitectureError

# Keyword arguments of the attention interface that add to the logits or cap them ...
LOGIT_ARGUMENTS = ("position_bias", "s_aux", "sinks", "softcap")
# ... and those that leave the logits alone, because they say what is scaled, dropped out, packed,
# cached or selected: every keyword that the modelling files of transformers 5.17 to 5.23 write at
# a call of the interface, and every parameter of the attention functions that the interface can
# hand back, less the ones above. Any other goes through `check_arguments`.
NEUTRAL_ARGUMENTS = frozenset(
    "dropout scaling is_causal sliding_window cu_seq_lens_q cu_seq_lens_k max_length_q "
    "max_length_k output_attentions position_ids indices block_indices deterministic cache "
    "kernel_options target_dtype implementation use_top_left_mask block_table".split()
)


_KNOWN_ARGUMENTS = NEUTRAL_ARGUMENTS.union(LOGIT_ARGUMENTS)


def check_arguments(function: Callable[..., Any], layer: str, names: Iterable[str]) -> None:
    """ArchitectureError for an argument that may change the logits in a way not known here.

    Models pass on every keyword that they were called with, and most don't matter: an attention
    function of transformers reads the arguments that its signature names and ignores the rest. A
    function from elsewhere is given known arguments only.
    """
    for name in names:
        if name in _KNOWN_ARGUMENTS:
            continue
        # The cache below must not keep an observer alive, so it is asked about what that wraps.
        plain = inspect.unwrap(function) if hasattr(function, "__wrapped__") else function
        if _reads(plain, name):
            raise ArchitectureError(
                f"{layer} passes '{name}' to its attention function "
                f"({getattr(function, '__name__', function)}), which is not known to leave the "
                "logits alone; this architecture is refused"
            )


@functools.lru_cache(maxsize=1024)
def _reads(function: Callable[..., Any], name: str) -> bool:
    """Whether a function names an argument, or may read it unnamed: one from elsewhere may."""
    if getattr(function, "__module__", "").split(".")[0] != "transformers":
        return True
    return name in inspect.signature(function).parameters


class _ModuleWithSinks:
    """A module with other sink logits, for eager code that reads them off the module."""

    def __init__(self, module: Any, change: Callable[[Tensor], Tensor]) -> None:
        self._module = module
        self._change = change

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if "sink" in name and isinstance(value, Tensor):
            return self._change(value)
        return value


def widened_sinks(module: nn.Module) -> Any:
    """A module whose sink logits, if it has any of its own, are in float64."""
    if not has_own_sinks(module):
        return module
    return _ModuleWithSinks(module, lambda sinks: sinks.detach().double())


def _scaled_sinks(sinks: Tensor, beta: Tensor) -> Tensor:
    heads = beta.shape[1]
    if sinks.ndim == 1 and sinks.shape[0] == heads and beta.shape[2] > 1:
        raise ArchitectureError(
            "sink logits are shared by all queries, so temperatures that depend on the query can't "
            "reach them"
        )
    if sinks.ndim == 1 and sinks.shape[0] == heads:
        return (sinks * beta.reshape(heads)).to(sinks.dtype)
    if sinks.ndim >= 3 and sinks.shape[-3] == heads:
        return (sinks * beta).to(sinks.dtype)
    raise ArchitectureError(f"sink logits of shape {tuple(sinks.shape)} don't match {heads} heads")


def has_own_sinks(module: Any) -> bool:
    """Whether sink logits are weights of the attention module."""
    # Loops and no `any`: this is asked at every call, and a generator costs more than the answer.
    for name in module._parameters:
        if "sink" in name:
            return True
    for name in module._buffers:  # noqa: SIM110
        if "sink" in name:
            return True
    return False


def attend(
    function: Callable[..., Any],
    state: TemperatureState,
    module: Any,  # or a stand-in for one, with other sinks
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Any:
    """Call an attention function of transformers with its logits divided by T."""
    layer = state.layer
    batch, heads = query.shape[:2]
    if heads != layer.heads:
        raise ArchitectureError(
            f"{layer.name} has queries of shape {tuple(query.shape)}; "
            f"axis 1 should hold its {layer.heads} heads"
        )
    note_met(state)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        check_arguments(function, layer.name, kwargs)
        state.calls += 1
        state.fit_call(batch, query.device)
    if state.rule is None:
        beta, shift = state.beta, state.shift
    else:
        beta = state.rule(state, query, key, attention_mask, kwargs)
        shift = shift_of(float(beta.max())) if query.dtype == torch.float16 else 1
    half = query.dtype == torch.float16 and (
        adds_too_much(query, attention_mask, shift, layer.mask_floor)
        or adds_too_much(query, kwargs.get("position_bias"), shift, layer.mask_floor)
    )
    if half:
        query, key, value = query.float(), key.float(), value.float()
        attention_mask = in_float(attention_mask)
        kwargs = {name: in_float(item) for name, item in kwargs.items()}
    sinks = has_own_sinks(module)
    extras = [name for name in LOGIT_ARGUMENTS if kwargs.get(name) is not None]
    if len(beta) > 1 and (sinks or _has_sink_per_head(extras, kwargs)):
        inputs = (query, key, value)
        output = _by_row(function, state, beta, shift, module, inputs, attention_mask, kwargs)
        return _given_back(output, state, half)

    scaling = kwargs.get("scaling")
    uniform = None if compiling or state.rule is not None else state.uniform
    if uniform is not None and isinstance(scaling, float):
        kwargs["scaling"] = scaling * uniform
    else:
        query, shift = query_over_t(query, beta, shift)
        if shift != 1:
            kwargs["scaling"] = shift * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    for name in extras:
        kwargs[name] = _scaled_extra(name, kwargs[name], beta, uniform, function, state)
    target: Any = module
    if sinks:
        target = _ModuleWithSinks(module, lambda own: _scaled_sinks(own, beta))
    mask = scaled_mask(attention_mask, beta, layer.mask_floor)
    output = function(target, query, key, value, mask, **kwargs)
    return _given_back(output, state, half)


def _given_back(output: Any, state: TemperatureState, half: bool) -> Any:
    """What an attention function gave, with the heads' outputs times their scales."""
    if state.scale is not None:
        mixed = output[0]
        if mixed.ndim != 4 or mixed.shape[2] != state.layer.heads:
            raise ArchitectureError(
                f"{state.layer.name} gives outputs of shape {tuple(mixed.shape)}, where heads are "
                "not axis 2 of 4, so output scales can't reach them"
            )
        output = ((mixed * state.scale).to(mixed.dtype), *output[1:])
    return tuple(None if x is None else x.half() for x in output) if half else output


def _has_sink_per_head(extras: Sequence[str], kwargs: dict[str, Any]) -> bool:
    """Whether sink logits are passed that all rows of the batch share."""
    return any(name in ("s_aux", "sinks") and kwargs[name].ndim == 1 for name in extras)


def _scaled_extra(
    name: str,
    value: Any,
    beta: Tensor,
    uniform: float | None,
    function: Callable[..., Any],
    state: TemperatureState,
) -> Any:
    if name == "softcap":
        if uniform is not None:
            return value * uniform
        if "eager" not in getattr(function, "__name__", ""):
            raise ArchitectureError(
                f"{state.layer.name} caps its logits inside a fused kernel, which takes one cap "
                "for all heads; load the model with attn_implementation='eager' for temperatures "
                "per head or per row"
            )
        return value * beta
    if name == "position_bias":
        floor = max(state.layer.mask_floor, torch.finfo(value.dtype).min / 2)
        return scaled(value, beta, floor)
    return _scaled_sinks(value, beta)


def _by_row(
    function: Callable[..., Any],
    state: TemperatureState,
    beta: Tensor,
    shift: int,
    module: Any,
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Any,
    kwargs: dict[str, Any],
) -> Any:
    """One call for each row: sink logits can't differ between the rows of one call."""
    if mask is not None and not isinstance(mask, Tensor):
        raise ArchitectureError(
            f"{state.layer.name} has sink logits, which flex attention takes for the whole batch; "
            "give one profile, or load the model with attn_implementation='eager' for a profile "
            "per row"
        )
    batch = inputs[0].shape[0]
    outputs, weights = [], []
    for row in range(batch):
        only = slice(row, row + 1)
        row_state = TemperatureState(state.layer, inputs[0].device, state.beta.dtype)
        row_state.beta, row_state.uniform, row_state.shift = beta[only], None, shift

        def of_row(item: Any, only: slice = only) -> Any:
            per_row = isinstance(item, Tensor) and item.ndim > 1 and item.shape[0] == batch > 1
            return item[only] if per_row else item

        arguments = {name: of_row(item) for name, item in kwargs.items()}
        query, key, value = (item[only] for item in inputs)
        output = attend(function, row_state, module, query, key, value, of_row(mask), **arguments)
        outputs.append(output[0])
        weights.append(output[1])
    return torch.cat(outputs), None if weights[0] is None else torch.cat(weights)
