"""Which slices of a parameter belong to which head's queries, read off gradients.

Two cotangents run back from the finished logits through the queries: random ones G, and
c_h G with another number c_h for each head. A slice that reaches the queries of head h alone has
gradients g and c_h g, so the ratio names the head; a slice that reaches several heads has
gradients that point in different directions. The weights are jittered: those as they are may
hide a path behind a zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.attention.baking.isolated_layer import Isolated, SeenLogits

# 1 - cos^2 of the angle between the two gradients of a slice. Rounding in float32 gives about
# 1e-12; two heads that share a slice equally give (difference of their c / their sum)^2.
_ANGLE = 1e-8
# How far the ratio of the gradients may be from a head's c, of the distance between two heads' c.
_NEAR = 0.2
_TINY = 1e-300  # instead of 0 as a divisor


class Through(Enum):
    """The path of a parameter to the logits: an operand of their products, or added to them."""

    QUERIES = "queries"
    KEYS = "keys"
    LOGITS = "logits"


@dataclass(frozen=True)
class Reach:
    """How the slices of one parameter along one axis reach the logits of a layer.

    heads: a label for each slice: its head, or -1.
    per_head: whether each labelled slice reaches one head alone; if not, the labels are 0.
    through: by which path; `LOGITS` is that of sinks and biases.
    dead: how many slices reach nothing at all on the sample.
    vector: whether the parameter has one axis.
    """

    axis: int
    heads: Tensor
    per_head: bool
    through: Through
    dead: int
    vector: bool


def reaches(layer: Isolated) -> tuple[dict[str, Reach], list[str]]:
    """For each parameter of an isolated layer that reaches its logits, how; and its idle ones.

    A parameter with a slice that reaches both queries and keys is left out. Idle are parameters of
    the layer's own module without any gradient: other inputs may bring them in. (A parameter of a
    submodule takes part where the submodule does, and modules that rank keys give no gradients.)
    """
    parameters = dict(layer.module.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            runs = layer.run()
            paths, output = _gradients(layer, runs, list(parameters.values()))
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    found, idle = {}, []
    for index, name in enumerate(parameters):
        gradients = {path: (plain[index], marked[index]) for path, (plain, marked) in paths.items()}
        reach = _reach(gradients, output[index], marks_of(layer.layer.heads))
        if reach is not None:
            found[name] = reach
        ends = [*(plain for plain, _ in gradients.values()), output[index]]
        if "." not in name and not any(end is not None and bool(end.any()) for end in ends):
            idle.append(name)
    return found, idle


def marks_of(heads: int) -> Float[Tensor, "heads"]:
    """c_h: evenly spread in 1..2, in an order without pattern."""
    order = torch.randperm(heads, generator=torch.Generator().manual_seed(1))
    return (1 + order / heads).float()


Gradients = list[Tensor | None]


def _gradients(
    layer: Isolated, runs: list[SeenLogits], parameters: list[Tensor]
) -> tuple[dict[Through, tuple[Gradients, Gradients]], Gradients]:
    """Gradients with cotangents G and c G by each path to the logits; those of the outputs."""
    marks = marks_of(layer.layer.heads)
    generator = torch.Generator().manual_seed(0)

    def random_like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.device)

    pairs = [
        (item, mask)
        for seen in runs
        for item, mask in zip(seen.logits, seen.visible, strict=True)
        if item.requires_grad
    ]
    logits = [item for item, _ in pairs]
    queries = [item for seen in runs for item in seen.queries if item.requires_grad]
    keys = [item for seen in runs for item in seen.keys if item.requires_grad]
    outputs = [item for seen in runs for item in seen.outputs if item.requires_grad]
    plain = [random_like(item).masked_fill(~mask, 0.0) for item, mask in pairs]
    marked = [item * marks.to(item.device)[None, :, None, None] for item in plain]

    def back(ends: list[Tensor], starts: list[Tensor], cotangents: list[Tensor]) -> Gradients:
        if not ends or not starts:
            return [None] * len(starts)
        return list(
            torch.autograd.grad(ends, starts, cotangents, retain_graph=True, allow_unused=True)
        )

    def through(middles: list[Tensor], cotangents: list[Tensor]) -> Gradients:
        inner = back(logits, middles, cotangents)
        reached = [(m, g) for m, g in zip(middles, inner, strict=True) if g is not None]
        return back([m for m, _ in reached], parameters, [g for _, g in reached])

    paths = {
        Through.QUERIES: (through(queries, plain), through(queries, marked)),
        Through.KEYS: (through(keys, plain), through(keys, marked)),
        Through.LOGITS: (back(logits, parameters, plain), back(logits, parameters, marked)),
    }
    return paths, back(outputs, parameters, [random_like(item) for item in outputs])


def _reach(
    paths: dict[Through, tuple[Tensor | None, Tensor | None]], output: Tensor | None, marks: Tensor
) -> Reach | None:
    key = paths[Through.KEYS][0]
    for through, (plain, marked) in paths.items():
        if plain is None or marked is None or not bool((plain != 0).any()):
            continue
        shared = None
        for axis in range(plain.ndim):
            slices = Slices(plain, marked, axis)
            by_key = _alive(key if through is Through.QUERIES else None, axis, plain)
            if bool((slices.alive & by_key).any()):
                continue
            dead = int((~(slices.alive | by_key | _alive(output, axis, plain))).sum())
            labels = slices.labels(marks)
            if labels is not None:
                return Reach(axis, labels, True, through, dead, plain.ndim == 1)
            if shared is None:
                labels = torch.where(slices.alive, 0, -1)
                shared = Reach(axis, labels, False, through, dead, plain.ndim == 1)
        return shared
    return None


def _alive(gradient: Tensor | None, axis: int, like: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros(like.shape[axis], dtype=torch.bool)
    return (gradient != 0).movedim(axis, 0).reshape(like.shape[axis], -1).any(1).cpu()


class Slices:
    """The two gradients of a parameter, slice by slice along an axis."""

    def __init__(self, plain: Tensor, marked: Tensor, axis: int) -> None:
        first = plain.movedim(axis, 0).reshape(plain.shape[axis], -1).double().cpu()
        second = marked.movedim(axis, 0).reshape(plain.shape[axis], -1).double().cpu()
        self.first = first.square().sum(1)
        self.second = second.square().sum(1)
        self.product = (first * second).sum(1)
        self.alive = self.first > 0

    def labels(self, marks: Tensor) -> Tensor | None:
        """The head of each slice (-1 where none), or None when slices belong to several."""
        first, second, product = (
            item[self.alive] for item in (self.first, self.second, self.product)
        )
        angle = 1 - product.square() / (first * second).clamp(min=_TINY)
        distance = (product / first)[:, None] - marks.double()[None]
        nearest = distance.abs().min(dim=1)
        if bool((angle > _ANGLE).any()) or bool((nearest.values > _NEAR / len(marks)).any()):
            return None
        labels = torch.full(self.alive.shape, -1, dtype=torch.long)
        labels[self.alive] = nearest.indices
        return labels
