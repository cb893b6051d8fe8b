"""What is tuned: a few numbers theta, and log T[layer, head] as a linear function of them.

    log T = B theta,   theta = 0 is the untempered model

per="head": one number a head. "layer": one a layer. "kv": one for each group of query heads that
share keys and values. "type": one for each kind of layer (sliding, global; else all layers).
"spline": a natural cubic spline over depth through 6 equally spaced values, or one a layer in
models of fewer. `pattern_basis`: the log amplitudes of patterns over depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.attention.layout import AttentionLayer, Layout
from tempering.errors import InputError
from tempering.schedules import Schedule, as_schedule

_KNOTS = 6
# Adam's rates in benchmarks/repair_rivals.py: .05 for log s, .1 for log T.
SCALE_UNIT = 0.5
CHOICES = ("head", "layer", "kv", "type", "spline")


@dataclass(frozen=True, eq=False)
class Basis:
    """B as one matrix over all heads, with a name for each number.

    matrix: Float[Tensor, "all_heads numbers"] (float64). heads: heads in each layer.
    """

    matrix: Tensor
    names: tuple[str, ...]
    heads: tuple[int, ...]
    per: str

    def rows(self, theta: Float[Tensor, "*rows numbers"]) -> list[Tensor]:
        """log T for each layer, Float[Tensor, "*rows heads"]; gradients flow to theta."""
        return list((theta @ self.matrix.to(theta).T).split(self.heads, dim=-1))


def make_basis(model: nn.Module, plan: Layout, per: str, knots: int | None = None) -> Basis:
    """The basis for a model; InputError for an unknown kind, or fewer layers than knots."""
    if per not in CHOICES:
        raise InputError(f"temperatures are tuned per {', '.join(CHOICES)}; not per '{per}'")
    if per == "spline":
        return _spline(plan, knots)
    groups: list[str] = []
    for layer in plan.layers:
        part = f"{layer.part} " if len(plan.depths) > 1 else ""
        name = f"{part}layer {layer.index}"
        for head in range(layer.heads):
            if per == "head":
                groups.append(f"{name} head {head}")
            elif per == "kv":
                share = layer.heads // layer.kv_heads
                groups.append(f"{name} key-value head {head // share}")
            elif per == "layer":
                groups.append(name)
            else:
                groups.append(part + _kind(model, layer))
    names = tuple(dict.fromkeys(groups))
    matrix = torch.zeros(len(groups), len(names), dtype=torch.float64)
    matrix[torch.arange(len(groups)), torch.tensor([names.index(item) for item in groups])] = 1.0
    return Basis(matrix, names, plan.heads, per)


def _kind(model: nn.Module, layer: AttentionLayer) -> str:
    config: Any = model.config
    kinds = getattr(config.get_text_config(), "layer_types", None)
    if not kinds or layer.index >= len(kinds) or layer.tower not in ("", "text"):
        return "attention"
    return str(kinds[layer.index])


def pattern_basis(plan: Layout, patterns: Sequence[str | Schedule]) -> Basis:
    """One number a pattern: the log of its amplitude, theta = 0 for none of it.

        log T[l] = sum_k theta_k p_k(l/(L-1)),   p_k in [-1, 1]

    p_k is the pattern's logarithm with the middle of its range at 0, as `amplitude` maps it.
    Raises InputError without a pattern, or with one that is flat; ScheduleError for a
    text that is no pattern.
    """
    if not patterns:
        raise InputError("name at least one pattern, e.g. 'throb(12,3,1,12)'")
    columns, names = [], []
    for pattern in patterns:
        shape = as_schedule(pattern).amplitude(math.e)
        values = {part: shape.sample(depth).log() for part, depth in plan.depths.items()}
        rows = [values[layer.part][layer.index].expand(layer.heads) for layer in plan.layers]
        column = torch.cat(rows)
        if not bool(column.any()):
            raise InputError(f"the pattern '{pattern}' is flat, so it has no amplitude to tune")
        columns.append(column)
        names.append(f"log amplitude of {pattern}")
    return Basis(torch.stack(columns, dim=1), tuple(names), plan.heads, "pattern")


def scale_basis(plan: Layout) -> Basis:
    """log s of the heads' outputs: one number for each group of heads that share values.

    So it folds into the rows that make these values, whatever format they are kept in. A number
    counts half (`SCALE_UNIT`), since a likelihood is steeper in log s than in log T.
    """
    names: list[str] = []
    groups: list[int] = []
    for layer in plan.layers:
        share = layer.heads // layer.kv_heads
        part = f"{layer.part} " if len(plan.depths) > 1 else ""
        groups += [len(names) + head // share for head in range(layer.heads)]
        names += [
            f"output scale of {part}layer {layer.index} value head {head}"
            for head in range(layer.kv_heads)
        ]
    matrix = torch.zeros(len(groups), len(names), dtype=torch.float64)
    matrix[torch.arange(len(groups)), torch.tensor(groups)] = SCALE_UNIT
    return Basis(matrix, tuple(names), plan.heads, "value head")


def uniform_basis(plan: Layout) -> Basis:
    """One number for the whole model."""
    return Basis(torch.ones(sum(plan.heads), 1, dtype=torch.float64), ("T",), plan.heads, "model")


def _spline(plan: Layout, knots: int | None) -> Basis:
    from scipy.interpolate import CubicSpline

    depth = max(plan.depths.values())
    knots = min(_KNOTS, depth) if knots is None else knots
    if not 2 <= knots <= depth:
        raise InputError(f"a spline over {depth} layers has 2 to {depth} knots, not {knots}")
    at = torch.linspace(0, 1, knots, dtype=torch.float64)
    columns = CubicSpline(at.numpy(), torch.eye(knots).numpy(), bc_type="natural")
    rows = []
    for layer in plan.layers:
        u = layer.index / max(plan.depths[layer.part] - 1, 1)
        value = torch.as_tensor(columns(u), dtype=torch.float64)
        rows.append(value.expand(layer.heads, -1))
    names = tuple(f"spline at {float(u):.2f}" for u in at)
    return Basis(torch.cat(rows), names, plan.heads, "spline")
