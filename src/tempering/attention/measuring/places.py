"""Where the tokens of a layer stand: in a row, or as patches of an image in rows and columns.

    text      token i at i                     distances in tokens
    sound     frame i at i                     in frames
    images    patch in row i, column j         in patches, along the straight line

Class and register tokens stand before the patches and have no place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.attention.layout import AttentionLayer

_UNITS = {"vision": "patches", "image": "patches", "audio": "frames", "speech": "frames"}
_OF_MAIN_INPUT = {
    "pixel_values": "patches",
    "input_features": "frames",
    "input_values": "frames",
}
# Class, distillation and register tokens; more are no prefix but another kind of layer.
_MOST_BEFORE = 16


def unit_of(model: Any, layer: AttentionLayer) -> str:
    """What the tokens of a layer are: "tokens", "patches" or "frames"; of cross, its queries."""
    if layer.tower:
        return _UNITS.get(layer.tower, "tokens")
    if layer.stack != "encoder":
        return "tokens"
    return _OF_MAIN_INPUT.get(str(getattr(model, "main_input_name", "")), "tokens")


def patch_places(
    module: Any, arguments: Mapping[str, Tensor], tokens: int
) -> Float[Tensor, "tokens 2"] | None:
    """Row and column of each patch, NaN for the tokens before them.

    module: the attention module, by whose configuration an image is cut into patches.
    None where the tokens are not the patches of one image (merged, in windows, packed, of a film).
    """
    pixels, patch = arguments.get("pixel_values"), _pair(getattr(module, "config", None))
    if pixels is None or pixels.ndim not in (4, 5) or patch is None:
        return None
    rows, columns = pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1]
    before = tokens - rows * columns
    if rows * columns == 0 or not 0 <= before <= _MOST_BEFORE:
        return None
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double().view(-1, 2)
    return torch.cat([torch.full((before, 2), torch.nan, dtype=torch.float64), grid])


def _pair(config: Any) -> tuple[int, int] | None:
    """Height and width of a patch; None where the configuration states none, or a film's."""
    size = getattr(config, "patch_size", None)
    if getattr(config, "tubelet_size", None) is not None:
        return None
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None
