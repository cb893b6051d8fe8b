"""What is tuned: a few numbers theta, and log T[layer, head] as a linear function of them.

    log T = B theta,   theta = 0 is the untempered model

per="head": one number a head. "layer": one a layer. "kv": one for each group of query heads that
share keys and values. "type": one for each kind of layer (sliding, global; else all layers).
"spline": a natural cubic spline over depth through `knots` equally spaced values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.attention.layout import Layout
from tempering.errors import InputError

Per = Literal["head", "layer", "kv", "type", "spline"]
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


def make_basis(model: nn.Module, plan: Layout, per: str, knots: int = 6) -> Basis:
    """The basis for a model; InputError for an unknown kind, or fewer layers than knots."""
    if per not in CHOICES:
        raise InputError(f"temperatures are tuned per {', '.join(CHOICES)}; not per '{per}'")
    groups: list[str] = []
    for layer in plan.layers:
        for head in range(layer.heads):
            if per == "head":
                groups.append(f"{layer.name}, head {head}")
            elif per == "kv":
                share = layer.heads // layer.kv_heads
                groups.append(f"{layer.name}, key-value head {head // share}")
            elif per == "layer":
                groups.append(layer.name)
            else:
                groups.append(_kind(model, layer.name, layer.index))
    if per == "spline":
        return _spline(plan, knots)
    names = tuple(dict.fromkeys(groups))
    matrix = torch.zeros(len(groups), len(names), dtype=torch.float64)
    matrix[torch.arange(len(groups)), torch.tensor([names.index(item) for item in groups])] = 1.0
    return Basis(matrix, names, plan.heads, per)


def _kind(model: nn.Module, name: str, index: int) -> str:
    config: Any = model.config
    kinds = getattr(config.get_text_config(), "layer_types", None)
    return str(kinds[index]) if kinds and index < len(kinds) else "attention"


def _spline(plan: Layout, knots: int) -> Basis:
    from scipy.interpolate import CubicSpline

    depth = max(plan.depths.values())
    if not 2 <= knots <= depth:
        raise InputError(f"a spline over {depth} layers has 2 to {depth} knots, not {knots}")
    at = torch.linspace(0, 1, knots, dtype=torch.float64)
    columns = CubicSpline(at.numpy(), torch.eye(knots).numpy(), bc_type="natural")
    rows = []
    for layer in plan.layers:
        u = layer.index / max(plan.depths[layer.stack] - 1, 1)
        value = torch.as_tensor(columns(u), dtype=torch.float64)
        rows.append(value.expand(layer.heads, -1))
    names = tuple(f"spline at {float(u):.2f}" for u in at)
    return Basis(torch.cat(rows), names, plan.heads, "spline")
