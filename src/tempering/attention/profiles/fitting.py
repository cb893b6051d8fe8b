"""A profile's rows and rules for the attention layers of a model, or an error that says why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from tempering.attention.layout import Layout
from tempering.attention.limits import check_scale_values, check_values
from tempering.attention.profiles.rules import Rule
from tempering.errors import ProfileError


def describe_rows(rows: Sequence[Tensor]) -> str:
    """A short text for messages, e.g. "30 layers x 9 heads"."""
    counts = sorted({len(row) for row in rows})
    heads = str(counts[0]) if len(counts) == 1 else f"{counts[0]}..{counts[-1]}"
    return f"{len(rows)} layers x {heads} heads"


def check_row(row: Tensor, where: str) -> None:
    """ProfileError or TemperatureError unless a row can be the temperatures of a layer's heads."""
    if row.ndim != 1 or len(row) == 0:
        raise ProfileError(f"{where}: temperatures have shape [heads]; this has {tuple(row.shape)}")
    check_values(row, where)


def check_scales(scales: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
    """ProfileError unless `scales` can be the output scales of the heads that have `rows`."""
    if [scale.shape for scale in scales] != [row.shape for row in rows]:
        raise ProfileError(
            f"a profile of {describe_rows(rows)} has an output scale for each head or none; "
            f"these are {len(scales)} layers of {sorted({len(s) for s in scales if s.ndim})} scales"
        )
    for place, scale in enumerate(scales):
        check_scale_values(scale, f"layer {place}")


def rows_by_layer(
    rows: Sequence[Tensor], names: Sequence[str] | None, partial: bool, model_layout: Layout
) -> list[Tensor]:
    """The row of each layer of a layout; ProfileError with both shapes where they don't fit.

    names, partial: as in `Profile`.
    """
    shape = describe_rows(rows)
    if names is None:
        if [len(row) for row in rows] != list(model_layout.heads):
            raise ProfileError(f"the profile has {shape}, the model has {model_layout.describe()}")
        return list(rows)
    by_name = dict(zip(names, rows, strict=True))
    unknown = by_name.keys() - set(model_layout.names)
    if unknown:
        first = next(name for name in by_name if name in unknown)
        _refuse_name(first, shape, partial, model_layout)
    fitted = []
    for layer in model_layout.layers:
        row = by_name.get(layer.name)
        if row is None and not partial:
            raise ProfileError(
                f"the profile has {shape} and none for {layer.name}; "
                f"the model has {model_layout.describe()}"
            )
        if row is None:
            row = torch.ones(layer.heads, dtype=torch.float64)
        elif partial and len(row) == 1:
            row = row.expand(layer.heads)
        if len(row) != layer.heads:
            raise ProfileError(
                f"{layer.name} has {layer.heads} heads, the profile has {len(row)} for it; "
                f"the profile has {shape}, the model {model_layout.describe()}"
            )
        fitted.append(row)
    return fitted


def _refuse_name(name: str, shape: str, partial: bool, model_layout: Layout) -> NoReturn:
    """Say what is wrong with a name that is no attention layer of the model."""
    if any(name == other or name.startswith(other + ".") for other in model_layout.untempered):
        raise ProfileError(
            f"{name} has no temperature: it has no softmax, or text does not reach it; "
            "leave it out of the profile"
        )
    if not partial:
        raise ProfileError(
            f"the profile was made for another model: it has {shape} "
            f"with a module {name}, the model has {model_layout.describe()} and no such module"
        )
    raise ProfileError(
        f"the model has no attention module '{name}'; its modules are called "
        f"{model_layout.names[0]} .. {model_layout.names[-1]}"
    )


def rules_by_layer(
    rules: Sequence[Rule | None], names: Sequence[str] | None, model_layout: Layout
) -> tuple[Rule | None, ...]:
    """The rule of each layer of a layout; None where it has none."""
    if not rules:
        return (None,) * len(model_layout.layers)
    if names is None:
        return tuple(rules)
    by_name = dict(zip(names, rules, strict=True))
    return tuple(by_name.get(name) for name in model_layout.names)
