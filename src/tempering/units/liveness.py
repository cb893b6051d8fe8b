"""Which hypotheses are alive: dead ones, dominant ones, and what they tell of the input."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch

from tempering.errors import InputError
from tempering.tensors import TensorLike, as_tensor

# A hypothesis is dead when its mean responsibility is under this part of its equal share 1/K: a
# convention, by which 100 hypotheses may differ tenfold in use before one is reported.
DEAD = 0.1
# A hypothesis is dominant above this mean responsibility: it has more than all others together.
# With K = 2 equal rivals have 0.5 each, so there it is dominant when the other one is dead.
DOMINANT = 0.5
# Posteriors that keep less than this part of log K nats hardly depend on the input: a convention.
MUTE = 0.05


@dataclass(frozen=True)
class HypothesisReport:
    """What a batch shows of its K hypotheses.

    n: inputs. mean: mean responsibility of each. dead: those under 0.1/K. dominant: those over
    0.5 (K = 2: 0.95). used: support of the mean responsibilities: how many the batch uses.
    support: mean over inputs of the support: how many each input keeps alive. information: nats
    that the posterior keeps of the input, 0..log K.
    """

    n: int
    mean: tuple[float, ...]
    dead: tuple[int, ...]
    dominant: tuple[int, ...]
    used: float
    support: float
    information: float

    @property
    def collapsed(self) -> bool:
        """Whether hypotheses died, one took over, or the posterior hardly depends on the input."""
        mute = self.information < MUTE * math.log(len(self.mean))
        return bool(self.dead or self.dominant or mute)

    def as_dict(self) -> dict[str, object]:
        """The fields and `collapsed`, for JSON."""
        return {**asdict(self), "collapsed": self.collapsed}

    def __str__(self) -> str:
        count = len(self.mean)
        return (
            f"{count} hypotheses over {self.n} inputs: {len(self.dead)} dead"
            f"{_named(self.dead)}, {len(self.dominant)} dominant{_named(self.dominant)}; "
            f"{self.used:.2f} in use, {self.support:.2f} alive for each input, "
            f"{self.information:.3f} nats kept; {'collapsed' if self.collapsed else 'healthy'}"
        )


def monitor(r: TensorLike) -> HypothesisReport:
    """Report dead and dominant hypotheses of a batch of responsibilities.

    Parameters
    ----------
    r: responsibilities, each row summing to 1; every dimension but the last counts as inputs.

    Raises InputError where rows are missing or aren't responsibilities.
    """
    r = as_tensor(r, "responsibilities", InputError)
    if r.ndim == 0 or not r.is_floating_point():
        raise InputError(
            f"responsibilities of shape {list(r.shape)} and {r.dtype}; expected [..., K] with at "
            "least one input and K >= 2, in floating point"
        )
    rows = r.detach().reshape(-1, r.shape[-1]).double()
    if rows.shape[0] == 0 or rows.shape[1] < 2:
        raise InputError(
            f"responsibilities of shape {list(r.shape)}; expected [..., K] with at least one "
            "input and K >= 2"
        )
    # Half precision rounds the sum by a few eps; 1e-3 is far below what other inputs miss 1 by.
    slack = 1e-3 + 8 * torch.finfo(r.dtype).eps
    wrong = (~((rows >= 0).all(-1) & ((rows.sum(-1) - 1).abs() <= slack))).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"row {row} is {rows[row].tolist()}, which are not responsibilities (not negative, "
            "summing to 1). Give the output of statistic 'full'"
        )
    mean = rows.mean(0)
    count = len(mean)
    bar = DOMINANT if count > 2 else 1 - DEAD / count
    marginal = torch.special.entr(mean).sum()
    inputs = torch.special.entr(rows).sum(-1)
    return HypothesisReport(
        n=len(rows),
        mean=tuple(mean.tolist()),
        dead=tuple((mean < DEAD / count).nonzero().flatten().tolist()),
        dominant=tuple((mean > bar).nonzero().flatten().tolist()),
        used=float(marginal.exp()),
        support=float(inputs.exp().mean()),
        information=float((marginal - inputs.mean()).clamp(min=0)),
    )


def _named(indices: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f" ({shown})" if indices else ""
