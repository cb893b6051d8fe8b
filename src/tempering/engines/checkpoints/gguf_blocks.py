"""Fold betas into GGUF tensors: through the scales of their blocks, or in a wider type.

A quantised block is codes times float16 scales, so beta times a row is the same codes with
beta times the scales: no code is requantised, and the loss is the rounding of the scales.
Where that loses more than `limit` (scales that float16 can't hold), the tensor is widened.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempering.attention.baking.comparison import rounding
from tempering.attention.baking.folds import PLAIN, Fold

# Where the float16 scales of a block lie, in bytes from its start (negative: from its end);
# from ggml-common.h of llama.cpp. Every use is checked by dequantising.
_SCALES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (-4, -2),
    "Q3_K": (-2,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (-2,),
    "TQ1_0": (-2,),
    "TQ2_0": (-2,),
    "IQ1_S": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
_PLAIN = ("F64", "F32", "F16", "BF16")

Parts = list[tuple[Fold, Tensor]]


def values_of(data: np.ndarray, kind: Any) -> Tensor:
    """The numbers in a GGUF tensor's data, float32."""
    from gguf.quants import dequantize

    return torch.from_numpy(np.array(dequantize(data, kind), dtype=np.float32))


def fold_tensor(data: np.ndarray, kind: Any, parts: Parts, limit: float) -> tuple[np.ndarray, Any]:
    """The data and the type of a GGUF tensor with folds in it.

    Parameters
    ----------
    data: as a GGUFReader gives it. kind: its GGMLQuantizationType.
    parts: folds with their betas per head.
    limit: share of a head's weights that may be lost before the tensor is widened.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    exact = values_of(data, kind)
    for fold, beta in parts:
        fold.apply_(exact, beta)
    candidates: list[tuple[np.ndarray, Any]] = []
    if kind.name in _SCALES:
        if all(fold.axis == 0 and fold.form == PLAIN for fold, _ in parts):
            candidates.append((_scaled_blocks(data, kind, parts), kind))
    elif kind.name in _PLAIN:
        candidates.append((quantize(exact.numpy(), kind), kind))
    for data_, kind_ in candidates:
        if _lost(exact, data_, kind_, parts) <= limit:
            return data_, kind_
    for wider in (GGMLQuantizationType.F16, GGMLQuantizationType.F32):
        with np.errstate(over="ignore"):
            wide = quantize(exact.numpy(), wider)
        if _lost(exact, wide, wider, parts) <= limit:
            break
    return wide, wider


def _lost(exact: Tensor, data: np.ndarray, kind: Any, parts: Parts) -> float:
    with np.errstate(over="ignore", invalid="ignore"):  # scales that became infinite
        stored = values_of(data, kind)
    if not bool(stored.isfinite().all()):
        return float("inf")
    return max(rounding(fold, exact, stored) for fold, _ in parts)


def _scaled_blocks(data: np.ndarray, kind: Any, parts: Parts) -> np.ndarray:
    from gguf import GGML_QUANT_SIZES

    size = GGML_QUANT_SIZES[kind][1]
    blocks = np.array(data).reshape(data.shape[0], -1, size)
    for fold, beta in parts:
        for start, stop, head in fold.runs:
            for offset in _SCALES[kind.name]:
                place = offset % size
                scales = blocks[start:stop, :, place : place + 2].copy().view(np.float16)
                with np.errstate(over="ignore"):
                    scaled = (scales.astype(np.float32) * np.float32(beta[head])).astype(np.float16)
                blocks[start:stop, :, place : place + 2] = scaled.view(np.uint8)
    return blocks.reshape(data.shape)
