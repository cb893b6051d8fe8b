"""The finished logits of an attention call: all that stands before its softmax, in float32.

Formed for a slice of the queries at a time, so that memory stays linear in the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.errors import ArchitectureError

# Entries of a slice of logits formed at once: 64 MB in float32.
_ENTRIES = 1 << 24

Observer = Callable[..., None]


def sliced_logits(
    module: Any,
    query: Float[Tensor, "batch heads q_seq d"],
    key: Float[Tensor, "batch kv_heads kv_seq d"],
    mask: Any,
    kwargs: dict[str, Any],
    queries: Tensor | None = None,
) -> Iterator[Float[Tensor, "batch heads q_part keys"]]:
    """Yield softmax inputs of an interface call for consecutive slices of its queries.

    queries: indices of the queries wanted; all by default. Learned sink logits, where the
    architecture has them, are the last key. Raises ArchitectureError for block masks.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise ArchitectureError(
            "flex attention hides its mask; load the model with attn_implementation='sdpa' or "
            "'eager' to measure it"
        )
    batch, heads, q_seq, _ = query.shape
    kv_seq = key.shape[2]
    work = torch.promote_types(query.dtype, torch.float32)
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys = key.to(work).repeat_interleave(heads // key.shape[1], dim=1).transpose(-1, -2)
    index = torch.arange(q_seq, device=query.device) if queries is None else queries
    step = max(1, _ENTRIES // max(1, batch * heads * kv_seq))
    sinks = _sinks(module, kwargs)
    causal = _is_causal(module, mask, kwargs, q_seq)
    for part in index.split(step):
        logits = query[:, :, part].to(work) @ keys * scaling
        if kwargs.get("softcap") is not None:
            cap = kwargs["softcap"]
            logits = torch.tanh(logits / cap) * cap
        if kwargs.get("position_bias") is not None:
            bias = kwargs["position_bias"][..., :kv_seq]
            logits = logits + (bias[:, :, part] if bias.shape[2] > 1 else bias)
        if mask is not None:
            own = mask[..., :kv_seq]
            logits = _masked(logits, own[:, :, part] if own.shape[2] > 1 else own)
        elif causal:
            visible = torch.arange(kv_seq, device=query.device) <= part[:, None]
            logits = logits.masked_fill(~visible, float("-inf"))
        floor = torch.finfo(query.dtype).min / 2
        logits = logits.masked_fill(logits <= floor, float("-inf"))
        if sinks is not None:
            column = _sink_column(sinks.to(work), heads, part)
            logits = torch.cat([logits, column.expand(batch, -1, len(part), -1)], dim=-1)
        yield logits


def has_sinks(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a learned sink logit takes part in the softmax."""
    return _sinks(module, kwargs) is not None


def _sinks(module: Any, kwargs: dict[str, Any]) -> Tensor | None:
    for name in ("s_aux", "sinks"):
        if kwargs.get(name) is not None:
            return kwargs[name]
    sinks = getattr(module, "sinks", None)
    return sinks if isinstance(sinks, Tensor) else None


def _sink_column(sinks: Tensor, heads: int, queries: Tensor) -> Tensor:
    """One logit a head, or one for each row, head and query, as a column of keys."""
    if sinks.ndim < 3:
        return sinks.reshape(1, heads, 1, 1)
    column = sinks if sinks.ndim == 4 else sinks[..., None]
    return column[:, :, queries] if column.shape[2] > 1 else column


def _is_causal(module: Any, mask: Any, kwargs: dict[str, Any], q_seq: int) -> bool:
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return bool(causal) and mask is None and q_seq > 1


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, float("-inf"))
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return (logits + mask.to(logits.dtype)).masked_fill(hidden, float("-inf"))


def observe_with(function: Callable[..., Any], observer: Any) -> Callable[..., Any]:
    """An attention function that shows its arguments to `observer` before it runs."""

    def observed(
        module: Any,  # or a stand-in for one, with tempered sinks
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        observer.see_call(module, query, key, attention_mask, kwargs)
        return function(module, query, key, value, attention_mask, **kwargs)

    observed.__name__ = getattr(function, "__name__", "attention")
    observed.__wrapped__ = function  # type: ignore[attr-defined]
    return observed
