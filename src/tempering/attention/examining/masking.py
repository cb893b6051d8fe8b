"""The numbers by which a model hides keys, in its masks and in finished logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tempering.errors import ArchitectureError

# A logit at or below this is masked: the mildest masking constant in use is -1e4 (GPT-2's first
# releases). A live logit that is as low is refused by `logits_floor`.
MASKED = -5e3
# The mildest number that is taken for a mask, where an argument holds it and 0 alone: it hides a
# key (e^-50 = 2e-22), and is half of what Swin uses.
_MILDEST = -50.0

# Of a forward: by place, by name.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


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
    `MASKED` where the sample has nothing to mask, and other inputs may have.
    """
    low = logits <= MASKED
    if not bool(low.any()):
        return MASKED
    masked = low.all(dim=1, keepdim=True).expand_as(logits)
    floor = mask_floor(logits[masked])
    if bool((low & ~masked & (logits <= floor)).any()):
        raise ArchitectureError(
            f"{name} has logits down to {logits[low & ~masked].min().item():.3g}, as low as its "
            f"masking (above {2 * floor:.3g}), so the two can't be told apart"
        )
    return floor


def soft_mask(arguments: Arguments) -> int | str | None:
    """The argument that is a mask of 0 and one number that hides at T = 1 and not at T = 1000.

    Swin's shifted windows hide by -100, which a learned bias is far from, and which exp brings
    under the rounding of float32; divided by 10, it shows.
    """
    args, kwargs = arguments
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, item in places:
        if not isinstance(item, Tensor) or not item.is_floating_point() or not item.numel():
            continue
        lowest, highest = (float(end) for end in item.aminmax())
        mild = MASKED < lowest <= _MILDEST and highest == 0
        if mild and bool(((item == lowest) | (item == 0)).all()):
            return place
    return None


def masking_value(logits: Tensor) -> float | None:
    """What all masked logits are, if it is -inf or the dtype's minimum; else None."""
    values = logits[logits <= MASKED].unique().tolist()
    lowest = (-torch.inf, torch.finfo(logits.dtype).min)
    return values[0] if len(values) == 1 and values[0] in lowest else None
