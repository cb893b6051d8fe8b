"""Logits and masks divided by T: what both routes multiply by beta, and what they leave alone.

Masking entries stay as they are, and no product overflows float16 where the logit over T fits.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def shift_of(largest: float) -> int:
    """The least power of two, from 1, that the largest beta doesn't exceed."""
    return 2 ** math.ceil(math.log2(max(1.0, largest)))


def query_over_t(query: Tensor, beta: Tensor, shift: int) -> tuple[Tensor, int]:
    """query * beta / s, and the factor s >= 1 by which the scaling of the products grows in turn.

    In float16, a query times beta may overflow where the logit over T fits, and so may its product
    with a key before that is scaled. Since beta / s is at most 1, neither grows. Other dtypes have
    room enough: s = 1.
    """
    if query.dtype != torch.float16 or shift == 1:
        product = query * beta
        return product if product.dtype == query.dtype else product.to(query.dtype), 1
    return (query * (beta / shift)).to(query.dtype), shift


def adds_too_much(query: Tensor, mask: Any, shift: int, floor: float) -> bool:
    """Whether the parts of a logit may overflow float16 when divided by T, though their sum fits.

    This takes a mask with biases in it. The call is then made in float32.
    """
    if query.dtype != torch.float16 or shift == 1:
        return False
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        return False
    floor = max(floor, torch.finfo(mask.dtype).min / 2)
    return torch.compiler.is_compiling() or _has_bias(mask, floor)


def in_float(item: Any) -> Any:
    """A float16 tensor in float32, its masking entries float32's lowest; else the item itself."""
    if not isinstance(item, Tensor) or item.dtype != torch.float16:
        return item
    masked = item <= torch.finfo(torch.float16).min / 2
    return item.float().masked_fill(masked, torch.finfo(torch.float32).min)


# id of a mask -> (the mask, its version, whether it has a bias). All layers of a forward share a
# mask or two; the limit only bounds the memory.
_MASKS: dict[int, tuple[weakref.ref[Tensor], int, bool]] = {}
_MOST_MASKS = 64


def _has_bias(mask: Tensor, floor: float) -> bool:
    """Whether an additive mask holds a finite entry other than 0; remembered per tensor."""
    has_version = not mask.is_inference()
    known = _MASKS.get(id(mask)) if has_version else None
    if known is not None and known[0]() is mask and known[1] == mask._version:
        return known[2]
    answer = bool(((mask > floor) & (mask != 0)).any())
    if not has_version:
        return answer
    if len(_MASKS) > _MOST_MASKS:
        _MASKS.clear()
    _MASKS[id(mask)] = (weakref.ref(mask), mask._version, answer)
    return answer


def scaled(logits: Tensor, beta: Tensor, floor: float) -> Tensor:
    """`logits * beta` where they are above `floor`; masking (at or below it) stays masking."""
    live = logits > floor
    # -inf * beta has a gradient of NaN in beta, and `where` below would not stop it.
    product = (torch.where(live, logits, 0.0) if beta.requires_grad else logits) * beta
    return torch.where(live, product.to(logits.dtype), _masking(logits, beta, floor))


def _masking(logits: Tensor, beta: Tensor, floor: float) -> Tensor:
    """Masking as it is; a mild constant (-1e4) times beta > 1, to stay below live logits over T.

    A live -20 over T = 1e-3 is -2e4.
    """
    lowest = torch.finfo(logits.dtype).min
    if not _is_mild(floor, logits):
        return logits
    colder = (logits * beta.detach().clamp(min=1.0)).to(logits.dtype).clamp(min=lowest)
    return torch.where(logits > lowest / 2, colder, logits)


def _is_mild(floor: float, logits: Tensor) -> bool:
    """Whether what masks may be another number than -inf or the dtype's minimum."""
    return floor > torch.finfo(logits.dtype).min / 2


# Far below every logit times the largest beta, and far above the lowest number over the largest T.
_BETWEEN = -1e30


def divided(logits: Tensor, beta: Tensor, floor: float, masking: float | None) -> Tensor:
    """`scaled`, in fewer passes where all masked logits are known to be `masking`."""
    if masking == -torch.inf and not beta.requires_grad:
        return (logits * beta).to(logits.dtype)
    if masking == torch.finfo(logits.dtype).min < _BETWEEN:
        return F.threshold((logits * beta).to(logits.dtype), _BETWEEN, masking)
    return scaled(logits, beta, floor)


def scaled_mask(mask: Any, beta: Tensor, floor: float) -> Any:
    """An additive mask times beta; what masks stays masking, and boolean masks as they are."""
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        return mask
    floor = max(floor, torch.finfo(mask.dtype).min / 2)
    plain = not torch.compiler.is_compiling() and not _has_bias(mask, floor)
    if plain and not _is_mild(floor, mask):
        return mask
    return scaled(mask, beta, floor)
