"""What is examined: the transformers model that was given, or the sentence that refuses it."""

from __future__ import annotations

from typing import Any

from torch import nn

from tempering.errors import ArchitectureError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile(model)`, which shares its modules; else the model."""
    return getattr(model, "_orig_mod", model)


def check_subject(model: Any) -> None:
    if not hasattr(model, "config"):
        raise ArchitectureError(
            f"{type(model).__name__} has no transformers configuration; give a transformers "
            "model, not a wrapper around one"
        )
