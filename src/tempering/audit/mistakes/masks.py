"""Mistakes in which keys a query sees: the window of sliding layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tempering.audit.mistakes.base import (
    MistakeCase,
    attention_modules,
    attributes,
    mistake,
    text_config,
    together,
)

_NONE = 2**30


@mistake
def window(model: Any) -> Iterator[MistakeCase]:
    """A window that is missing, or one token too wide or too narrow."""
    config = text_config(model)
    own = getattr(config, "sliding_window", None)
    modules = [m for m in attention_modules(model) if getattr(m, "sliding_window", None)]
    kinds = getattr(config, "layer_types", None)
    # Without kinds of layers (Mistral) all of them have the window, and masks alone read it.
    if not own or (not modules and kinds and "sliding_attention" not in kinds):
        return
    for what, size in (
        ("were missing", _NONE),
        (f"were {own + 1} in place of {own}", own + 1),
        (f"were {own - 1} in place of {own}", own - 1),
    ):
        if size < 1:
            continue
        change = together(
            attributes([config], sliding_window=size), attributes(modules, sliding_window=size)
        )
        yield MistakeCase(f"the window of its sliding layers {what}", change, least=own + 2)
