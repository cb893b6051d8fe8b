"""A small batch of random images or sound, for models that read these and no tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tempering.attention.examining.stored import input_device
from tempering.errors import ArchitectureError

# Sides of a small image in patches, and frames or samples of sound: quick, and more than one.
_PATCHES, _FRAMES, _SAMPLES, _TARGETS = 4, 64, 4000, 7
Run = Callable[[Any, dict[str, Any]], Any]
_UNKNOWN = "give a sample of its inputs: layout(model, sample={...})"


def media_sample(model: Any, rows: int, run: Run) -> dict[str, Tensor]:
    """Rows that are alike, by the shape that the configuration states.

    run: a forward pass.
    Raises ArchitectureError where it states none; then the caller gives a sample.
    """
    main = model.main_input_name
    if main == "pixel_values":
        inputs = {main: images_sample(model, rows, run)}
    elif main == "input_features":
        inputs = {main: _features(model, rows)}
    elif main == "input_values":
        inputs = {main: _waves(model, rows)}
    else:
        raise ArchitectureError(f"{type(model).__name__} takes '{main}', not token ids; {_UNKNOWN}")
    if model.config.is_encoder_decoder:
        ids = torch.arange(1, _TARGETS + 1).expand(rows, -1).contiguous()
        inputs["decoder_input_ids"] = ids.to(input_device(model))
    return inputs


def images_sample(model: Any, rows: int, run: Run) -> Tensor:
    """Random images, small ones where the model takes them."""
    configs = _configs(model)
    size = _first(configs, "image_size")
    if size is None:
        raise ArchitectureError(
            f"{type(model).__name__} doesn't say how large an image is; {_UNKNOWN}"
        )
    height, width = (size, size) if isinstance(size, int) else list(size)[-2:]
    channels = int(_first(configs, "num_channels") or 3)
    patch = _first(configs, "patch_size")
    if isinstance(patch, int) and _PATCHES * patch < min(height, width):
        # Models that stretch their positions take a small image, and answer much sooner.
        small = _random(model, (rows, channels, _PATCHES * patch, _PATCHES * patch))
        try:
            run(model, {"pixel_values": small})
        except Exception:  # models refuse a size with what error they please
            pass
        else:
            return small
    return _random(model, (rows, channels, int(height), int(width)))


def _features(model: Any, rows: int) -> Tensor:
    configs = _configs(model)
    positions = _first(configs, "max_source_positions")
    mels = _first(configs, "num_mel_bins")
    if model.config.model_type.startswith("whisper") and positions and mels:
        return _random(model, (rows, int(mels), 2 * int(positions)))  # it takes no other length
    names = ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins", "input_dim")
    width = next((found for name in names if (found := _first(configs, name))), None)
    if width is None:
        raise ArchitectureError(
            f"{type(model).__name__} doesn't say how wide its features are; {_UNKNOWN}"
        )
    return _random(model, (rows, _FRAMES, int(width)))


def _waves(model: Any, rows: int) -> Tensor:
    configs = _configs(model)
    frames, mels = _first(configs, "max_length"), _first(configs, "num_mel_bins")
    spectral = "spectrogram" in model.config.model_type and frames and mels
    return _random(model, (rows, int(frames), int(mels)) if spectral else (rows, _SAMPLES))


def _configs(model: Any) -> list[Any]:
    """The model's configuration, and those of its parts."""
    config = model.config
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *(part for part in parts if part is not None)]


def _first(configs: list[Any], name: str) -> Any:
    found = (getattr(config, name, None) for config in configs)
    return next((value for value in found if value is not None), None)


def _random(model: Any, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, *shape[1:], generator=generator)
    weights = next(item for item in model.parameters() if item.is_floating_point())
    return row.expand(shape).contiguous().to(input_device(model), weights.dtype)
