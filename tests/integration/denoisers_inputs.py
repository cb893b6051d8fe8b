"""Inputs of two rows for tiny models of diffusers, and the table of the models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HEADS, WIDTH = 2, 8
TEXT, TEXT_WIDTH = 5, 12
ROWS, SIDE, FRAMES = 2, 4, 3

Maker = Callable[[], tuple[str, dict[str, Any], dict[str, Any]]]
MAKERS: dict[str, Maker] = {}


def maker(function: Maker) -> Maker:
    MAKERS[function.__name__] = function
    return function


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def image(channels: int = 4, side: int = SIDE) -> Tensor:
    return draw(ROWS, channels, side, side)


def video(channels: int = 4, side: int = SIDE) -> Tensor:
    return draw(ROWS, channels, FRAMES, side, side)


def text(width: int = TEXT_WIDTH) -> Tensor:
    return draw(ROWS, TEXT, width)


def times() -> Tensor:
    return torch.tensor([3, 7])


def padding() -> Tensor:
    """A mask of text, 1 for what is real, whose second row is shorter."""
    mask = torch.ones(ROWS, TEXT, dtype=torch.long)
    mask[1, 3:] = 0
    return mask


SHAPE = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH}
