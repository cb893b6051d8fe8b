"""The numbers by which a model hides keys, in its masks and in finished logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tempering.errors import ArchitectureError

# A logit at or below this is masked: the mildest masking constant in use is -1e4 (GPT-2's first
# releases). A live logit that is as low is refused by `logits_floor`.
MASKED = -5e3


def mask_floor(mask: Any) -> float:
    """The floor at or below which an additive mask hides: half the model's masking constant.

    Some models use -1e4 or -1e9 for it, and most the dtype's minimum.
    """
    lowest = float(torch.finfo(torch.float32).min) / 2
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        return lowest
    masked = mask[(mask <= MASKED) & (mask > -torch.inf)]
    return max(lowest, masked.max().item() / 2) if masked.numel() else lowest


def logits_floor(name: str, logits: Tensor) -> float:
    """`mask_floor`, from finished logits [batch, heads, queries, keys].

    An entry is masked if it is low in every head. ArchitectureError if a live logit is as low.
    """
    low = logits <= MASKED
    masked = low.all(dim=1, keepdim=True).expand_as(logits)
    floor = mask_floor(logits[masked])
    if bool((low & ~masked & (logits <= floor)).any()):
        raise ArchitectureError(
            f"{name} has logits down to {logits[low & ~masked].min().item():.3g}, as low as its "
            f"masking (above {2 * floor:.3g}), so the two can't be told apart"
        )
    return floor


def masking_value(logits: Tensor) -> float | None:
    """What all masked logits are, if it is -inf or the dtype's minimum; else None."""
    values = logits[logits <= MASKED].unique().tolist()
    lowest = (-torch.inf, torch.finfo(logits.dtype).min)
    return values[0] if len(values) == 1 and values[0] in lowest else None
