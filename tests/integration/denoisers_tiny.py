"""Tiny random models of diffusers, with inputs, and their attention in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.integration import denoisers_images, denoisers_unets, denoisers_videos
from tests.integration.denoisers_inputs import MAKERS, TEXT, TEXT_WIDTH, draw, image, padding, text
from tests.integration.denoisers_oracle import attention_divided, random_rows

__all__ = [
    "MAKERS",
    "REFUSED",
    "SINGLE",
    "TEXT",
    "TEXT_WIDTH",
    "attention_divided",
    "denoisers_images",
    "denoisers_unets",
    "denoisers_videos",
    "draw",
    "image",
    "make",
    "output",
    "padding",
    "random_rows",
    "text",
    "to",
]

# Pooled text attends inside a function of PyTorch's, out of reach.
REFUSED = {"hunyuan_dit": "time_extra_emb.pooler"}
# Models that compute parts in single precision, whatever their weights are in.
SINGLE = {"kandinsky5"}


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    """(model, sample): a model whose weights are drawn wide, so that T matters in every layer."""
    import diffusers

    kind, config, inputs = MAKERS[name]()
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.ndim > 1:  # norms start as they should, and gates at zero
                value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
            elif "norm" not in key:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
            if any(part in key for part in ("to_q", "to_k", "add_q", "add_k", "qkv")):
                value.mul_(2)
    return model.to(dtype), to(inputs, dtype)


def to(item: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of nested inputs in another dtype."""
    if isinstance(item, Tensor):
        return item.to(dtype) if item.is_floating_point() else item
    if isinstance(item, dict):
        return {name: to(value, dtype) for name, value in item.items()}
    if isinstance(item, list | tuple):
        return type(item)(to(value, dtype) for value in item)
    return item


def output(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The first tensor that a model gives."""
    with torch.no_grad():
        given = model(**inputs, return_dict=False)[0]
    return given[0] if isinstance(given, list | tuple) else given
