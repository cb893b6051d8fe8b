"""Mistakes in rotary positions: YaRN's, llama3's and longrope's factors, the base, the pairs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from tempering.audit.mistakes.base import MistakeCase, attributes, mistake

_BASES = (10_000.0, 500_000.0, 1_000_000.0)


def _rotary(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if _frequencies(m)]


def _frequencies(module: nn.Module) -> list[str]:
    """Names of a module's frequencies: inv_freq, or one for each kind of layer."""
    return [
        name
        for name, value in vars(module).get("_buffers", {}).items()
        if isinstance(value, Tensor) and name.endswith("inv_freq") and "original" not in name
    ]


def _kind(name: str) -> str:
    """The kind of layer in a name: "sliding_attention" in "sliding_attention_inv_freq"."""
    return name.removesuffix("inv_freq").removesuffix("_")


def _told(kind: str) -> str:
    return f" in its {kind.replace('_attention', '')} layers" if kind else ""


@mistake
def attention_factor(model: Any) -> Iterator[MistakeCase]:
    """The factor that YaRN and longrope put on cosines and sines: missing, halfway, twice."""
    for module in _rotary(model):
        for name in _frequencies(module):
            kind = _kind(name)
            attribute = f"{kind}_attention_scaling" if kind else "attention_scaling"
            own = getattr(module, attribute, None)
            if own is None or own == 1.0:
                continue
            label = _label(module, kind)
            for what, value in (
                ("were applied twice", own**2),
                ("were missing", 1.0),
                ("were applied to the queries and not to the keys", own**0.5),
            ):
                yield MistakeCase(
                    f"{label}'s factor {own:.4f} {what}{_told(kind)}",
                    attributes([module], **{attribute: value}),
                )


@mistake
def scaling_missing(model: Any) -> Iterator[MistakeCase]:
    """The stretching of positions (YaRN, llama3, linear, longrope) missing or done twice."""
    for module in _rotary(model):
        for name in _frequencies(module):
            kind = _kind(name)
            settings = _settings(module, kind)
            if settings is None or settings.get("rope_type", "default") == "default":
                continue
            plain = _computed(module, kind, {"rope_type": "default"})
            if plain is not None:
                yield MistakeCase(
                    f"{_label(module, kind)}'s stretching of positions were missing{_told(kind)}",
                    attributes([module], **{name: plain}),
                )
            if "factor" in settings:
                twice = _computed(module, kind, {"factor": settings["factor"] ** 2})
                if twice is not None:
                    yield MistakeCase(
                        f"{_label(module, kind)}'s factor {settings['factor']:g} of positions were "
                        f"squared{_told(kind)}",
                        attributes([module], **{name: twice}),
                    )


@mistake
def wrong_base(model: Any) -> Iterator[MistakeCase]:
    """Another base than the model's, or that of the other kind of layer."""
    for module in _rotary(model):
        names = _frequencies(module)
        own = {name: _settings(module, _kind(name)) or {} for name in names}
        bases = {name: float(settings.get("rope_theta", 0)) for name, settings in own.items()}
        for name in names:
            if not bases[name]:
                continue
            others = dict.fromkeys([*(b for n, b in bases.items() if n != name), *_BASES])
            for base in others:
                if not base or base == bases[name]:
                    continue
                values = _computed(module, _kind(name), {"rope_theta": base})
                if values is not None:
                    yield MistakeCase(
                        f"the base of its rotation were {base:g} in place of {bases[name]:g}"
                        f"{_told(_kind(name))}",
                        attributes([module], **{name: values}),
                    )


def _label(module: Any, kind: str) -> str:
    names = {"yarn": "YaRN", "longrope": "longrope", "llama3": "llama3", "linear": "linear RoPE"}
    settings = _settings(module, kind) or {}
    found = str(settings.get("rope_type", "rope"))
    return names.get(found, found)


def _settings(module: Any, kind: str) -> dict[str, Any] | None:
    config = getattr(module, "config", None)
    found = getattr(config, "rope_parameters", None)
    if kind and isinstance(found, dict):
        found = found.get(kind)
    return dict(found) if isinstance(found, dict) else None


def _computed(module: Any, kind: str, change: dict[str, Any]) -> Tensor | None:
    """The module's frequencies with its settings changed, as transformers computes them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = copy.deepcopy(module.config)
    settings = config.rope_parameters[kind] if kind else config.rope_parameters
    settings.update(change)
    rope_type = settings.get("rope_type", "default")
    function = ROPE_INIT_FUNCTIONS.get(rope_type)
    if rope_type == "default":
        function = getattr(module, "compute_default_rope_parameters", None)
    if function is None:
        return None
    own = getattr(module, f"{kind}_inv_freq" if kind else "inv_freq")
    options = {"layer_type": kind} if kind else {}
    values, _ = function(config, device=own.device, **options)
    if values.shape != own.shape or bool((values == own).all()):
        return None
    return values.to(own)
