"""How a model hides keys: the constants in its masks, and in finished logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tempering.errors import ArchitectureError

# A finite masking constant is below this.
MASKED = -5e3


def mask_floor(mask: Any) -> float:
    """Half the model's own masking constant (some use -1e4 or -1e9 rather than the minimum)."""
    natural = float(torch.finfo(torch.float32).min) / 2
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        return natural
    masked = mask[(mask <= MASKED) & (mask > -torch.inf)]
    return max(natural, masked.max().item() / 2) if masked.numel() else natural


def logits_floor(name: str, logits: Tensor) -> float:
    """The same from finished logits [batch, heads, queries, keys]: masking is common to heads."""
    low = logits <= MASKED
    masked = low.all(dim=1, keepdim=True).expand_as(logits)
    floor = mask_floor(logits[masked])
    if bool((low & ~masked & (logits <= floor)).any()):
        raise ArchitectureError(
            f"{name} has logits down to {logits[low & ~masked].min().item():.3g}, as low as its "
            f"masking (above {2 * floor:.3g}), so the two can't be told apart"
        )
    return floor


def masking(logits: Tensor) -> float | None:
    values = logits[logits <= MASKED].unique().tolist()
    lowest = (-torch.inf, torch.finfo(logits.dtype).min)
    return values[0] if len(values) == 1 and values[0] in lowest else None
