"""Whether a profile was made for the model that vLLM serves: architecture, shape, fingerprint.

vLLM packs and splits its weights, so the fingerprint is taken from the checkpoint's files: the
same names, shapes and sampled values that the transformers engine hashes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempering.attention.profiles.fingerprint import fingerprint_of, sampled
from tempering.attention.profiles.profile import Profile
from tempering.errors import ProfileError


def check_identity(profile: Profile, model_config: Any) -> str | None:
    """ProfileError unless the profile is for this model, as far as can be known.

    Parameters
    ----------
    profile: one that names no model is not checked.
    model_config: vLLM's `ModelConfig`.

    Returns
    -------
    None when all was compared; else the reason why only architecture and shape were.
    """
    if profile.model is None:
        return None
    made_for = str(profile.model.get("architecture"))
    served = list(getattr(model_config.hf_config, "architectures", None) or ["unknown"])
    if made_for not in served:
        raise ProfileError(
            f"the profile was made for {made_for} ({profile.model.get('shape')}), "
            f"the engine serves {served[0]}"
        )
    directory = checkpoint_directory(model_config.model, model_config.revision)
    if directory is None:
        return f"no safetensors files of {model_config.model} are at hand"
    served_fingerprint = checkpoint_fingerprint(directory, made_for)
    if served_fingerprint is None:
        return "the checkpoint's tensors are not named or shaped as transformers' (quantized?)"
    if served_fingerprint != profile.model.get("fingerprint"):
        raise ProfileError(
            f"the profile was made for {made_for} with the fingerprint "
            f"{profile.model.get('fingerprint')}, the engine serves weights with "
            f"{served_fingerprint}; if it is meant for these too, rebind it in transformers: "
            "profile.adopt(model).save(...)"
        )
    return None


def checkpoint_directory(model: str, revision: str | None = None) -> Path | None:
    """The directory of a model's safetensors files, local or in the hub's cache."""
    directory = Path(model)
    if not directory.is_dir():
        from huggingface_hub import try_to_load_from_cache

        for name in ("model.safetensors.index.json", "model.safetensors"):
            try:
                cached = try_to_load_from_cache(model, name, revision=revision)
            except ValueError:  # no hub id: a bucket, say
                return None
            if isinstance(cached, str):
                return Path(cached).parent
        return None
    return directory if any(directory.glob("*.safetensors")) else None


def checkpoint_fingerprint(directory: Path, architecture: str) -> str | None:
    """The fingerprint of the model in a checkpoint; None where its tensors have other names."""
    import transformers

    kind = getattr(transformers, architecture, None)
    if kind is None:  # too new for this transformers, which can't read its configuration
        return None
    config = transformers.AutoConfig.from_pretrained(directory)
    if not isinstance(config, kind.config_class):
        return None
    with torch.device("meta"):
        empty = kind(config)
    shapes = {name: parameter.shape for name, parameter in empty.named_parameters()}
    files = _files(directory)
    stored_names: dict[str, str] = {}
    for name in shapes:
        stored = next((other for other in _other_names(name, empty) if other in files), None)
        if stored is None:
            return None
        stored_names[name] = stored
    samples: dict[str, bytes] = {}
    for name, value in _values(directory, files, stored_names):
        if value.shape != shapes[name]:
            return None
        samples[name] = sampled(value)
    return fingerprint_of(config, samples)


def _other_names(name: str, model: Any) -> Iterator[str]:
    """Names under which a checkpoint may hold a parameter: with or without the base's prefix."""
    yield name
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if len(prefix) > 1:
        yield name.removeprefix(prefix)
        yield prefix + name


def _files(directory: Path) -> dict[str, str]:
    """Tensor name -> name of the file that holds it."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return dict(json.loads(index.read_text())["weight_map"])
    from safetensors import safe_open

    file_of = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            file_of.update(dict.fromkeys(tensors.keys(), path.name))
    return file_of


def _values(
    directory: Path, files: dict[str, str], stored_names: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """(name, value) one after another: a large checkpoint is never whole in memory."""
    from safetensors import safe_open

    for file in sorted({files[stored] for stored in stored_names.values()}):
        with safe_open(directory / file, framework="pt") as tensors:
            for name, stored in stored_names.items():
                if files[stored] == file:
                    yield name, tensors.get_tensor(stored)
