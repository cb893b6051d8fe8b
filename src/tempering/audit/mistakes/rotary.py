"""Mistakes in rotary positions: YaRN's, llama3's and longrope's factors, and the base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tempering.audit.mistakes.base import MistakeCase, attributes, everywhere, mistake, together
from tempering.audit.mistakes.rotation import rotations

_BASES = (10_000.0, 500_000.0, 1_000_000.0)
_FACTORS = (2.0, 4.0, 8.0, 16.0)


@mistake
@everywhere
def attention_factor(model: Any) -> Iterator[MistakeCase]:
    """The factor that YaRN and longrope put on cosines and sines: missing, halfway, twice."""
    for rotation in rotations(model):
        attribute = rotation.attribute("attention_scaling")
        own = getattr(rotation.module, attribute, None)
        if own is None or own == 1.0:
            continue
        for what, value in (
            ("were applied twice", own**2),
            ("were missing", 1.0),
            ("were applied to the queries and not to the keys", own**0.5),
        ):
            yield MistakeCase(
                f"{rotation.label}'s factor {own:.4f} {what}{rotation.told}",
                attributes([rotation.module], **{attribute: value}),
            )


@mistake
@everywhere
def scaling_missing(model: Any) -> Iterator[MistakeCase]:
    """The stretching of positions (YaRN, llama3, linear, longrope) missing or done twice."""
    for rotation in rotations(model):
        if rotation.rope_type == "default":
            continue
        label, told = rotation.label, rotation.told
        plain = rotation.retuned({"rope_type": "default"})
        if plain is not None:
            yield MistakeCase(f"{label}'s stretching of positions were missing{told}", plain)
            attribute = rotation.attribute("attention_scaling")
            if getattr(rotation.module, attribute, 1.0) != 1.0:
                unscaled = attributes([rotation.module], **{attribute: 1.0})
                yield MistakeCase(
                    f"{label} were left out, the stretching and the factor{told}",
                    together(plain, unscaled),
                )
        factor = rotation.settings.get("factor")
        # longrope's is in its attention factor alone.
        if factor is not None and rotation.rope_type != "longrope":
            twice = rotation.retuned({"factor": factor**2})
            if twice is not None:
                yield MistakeCase(
                    f"{label}'s factor {factor:g} of positions were squared{told}", twice
                )


@mistake
@everywhere
def wrong_factor(model: Any) -> Iterator[MistakeCase]:
    """Positions stretched by another factor than the model's, or where it doesn't stretch them."""
    for rotation in rotations(model):
        own = rotation.settings.get("factor")
        attribute = rotation.attribute("attention_scaling")
        scale = getattr(rotation.module, attribute, 1.0)
        for factor in _FACTORS:
            if rotation.rope_type == "default":
                settings: dict[str, Any] = {"rope_type": "linear", "factor": factor}
                name = f"its positions were stretched by {factor:g} (linear RoPE){rotation.told}"
            elif own is None or own == factor or rotation.rope_type == "longrope":
                continue
            else:
                settings = {"factor": factor}
                told = f"{factor:g} in place of {own:g}{rotation.told}"
                name = f"{rotation.label}'s factor were {told}"
            change = rotation.retuned(settings)
            if change is None:
                continue
            # YaRN's factor of attention follows from this one, where the model names none.
            follows = rotation.attention_factor(settings)
            if follows != scale:
                change = together(change, attributes([rotation.module], **{attribute: follows}))
            elif own is not None and factor == own**2:
                continue  # squared, above
            yield MistakeCase(name, change)


@mistake
@everywhere
def longrope_swapped(model: Any) -> Iterator[MistakeCase]:
    """longrope's factors for long texts used for short ones, or those for short ones for long."""
    for rotation in rotations(model):
        if rotation.rope_type != "longrope":
            continue
        limit = rotation.limit
        for what, other, where, least in (
            ("long", "short", f"texts of at most {limit} tokens", 0),
            ("short", "long", f"texts of more than {limit} tokens", limit + 1),
        ):
            factors = rotation.settings[f"{what}_factor"]
            change = rotation.retuned({f"{other}_factor": factors})
            if change is not None:
                yield MistakeCase(
                    f"longrope's factors for {what} texts were used for {where}{rotation.told}",
                    change,
                    least,
                )


@mistake
@everywhere
def wrong_base(model: Any) -> Iterator[MistakeCase]:
    """Another base than the model's, or that of another kind of layer."""
    found = rotations(model)
    bases = [float(rotation.settings.get("rope_theta", 0)) for rotation in found]
    for rotation, own in zip(found, bases, strict=True):
        if not own:
            continue
        for base in dict.fromkeys([*bases, *_BASES]):
            if not base or base == own:
                continue
            change = rotation.retuned({"rope_theta": base})
            if change is not None:
                yield MistakeCase(
                    f"the base of its rotation were {base:g} in place of {own:g}{rotation.told}",
                    change,
                )
