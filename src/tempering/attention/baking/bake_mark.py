"""What a baked model carries about itself: its profile, and how to take it out again.

`config.json` holds it under the name `tempering`; a GGUF file as JSON under `tempering.bake`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from tempering.attention.baking.folds import Fold
from tempering.attention.profiles.profile import Profile
from tempering.errors import BakeError

VERSION = 1


def make_mark(profile: Profile, folds: Mapping[str, list[tuple[Fold, Tensor]]]) -> dict[str, Any]:
    """The mark of a model whose tensors had `folds[tensor name] = [(fold, beta), ...]`."""
    return {
        "version": VERSION,
        "tempering": metadata.version("tempering"),
        "profile": profile.to_json(),
        "tensors": {
            name: [{**fold.to_json(), "beta": beta.tolist()} for fold, beta in parts]
            for name, parts in folds.items()
        },
    }


def read_mark(mark: Any, where: str) -> tuple[Profile, dict[str, list[tuple[Fold, Tensor]]]]:
    """The profile and the folds of a mark; BakeError when it can't be read."""
    if not isinstance(mark, Mapping) or mark.get("version") != VERSION:
        raise BakeError(
            f"{where} carries no mark of a bake that this tempering reads (version {VERSION}); "
            "only a baked model can be undone"
        )
    try:
        profile = Profile.from_json(mark["profile"], where)
        folds = {
            str(name): [
                (Fold.from_json(str(name), part), torch.tensor(part["beta"], dtype=torch.float64))
                for part in parts
            ]
            for name, parts in mark["tensors"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BakeError(f"the mark of {where} is damaged: {error}") from error
    return profile, folds
