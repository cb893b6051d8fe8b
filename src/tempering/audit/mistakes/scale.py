"""Mistakes in what the products of queries and keys are multiplied by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tempering.audit.mistakes.base import (
    MistakeCase,
    attention_modules,
    attributes,
    mistake,
    text_config,
)

# Engines pad heads to a size that their kernels know.
_PADDED = (64, 96, 128, 192, 256)


def _scaled(model: Any) -> list[Any]:
    return [m for m in attention_modules(model) if isinstance(getattr(m, "scaling", None), float)]


@mistake
def wrong_scale(model: Any) -> Iterator[MistakeCase]:
    """1/sqrt(d) from a padded or another head size, or the architecture's own scale ignored."""
    modules = _scaled(model)
    sizes = {getattr(m, "head_dim", None) for m in modules}
    size = next(iter(sizes), None)
    if len(sizes) != 1 or not isinstance(size, int):
        return
    own = {m.scaling for m in modules}
    config = text_config(model)
    width = config.hidden_size // config.num_attention_heads
    padded = next((d for d in _PADDED if d > size), 2 * size)
    told = {
        "the scale of its queries (query_pre_attn_scalar, attention_multiplier) were ignored and "
        f"1/sqrt({size}), from the size of a head, used": size**-0.5,
        f"its scale came from heads padded to {padded}: 1/sqrt({padded})": padded**-0.5,
        f"its scale came from a wrong head size: 1/sqrt({width})": width**-0.5,
        "its scale were applied twice": max(own) ** 2,
        f"its scale were 1/{size} in place of 1/sqrt({size})": 1 / size,
        "its products of queries and keys were not scaled": 1.0,
    }
    seen: list[float] = list(own) if len(own) == 1 else []
    for name, value in told.items():
        if not any(math.isclose(value, other, rel_tol=1e-6) for other in seen):
            seen.append(value)
            yield MistakeCase(name, attributes(modules, scaling=value))


@mistake
def soft_cap_missing(model: Any) -> Iterator[MistakeCase]:
    """Attention's soft cap left out."""
    capped = [m for m in attention_modules(model) if getattr(m, "attn_logit_softcapping", None)]
    if capped:
        yield MistakeCase(
            "the soft cap of its attention were missing",
            attributes(capped, attn_logit_softcapping=None),
        )


@mistake
def sinks_missing(model: Any) -> Iterator[MistakeCase]:
    """Sink logits left out."""
    import torch

    modules = [m for m in attention_modules(model) if hasattr(m, "sinks")]
    modules = [m for m in modules if isinstance(m.sinks, torch.nn.Parameter)]
    if modules:
        low = [torch.nn.Parameter(torch.full_like(m.sinks, -1e9), False) for m in modules]
        yield MistakeCase("its sinks were missing", attributes(modules, sinks=low))
