"""How a temperature reaches a softmax: l -> l / T for all that the architecture puts before it.

Two routes. Where a model calls transformers' attention interface, what the interface hands
back is wrapped: queries (or the scaling factor), finite entries of an additive mask, additive
position biases, sink logits and the soft cap are multiplied by beta = 1/T, which equals
dividing the finished logits:

    cap tanh(l / cap) / T = (cap/T) tanh((l/T) / (cap/T))

Where a model has attention code of its own, its softmax (or scaled dot product) calls are
intercepted while the module's forward runs.

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
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tempering.attention.layout import AttentionLayer
from tempering.attention.profile import check_values
from tempering.errors import ArchitectureError, ProfileError

STATE = "_tempering"

# Keyword arguments of the attention interface that add to the logits ...
LOGIT_ARGUMENTS = ("position_bias", "s_aux", "sinks", "softcap")
# ... and those known to leave them alone (transformers 5.17 to 5.23). Any other is refused.
NEUTRAL_ARGUMENTS = frozenset(
    "dropout scaling is_causal sliding_window cu_seq_lens_q cu_seq_lens_k max_length_q "
    "max_length_k cu_seqlens position_embeddings output_attentions hidden_states position_ids "
    "past_key_values past_key_value use_cache cache_position indices block_indices "
    "deterministic layer_idx "
    "output_hidden_states output_router_logits num_items_in_batch seq_idx return_dict training "
    "encoder_hidden_states encoder_attention_mask is_cross_attention attention_type cache "
    "allow_is_causal_skip block_table kernel_options target_dtype implementation head_mask "
    "token_type_ids inputs_embeds logits_to_keep labels mm_token_type_ids seq_lens "
    "rotary_pos_emb per_layer_inputs shared_kv_states".split()
)


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
    rule: a function (query, key, mask, kwargs) -> beta, for temperatures that depend on the query.
    observer: an object whose `see_call` or `see_logits` is shown what reaches the softmax.
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
        self.observer: Any = None
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
        parts = [*(part for other, part in self.parts.items() if other is not owner), temperature]
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
        if len(parts) > 1:
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
            exact = total.detach().reciprocal()
            same = not beta.requires_grad and bool((exact == exact.flatten()[0]).all())
            self.uniform = float(exact.flatten()[0]) if same else None

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


def _has_bias(mask: Tensor) -> bool:
    """Whether an additive mask holds a finite entry other than 0; remembered per tensor."""
    versioned = not mask.is_inference()
    known = _MASKS.get(id(mask)) if versioned else None
    if known is not None and known[0]() is mask and known[1] == mask._version:
        return known[2]
    floor = torch.finfo(mask.dtype).min / 2
    answer = bool(((mask > floor) & (mask != 0)).any())
    if not versioned:
        return answer
    if len(_MASKS) > 64:
        _MASKS.clear()
    _MASKS[id(mask)] = (weakref.ref(mask), mask._version, answer)
    return answer


def scaled(logits: Tensor, beta: Tensor, floor: float) -> Tensor:
    """`logits * beta` where they are above `floor`; masking (at or below it) stays as it is."""
    return torch.where(logits > floor, (logits * beta).to(logits.dtype), logits)


def _scaled_mask(mask: Any, beta: Tensor) -> Any:
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        return mask
    if not torch.compiler.is_compiling() and not _has_bias(mask):
        return mask
    return scaled(mask, beta, torch.finfo(mask.dtype).min / 2)


class _ModuleWithSinks:
    """A module whose sink logits are tempered, for eager code that reads them off the module."""

    def __init__(self, module: nn.Module, beta: Tensor) -> None:
        self._module = module
        self._beta = beta

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if "sink" in name and isinstance(value, Tensor):
            return _scaled_sinks(value, self._beta)
        return value


def _scaled_sinks(sinks: Tensor, beta: Tensor) -> Tensor:
    heads = beta.shape[1]
    if sinks.ndim == 1 and sinks.shape[0] == heads:
        return (sinks * beta.reshape(heads)).to(sinks.dtype)
    if sinks.ndim >= 3 and sinks.shape[-3] == heads:
        return (sinks * beta).to(sinks.dtype)
    raise ArchitectureError(f"sink logits of shape {tuple(sinks.shape)} don't match {heads} heads")


def _own_sinks(module: nn.Module) -> bool:
    return any("sink" in name for name in module._parameters) or any(
        "sink" in name for name in module._buffers
    )


def attend(
    function: Callable[..., Any],
    state: TemperatureState,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Any:
    """Call an attention function of transformers with its logits divided by T."""
    for name in kwargs:
        if name not in NEUTRAL_ARGUMENTS and name not in LOGIT_ARGUMENTS:
            raise ArchitectureError(
                f"{state.layer.name} passes '{name}' to its attention, which is not known to "
                "leave the logits alone; this architecture is refused"
            )
    if query.shape[1] != state.layer.heads:
        raise ArchitectureError(
            f"{state.layer.name} has queries of shape {tuple(query.shape)}; "
            f"axis 1 should hold its {state.layer.heads} heads"
        )
    compiling = torch.compiler.is_compiling()
    if not compiling:
        state.calls += 1
        state.meet(query.shape[0], query.device)
    beta = state.beta if state.rule is None else state.rule(query, key, attention_mask, kwargs)
    sinks = _own_sinks(module)
    extras = [name for name in LOGIT_ARGUMENTS if kwargs.get(name) is not None]
    if beta.shape[0] > 1 and (sinks or "s_aux" in extras or "sinks" in extras):
        return _by_row(function, state, module, query, key, value, attention_mask, kwargs)

    scaling = kwargs.get("scaling")
    uniform = None if compiling or state.rule is not None else state.uniform
    if uniform is not None and isinstance(scaling, float):
        kwargs["scaling"] = scaling * uniform
    else:
        query = (query * beta).to(query.dtype)
    for name in extras:
        kwargs[name] = _scaled_extra(name, kwargs[name], beta, uniform, function, state)
    target: Any = _ModuleWithSinks(module, beta) if sinks else module
    return function(target, query, key, value, _scaled_mask(attention_mask, beta), **kwargs)


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
        floor = torch.finfo(value.dtype).min / 2
        return scaled(value, beta, floor)
    return _scaled_sinks(value, beta)


def _by_row(
    function: Callable[..., Any],
    state: TemperatureState,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> Any:
    """One call a row, for what can't differ between the rows of one call (sink logits)."""
    outputs, weights = [], []
    for row in range(query.shape[0]):
        part = slice(row, row + 1)
        one = TemperatureState(state.layer, query.device)
        one.beta, one.uniform = state.beta[part], None
        own = {
            name: item[part]
            if name == "position_bias" and isinstance(item, Tensor) and item.shape[0] > 1
            else item
            for name, item in kwargs.items()
        }
        own_mask = mask[part] if isinstance(mask, Tensor) and mask.shape[0] > 1 else mask
        output = attend(function, one, module, query[part], key[part], value[part], own_mask, **own)
        outputs.append(output[0])
        weights.append(output[1])
    return torch.cat(outputs), None if weights[0] is None else torch.cat(weights)


# --- the softmax route ---------------------------------------------------------------------

SOFTMAXES = (F.softmax, torch.softmax, torch.Tensor.softmax, torch.special.softmax)


class TemperedSoftmax(TorchFunctionMode):
    """While active, the attention softmax of one module sees logits times beta."""

    def __init__(self, state: TemperatureState) -> None:
        super().__init__()
        self.state = state

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in SOFTMAXES and args and self._is_attention(args[0]):
            logits = self._scaled_logits(args[0])
            if self.state.observer is not None:
                self.state.observer.see_logits(self.state.layer, logits)
            return func(logits, *args[1:], **kwargs)
        if func is F.scaled_dot_product_attention and args and args[0].ndim == 4:
            return self._scaled_product(func, args, kwargs)
        return func(*args, **kwargs)

    def _is_attention(self, logits: Tensor) -> bool:
        layer = self.state.layer
        if layer.folded:
            return logits.ndim == 3 and logits.shape[0] % layer.heads == 0
        return logits.ndim == 4 and logits.shape[1] == layer.heads

    def _scaled_logits(self, logits: Tensor) -> Tensor:
        state, layer = self.state, self.state.layer
        self._count()
        floor = max(layer.mask_floor, torch.finfo(logits.dtype).min / 2)
        if layer.folded:
            batch = logits.shape[0] // layer.heads
            state.meet(batch, logits.device)
            beta = state.beta.expand(batch, -1, 1, 1).reshape(-1, 1, 1)
            return scaled(logits, beta, floor)
        state.meet(logits.shape[0], logits.device)
        return scaled(logits, state.beta, floor)

    def _scaled_product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        state = self.state
        query = args[0]
        if query.shape[1] != state.layer.heads:
            raise ArchitectureError(
                f"{state.layer.name} has queries of shape {tuple(query.shape)}; "
                f"axis 1 should hold its {state.layer.heads} heads"
            )
        self._count()
        state.meet(query.shape[0], query.device)
        query = (query * state.beta).to(query.dtype)
        if len(args) > 3:
            args = (*args[:3], _scaled_mask(args[3], state.beta), *args[4:])
        elif kwargs.get("attn_mask") is not None:
            kwargs = {**kwargs, "attn_mask": _scaled_mask(kwargs["attn_mask"], state.beta)}
        if state.observer is not None:
            state.observer.see_product(state.layer, (query, *args[1:]), kwargs)
        return func(query, *args[1:], **kwargs)

    def _count(self) -> None:
        if not torch.compiler.is_compiling():
            self.state.calls += 1
