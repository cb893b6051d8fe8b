"""Say what folds into a model, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tempering.attention.baking.bake import foldable
from tempering.attention.baking.foldable import NO, Foldable
from tempering.attention.baking.profile_folds import betas
from tempering.attention.baking.widened import widened
from tempering.attention.profiles.profile import Profile
from tempering.engines.checkpoints.bake import open_checkpoint
from tempering.engines.loading.gguf_files import load_gguf
from tempering.engines.loading.hub import load_model
from tempering.errors import BakeError


def check_model(name: str | Path, profile: Profile | None = None) -> Foldable:
    """What folds into the weights of a model: per head, per layer, or no; see `foldable`.

    Parameters
    ----------
    name: a known model, a directory, a hub id, or a GGUF file.
    profile: one that should fold; BakeError that names the layer when it doesn't.
    """
    model: Any
    if str(name).endswith(".gguf"):
        model, _ = load_gguf(Path(name).expanduser())
    else:
        checkpoint = open_checkpoint(name)
        if checkpoint.config.get("quantization_config"):
            method = checkpoint.config["quantization_config"].get("quant_method", "unknown method")
            reason = f"its weights are quantised ({method})"
            if profile is not None:
                raise BakeError(f"{name}: {reason}")
            return Foldable(NO, reason)
        model, _ = load_model(name, dtype=checkpoint.main_dtype)
    with widened(model):
        found = foldable(model)
        if profile is not None:
            profile.check_model(model)
            betas(found, model, profile)
    return found
