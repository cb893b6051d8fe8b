"""A fold: the slices of a parameter that belong to head h, times beta = 1/T of that head.

w'[slice of h] = beta_h w[slice of h]                  form "w"
w'[slice of h] = beta_h (1 + w[slice of h]) - 1        form "1+w", of norms that add 1
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Form = Literal["w", "1+w"]
PLAIN: Form = "w"
ADDS_ONE: Form = "1+w"


@dataclass(frozen=True)
class Fold:
    """What to do with one parameter of one attention layer.

    parameter: its name, in the model or in a file.
    axis: the axis along which slices belong to heads.
    runs: (start, stop, head) along the axis; slices in no run stay as they are.
    form: "w" or "1+w".
    per_head: False where all heads share the slices, so that they need one temperature.
    """

    parameter: str
    axis: int
    runs: tuple[tuple[int, int, int], ...]
    form: Form = PLAIN
    per_head: bool = True

    @classmethod
    def of(
        cls, parameter: str, axis: int, labels: Tensor, form: Form = PLAIN, per_head: bool = True
    ) -> Fold:
        """From a label for each slice: its head, or -1 where it stays."""
        return cls(parameter, axis, runs_of(labels), form, per_head)

    def apply_(self, weights: Tensor, beta: Float[Tensor, "heads"]) -> None:
        """Fold `beta` into `weights` in place, in float32 at least, rounded once."""
        work = torch.promote_types(weights.dtype, torch.float32)
        with torch.no_grad():
            for start, stop, head in self.runs:
                part = weights.narrow(self.axis, start, stop - start)
                factor = float(beta[head])
                if self.form == PLAIN:
                    part.copy_(part.to(work) * factor)
                else:
                    part.copy_((part.to(work) + 1) * factor - 1)

    def touched(self, weights: Tensor) -> Tensor:
        """A copy of the slices that `apply_` changes, for `put_back`."""
        return torch.cat(
            [weights.detach().narrow(self.axis, a, b - a) for a, b, _ in self.runs], self.axis
        )

    def put_back(self, weights: Tensor, slices: Tensor) -> None:
        """Undo `apply_` exactly."""
        place = 0
        with torch.no_grad():
            for start, stop, _ in self.runs:
                size = stop - start
                own = slices.narrow(self.axis, place, size)
                weights.narrow(self.axis, start, size).copy_(own)
                place += size

    def labels(self, size: int) -> Tensor:
        """The inverse of `of`."""
        labels = torch.full((size,), -1, dtype=torch.long)
        for start, stop, head in self.runs:
            labels[start:stop] = head
        return labels

    def merged(self, beta: Float[Tensor, "heads"]) -> Fold:
        """The same for this `beta`, with heads of equal beta as one, the first of them."""
        first: dict[float, int] = {}
        runs = tuple(
            (start, stop, first.setdefault(float(beta[head]), head))
            for start, stop, head in self.runs
        )
        return replace(self, runs=runs)

    def to_json(self) -> dict[str, Any]:
        return {"axis": self.axis, "form": self.form, "runs": [list(run) for run in self.runs]}

    @classmethod
    def from_json(cls, parameter: str, data: Mapping[str, Any]) -> Fold:
        """The inverse of `to_json`; `per_head` is not kept, since T is known by then."""
        runs = tuple((int(a), int(b), int(h)) for a, b, h in data["runs"])
        form = ADDS_ONE if data["form"] == ADDS_ONE else PLAIN
        return cls(parameter, int(data["axis"]), runs, form)


def runs_of(labels: Tensor) -> tuple[tuple[int, int, int], ...]:
    """Runs (start, stop, label) of equal labels; labels below 0 are left out."""
    values, counts = torch.unique_consecutive(labels, return_counts=True)
    runs, start = [], 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if value >= 0:
            runs.append((start, start + count, value))
        start += count
    return tuple(runs)


@contextlib.contextmanager
def folded(module: nn.Module, folds: Iterable[tuple[Fold, Tensor]]) -> Iterator[None]:
    """The module with betas folded into its parameters, which are put back afterwards."""
    saved = []
    try:
        for fold, beta in folds:
            weights = module.get_parameter(fold.parameter)
            saved.append((fold, weights, fold.touched(weights)))
            fold.apply_(weights, beta)
        yield
    finally:
        for fold, weights, slices in reversed(saved):
            fold.put_back(weights, slices)
