"""A short name for exactly this architecture with these weights."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from tempering.attention.examining.layout_of import examined
from tempering.attention.examining.stored import hooks, packed, parts_of
from tempering.attention.examining.structure import ObjectRef, Structure, object_ref, same, walk
from tempering.attention.examining.subject import check_subject, unwrapped
from tempering.attention.layout import Layout
from tempering.ranks import here

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
Walked = tuple[Structure, list[torch.Tensor]]
_SAMPLES = 64
_PRIME = 2_654_435_761
# Numbers below the smallest normal float16 lose bits in it, so they all count as 0.
_FLOOR = 2.0**-14


class _Known(NamedTuple):
    """The last fingerprint of a model, and what it was made from.

    tree: the names of its parameters, as `Structure.marks` holds them. stated: its configurations.
    marks: what changes when a parameter is replaced, moved, or written to in place.
    """

    tree: tuple[Any, ...]
    stated: tuple[str, ...]
    name: str
    marks: _Marks | None


class _Marks(NamedTuple):
    objects: list[ObjectRef]
    addresses: list[int]
    versions: list[int]
    watched: list[bytes]

    def alike(self, other: _Marks) -> bool:
        return self[1:] == other[1:] and same(self.objects, other.objects)


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
# So many parameters, spread over the model, tell of a change that leaves no mark.
_WATCHED = 64
_PLAIN = {nn.Parameter, torch.Tensor}


def quick_fingerprint(model: nn.Module, walked: Walked) -> str:
    """`fingerprint`, without a look at all the weights where they show no change.

    A parameter that was replaced, moved, or changed in place has another object, address or
    version counter. A write through `.data` leaves all three: it is noticed where it changes one
    of the sampled values of 64 parameters, spread over the model.
    """
    structure, parameters = walked
    known = _KNOWN.get(model)
    # The fields that are hashed are among those that the configurations state.
    if known is not None and known[:2] == (structure.marks, structure.stated):
        now = _marks(model, parameters)
        if now is not None and known.marks is not None and now.alike(known.marks):
            return known.name
    return _hashed(model, walked)


def _marks(model: nn.Module, parameters: Sequence[torch.Tensor]) -> _Marks | None:
    """What tells of a change of parameters; None where nothing does."""
    values = list(parameters)
    if not set(map(type, values)) <= _PLAIN:
        values = [part for value in parameters for part in packed(value)]
    here = [value for value in values if not value.is_meta]
    objects: list[ObjectRef] = list(map(weakref.ref, here))
    if len(here) < len(values):  # put onto the meta device anew after every forward
        offload = (hook for module in model.modules() for hook in hooks(module))
        objects += map(object_ref, offload)
    try:
        versions = [value._version for value in here]
    except RuntimeError:  # made in inference mode, which keeps no versions
        return None
    watched, _ = _gathered([here[index] for index in _spread(len(here))])
    addresses = [value.data_ptr() for value in here]
    return _Marks(objects, addresses, versions, watched)


@functools.lru_cache(maxsize=64)
def _spread(count: int) -> list[int]:
    # Drawn: at an even stride, the same parameter of every layer could be watched and no other.
    return sorted(random.Random(0).sample(range(count), min(_WATCHED, count)))


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that name a model: SHA-256 of its architecture and sampled weights.

    Hashed are the configuration's architecture fields, every parameter's name and shape, and 64
    values of every parameter, at fixed places, rounded to bfloat16.

    The same model loaded twice, on any device, has the same fingerprint; a fine-tuned copy has
    another unless the change misses every sampled place or stays below bfloat16's resolution
    (2^-8 relative) at all of them. float32 and bfloat16 copies agree; a float16 copy agrees when
    the weights were published in bfloat16, as most are, and not for the embedded model, whose
    weights need float32. Buffers, mode (train or eval) and temperature do not enter.

    Of a quantised weight its packed values and scales are hashed, so that the model has another
    name than it had before. Weights that accelerate keeps on disk are read from there once. All
    others are hashed at every call. Profiles, records and `tempered` hash them again only where
    they show a change (`quick_fingerprint`); this function does it on demand, for all of them.

    Raises ModelError when a parameter has no values (the meta device), ArchitectureError for what
    is no torch module.
    """
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        check_subject(model)
    return _hashed(model, walk(model))


def _hashed(model: nn.Module, walked: Walked) -> str:
    structure, parameters = walked
    names = [name for name, _ in model.named_parameters()]
    pieces = [
        part for item in zip(names, parameters, strict=True) for part in parts_of(model, *item)
    ]
    _, pick = _gathered([value for _, value in pieces])
    samples = {
        name: _shape(value) + sample for (name, value), sample in zip(pieces, pick(), strict=True)
    }
    for name, source in _tied_elsewhere(model, pieces).items():
        if samples.get(name) == samples.get(source):
            del samples[name]
    name = _digest(_fields(getattr(model, "config", None)), samples)
    _KNOWN[model] = _Known(structure.marks, structure.stated, name, _marks(model, parameters))
    return name


def _tied_elsewhere(model: nn.Module, pieces: Sequence[tuple[str, Any]]) -> dict[str, str]:
    """Tied weights that accelerate keeps elsewhere: one tensor there, two parameters here."""
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    names = {name for name, _ in pieces}
    return {
        name: source
        for name, source in tied.items()
        if {name, source} <= names and model.get_parameter(name).is_meta
    }


def fingerprint_of(config: Any, samples: Mapping[str, bytes]) -> str:
    """The fingerprint from a configuration and `sampled(tensor)` of every parameter by name."""
    return _digest(_fields(config), samples)


def _digest(fields: str, samples: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256(fields.encode())
    for name, sample in sorted(samples.items()):
        digest.update(name.encode() + sample)
    return digest.hexdigest()[:16]


def _fields(config: Any) -> str:
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    fields = {name: _field(config, name) for name in _FIELDS}
    return json.dumps(fields, sort_keys=True, default=str)


def _field(config: Any, name: str) -> Any:
    """A field; its values in all layers where layers have configurations of their own."""
    if getattr(config, "is_heterogeneous", False):
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    return getattr(config, name, None)


def sampled(weights: torch.Tensor) -> bytes:
    """What a fingerprint holds of one parameter: its shape, and a few of its values."""
    return _shape(weights) + _rounded(_take(weights.detach())).tobytes()


def _shape(weights: torch.Tensor) -> bytes:
    return str(tuple(weights.shape)).encode()


def _gathered(
    tensors: Sequence[torch.Tensor],
) -> tuple[list[bytes], Callable[[], list[bytes]]]:
    """The sampled values of all tensors as they are stored, and a function that rounds them.

    One copy from each device: a wait for it at every parameter would take longer than the rest.
    """
    groups: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.dtype, tensor.device), []).append(index)
    with torch.no_grad():
        taken = {
            key: torch.cat([_take(tensors[index]) for index in group]).cpu()
            for key, group in groups.items()
        }

    def pick() -> list[bytes]:
        found = [b""] * len(tensors)
        for key, group in groups.items():
            rounded, start = _rounded(taken[key]), 0
            for index in group:
                end = start + min(_SAMPLES, tensors[index].numel())
                found[index] = rounded[start:end].tobytes()
                start = end
        return found

    return [item.view(torch.uint8).numpy().tobytes() for item in taken.values()], pick


def _take(weights: torch.Tensor) -> torch.Tensor:
    """Up to 64 values spread over the tensor without a common stride."""
    if weights.numel() == 0:
        return weights.reshape(-1)
    if weights.dtype.itemsize == 1 and weights.is_floating_point():
        weights = weights.view(torch.uint8)  # float8 is stored and not computed with
    return weights.take(_places(weights.numel(), weights.device))


@functools.lru_cache(maxsize=1024)
def _places(size: int, device: torch.device) -> torch.Tensor:
    # Multiples of a prime modulo the size: no two samples share a column by design of the
    # layout, as they would with an even stride.
    places = [i * _PRIME % size for i in range(min(_SAMPLES, size))]
    with torch.inference_mode(False):
        return torch.tensor(places, device=device)


def _rounded(values: torch.Tensor) -> Any:
    """bfloat16's bits, in an array."""
    values = values.float().cpu()
    return values.masked_fill(values.abs() < _FLOOR, 0.0).bfloat16().view(torch.int16).numpy()


def agree_on_model(model: nn.Module) -> None:
    """RankError where the ranks of a run have other models: other architectures or weights.

    Every weight counts here, and so does its dtype: a checksum of all bits of every parameter goes
    with the fingerprint, which samples them. In one process nothing is computed.
    """
    if here().size > 1:
        model = unwrapped(model)
        own = {"model (fingerprint)": fingerprint(model), "weights (checksum)": _checksum(model)}
        here().agree(own)


# Integers of the size of a number, by the bytes of a number.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _checksum(model: nn.Module) -> str:
    """Hexadecimal digits that change with any bit of any parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        for part, value in parts_of(model, name, parameter):
            bits = value.detach().contiguous().view(_BITS[value.element_size()])
            total = int(bits.sum(dtype=torch.int64))
            digest.update(f"{part} {value.dtype} {tuple(value.shape)} {total}\n".encode())
    return digest.hexdigest()[:16]


def describe_model(
    model: nn.Module, model_layout: Layout | None = None, walked: Walked | None = None
) -> dict[str, Any]:
    """Architecture, shape and fingerprint: what ties a profile or a record to its model.

    model_layout, walked: its layout, and what `walk` gave, where they are known already.
    """
    model = unwrapped(model)
    if model_layout is None:
        walked = walk(model)
        model_layout = examined(model, None, walked[0]).layout
    config: Any = model.config
    return {
        "name": str(getattr(config, "_name_or_path", "") or "").rstrip("/").rsplit("/", 1)[-1],
        "architecture": type(model).__name__,
        "shape": model_layout.describe(),
        "fingerprint": quick_fingerprint(model, walked or walk(model)),
    }
