"""Weights rounded to the nearest of a few levels: the plainest compression, for trials.

    w -> lo + round((w - lo) / s) s,    s = (hi - lo) / (2^bits - 1)

with lo and hi the smallest and largest weight of each group of neighbours in a row (asymmetric,
round to nearest). The result is stored in the dtype that it had.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tempering.errors import InputError

GROUP = 32


def round_weights(model: nn.Module, bits: int, group: int = GROUP) -> int:
    """Round every linear layer but the head, in place; how many weights were rounded.

    Parameters
    ----------
    model: a transformers model.
    bits: 1 to 8 a weight; a group's scale and offset come on top, 32 bits as GGUF stores them.
    group: neighbours in a row that share a scale; a shorter rest has one of its own.
    """
    if not 1 <= bits <= 8:
        raise InputError(f"weights are rounded to 1 to 8 bits, not to {bits}")
    if group < 2:
        raise InputError(f"a group has at least 2 weights, not {group}")
    network: Any = model
    head = network.get_output_embeddings()
    count = 0
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not head:
                module.weight.copy_(rounded(module.weight, bits, group))
                count += module.weight.numel()
    return count


def rounded(weight: torch.Tensor, bits: int, group: int = GROUP) -> torch.Tensor:
    """A matrix with every group of each row rounded by itself; float64 within."""
    parts = []
    for part in weight.double().split(group, dim=-1):
        low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
        step = (high - low) / (2**bits - 1)
        codes = torch.where(step > 0, (part - low) / step, 0.0).round()
        parts.append(low + codes * step)
    return torch.cat(parts, -1).to(weight.dtype)
