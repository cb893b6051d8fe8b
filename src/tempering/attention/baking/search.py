"""The parameters to fold in one attention layer: candidates are tried, and one is proved.

A fold of random betas is right when, on the layer alone,

    the finished logits are beta times the old ones, wherever they are not masked;
    they still are for beta = 2^30 and 2^-30, so that nothing clamps or caps on the way;
    everything that the layer returns equals what it returns under the temperatures themselves;
    whatever the layer ranks, to choose keys or experts, is ranked as before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.attention.baking.folds import Fold, Form, folded
from tempering.attention.baking.isolate import Isolated, Seen
from tempering.attention.baking.labels import Reach, reaches
from tempering.attention.control.self_check import random_temperatures

# Relative to the largest logit of a head; float32 rounding on a few tokens gives about 1e-6.
_TOLERANCE = 2e-5
_UNIFORM = 0.6
_EXTREME = 2.0**30


@dataclass(frozen=True)
class Found:
    """What folds into one layer: "per head", "per layer" or "no", why, and how."""

    verdict: str
    reason: str
    folds: tuple[Fold, ...] = ()


def search(layer: Isolated) -> Found:
    """Find and prove the fold of an isolated layer, per head if there is one, else per layer."""
    found, idle = reaches(layer)
    if idle:
        return Found(
            "no", f"{idle[0]} takes no part in a short forward pass, so its part is unknown"
        )
    paths = {
        path: {name: reach for name, reach in found.items() if reach.through == path}
        for path in ("queries", "keys", "logits")
    }
    if not paths["queries"] and not paths["keys"]:
        return Found("no", "no weight of the layer reaches its queries alone")
    base = layer.run()
    verdicts: list[str] = []
    for per_head, path in itertools.product((True, False), ("queries", "keys")):
        for folds in _candidates(paths[path], paths["logits"], per_head):
            verdict = _proved(layer, base, folds, per_head, explained="affine" in verdicts)
            if not verdict:
                if per_head:
                    return Found("per head", "", folds)
                return Found("per layer", _why_shared(folds), folds)
            # Why not is read off the queries, without what is added to their products.
            alone = not any(fold.parameter in paths["logits"] for fold in folds)
            if path == "queries" and (alone or verdict in ("clamped", "outputs", "choices")):
                verdicts.append("lent" if verdict == "outputs" and not alone else verdict)
    return Found("no", _why_not(layer, verdicts, paths["logits"]))


def _candidates(
    products: dict[str, Reach], added: dict[str, Reach], per_head: bool
) -> Iterator[tuple[Fold, ...]]:
    """Sets of folds: parameters of a submodule, of two, of all; sinks and biases beside them."""
    forms: tuple[Form, ...] = ("w", "1+w")
    for group, beside, form in itertools.product(
        _groups(products, per_head), [*_beside(added, per_head), ()], forms
    ):
        # Norms alone add 1 to their weight.
        if form == "1+w" and not any(_is_norm(name, products[name]) for name in group):
            continue
        chosen = [
            Fold.of(
                name,
                products[name].axis,
                products[name].heads,
                form if _is_norm(name, products[name]) else "w",
                products[name].per_head,
            )
            for name in group
        ]
        chosen += [
            Fold.of(name, added[name].axis, added[name].heads, "w", added[name].per_head)
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
    """The same of what is added to the products, and each alone: two may be multiplied."""
    alone = [(name,) for name in added if _whole(added[name], per_head)]
    return list(dict.fromkeys([*_groups(added, per_head), *alone]))


def _whole(reach: Reach, per_head: bool) -> bool:
    """Whether nothing of a parameter hides: no slice is idle, and heads have equal shares."""
    if reach.dead or (per_head and not reach.per_head):
        return False
    counts = torch.bincount(reach.heads[reach.heads >= 0])
    return not per_head or bool((counts == counts[0]).all())


def _proved(
    layer: Isolated, base: list[Seen], folds: tuple[Fold, ...], per_head: bool, explained: bool
) -> str:
    """Empty when the fold is right; else what went wrong, in brief where that is `explained`."""
    heads = layer.layer.heads
    if per_head:
        beta = random_temperatures(layer.layer.name, heads).reciprocal()
    else:
        beta = torch.full((heads,), _UNIFORM)
    runs = _folded_run(layer, folds, beta)
    if not _logits_agree(base, runs, beta):
        if _logits_agree(base, runs, torch.ones(heads), 1e-2):
            return "undone"
        return "affine" if not explained and _affine(layer, base, folds) else "other"
    floor = max(layer.layer.mask_floor, torch.finfo(torch.float32).min / 2)
    if not _outputs_agree(layer.run(beta), runs, floor):
        return "outputs"
    if not _choices_agree(base, runs, beta, floor):
        return "choices"
    # 1 + w' can't be small without rounding, so a fold of that form is tried upwards alone.
    tiny = () if any(fold.form == "1+w" for fold in folds) else (1 / _EXTREME,)
    for extreme in (_EXTREME, *tiny):
        beta = torch.full((heads,), extreme)
        if not _logits_agree(base, _folded_run(layer, folds, beta), beta):
            return "clamped"
    return ""


def _folded_run(
    layer: Isolated, folds: tuple[Fold, ...], beta: Float[Tensor, "heads"]
) -> list[Seen]:
    with folded(layer.module, ((fold, beta) for fold in folds)):
        return layer.run()


def _logits_agree(
    base: list[Seen],
    runs: list[Seen],
    beta: Float[Tensor, "heads"],
    tolerance: float = _TOLERANCE,
) -> bool:
    """Whether the logits are beta times the old ones, per head and for the sinks by themselves."""
    found = False
    for old, new in zip(base, runs, strict=True):
        for before, seen, after in zip(old.logits, old.visible, new.logits, strict=True):
            wanted = (before * beta.to(before)[None, :, None, None]).masked_fill(~seen, 0.0)
            error = (after.masked_fill(~seen, 0.0) - wanted).abs()
            split = before.shape[-1] - int(old.sinks)
            for part in (slice(0, split), slice(split, None)):
                if wanted[..., part].numel() == 0:
                    continue
                size = wanted[..., part].abs().amax(dim=(0, 2, 3))
                worst = error[..., part].amax(dim=(0, 2, 3))
                found = found or bool((size > 0).all())
                if not bool((worst <= tolerance * size).all()):
                    return False
    return found


def _affine(layer: Isolated, base: list[Seen], folds: tuple[Fold, ...]) -> bool:
    """Whether the logits are beta a + b: a part of them is scaled, another is not."""
    heads = layer.layer.heads
    slopes = []
    for value in (0.5, 2.0):
        runs = _folded_run(layer, folds, torch.full((heads,), value))
        pairs = [
            (after - before)[seen] / (value - 1)
            for old, new in zip(base, runs, strict=True)
            for before, seen, after in zip(old.logits, old.visible, new.logits, strict=True)
        ]
        slopes.append(torch.cat(pairs))
    error = (slopes[0] - slopes[1]).abs().max()
    return bool(error <= 1e-3 * slopes[0].abs().max())


def _outputs_agree(expected: list[Seen], runs: list[Seen], floor: float) -> bool:
    """Whether the layer returns the same; masking in it (a position bias may hold some) aside."""
    for one, two in zip(expected, runs, strict=True):
        if len(one.outputs) != len(two.outputs):
            return False
        for wanted, got in zip(one.outputs, two.outputs, strict=True):
            if wanted.shape != got.shape:
                return False
            wanted, got = (x.nan_to_num().masked_fill(x <= floor, 0.0) for x in (wanted, got))
            if bool((wanted - got).abs().max() > _TOLERANCE * wanted.abs().max()):
                return False
    return True


def _choices_agree(base: list[Seen], runs: list[Seen], beta: Tensor, floor: float) -> bool:
    """Whether ranked tensors are the old ones, or one positive multiple of them."""
    for old, new in zip(base, runs, strict=True):
        for before, after in zip(old.choices, new.choices, strict=True):
            seen = before.isfinite() & (before > floor)
            one, two = before[seen], after[seen]
            if not bool(one.any()):
                factor = 1.0
            elif bool(beta.min() == beta.max()):
                factor = float(two.norm() / one.norm())
            else:
                factor = 1.0
            wanted = factor * one
            if not torch.allclose(two, wanted, _TOLERANCE, _TOLERANCE * float(wanted.norm())):
                return False
    return True


def _why_shared(folds: tuple[Fold, ...]) -> str:
    names = [fold.parameter for fold in folds if not fold.per_head]
    if not names:
        return "its queries take one factor for all heads"
    verb = "is" if len(names) == 1 else "are"
    return f"{' and '.join(names)} {verb} shared by its heads"


def _why_not(layer: Isolated, verdicts: list[str], added: dict[str, Reach]) -> str:
    if "softcap" in layer.layer.features:
        return "its logits pass a soft cap, which no weight of the layer scales"
    if "clamped" in verdicts:
        return "its queries or logits are clamped, which no weight of the layer scales"
    if "choices" in verdicts:
        return "its queries also choose which keys it sees, so scaling them would change the choice"
    if "lent" in verdicts:
        return "its logits hold an added part that it shares with other layers"
    if "outputs" in verdicts:
        return "the weights of its queries have another effect on what the layer returns"
    hidden = next((name for name, reach in added.items() if reach.dead), None)
    if "affine" in verdicts and hidden is not None:
        return f"{hidden} adds to its logits, and few tokens show only a part of it"
    if "affine" in verdicts:
        return (
            "its logits hold an added part (a position bias, or a mask of its own), "
            "which no weight of the layer scales"
        )
    if "undone" in verdicts:
        return "its queries are normalised, and no weight comes after the norm"
    return "no weight of the layer scales its logits"
