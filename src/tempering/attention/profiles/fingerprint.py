"""A short name for exactly this architecture with these weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tempering.attention.examining.layout_of import layout, unwrapped
from tempering.errors import ModelError

# Fields that decide what the weights compute. A fixed list, so that a new default in a later
# transformers release doesn't rename every model.
_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "alibi",
    "attention_multiplier",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "scale_attn_by_inverse_layer_idx",
)
_SAMPLES = 64
# Numbers below the smallest normal float16 lose bits in it, so they all count as 0.
_FLOOR = 2.0**-14


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that name a model: SHA-256 of its architecture and sampled weights.

    Hashed are the configuration's architecture fields, every parameter's name and shape, and 64
    values of every parameter, at fixed places, rounded to bfloat16.

    The same model loaded twice, on any device, has the same fingerprint; a fine-tuned copy has
    another unless the change misses every sampled place or stays below bfloat16's resolution
    (2^-8 relative) at all of them. float32 and bfloat16 copies agree; a float16 copy agrees when
    the weights were published in bfloat16, as most are, and not for the embedded model, whose
    weights need float32. Buffers, mode (train or eval) and temperature do not enter.

    Raises ModelError when a parameter has no data (the meta device).
    """
    samples: dict[str, bytes] = {}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta:
            raise ModelError(
                f"can't fingerprint the model: {name} is on the meta device and has no data; "
                "load the weights first"
            )
        samples[name] = sampled(parameter.detach())
    return fingerprint_of(getattr(model, "config", None), samples)


def fingerprint_of(config: Any, samples: Mapping[str, bytes]) -> str:
    """The fingerprint from a configuration and `sampled(tensor)` of every parameter by name."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    fields = {name: _field(config, name) for name in _FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, sample in sorted(samples.items()):
        digest.update(name.encode() + sample)
    return digest.hexdigest()[:16]


def _field(config: Any, name: str) -> Any:
    """A field; its values in all layers where layers have configurations of their own."""
    if getattr(config, "is_heterogeneous", False):
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    return getattr(config, name, None)


def sampled(weights: torch.Tensor) -> bytes:
    """What a fingerprint holds of one parameter: its shape, and a few of its values."""
    return str(tuple(weights.shape)).encode() + _sample(weights)


def _sample(weights: torch.Tensor) -> bytes:
    """Up to 64 values spread over the tensor without a common stride, as bfloat16's bytes."""
    size = weights.numel()
    if size == 0:
        return b""
    # Multiples of a large prime modulo the size: no two samples share a column by design of the
    # layout, as they would with an even stride.
    places = [i * 2_654_435_761 % size for i in range(min(_SAMPLES, size))]
    index = torch.tensor(places, device=weights.device)
    values = weights.reshape(-1)[index].float().cpu()
    values[values.abs() < _FLOOR] = 0.0
    return values.bfloat16().view(torch.int16).numpy().tobytes()


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Architecture, shape and fingerprint: what ties a profile or a record to its model."""
    model = unwrapped(model)
    plan = layout(model)
    config: Any = model.config
    return {
        "name": str(getattr(config, "_name_or_path", "") or "").rstrip("/").rsplit("/", 1)[-1],
        "architecture": type(model).__name__,
        "shape": plan.describe(),
        "fingerprint": fingerprint(model),
    }
