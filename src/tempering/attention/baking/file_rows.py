"""Where a file keeps a parameter: found by its values, whatever name and layout it has there.

Files rename parameters, fuse and split them, transpose them, and permute rows within a head.
So a fold of a parameter becomes a fold of the file's tensors: each row of a tensor that equals
a row of the parameter takes the label of that row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tempering.attention.baking.folds import ADDS_ONE, PLAIN, Fold
from tempering.errors import BakeError

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")

# Ten roundings of float32 near 1.
_NEAR_ONE = 1e-6

Shapes = Mapping[str, tuple[int, ...]]


def locate(
    fold: Fold,
    beta: Tensor,
    weights: Tensor,
    names: Sequence[str],
    shapes: Shapes,
    read: Callable[[str], Tensor],
) -> list[Fold]:
    """The folds of a file's tensors that equal `fold` of a parameter.

    Parameters
    ----------
    fold: of the model's parameter. beta: what is folded, per head.
    weights: the parameter's values, as the file's are when read.
    names: all names of the parameter in the model.
    shapes: of the tensors in the file. read: the values of one of them.

    Raises BakeError when the file holds the parameter nowhere, or in no recognisable layout.
    """
    ambiguous = _ambiguity(fold, weights)
    if ambiguous:
        # Heads of one beta need not be told apart.
        fold = fold.merged(beta)
        ambiguous = _ambiguity(fold, weights)
    found = []
    for name in _by_name(names, shapes):
        in_file = _in_tensor(fold, weights, name, read(name))
        if in_file is None:
            raise BakeError(
                f"{name} in the file differs from {fold.parameter} of the loaded model; "
                "load and save the model with transformers, then bake that"
            )
        found.append(in_file)
    if found:
        return found
    number = _number(fold.parameter)
    for name, shape in shapes.items():
        if _number(name) != number or not _may_hold(weights, fold.axis, shape):
            continue
        in_file = _in_tensor(fold, weights, name, read(name))
        if in_file is not None:
            found.append(in_file)
    if not found and ambiguous:
        raise BakeError(
            f"{ambiguous} in {fold.parameter}, which the file has in another layout, so where each "
            "of them is can't be told; give those heads one temperature, or load and save the "
            "model with transformers, then bake that"
        )
    if len(found) != 1:
        raise BakeError(
            f"{fold.parameter} is in {len(found) or 'none'} of the file's tensors, where one was "
            "expected; load and save the model with transformers, then bake that"
        )
    return found


def _ambiguity(fold: Fold, weights: Tensor) -> str:
    """Which heads have equal slices, so that a file's slice has no one label; empty if none."""
    rows, known = _rows(weights.detach().cpu(), fold.axis), dict[bytes, int]()
    for row, label in zip(rows, fold.labels(len(rows)).tolist(), strict=True):
        # Slices of zeros stay zeros whatever their head is.
        if fold.form == PLAIN and not bool(row.any()):
            continue
        other = known.setdefault(row.numpy().tobytes(), label)
        if other != label:
            one, two = sorted((other, label))
            what = f"heads {one} and {two} have" if one >= 0 else f"head {two} and no head have"
            return f"{what} equal slices"
    return ""


def _by_name(names: Sequence[str], shapes: Shapes) -> list[str]:
    """Tensors with a name of the parameter, or with one that lacks or has a prefix."""
    exact = [name for name in names if name in shapes]
    if exact:
        return exact
    return [
        key
        for key in shapes
        if any(key.endswith("." + name) or name.endswith("." + key) for name in names)
    ][:1]


def _number(name: str) -> str | None:
    match = _NUMBER.search(name)
    return match.group(1) if match else None


def _may_hold(weights: Tensor, axis: int, shape: tuple[int, ...]) -> bool:
    if weights.ndim != len(shape):
        return False
    if weights.ndim == 1:
        return shape[0] >= weights.shape[0]
    rest = weights.numel() // weights.shape[axis]
    return any(torch.Size(shape).numel() // size == rest for size in shape)


def _in_tensor(fold: Fold, weights: Tensor, name: str, stored: Tensor) -> Fold | None:
    """The fold of `stored` that equals `fold` of `weights`, or None where it isn't there."""
    weights = weights.detach().cpu()
    if stored.shape == weights.shape and torch.equal(stored, weights):
        return replace(fold, parameter=name)
    if fold.form == ADDS_ONE and stored.shape == weights.shape:
        # Some files keep 1 + w itself, rounded to float32 near 1.
        if torch.allclose(stored, weights + 1, rtol=0, atol=_NEAR_ONE):
            return replace(fold, parameter=name, form=PLAIN)
        return None
    if weights.ndim == 1:
        return _in_vector(fold, weights, name, stored)
    for axis in range(stored.ndim):
        labels = _row_labels(fold, weights, stored, axis)
        if labels is not None:
            return Fold.of(name, axis, labels, fold.form, fold.per_head)
    return None


def _in_vector(fold: Fold, weights: Tensor, name: str, stored: Tensor) -> Fold | None:
    """A bias kept as a stretch of a longer one, or permuted without ambiguity."""
    size = weights.shape[0]
    if stored.ndim != 1 or stored.shape[0] < size:
        return None
    windows = stored.unfold(0, size, 1)
    places = (windows == weights).all(1).nonzero().flatten().tolist()
    labels = torch.full(stored.shape, -1, dtype=torch.long)
    if len(places) == 1:
        labels[places[0] : places[0] + size] = fold.labels(size)
        return Fold.of(name, 0, labels, fold.form, fold.per_head)
    permuted = _row_labels(fold, weights, stored, 0)
    return None if permuted is None else Fold.of(name, 0, permuted, fold.form, fold.per_head)


def _row_labels(fold: Fold, weights: Tensor, stored: Tensor, axis: int) -> Tensor | None:
    """Labels of the slices of `stored` along `axis`, by the slices of `weights` they equal."""
    ours, theirs = _rows(weights, fold.axis), _rows(stored, axis)
    if ours.shape[1] != theirs.shape[1] or ours.shape[0] > theirs.shape[0]:
        return None
    first = fold.runs[0][0]
    if not bool((theirs == ours[first]).all(1).any()):
        return None
    known: dict[bytes, int] = {}
    wanted: dict[bytes, int] = {}
    for row, label in zip(ours, fold.labels(len(ours)).tolist(), strict=True):
        key = row.numpy().tobytes()
        # Slices of zeros stay zeros whatever their head is.
        if known.setdefault(key, label) != label and (fold.form == ADDS_ONE or bool(row.any())):
            return None
        wanted[key] = wanted.get(key, 0) + 1
    labels = []
    for row in theirs:
        key = row.numpy().tobytes()
        labels.append(known.get(key, -1))
        if key in wanted:
            wanted[key] -= 1
    if any(wanted.values()):
        return None
    return torch.tensor(labels)


def _rows(weights: Tensor, axis: int) -> Tensor:
    # + 0.0 makes the two zeros one, so that equal values have equal bytes.
    return weights.movedim(axis, 0).reshape(weights.shape[axis], -1).contiguous() + 0.0
