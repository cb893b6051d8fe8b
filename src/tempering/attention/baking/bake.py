"""Which temperatures fold into a model's weights, and folding them in memory.

foldable(model)        per head, per layer or not at all, layer by layer, with the reason
bake(model, profile)   a copy of the model whose own temperature is the profile's
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tempering.attention.baking.bake_mark import make_mark
from tempering.attention.baking.comparison import (
    check_deviation,
    controlled_logits,
    deviation,
    logits_of,
    refuse_rounding,
    verification_inputs,
)
from tempering.attention.baking.fold_search import search
from tempering.attention.baking.foldable import NO, PER_HEAD, PER_LAYER, Foldable, LayerFold
from tempering.attention.baking.layer_calls import isolated_layers
from tempering.attention.baking.profile_folds import Betas, named_fold, profile_folds
from tempering.attention.baking.widened import folded_copy
from tempering.attention.control.tempered import BAKED_MARK
from tempering.attention.denoisers import of_diffusers
from tempering.attention.examining.layout_of import examined
from tempering.attention.examining.stored import check_stored, packed
from tempering.attention.examining.subject import check_subject, without_peft
from tempering.attention.hooks.site import is_held
from tempering.attention.layout import Layout
from tempering.attention.profiles.profile import Profile
from tempering.errors import ArchitectureError, BakeError, RefusedError

_BAKED = (
    "this model's weights were baked with a temperature profile already; bake the original, or "
    "take the profile out first: tempering bake MODEL --undo --out DIR"
)


def foldable(model: nn.Module, sample: dict[str, Any] | None = None) -> Foldable:
    """Find, by experiment on a few tokens, which profiles fold into the weights of `model`.

    Parameters
    ----------
    model: a transformers model, untempered; it is left as it is.
    sample: keyword arguments of a forward call, for models that don't take `input_ids`.

    Raises RefusedError when the model is tempered at the moment, ModelError when its weights have
    no values (the meta device).
    """
    if not isinstance(model, nn.Module):
        check_subject(model)
    for module in model.modules():
        if is_held(module):
            raise RefusedError(
                "this model is tempered at the moment; remove the handle before baking"
            )
    reason = _unsuited(model)
    if reason:
        return Foldable(NO, reason)
    try:
        known = examined(model, sample)
    except ArchitectureError as error:
        return Foldable(NO, str(error))
    model_layout, sample = known.layout, known.sample
    layers = _folds(model, model_layout, sample)
    layers = _without_shared(model, layers)
    for verdict in (NO, PER_LAYER):
        for item in layers:
            if item.verdict == verdict:
                return Foldable(verdict, f"{item.name}: {item.reason}", layers)
    return Foldable(PER_HEAD, "", layers)


def _unsuited(model: nn.Module) -> str:
    """Why no weight of the model can be folded at all; empty when there is no such reason."""
    config: Any = getattr(model, "config", None)
    if getattr(config, BAKED_MARK, None):
        return _BAKED
    if of_diffusers(model):
        return (
            "it is a model of diffusers, whose weights are not baked; temper it instead, "
            "tempered(model, profile)"
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = (
            quantization.get("quant_method")
            if isinstance(quantization, dict)
            else getattr(quantization, "quant_method", None)
        )
        method = getattr(method, "value", method)
        # A model read from a GGUF file has plain weights by now.
        if method != "gguf":
            return (
                f"its weights are quantised ({method}); bake the model that they were quantised "
                "from, then quantise it"
            )
    if without_peft(model) is not model:
        return (
            f"it is a {type(model).__name__}; put its adapters into the weights, "
            "model.merge_and_unload(), and bake what that returns"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            check_stored(model)
            return (
                f"{name} is kept on disk or CPU by accelerate; load the model without a "
                "device_map, or bake its files: tempering bake DIRECTORY"
            )
        if next(packed(parameter)) is not parameter:
            return (
                f"its weights are quantised ({name} is {type(parameter.data).__name__}); bake the "
                "model that they were quantised from, then quantise it"
            )
        where = _not_finite(parameter)
        if where:
            return f"{name}{where}, so nothing that is folded can be compared; mend the weights"
    return ""


def _not_finite(weights: Tensor) -> str:
    """Where the first NaN or infinity is; empty when there is none."""
    # Two numbers, where a mask would take as much memory as the weights.
    if not weights.numel() or not weights.dtype.is_floating_point or weights.element_size() < 2:
        return ""
    low, high = weights.detach().aminmax()
    if bool(low.isfinite()) and bool(high.isfinite()):
        return ""
    places = (~weights.detach().isfinite()).nonzero()
    value = float(weights.detach()[tuple(places[0])])
    return f" holds {value:g} at {places[0].tolist()} (and {len(places) - 1} more)"


def _folds(
    model: nn.Module, model_layout: Layout, sample: dict[str, Any] | None
) -> tuple[LayerFold, ...]:
    found = []
    with contextlib.closing(isolated_layers(model, model_layout.layers, sample)) as layers:
        for layer in layers:
            item = search(layer)
            folds = tuple(named_fold(model, layer, fold) for fold in item.folds)
            found.append(LayerFold(layer.layer.name, item.verdict, item.reason, folds))
    return tuple(found)


def _without_shared(model: nn.Module, layers: tuple[LayerFold, ...]) -> tuple[LayerFold, ...]:
    """The layers; one that would fold a parameter of another module too folds nothing."""
    owners: dict[str, list[str]] = {}
    for layer in layers:
        for fold in layer.folds:
            owners.setdefault(fold.parameter, []).append(layer.name)
    modules: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                modules.setdefault(id(parameter), set()).add(id(module))
    result = []
    for layer in layers:
        for fold in layer.folds:
            others = [name for name in owners[fold.parameter] if name != layer.name]
            if others:
                reason = (
                    f"it shares {fold.parameter} with {others[0]}, so both take the same "
                    "temperatures or neither any"
                )
                layer = replace(layer, verdict=NO, reason=reason)
                break
            if len(modules[id(model.get_parameter(fold.parameter))]) > 1:
                reason = f"{fold.parameter} is tied to a weight of another module"
                layer = LayerFold(layer.name, NO, reason)
                break
        result.append(layer)
    return tuple(result)


def bake(model: nn.Module, profile: Profile, *, sample: dict[str, Any] | None = None) -> nn.Module:
    """A copy of `model` whose own attention temperatures are those of `profile`.

    The copy runs anywhere at no cost; its configuration carries a mark, so that it isn't
    tempered or baked again unawares. It is compared with the controlled model in float32:
    their logits agree to 1e-4 of their standard deviation on random input. Half precision is
    folded in float32 and rounded once; where that loses more than 2^-8 of a parameter, as float16
    does with temperatures far from 1, it is refused.

    Parameters
    ----------
    model: a transformers model, untempered; it is left as it is.
    profile: temperatures; layers at T = 1 stay as they are.
    sample: keyword arguments of a forward call, for models that don't take `input_ids`.

    Raises BakeError (a layer that can't be folded or a parameter that can't hold the result, by
    name, or a model that was baked already),
    ProfileError (another shape or model), RefusedError (tempered at the moment), CheckError.
    """
    refuse_baked(model)
    profile.check_model(model)
    known = examined(model, sample)
    sample = known.sample
    profile.resolve(known.layout, scales=True)
    chosen = profile_folds(foldable(model, sample), model, profile, sample)
    for fold, beta in chosen:
        weights = model.get_parameter(fold.parameter)
        exact, stored = (folded_copy(weights, [(fold, beta)], each) for each in (False, True))
        refuse_rounding(fold, beta, weights, exact, stored)
    work = copy.deepcopy(model).float()
    inputs = verification_inputs(work, sample)
    bare = replace(profile, model=None)
    wanted = controlled_logits(work, bare, inputs, sample)
    for fold, beta in chosen:
        fold.apply_(work.get_parameter(fold.parameter), beta)
    check_deviation(deviation(logits_of(work, inputs), wanted), "the baked model")
    result = work
    if any(one.dtype != two.dtype for one, two in zip(model.parameters(), work.parameters())):
        result = copy.deepcopy(model)
        for fold, beta in chosen:
            fold.apply_(result.get_parameter(fold.parameter), beta)
    config: Any = result.config
    parts: dict[str, Betas] = {}
    for fold, beta in chosen:
        parts.setdefault(fold.parameter, []).append((fold, beta))
    mark = make_mark(profile, parts)
    setattr(config, BAKED_MARK, mark)
    return result


def refuse_baked(model: nn.Module) -> None:
    """BakeError when a model carries the mark of a bake."""
    if getattr(getattr(model, "config", None), BAKED_MARK, None):
        raise BakeError(_BAKED)
