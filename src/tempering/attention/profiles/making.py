"""Rows of temperatures from a schedule over depth, or from a matrix."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tempering.attention.layout import Layout
from tempering.errors import ProfileError
from tempering.schedules import Schedule


def rows_of_schedule(
    pattern: Schedule,
    model_layout: Layout,
    layers: Iterable[int] | None,
    heads: Iterable[int] | None,
    stack: str | None,
) -> list[Tensor]:
    """T of every layer, read from a schedule at l/(L-1); see `Profile.from_schedule`."""
    parts = model_layout.parts_called(stack)
    values = {part: pattern.sample(model_layout.depths[part]) for part in parts}
    chosen_layers = _chosen(layers, "layer", max(model_layout.depths[part] for part in parts))
    chosen_heads = _chosen(heads, "head", max(model_layout.heads))
    rows = []
    for layer in model_layout.layers:
        row = torch.ones(layer.heads, dtype=torch.float64)
        if layer.part in values and (chosen_layers is None or layer.index in chosen_layers):
            tempered_heads = (
                slice(None)
                if chosen_heads is None
                else [head for head in chosen_heads if head < layer.heads]
            )
            row[tempered_heads] = float(values[layer.part][layer.index])
        rows.append(row)
    return rows


def rows_of_matrix(table: Tensor, model_layout: Layout) -> list[Tensor]:
    """The rows of T[layer, head], or of T[layer], for a model's layers of attention."""
    count = len(model_layout.layers)
    if len(table) != count and len(table) == sum(model_layout.depths.values()):
        table = _softmax_rows(table, model_layout)
    if len(table) != count:
        raise ProfileError(f"{len(table)} rows were given, the model has {model_layout.describe()}")
    if table.ndim == 2:
        return list(table)
    return [value.expand(heads) for value, heads in zip(table, model_layout.heads, strict=True)]


def _chosen(items: Iterable[int] | None, what: str, count: int) -> set[int] | None:
    """The layers or heads that were chosen; None for all."""
    if items is None:
        return None
    chosen = set(items)
    wrong = sorted(item for item in chosen if not 0 <= item < count)
    if wrong or not chosen:
        named = ", ".join(map(str, wrong)) or "(none)"
        raise ProfileError(f"{what} {named}: the model has {what}s 0 to {count - 1}")
    return chosen


def _softmax_rows(table: Tensor, model_layout: Layout) -> Tensor:
    """The rows of layers with a softmax, of a table with a row for every layer."""
    with_softmax = {(layer.part, layer.index) for layer in model_layout.layers}
    rows, index = [], 0
    for part, depth in model_layout.depths.items():
        for layer in range(depth):
            if (part, layer) in with_softmax:
                rows.append(table[index])
            elif not bool(((table[index] == 1) | table[index].isnan()).all()):
                raise ProfileError(
                    f"layer {layer} of the {part} has no softmax and so no temperature; "
                    "its row must be 1 or NaN"
                )
            index += 1
    return torch.stack(rows)
