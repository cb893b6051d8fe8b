"""How the shape of logits can be read: which axis holds the heads, and which the rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tempering.attention import axes, denoisers

# Under these names, modules and configurations state how many heads they have.
_HEAD_FIELDS = (
    "num_attention_heads",
    "num_heads",
    "n_heads",
    "n_head",
    "num_attn_heads",
    "heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
)

Reading = tuple[str, int]  # a pattern of `axes`, and the number of heads


class ShapeReadings:
    """Readings of shapes, by the numbers of heads that a model and its modules state.

    batch: rows of the sample.
    """

    def __init__(self, model: nn.Module, batch: int) -> None:
        self.model: Any = model
        self.batch = batch
        self.of_diffusers = denoisers.of_diffusers(model)

    def likely(self, module: nn.Module, shape: torch.Size) -> list[Reading]:
        """With the batch's rows and heads that are stated."""
        if self.of_diffusers:
            found = self.certain(module, shape)
            return [item for item in found if axes.rows(item[0], shape, item[1]) == self.batch]
        return axes.candidates(shape, self.batch, self._heads(module))

    def of_any_rows(self, module: nn.Module, shape: torch.Size) -> list[Reading]:
        """With any number of rows: windows, frames or packed inputs."""
        heads = self._heads(module)
        # One head and any number of rows would fit every softmax over three axes.
        return axes.of_any_rows(shape, heads - {1} if len(shape) == 3 else heads)

    def certain(self, module: nn.Module, shape: torch.Size) -> list[Reading]:
        """Of logits that a model of diffusers is sure to attend with."""
        # The model itself would warn where its configuration is read off it.
        counts = _stated(SimpleNamespace(**vars(module)))
        if not counts and len(shape) == 4:  # else nothing tells rows and heads apart
            counts = _stated(self.model.config) or {1}
        return axes.of_any_rows(shape, counts)

    def _heads(self, module: nn.Module) -> set[int]:
        """The numbers of heads that a module states, or else the configuration; one if neither."""
        return _stated(module) or _stated(self.model.config.get_text_config()) or {1}


def _stated(holder: Any) -> set[int]:
    """The numbers of heads that a module or a configuration states."""
    values = {getattr(holder, name, None) for name in _HEAD_FIELDS}
    return {item for item in values if type(item) is int and item > 0}
