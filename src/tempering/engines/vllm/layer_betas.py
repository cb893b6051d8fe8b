"""The betas of vLLM's attention layers: which row of a profile is whose, cut to a rank's heads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.attention.profiles.profile import Profile
from tempering.attention.profiles.rule_base import Rule
from tempering.errors import ProfileError

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True)
class RankLayer:
    """One attention layer, as one rank of tensor parallelism holds it.

    name: vLLM's, e.g. "model.layers.3.self_attn.attn".
    heads: query heads on this rank. rank, ranks: of tensor parallelism.
    """

    name: str
    heads: int
    rank: int = 0
    ranks: int = 1

    @property
    def number(self) -> int:
        """Which layer of the model it is: the first number in its name."""
        return layer_number(self.name)


def layer_number(name: str) -> int:
    """The first number in a module's name, which counts the layers of the model."""
    match = _NUMBER.search(name)
    if match is None:
        raise ProfileError(f"the module '{name}' has no layer number in its name")
    return int(match.group(1))


def layer_betas(
    profile: Profile, layers: Sequence[RankLayer], *, depth: int | None = None
) -> list[Float[Tensor, " heads"]]:
    """beta = 1/T of each layer's own heads, float32.

    Query heads are split over the ranks in order: rank r of R has heads r H/R .. (r + 1) H/R - 1.

    Parameters
    ----------
    profile: with the names of transformers' modules, or without names, in order of depth.
    layers: the attention layers of this worker.
    depth: layers of the whole model, where other pipeline stages hold the rest of them.

    Raises
    ------
    RefusedError: a profile with output scales.
    ProfileError: a row without a layer, a layer without a row, or another number of heads; the
    message describes profile and engine.
    """
    profile.refuse_scales("vLLM takes temperatures alone, so bake it")
    neutral = torch.ones(1, dtype=torch.float64)
    return [
        _cut(profile, neutral if index is None else profile.rows[index], layer)
        for layer, index in zip(layers, _indices(profile, layers, depth), strict=True)
    ]


def layer_rules(
    profile: Profile, layers: Sequence[RankLayer], *, depth: int | None = None
) -> list[Rule | None]:
    """The rule of each layer, for the heads of all ranks; otherwise as `layer_betas`."""
    if not profile.rules:
        return [None] * len(layers)
    indices = _indices(profile, layers, depth)
    return [None if index is None else profile.rules[index] for index in indices]


def _indices(profile: Profile, layers: Sequence[RankLayer], depth: int | None) -> list[int | None]:
    """The row of a profile for each layer; None where a partial profile names it not."""
    if not layers and depth is None:
        raise ProfileError("this worker has no attention layer, so it has no attention temperature")
    ordered = sorted(layers, key=lambda layer: layer.number)
    if profile.names is None:
        found = _unnamed(profile, ordered, depth)
    else:
        found = _named(profile, ordered)
        _check_all_used(profile, ordered, depth)
    by_name = dict(zip((layer.name for layer in ordered), found, strict=True))
    return [by_name[layer.name] for layer in layers]


def _unnamed(profile: Profile, layers: Sequence[RankLayer], depth: int | None) -> list[int | None]:
    if depth is None:
        if len(profile.rows) != len(layers):
            raise ProfileError(
                f"the profile has {profile.describe()}, the engine has {_describe(layers)}"
            )
        return list(range(len(layers)))
    numbers = [layer.number for layer in layers]
    if len(profile.rows) != depth:
        raise ProfileError(f"the profile has {profile.describe()}, the model has {depth} layers")
    # A gap is a layer without attention, which has no row: then rows aren't numbers of layers.
    if numbers and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise ProfileError(
            f"the profile has {profile.describe()} without names, and this pipeline stage has "
            f"the layers {numbers}; give a profile with module names (Profile.adopt(model))"
        )
    return list(numbers)


def _named(profile: Profile, layers: Sequence[RankLayer]) -> list[int | None]:
    names = profile.names or ()
    by_number: dict[int, list[int]] = {}
    for index, name in enumerate(names):
        by_number.setdefault(layer_number(name), []).append(index)
    rows: list[int | None] = []
    for layer in layers:
        exact = [i for i, name in enumerate(names) if layer.name in (name, f"{name}.attn")]
        candidates = exact or by_number.get(layer.number, [])
        if len(candidates) > 1:
            raise ProfileError(
                f"the profile has several rows for layer {layer.number} "
                f"({', '.join(names[i] for i in candidates)}), the engine has {layer.name} there"
            )
        if candidates:
            rows.append(candidates[0])
        elif profile.partial:
            rows.append(None)
        else:
            raise ProfileError(
                f"the profile was made for another model: it has {profile.describe()} and none "
                f"for {layer.name}; the engine has {_describe(layers)}"
            )
    return rows


def _check_all_used(profile: Profile, layers: Sequence[RankLayer], depth: int | None) -> None:
    known = {layer.number for layer in layers} if depth is None else set(range(depth))
    has = _describe(layers) if depth is None else f"{depth} layers"
    for name in profile.names or ():
        if layer_number(name) not in known:
            raise ProfileError(
                f"the profile was made for another model: it has {profile.describe()} with a "
                f"module {name}, the engine has {has} and no such layer"
            )


def _cut(profile: Profile, row: Tensor, layer: RankLayer) -> Tensor:
    if profile.partial and len(row) == 1:
        row = row.expand(layer.heads * layer.ranks)
    beta = (1 / row.double()).float()
    if len(beta) == layer.heads * layer.ranks:
        return beta[layer.rank * layer.heads : (layer.rank + 1) * layer.heads].clone()
    raise ProfileError(
        f"{layer.name} has {layer.heads * layer.ranks} heads, the profile has {len(row)} for it; "
        f"the profile has {profile.describe()}"
    )


def _describe(layers: Sequence[RankLayer]) -> str:
    counts = sorted({layer.heads * layer.ranks for layer in layers})
    heads = str(counts[0]) if len(counts) == 1 else f"{counts[0]}..{counts[-1]}"
    return f"{len(layers)} layers x {heads} heads"
