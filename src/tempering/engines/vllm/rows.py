"""Which row of a profile belongs to which attention layer of vLLM, cut to the heads of a rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.attention.profiles.profile import Profile
from tempering.errors import ProfileError

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Slot:
    """One attention layer on one rank.

    name: vLLM's, e.g. "model.layers.3.self_attn.attn".
    heads: query heads on this rank. rank, ranks: of tensor parallelism.
    """

    name: str
    heads: int
    rank: int = 0
    ranks: int = 1

    @property
    def place(self) -> int:
        """Number of its layer: the first number in its name."""
        return place(self.name)


def place(name: str) -> int:
    """The first number in a module's name, which is the layer's place in the model."""
    found = _NUMBER.search(name)
    if found is None:
        raise ProfileError(f"the module '{name}' has no layer number in its name")
    return int(found.group(1))


def betas(
    profile: Profile, slots: Sequence[Slot], *, staged: bool = False
) -> list[Float[Tensor, " heads"]]:
    """beta = 1/T of each slot's own heads, float32.

    Query heads are split over the ranks in order: rank r of R has heads r H/R .. (r + 1) H/R - 1.

    Parameters
    ----------
    profile: named by transformers' modules, or a bare matrix in order of depth.
    slots: the attention layers of this worker.
    staged: whether other pipeline stages hold more layers than these.

    Raises
    ------
    RefusedError: a profile with rules.
    ProfileError: a row without a layer, a layer without a row, or another number of heads; says
    both sides.
    """
    profile.refuse_rules("vLLM takes temperatures that are numbers")
    if not slots:
        raise ProfileError("this worker has no attention layer, so it has no attention temperature")
    ordered = sorted(slots, key=lambda slot: slot.place)
    rows = _unnamed(profile, ordered, staged) if profile.names is None else _named(profile, ordered)
    if profile.names is not None and not staged:
        _check_all_used(profile, ordered)
    found = {slot.name: _cut(profile, row, slot) for slot, row in zip(ordered, rows, strict=True)}
    return [found[slot.name] for slot in slots]


def _unnamed(profile: Profile, slots: Sequence[Slot], staged: bool) -> list[Tensor]:
    if staged:
        places = [slot.place for slot in slots]
        if places != list(range(places[0], places[0] + len(places))) or max(places) >= len(
            profile.rows
        ):
            raise ProfileError(
                f"the profile has {profile.describe()} without names, and this pipeline stage has "
                f"the layers {places}; give a profile with module names (Profile.adopt(model))"
            )
        return [profile.rows[index] for index in places]
    if len(profile.rows) != len(slots):
        raise ProfileError(
            f"the profile has {profile.describe()}, the engine has {_describe(slots)}"
        )
    return list(profile.rows)


def _named(profile: Profile, slots: Sequence[Slot]) -> list[Tensor]:
    names = profile.names or ()
    by_place: dict[int, list[int]] = {}
    for index, name in enumerate(names):
        by_place.setdefault(place(name), []).append(index)
    rows = []
    for slot in slots:
        exact = [i for i, name in enumerate(names) if slot.name in (name, f"{name}.attn")]
        found = exact or by_place.get(slot.place, [])
        if len(found) > 1:
            raise ProfileError(
                f"the profile has several rows for layer {slot.place} "
                f"({', '.join(names[i] for i in found)}), the engine has {slot.name} there"
            )
        if found:
            rows.append(profile.rows[found[0]])
        elif profile.partial:
            rows.append(torch.ones(1, dtype=torch.float64))
        else:
            raise ProfileError(
                f"the profile was made for another model: it has {profile.describe()} and none "
                f"for {slot.name}; the engine has {_describe(slots)}"
            )
    return rows


def _check_all_used(profile: Profile, slots: Sequence[Slot]) -> None:
    places = {slot.place for slot in slots}
    for name in profile.names or ():
        if place(name) not in places:
            raise ProfileError(
                f"the profile was made for another model: it has {profile.describe()} with a "
                f"module {name}, the engine has {_describe(slots)} and no such layer"
            )


def _cut(profile: Profile, row: Tensor, slot: Slot) -> Tensor:
    if profile.partial and len(row) == 1:
        row = row.expand(slot.heads * slot.ranks)
    beta = (1 / row.double()).float()
    if len(beta) == slot.heads * slot.ranks:
        return beta[slot.rank * slot.heads : (slot.rank + 1) * slot.heads].clone()
    raise ProfileError(
        f"{slot.name} has {slot.heads * slot.ranks} heads, the profile has {len(row)} for it; "
        f"the profile has {profile.describe()}"
    )


def _describe(slots: Sequence[Slot]) -> str:
    counts = sorted({slot.heads * slot.ranks for slot in slots})
    heads = str(counts[0]) if len(counts) == 1 else f"{counts[0]}..{counts[-1]}"
    return f"{len(slots)} layers x {heads} heads"
