"""Which keys a query sees where no mask says it: causality and sliding windows."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def is_causal(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call of the attention interface hides what comes later, if it has no mask."""
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def is_flash(module: Any) -> bool:
    """Whether an attention module runs flash kernels."""
    return "flash" in _implementation(module)


def is_eager(module: Any) -> bool:
    """Whether an attention module runs transformers' eager code."""
    return _implementation(module) == "eager"


def _implementation(module: Any) -> str:
    return str(getattr(getattr(module, "config", None), "_attn_implementation", None))


def _numbers(some: range | Tensor, device: torch.device) -> Tensor:
    """The numbers of some queries or keys, as a tensor."""
    return torch.arange(some.start, some.stop, device=device) if isinstance(some, range) else some


def visible(
    queries: Int[Tensor, "queries"] | range,
    keys: Int[Tensor, "keys"] | range,
    *,
    causal: bool,
    window: int | None = None,
    offset: int = 0,
    device: torch.device | None = None,
) -> Bool[Tensor, "queries keys"]:
    """Whether query i, which stands at key i + offset, sees key j.

    Causal: j <= i + offset. With a window: |i + offset - j| < window.
    """
    device = device or (queries.device if isinstance(queries, Tensor) else torch.device("cpu"))
    at, key = _numbers(queries, device)[:, None] + offset, _numbers(keys, device)
    seen = key <= at if causal else torch.ones_like(key <= at)
    if window is not None:
        seen &= key > at - window
        if not causal:
            seen &= key < at + window
    return seen


def visible_to_flash(
    queries: int, keys: int, *, causal: bool, window: int | None, device: torch.device
) -> Bool[Tensor, "1 1 queries keys"]:
    """What flash kernels show: they put the last query at the last key.

    transformers hands them a window only where there are more keys than it holds.
    """
    window = window if window is not None and keys > window else None
    offset = keys - queries
    seen = visible(
        range(queries), range(keys), causal=causal, window=window, offset=offset, device=device
    )
    return seen[None, None]
