"""A profile in force on a model: the handle that changes it and gives the model back."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tempering.attention.control.layer_rule import (
    LayerRule,
    RuleCount,
    check_attach,
    layer_rule,
)
from tempering.attention.examining.layout_of import examined
from tempering.attention.examining.structure import submodule, walk
from tempering.attention.hooks import forward, interface_patch, softmax_route
from tempering.attention.hooks.ownership import LOCK, Hold
from tempering.attention.hooks.site import LayerPart, OutsideProfile, Site
from tempering.attention.hooks.temperature_state import TemperatureState, inverses
from tempering.attention.layout import AttentionLayer, Layout
from tempering.attention.limits import check_scale_values, check_values
from tempering.attention.profiles.fingerprint import Walked
from tempering.attention.profiles.profile import Profile
from tempering.attention.profiles.rule_base import Rule
from tempering.errors import ArchitectureError, ProfileError, RefusedError


class Tempering:
    """A profile in force on a model: a handle with `.remove()`, and a context manager.

    It belongs to the thread or asyncio task that made it (see `tempered`). `.update(profile)`
    changes the temperatures in place, also of a compiled model, without recompiling; `.update`
    and `.remove` may be called anywhere.
    """

    def __init__(
        self,
        model: nn.Module,
        model_layout: Layout,
        profiles: Sequence[Profile],
        *,
        private: bool = False,
    ) -> None:
        self._model = weakref.ref(model)
        self._layout = model_layout
        self._sites: list[Site] = []
        rows = _stack(profiles, model_layout)
        modules = [submodule(model, layer.name) for layer in model_layout.layers]
        rules = map(layer_rule, modules, model_layout.layers, self._rules_of(profiles))
        placements = [forward.placement_of(module) for module in modules]
        scales = _stack_scales(profiles, model_layout)
        parts = map(LayerPart, model_layout.layers, rows, rules, inverses(rows, placements), scales)
        outside = [(submodule(model, name), name) for name in model_layout.outside]
        self._hold = Hold([*modules, *(module for module, _ in outside)], private=private)
        own_softmax = bool(outside) or any(
            layer.route == "softmax" for layer in model_layout.layers
        )
        for route in (interface_patch, softmax_route) if own_softmax else (interface_patch,):
            route.acquire()
            self._hold.releases.append(route.release)
        gone = weakref.finalize(model, _forget, weakref.ref(self._hold))
        gone.atexit = False
        self._hold.releases.append(gone.detach)
        try:
            with LOCK:
                self._sites = [
                    forward.hold_module(module, self._hold, part, placement)
                    for module, part, placement in zip(modules, parts, placements, strict=True)
                ]
                for module, name in outside:
                    forward.hold_module(module, self._hold, _outside(model_layout, module, name))
                self._hold.enter()
                self._note_moves()
                self.states()
        except BaseException:
            self.remove()
            raise

    def update(self, profile: Profile | Sequence[Profile]) -> None:
        """Change the temperatures of this handle in place."""
        self._require_active()
        profiles = as_profiles(profile)
        model = self._model()
        if model is not None:
            walked = walk(model)
            if examined(model, None, walked[0]).layout != self._layout:
                raise RefusedError(
                    f"{type(model).__name__} was changed since this handle was attached; remove "
                    "it and call tempered(model, profile) anew"
                )
            check_profiles(profiles, model, self._layout, walked)
        rules = self._rules_of(profiles)
        scales = _stack_scales(profiles, self._layout)
        with LOCK:
            made = self._made_rules(rules)
            self.set_rows(_stack(profiles, self._layout))
            self.set_scales(scales)
            self._set_made(made)

    def set_rules(self, rules: Sequence[Sequence[Rule | None]]) -> None:
        """Set the rules of each layer: one for all rows of a batch, or one for each row.

        Raises ArchitectureError or ProfileError where a rule can't act on a layer; nothing is
        changed then.
        """
        self._require_active()
        with LOCK:
            self._set_made(self._made_rules(rules))

    def _rules_of(self, profiles: Sequence[Profile]) -> list[Sequence[Any]]:
        """For each layer, the rule of every row of the batch."""
        return list(zip(*[item.rules_by_layer(self._layout) for item in profiles], strict=True))

    def _made_rules(self, rules: Sequence[Sequence[Rule | None]]) -> list[LayerRule | None]:
        """The rules for each site, checked against all that they will meet there."""
        made = []
        for site, own in zip(self._sites, rules, strict=True):
            for state in site.states_of(self._hold.number):
                check_attach(self._hold.number, state, own)
            module, layer = site.module(), site.parts[self._hold.number].layer
            made.append(None if module is None else layer_rule(module, layer, own))
        return made

    def _set_made(self, made: Sequence[LayerRule | None]) -> None:
        for site, item in zip(self._sites, made, strict=True):
            site.set_rule(self._hold.number, item)
        self._note_moves()

    def _note_moves(self) -> None:
        parts = [site.parts[self._hold.number] for site in self._sites]
        self._hold.moves = any(
            part.rule is not None
            or part.scale is not None
            or part.temperature.requires_grad
            or bool((part.temperature != 1).any())
            for part in parts
        )

    def rules(self) -> dict[str, list[RuleCount]]:
        """For each layer with rules: how often each acted, and how often T was at its bounds."""
        self._require_active()
        parts = [site.parts[self._hold.number] for site in self._sites]
        return {
            part.layer.name: list(part.rule.counts.values())
            for part in parts
            if part.rule is not None
        }

    @property
    def layout(self) -> Layout:
        """The layers that it tempers, in the order of its rows."""
        return self._layout

    def rows(self) -> list[Tensor]:
        """Float[Tensor, "rows heads"] for each layer: the temperatures of this handle now."""
        self._require_active()
        return [site.parts[self._hold.number].temperature for site in self._sites]

    def set_rows(self, rows: Iterable[Tensor]) -> None:
        """Set Float[Tensor, "rows heads"] for each layer; gradients flow to those that need one.

        Raises ProfileError for other shapes and TemperatureError for other values than a
        Profile may hold; nothing is changed then.
        """
        self._require_active()
        rows, layers = list(rows), self._layout.layers
        if len(rows) != len(layers):
            raise ProfileError(f"{len(rows)} layers were given, the model has {len(layers)}")
        with LOCK:
            for site, layer, row in zip(self._sites, layers, rows, strict=True):
                _check_shape(layer, row, "temperatures")
                check_values(row, layer.name)
                site.check(self._hold.number, row)
            for site, row in zip(self._sites, rows, strict=True):
                site.set(self._hold.number, row)
            self._note_moves()

    def set_scales(self, scales: Iterable[Tensor | None]) -> None:
        """Set the output scales of each layer, Float[Tensor, "rows heads"], or None for none.

        Gradients flow to those that need one. Raises ProfileError for other shapes and for numbers
        that are no scales; nothing is changed then.
        """
        self._require_active()
        scales, layers = list(scales), self._layout.layers
        if len(scales) != len(layers):
            raise ProfileError(f"{len(scales)} layers were given, the model has {len(layers)}")
        with LOCK:
            for layer, scale in zip(layers, scales, strict=True):
                if scale is not None:
                    _check_shape(layer, scale, "output scales")
                    check_scale_values(scale, layer.name)
            for site, scale in zip(self._sites, scales, strict=True):
                site.set_scale(self._hold.number, scale)
            self._note_moves()

    def calls(self) -> dict[str, int]:
        """How often each layer's temperature acted since this handle was attached."""
        self._require_active()
        with LOCK:
            return {
                layer.name: site.calls(self._hold.number)
                for layer, site in zip(self._layout.layers, self._sites, strict=True)
            }

    def states(self) -> list[TemperatureState]:
        """What each layer of the profile runs with in this thread or task."""
        found = [site.find() for site in self._sites]
        return [state for state in found if isinstance(state, TemperatureState)]

    def remove(self) -> None:
        """Give the model back as it was before this handle; doing it twice is harmless."""
        self._hold.release()
        self._sites = []

    def _require_active(self) -> None:
        if not self._hold.active:
            raise RefusedError("this handle was removed; call tempered(model, profile) anew")

    def __enter__(self) -> Tempering:
        self._require_active()
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _check_shape(layer: AttentionLayer, row: Tensor, what: str) -> None:
    if row.ndim != 2 or len(row) == 0 or row.shape[1] != layer.heads:
        raise ProfileError(
            f"{layer.name}: {what} have shape [rows, {layer.heads}]; this has {tuple(row.shape)}"
        )
    _check_rows(layer, len(row))


def _check_rows(layer: AttentionLayer, rows: int) -> None:
    """ProfileError for several profiles of a layer whose rows aren't those of the batch."""
    if rows > 1 and not layer.of_rows:
        raise ProfileError(
            f"{layer.name}: {rows} profiles were given, one a row; its rows can't be told from "
            "frames, windows or halves of the batch that stand among them, so it takes one "
            "profile for all. Where they are rows, a sample of two rows and, for a video, two "
            "frames or more shows it"
        )


def _forget(hold: weakref.ref[Hold]) -> None:
    """The model is gone, and so are its handles."""
    held = hold()
    if held is not None:
        held.release()


def _outside(model_layout: Layout, module: nn.Module, name: str) -> OutsideProfile:
    unreached = name in model_layout.unreached
    how = (
        "was not reached by the sample that this model was examined with"
        if unreached
        else "called no softmax when this model was examined"
    )
    return OutsideProfile(
        ArchitectureError(
            f"{name} ({type(module).__name__}) attends, but {how}, so the profile has no "
            "temperature for it; give a sample of inputs that makes it attend, "
            "tempered(model, profile, sample={...}), or temper that part of the model alone that "
            "you mean, e.g. its language model"
        ),
        entered=unreached,
    )


def as_profiles(profile: Any) -> list[Profile]:
    profiles = list(profile) if isinstance(profile, Iterable) else [profile]
    if not profiles or not all(isinstance(item, Profile) for item in profiles):
        raise ProfileError(
            "give a Profile, or a sequence of them with one for each row of the batch; "
            f"this is {type(profile).__name__} of {[type(p).__name__ for p in profiles][:3]}"
        )
    return profiles


def check_profiles(
    profiles: Sequence[Profile], model: nn.Module, model_layout: Layout, walked: Walked
) -> None:
    made_for = {(item.model or {}).get("fingerprint"): item for item in profiles}
    for item in made_for.values():
        item.check_model(model, walked)
    for item in profiles:
        item.resolve(model_layout, rules=True, scales=True)
        _refuse_scales_at_softmax(item, model_layout)


def _refuse_scales_at_softmax(profile: Profile, model_layout: Layout) -> None:
    """RefusedError for output scales of a layer whose attention is its own code."""
    own = [layer.name for layer in model_layout.layers if layer.route == "softmax"]
    if own:
        profile.refuse_scales(
            f"{own[0]} attends by code of its own, which shows no head's output; take a model that "
            "uses transformers' attention interface"
        )


def _stack(profiles: Sequence[Profile], model_layout: Layout) -> list[Tensor]:
    """For each layer, Float[Tensor, "rows heads"] over the profiles."""
    resolved = [profile.resolve(model_layout, rules=True, scales=True) for profile in profiles]
    if len(resolved) == 1:
        return [row[None] for row in resolved[0]]
    for layer in model_layout.layers:
        _check_rows(layer, len(profiles))
    return [torch.stack(rows) for rows in zip(*resolved, strict=True)]


def _stack_scales(profiles: Sequence[Profile], model_layout: Layout) -> Sequence[Tensor | None]:
    """For each layer, the output scales over the profiles; None for all without any."""
    found = [profile.scales_by_layer(model_layout) for profile in profiles]
    if all(scales is None for scales in found):
        return [None] * len(model_layout.layers)
    ones = [torch.ones(heads, dtype=torch.float64) for heads in model_layout.heads]
    return [torch.stack(rows) for rows in zip(*(s or ones for s in found), strict=True)]
