"""The finished logits of an attention call, with all that stands before its softmax, in float32.

They are formed for a slice of the queries at a time, so that memory stays linear in the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.attention.visibility import is_causal, is_eager, is_flash, visible, visible_to_flash
from tempering.errors import ArchitectureError

# Entries of the logits that are formed at once: 64 MB in float32.
_ENTRIES = 1 << 24


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention call: its queries and keys, and all that its logits pass before the softmax.

    scaling: factor of the products. cap: l -> cap tanh(l / cap), or None. bias: added to the
    logits. mask: boolean (True is seen) or added; None with `causal`: key j is hidden from query
    i where j > i, and where j <= i - window. sinks: learned sink logits, or None.
    """

    query: Float[Tensor, "batch heads q_seq d"]
    key: Float[Tensor, "batch kv_heads kv_seq d"]
    scaling: float
    cap: Any = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    window: int | None = None
    sinks: Tensor | None = None

    @classmethod
    def of(
        cls, module: Any, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> AttentionCall:
        """From the arguments of an attention function; ArchitectureError for block masks."""
        if mask is not None and not isinstance(mask, Tensor):
            raise ArchitectureError(
                "flex attention hides its mask; load the model with attn_implementation='sdpa' or "
                "'eager' to measure it"
            )
        if is_flash(module) and _is_packed(mask, kwargs):
            raise ArchitectureError(
                "flash attention keeps texts packed in one row apart by itself; give each text a "
                "row of its own, padded, to measure it or to hold rules on it"
            )
        scaling = kwargs.get("scaling")
        # Flash kernels take a mask of real keys, and hide the future and what left the window.
        if mask is not None and mask.ndim == 2:
            mask = mask.bool()[:, None, None, : key.shape[2]]
            hiding = True
        else:
            hiding = mask is None
        causal = hiding and is_causal(module, kwargs)
        if mask is None and kwargs.get("is_causal") is None and is_eager(module):
            causal = False  # the modules' flag is for kernels; eager code hides by masks alone
        window = kwargs.get("sliding_window") if hiding else None
        if is_flash(module) and (not causal or query.shape[2] != key.shape[2]):
            lengths = (query.shape[2], key.shape[2])
            seen = visible_to_flash(*lengths, causal=causal, window=window, device=query.device)
            mask, causal = seen if mask is None else mask & seen, False
        causal = causal and query.shape[2] > 1
        return cls(
            query,
            key,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            kwargs.get("softcap"),
            kwargs.get("position_bias"),
            mask,
            causal,
            window if causal else None,
            _sinks(module, kwargs),
        )

    @property
    def work(self) -> torch.dtype:
        """What logits are formed in: float32, or float64 for a model that is."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @property
    def only_products(self) -> bool:
        """Whether the logits are products that a number multiplies, some of them hidden."""
        return self.cap is None and self.bias is None and (self.mask is None or _hides(self.mask))

    def finish(
        self,
        logits: Float[Tensor, "rows heads_part q_part k_part"],
        queries: Tensor,
        rows: slice = slice(None),
        heads: slice = slice(None),
        keys: slice = slice(None),
    ) -> Float[Tensor, "rows heads_part q_part k_part"]:
        """Scaled products of a part of the call -> finished logits, hidden ones -inf."""
        part = _CallPart(rows, heads, queries, range(*keys.indices(self.key.shape[2])))
        if self.cap is not None:
            cap = part.of(self.cap) if isinstance(self.cap, Tensor) else self.cap
            logits = torch.tanh(logits / cap) * cap
        if self.bias is not None:
            logits = logits + part.of(self.bias)
        if self.mask is not None:
            logits = _masked(logits, part.of(self.mask))
        if self.causal:
            seen = visible(queries, part.keys, causal=True, window=self.window)
            logits = logits.masked_fill(~seen, float("-inf"))
        floor = torch.finfo(self.query.dtype).min / 2
        return logits.masked_fill(logits <= floor, float("-inf"))

    def sink_column(self, queries: Tensor) -> Float[Tensor, "rows heads q_part 1"]:
        """The learned sink's logit for some of the queries."""
        assert self.sinks is not None
        column = _sink_column(self.sinks.to(self.work), self.query.shape[1], queries)
        return column.expand(self.query.shape[0], -1, len(queries), -1)


@dataclass(frozen=True)
class _CallPart:
    """Which batch rows, heads, queries and keys of a call."""

    rows: slice
    heads: slice
    queries: Tensor
    keys: range

    def of(self, item: Tensor) -> Tensor:
        """That part of a tensor that broadcasts to [batch, heads, q_seq, kv_seq or more]."""
        item = item[self.rows] if item.shape[0] > 1 else item
        item = item[:, self.heads] if item.shape[1] > 1 else item
        if item.shape[2] > 1:
            item = item[:, :, self.queries]
        return item[..., self.keys.start : self.keys.stop] if item.shape[3] > 1 else item


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
    call = AttentionCall.of(module, query, key, mask, kwargs)
    batch, heads, q_seq, _ = query.shape
    keys = key.to(call.work).repeat_interleave(heads // key.shape[1], dim=1).transpose(-1, -2)
    index = torch.arange(q_seq, device=query.device) if queries is None else queries
    step = max(1, _ENTRIES // max(1, batch * heads * key.shape[2]))
    for part in index.split(step):
        logits = call.finish(query[:, :, part].to(call.work) @ keys * call.scaling, part)
        if call.sinks is not None:
            logits = torch.cat([logits, call.sink_column(part)], dim=-1)
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


def _is_packed(mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether flash attention is given several texts in one row.

    It learns so by their lengths, or by positions that begin anew.
    """
    if kwargs.get("cu_seq_lens_q") is not None:
        return True
    positions = kwargs.get("position_ids")
    return mask is None and positions is not None and bool((positions.diff() < 0).any())


def _hides(mask: Tensor) -> bool:
    """Whether a mask only hides, adding nothing to what is seen."""
    return mask.dtype == torch.bool


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
