"""The parameters to fold in one attention layer: candidates are tried, and one is proved.

Candidates are found, and refused with a reason, on jittered weights, where no zero and no tie hides
a dependence. The candidate that is right there is then tried on the weights as they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tempering.attention.baking.fold_proof import (
    Flaw,
    error_as_it_is,
    flaw_of,
    gives_numbers,
)
from tempering.attention.baking.foldable import NO, PER_HEAD, PER_LAYER
from tempering.attention.baking.folds import ADDS_ONE, PLAIN, Fold
from tempering.attention.baking.head_labels import Reach, Through, reaches
from tempering.attention.baking.isolated_layer import Isolated, SeenLogits

_NO_NUMBERS = "its output is NaN or infinite on a few tokens; mend the weights"


@dataclass(frozen=True)
class FoundFold:
    """What folds into one layer: "per head", "per layer" or "no", why, and how."""

    verdict: str
    reason: str
    folds: tuple[Fold, ...] = ()


def search(layer: Isolated) -> FoundFold:
    """Find and prove the fold of an isolated layer, per head if there is one, else per layer."""
    if not gives_numbers(layer.run()):
        return FoundFold(NO, _NO_NUMBERS)
    with layer.jittered():
        base = layer.run()
        found = _search(layer, base)
    if found.verdict == NO:
        return found
    error = error_as_it_is(layer, found.folds, found.verdict == PER_HEAD, base)
    if error <= 1:
        return found
    if error == math.inf:
        return FoundFold(NO, _NO_NUMBERS)
    names = " and ".join(fold.parameter for fold in found.folds)
    return FoundFold(
        NO,
        f"folded into {names} as it is, temperatures give another output than by themselves: it is "
        f"off by {error:.2g} times what rounding explains",
    )


def _search(layer: Isolated, base: list[SeenLogits]) -> FoundFold:
    """What folds into a layer with jittered weights, which shows `base` without a fold."""
    found, idle = reaches(layer)
    if idle:
        reason = f"{idle[0]} takes no part in a short forward pass, so its part is unknown"
        return FoundFold(NO, reason)
    paths = {
        path: {name: reach for name, reach in found.items() if reach.through is path}
        for path in Through
    }
    added = paths[Through.LOGITS]
    if not paths[Through.QUERIES] and not paths[Through.KEYS]:
        return FoundFold(NO, "no weight of the layer reaches its queries alone")
    flaws: set[Flaw] = set()
    for per_head, path in itertools.product((True, False), (Through.QUERIES, Through.KEYS)):
        for folds in _candidates(paths[path], added, per_head):
            flaw = flaw_of(layer, base, folds, per_head, explained=Flaw.AFFINE in flaws)
            if flaw is None:
                if per_head:
                    return FoundFold(PER_HEAD, "", folds)
                return FoundFold(PER_LAYER, _why_shared(folds), folds)
            # The reason is read off folds into the queries; those that also fold what is added to
            # their products tell only some flaws.
            alone = not any(fold.parameter in added for fold in folds)
            telling = alone or flaw in (Flaw.CLAMPED, Flaw.OUTPUTS, Flaw.CHOICES)
            if path is Through.QUERIES and telling:
                flaws.add(Flaw.LENT if flaw is Flaw.OUTPUTS and not alone else flaw)
    return FoundFold(NO, _why_not(layer, flaws, added))


def _candidates(
    products: dict[str, Reach], added: dict[str, Reach], per_head: bool
) -> Iterator[tuple[Fold, ...]]:
    """Sets of folds: parameters of a submodule, of two, of all; sinks and biases beside them."""
    for group, beside, form in itertools.product(
        _groups(products, per_head), [*_beside(added, per_head), ()], (PLAIN, ADDS_ONE)
    ):
        # Norms alone add 1 to their weight.
        if form == ADDS_ONE and not any(_is_norm(name, products[name]) for name in group):
            continue
        chosen = [
            Fold.of(
                name,
                products[name].axis,
                products[name].heads,
                form if _is_norm(name, products[name]) else PLAIN,
                products[name].per_head,
            )
            for name in group
        ]
        chosen += [
            Fold.of(name, added[name].axis, added[name].heads, PLAIN, added[name].per_head)
            for name in beside
        ]
        yield tuple(chosen)


def _is_norm(name: str, reach: Reach) -> bool:
    return reach.vector and name.endswith("weight")


def _groups(found: dict[str, Reach], per_head: bool) -> list[tuple[str, ...]]:
    """The parameters of each submodule, of each two, and of all."""
    owners: dict[str, list[str]] = {}
    for name in found:
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    fit = {
        owner: names
        for owner, names in owners.items()
        if all(_whole(found[name], per_head) for name in names)
    }
    sets = list(itertools.combinations(fit, 1)) + list(itertools.combinations(fit, 2))
    if len(fit) > 2:
        sets.append(tuple(fit))
    return [tuple(name for owner in chosen for name in fit[owner]) for chosen in sets]


def _beside(added: dict[str, Reach], per_head: bool) -> list[tuple[str, ...]]:
    """Groups of what is added to the products, and each parameter alone: two may be multiplied."""
    alone = [(name,) for name in added if _whole(added[name], per_head)]
    return list(dict.fromkeys([*_groups(added, per_head), *alone]))


def _whole(reach: Reach, per_head: bool) -> bool:
    """Whether a parameter was seen whole: no slice is idle, and heads have equal shares."""
    if reach.dead or (per_head and not reach.per_head):
        return False
    counts = torch.bincount(reach.heads[reach.heads >= 0])
    return not per_head or bool((counts == counts[:1]).all())


def _why_shared(folds: tuple[Fold, ...]) -> str:
    names = [fold.parameter for fold in folds if not fold.per_head]
    if not names:
        return "its queries take one factor for all heads"
    verb = "is" if len(names) == 1 else "are"
    return f"{' and '.join(names)} {verb} shared by its heads"


def _why_not(layer: Isolated, flaws: set[Flaw], added: dict[str, Reach]) -> str:
    if "softcap" in layer.layer.features:
        return "its logits pass a soft cap, which no weight of the layer scales"
    if Flaw.CLAMPED in flaws:
        return "its queries or logits are clamped, which no weight of the layer scales"
    if Flaw.CHOICES in flaws:
        return "its queries also choose which keys it sees, so scaling them would change the choice"
    if Flaw.LENT in flaws:
        return "its logits hold an added part that it shares with other layers"
    if Flaw.OUTPUTS in flaws:
        return "the weights of its queries have another effect on what the layer returns"
    hidden = next((name for name, reach in added.items() if reach.dead), None)
    if Flaw.AFFINE in flaws and hidden is not None:
        return f"{hidden} adds to its logits, and few tokens show only a part of it"
    if Flaw.AFFINE in flaws:
        return (
            "its logits hold an added part (a position bias, or a mask of its own), "
            "which no weight of the layer scales"
        )
    if Flaw.UNDONE in flaws:
        return "its queries are normalised, and no weight comes after the norm"
    return "no weight of the layer scales its logits"
