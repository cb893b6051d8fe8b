"""Temperatures that know their length, live: log T(n) = a + b log(n / n0), two numbers a head.

theta holds a for every number of the basis, and then b, in units of `SLOPE_UNIT`. Bounds hold for
every n from 1 to the longest text: with the squash s(x) = c tanh(x / c), c = log of the bound,

    log T(1) = s(a - b log n0),   log T(N) = s(a + b log(N / n0)),   log T linear in log n between

so that log T(n) is a + b log(n / n0) itself near theta = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.attention.profiles.length_base import LengthRule, Number
from tempering.attention.profiles.length_rules import Power
from tempering.attention.profiles.rule_base import PerHead
from tempering.attention.tuning.basis import Basis
from tempering.attention.tuning.batches import Batch
from tempering.attention.tuning.objectives import Objective
from tempering.errors import InputError

RULES = ("power",)
# A law that keeps beta proportional to log n has a slope of -1/log n, -0.13 at 2000 keys, and
# theory (arXiv 2605.12697) puts heads between half and twice that. With the prior of standard
# deviation 0.5 in theta, slopes are expected within 0.125.
SLOPE_UNIT = 0.25


@dataclass(frozen=True)
class LawRange:
    """The lengths that a law is learned over.

    length: n0, at which a is log T. longest: N, the most keys that a query sees.
    """

    length: int
    longest: int

    @classmethod
    def of(cls, objectives: Sequence[Objective], watched: Sequence[Objective]) -> LawRange:
        """Of data: n0 is the geometric mean of n over the targets that are learned from.

        There a and b are least entangled: without weights, a is the mean of log T over targets.
        """
        total, count, longest = 0.0, 0, 2
        for item in (*objectives, *watched):
            for piece in item.pieces:
                if not isinstance(piece.source, Batch):
                    raise InputError(
                        f"'{item.name}' is a Python function: a rule of length is learned from "
                        "texts or answers, whose lengths are known"
                    )
                longest = max(longest, piece.source.ids.shape[1] - 1)
        for item in objectives:
            for piece in item.pieces:
                assert isinstance(piece.source, Batch)
                # The token at place i is predicted by a query that sees i keys.
                places = piece.source.targets[:, 1:].nonzero()[:, 1] + 1
                total += float(places.double().log().sum())
                count += len(places)
        return cls(max(2, round(math.exp(total / count))), longest)


def slope_basis(basis: Basis) -> Basis:
    """b of the same heads that share a, in units of `SLOPE_UNIT`."""
    names = tuple(f"slope of {name}" for name in basis.names)
    return Basis(basis.matrix * SLOPE_UNIT, names, basis.heads, basis.per)


class LiveLaw(LengthRule):
    """`power` with a slope that takes gradients, and one for each row of a batch.

    slope: Float[Tensor, "rows heads"].
    """

    def __init__(self, length: int, heads: int) -> None:
        self.length = length
        self.slope = torch.zeros(1, heads, dtype=torch.float64)

    @property
    def numbers(self) -> tuple[Number, ...]:
        """None that stay as they are."""
        return ()

    def of_counts(
        self, seen: Int[Tensor, "rows heads_or_1 q_seq"], places: Tensor | None = None
    ) -> Float[Tensor, "rows heads q_seq"]:
        slope = self.slope.to(seen.device)[..., None]
        ratio = seen.clamp(min=1).double() / self.length
        return (-slope * ratio.log()).exp()

    def __str__(self) -> str:
        return f"power(heads(..),{self.length})"

    @property
    def label(self) -> str:
        return str(self)


def powers(slopes: Sequence[Float[Tensor, "heads"]], law: LawRange) -> tuple[Power, ...]:
    """The rule of each layer."""
    return tuple(
        Power(PerHead(slope.detach().cpu().double().tolist()), float(law.length))
        for slope in slopes
    )


def line_between(at_one: Tensor, at_longest: Tensor, law: LawRange) -> tuple[Tensor, Tensor]:
    """(log T at n0, slope) of the line through log T at 1 and at N keys."""
    slope = (at_longest - at_one) / math.log(law.longest)
    return at_one + slope * math.log(law.length), slope


def ends(log_t: Tensor, slope: Tensor, law: LawRange) -> tuple[Tensor, Tensor]:
    """a + b log(n / n0) at 1 and at N keys."""
    return (
        log_t - slope * math.log(law.length),
        log_t + slope * math.log(law.longest / law.length),
    )
