"""Towers: the parts of a model that have a configuration of their own, such as its vision tower."""

from __future__ import annotations

from typing import Any

# Of an encoder-decoder that is made of two models; its stacks tell these apart already.
_STACKS = ("encoder", "decoder")


def tower_of(model: Any, name: str) -> str:
    """The tower that a module belongs to: "vision" for one under `vision_config`, or "".

    A module belongs to the innermost part around it that runs by one of the model's own
    sub-configurations.
    """
    config = model.config
    towers = {
        key.removesuffix("_config"): getattr(config, key, None)
        for key in getattr(config, "sub_configs", {})
    }
    found = ""
    module = model
    for part in name.split("."):
        module = getattr(module, part)
        own = getattr(module, "config", None)
        if own is None or own is config:
            continue
        match = [key for key, item in towers.items() if item is own]
        # Some models copy the configurations of their parts.
        match = match or [key for key, item in towers.items() if type(item) is type(own)]
        if len(match) == 1 and match[0] not in _STACKS:
            found = match[0]
    return found
