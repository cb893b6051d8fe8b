"""Profiles with rules: one more temperature for every query, at every layer that has a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from tempering.attention.axes import FOLDED, STANDARD
from tempering.attention.examining.layout_of import layout
from tempering.attention.layout import AttentionLayer, Layout
from tempering.attention.profiles.length_base import LengthRule
from tempering.attention.profiles.length_rules import InsteadOf, RootLogLength
from tempering.attention.profiles.profile import Profile
from tempering.attention.profiles.rules import GRAMMAR, KNOWN, PerHead, Rule, rule, rule_of
from tempering.calls import CallNode
from tempering.errors import ArchitectureError, ProfileError, RefusedError
from tempering.schedules import schedule_of


def adaptive_profile(
    text: str,
    model: nn.Module | Layout,
    *,
    layers: Iterable[int] | None = None,
    stack: str | None = None,
    base: Profile | None = None,
) -> Profile:
    """A profile whose temperatures depend on the query, by a rule (see `attention.rules`).

    Parameters
    ----------
    text: "support(8)", "entropy(2)", "polynomial()", "power(-0.05,2048)", ...; the first number
        may be a pattern over depth, "support(throb(12,3,2,12))". Bounds of T may follow. With
        "x|instead_of(own)", layers that have the law `own` of the model (see `layout`) follow x in
        its place, and the others follow x.
    model: the model, or its layout.
    layers, stack: restrict the rule to these; the others keep the temperature of `base`.
    base: temperatures that the logits are divided by first; T = 1 by default.

    Raises ProfileError for a text that is no rule, a level out of range, or layers that the
    model doesn't have; ArchitectureError where a rule can't be exact.
    """
    model_layout = model if isinstance(model, Layout) else layout(model)
    start = base if base is not None else Profile.neutral(model)
    if any(start.rules):
        raise RefusedError(
            f"{text} can't stand on a profile that has rules itself "
            f"({', '.join(sorted({str(item) for item in start.rules if item}))})"
        )
    rows = start.resolve(model_layout)
    chosen = None if layers is None else set(layers)
    known = {layer.index for layer in model_layout.layers}
    if chosen is not None and (not chosen or chosen - known):
        wrong = ", ".join(str(item) for item in sorted(chosen - known)) or "(none)"
        raise ProfileError(f"layer {wrong}: the model has layers 0 to {max(known)} with a softmax")
    parts = model_layout.parts_called(stack)
    of_layer = _over_depth(text, model_layout)
    rules = [
        of_layer(layer)
        if (chosen is None or layer.index in chosen) and layer.part in parts
        else None
        for layer in model_layout.layers
    ]
    if any(isinstance(item, InsteadOf) for item in rules):
        rules = _where_it_has_a_law(rules, model_layout)
    for layer, item in zip(model_layout.layers, rules, strict=True):
        if item is not None:
            check_layer(layer, item)
    made = Profile._for(model_layout, rows, model, pattern=text if base is None else None)
    return replace(made, rules=tuple(rules))


def resolution_profile(model: nn.Module, trained: dict[str, Any]) -> Profile:
    """A profile for images of another size than those that a model was trained on.

        T[l] = sqrt(log n_l / log n)

    n_l keys of layer l at the size of training, n those of the image that is made. This keeps the
    entropy of attention about what it was: sharper for larger images, which repeat themselves
    otherwise, and hotter for smaller ones. It acts in self-attention; text is as long as it was.

    Parameters
    ----------
    model: a model of images, of diffusers or transformers.
    trained: a sample of its inputs at the size of training, as `layout` takes one; the values
        don't matter.

    Raises ArchitectureError where no layer attends to its own image. Source: `RootLogLength`.
    """
    model_layout = layout(model, trained)
    rules = tuple(
        RootLogLength(layer.keys) if layer.stack != "cross" and layer.keys > 1 else None
        for layer in model_layout.layers
    )
    if not any(rules):
        raise ArchitectureError(
            f"{type(model).__name__} has cross attention alone, whose keys don't grow with an image"
        )
    for layer, item in zip(model_layout.layers, rules, strict=True):
        if item is not None:
            check_layer(layer, item)
    return replace(Profile.neutral(model), rules=rules)


def _over_depth(text: str, model_layout: Layout) -> Callable[[AttentionLayer], Rule]:
    """layer -> its rule, for a text whose level may be a pattern over depth."""
    call = GRAMMAR.read(text)
    if call.name not in KNOWN:
        raise call.unknown(KNOWN, "rule")
    level, *rest = call.arguments or (None,)
    value = None if level is None else level.value
    if level is None or not isinstance(value, CallNode) or value.name in (*KNOWN, PerHead.name):
        same = rule_of(call)
        return lambda layer: same
    pattern = level.made(lambda: schedule_of(level.call(call.name, "pattern")))
    values = {part: pattern.sample(depth).tolist() for part, depth in model_layout.depths.items()}

    def of_layer(layer: AttentionLayer) -> Rule:
        own = replace(level, value=values[layer.part][layer.index])
        return rule_of(replace(call, arguments=(own, *rest)))

    return of_layer


def _where_it_has_a_law(rules: list[Rule | None], model_layout: Layout) -> list[Rule | None]:
    """The rules, with x alone for x|instead_of(own) on layers that have no law."""
    pairs = list(zip(model_layout.layers, rules, strict=True))
    if not any(layer.law for layer, item in pairs if item is not None):
        named = next(item for item in rules if item is not None)
        raise ProfileError(
            f"{named.label}: none of these layers has a law of its own to replace; leave "
            "instead_of(..) out"
        )
    return [
        item.inner if isinstance(item, InsteadOf) and layer.law is None else item
        for layer, item in pairs
    ]


def check_layer(layer: AttentionLayer, item: Rule) -> None:
    """ArchitectureError where a rule can't be exact on a layer."""
    if layer.route != "interface" and not isinstance(item, LengthRule):
        raise ArchitectureError(
            f"{layer.name} has attention code of its own; {item.name} needs transformers' "
            "attention interface, which hands out queries and keys"
        )
    if layer.route != "interface" and not set(layer.axes) <= {STANDARD, FOLDED}:
        raise ArchitectureError(
            f"{layer.name} attends in blocks or windows, where {item.label} would count the keys "
            "of one"
        )
    if "sinks" in layer.features:
        raise ArchitectureError(
            f"{layer.name} has sink logits shared by all queries, which a temperature per query "
            "can't reach"
        )
    if isinstance(item, InsteadOf) and (layer.law is None or rule(layer.law) != item.own):
        raise ArchitectureError(
            f"{layer.name} has {f'the law {layer.law}' if layer.law else 'no law of its own'}, so "
            f"{item.label} can't replace it; name the law that the layout shows"
        )
