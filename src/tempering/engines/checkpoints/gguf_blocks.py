"""Fold betas into GGUF tensors: through the scales of their blocks, or in a wider type.

A quantised block is codes times float16 scales, so beta times a row is the same codes with
beta times the scales: no code is requantised, and the loss is the rounding of the scales.
Where that loses more than `limit` (scales that float16 can't hold), `fold_tensor` stores the tensor
in a wider type, and `fold_in_type` refuses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempering.attention.baking.comparison import rounding
from tempering.attention.baking.folds import PLAIN, Fold
from tempering.errors import BakeError

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
# IQ1_M has its scale in the upper 4 bits of the last four 16-bit words, the lowest bits first.
_SPREAD, _NIBBLE = "IQ1_M", 0xF000
_PLAIN = ("F64", "F32", "F16", "BF16")

Parts = list[tuple[Fold, Tensor]]


def values_of(data: np.ndarray, kind: Any) -> Tensor:
    """The numbers in a GGUF tensor's data, float32."""
    from gguf.quants import dequantize

    return torch.from_numpy(np.array(dequantize(data, kind), dtype=np.float32))


def fold_tensor(
    data: np.ndarray, kind: Any, parts: Parts, limit: float
) -> tuple[np.ndarray, Any, float]:
    """The data and the type of a GGUF tensor with folds in it, and the share that rounding lost.

    Parameters
    ----------
    data: as a GGUFReader gives it. kind: its GGMLQuantizationType.
    parts: folds with their betas per head.
    limit: share of a head's weights that may be lost before the tensor is widened.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    exact = _exact(data, kind, parts)
    if why_not(kind, parts) is None:
        own, lost = _in_type(data, kind, parts, exact)
        if lost <= limit:
            return own, kind, lost
    for wider in (GGMLQuantizationType.F16, GGMLQuantizationType.F32):
        with np.errstate(over="ignore"):
            wide = quantize(exact.numpy(), wider)
        lost = _lost(exact, wide, wider, parts)
        if lost <= limit:
            break
    return wide, wider, lost


def fold_in_type(
    name: str, data: np.ndarray, kind: Any, parts: Parts, limit: float
) -> tuple[np.ndarray, float]:
    """`fold_tensor` in the tensor's own type alone; BakeError, naming it, where that can't be."""
    reason = why_not(kind, parts)
    if reason is not None:
        raise BakeError(
            f"{name} can't be changed in place: {reason}. Bake without --in-place-scales, which "
            f"stores it wider, or quantise it as a type with float16 scales: llama-quantize "
            f"--tensor-type {name.removesuffix('.weight')}=q8_0"
        )
    own, lost = _in_type(data, kind, parts, _exact(data, kind, parts))
    if not lost <= limit:
        raise BakeError(
            f"{name} can't be changed in place: as {kind.name} it can't hold weights times "
            f"{_range(parts)}; {_loses(lost)} (allowed {limit:.2g}). Take "
            "temperatures nearer to 1 for its layer, or bake without --in-place-scales, which "
            "stores it wider"
        )
    return own, lost


def why_not(kind: Any, parts: Parts) -> str | None:
    """Why a tensor can't take folds in its own type, whatever they are; None where it can."""
    if kind.name in _PLAIN:
        return None
    if kind.name not in _SCALES and kind.name != _SPREAD:
        return f"its type, {kind.name}, has no scales in float16"
    if any(fold.axis != 0 for fold, _ in parts):
        return f"its heads lie across the blocks of {kind.name}, which run along its rows"
    if any(fold.form != PLAIN for fold, _ in parts):
        return f"1 is added to its weights, and blocks of {kind.name} have no place for that"
    return None


def _range(parts: Parts) -> str:
    betas = torch.cat([beta[[head for *_, head in fold.runs]] for fold, beta in parts])
    return f"1/T = {float(betas.min()):.3g} to {float(betas.max()):.3g}"


def _loses(lost: float) -> str:
    return f"a head would lose {lost:.2g} of itself" if np.isfinite(lost) else "it overflows"


def _exact(data: np.ndarray, kind: Any, parts: Parts) -> Tensor:
    exact = values_of(data, kind)
    for fold, beta in parts:
        fold.apply_(exact, beta)
    return exact


def _in_type(data: np.ndarray, kind: Any, parts: Parts, exact: Tensor) -> tuple[np.ndarray, float]:
    from gguf.quants import quantize

    if kind.name in _PLAIN:
        with np.errstate(over="ignore"):
            own = quantize(exact.numpy(), kind)
    else:
        own = _scaled_blocks(data, kind, parts)
    return own, _lost(exact, own, kind, parts)


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
            part, factor = blocks[start:stop], np.float32(beta[head])
            if kind.name == _SPREAD:
                _scale_spread(part, factor)
                continue
            for offset in _SCALES[kind.name]:
                place = offset % size
                scales = part[:, :, place : place + 2].copy().view(np.float16)
                part[:, :, place : place + 2] = _times(scales, factor).view(np.uint8)
    return blocks.reshape(data.shape)


def _scale_spread(blocks: np.ndarray, factor: np.float32) -> None:
    words = blocks[:, :, -8:].copy().view(np.uint16)
    shifts = np.array([12, 8, 4, 0], dtype=np.uint16)
    scales = np.bitwise_or.reduce((words & np.uint16(_NIBBLE)) >> shifts, axis=-1, keepdims=True)
    bits = _times(scales.view(np.float16), factor).view(np.uint16)
    words = (words & np.uint16(0x0FFF)) | ((bits << shifts) & np.uint16(_NIBBLE))
    blocks[:, :, -8:] = words.view(np.uint8)


def _times(scales: np.ndarray, factor: np.float32) -> np.ndarray:
    with np.errstate(over="ignore"):
        return (scales.astype(np.float32) * factor).astype(np.float16)
