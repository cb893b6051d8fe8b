"""What a run of tuning gives back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tempering.attention.layout import Layout
from tempering.attention.measuring.measure import measure_tokens
from tempering.attention.profiles.profile import Profile
from tempering.attention.tuning.batches import Batch
from tempering.attention.tuning.live_temperatures import Bounds, LiveTemperatures
from tempering.attention.tuning.objectives import Objective
from tempering.errors import CollapseWarning, RefusedError
from tempering.temperature.learned import _AT_BOUND, _FLOOR, Collapse

INTERRUPTED = "interrupted"  # of what stopped a run


class Step(NamedTuple):
    """One point of a run.

    loss: of the calibration data, nats (with Adam, of the pieces of that step; None where none
    were run). held_out: of the watched data. cost: the constraint's quantity on watched data, nats
    per token. moved: the numbers that moved most since the row before, and their T.
    """

    step: int
    loss: float | None
    held_out: float
    cost: float | None
    multiplier: float
    coldest: float
    hottest: float
    moved: str

    def row(self) -> dict[str, Any]:
        """For the history of a record."""
        more = {} if self.cost is None else {"cost": self.cost, "multiplier": self.multiplier}
        return {
            "step": self.step,
            "loss": self.loss,
            "held_out": self.held_out,
            **more,
            "coldest": self.coldest,
            "hottest": self.hottest,
            "moved": self.moved,
        }


class TradeOff(NamedTuple):
    """A point between objective and constraint, on watched data."""

    label: str
    objective: float
    cost: float
    chosen: bool


class HeldOut(NamedTuple):
    """Losses of one objective's watched pieces, untempered and tuned; nats, and their targets."""

    name: str
    before: Tensor
    after: Tensor
    counts: Tensor


@dataclass(frozen=True, eq=False)
class Tuned:
    """A tuned profile and how it was found.

    theta, names: the numbers and what each stands for. history: one row for each evaluation.
    step: the evaluation that the profile is from (room: the power its T were raised to).
    watched: "held out", or "calibration" when nothing was held out.
    before, after: weighted loss of the watched data, untempered and tuned, nats.
    cost: of the constraint on watched data, nats per token. met: False when all points better than
        the untempered model break the constraint.
    held_out: losses by piece. trade_off: with a constraint, all points that were weighed.
    stopped_because: "all steps taken", "held-out loss stopped falling", "converged" or
    "interrupted". targets: tokens that were learned from. collapse: heads that the guard named.
    """

    profile: Profile
    theta: Tensor
    names: tuple[str, ...]
    history: tuple[Step, ...]
    step: int
    room: float
    watched: str
    before: float
    after: float
    cost: float | None
    met: bool
    held_out: tuple[HeldOut, ...]
    trade_off: tuple[TradeOff, ...]
    stopped_because: str
    targets: int
    seed: int
    collapse: Collapse | None


class ConstraintError(RefusedError):
    """No point within the constraint lowers the loss; `tuned` holds the best point outside it."""

    def __init__(self, tuned: Tuned, within: float) -> None:
        self.tuned = tuned
        table = "; ".join(
            f"{point.label}: loss {point.objective:.4f}, cost {point.cost:+.4f}"
            for point in tuned.trade_off
        )
        super().__init__(
            f"no temperatures within {within:g} nats per token lower the {tuned.watched} loss of "
            f"{tuned.before:.4f}. The best point found has loss {tuned.after:.4f} at a cost of "
            f"{tuned.cost:+.4f}. Trade-off: {table}. Allow more, give more text to the constraint, "
            "or tune for something closer to it"
        )


def guard(
    live: LiveTemperatures, theta: Tensor, watched: Sequence[Objective], prior_sd: float
) -> Collapse | None:
    """The collapse guard: heads at a bound of T, or whose support fell under its floor.

    With a law, T is looked at from one key to the longest text.

    Support is measured on the first watched batch; a head that was as thin untempered is not named.
    Warns CollapseWarning.
    """
    plan, bounds = live.plan, live.bounds
    log_bounds = torch.tensor(bounds, dtype=torch.float64).log()
    coldest, hottest = live.extents(theta)
    cold = _places(coldest.log() <= log_bounds[0] + _AT_BOUND)
    hot = _places(hottest.log() >= log_bounds[1] - _AT_BOUND)
    sample = next(
        (
            p.source.arguments or p.source.ids[:1]
            for o in watched
            for p in o.pieces
            if isinstance(p.source, Batch)
        ),
        None,
    )
    thin: tuple[tuple[int, ...], ...] = ()
    if sample is not None:
        live.untempered()
        before = measure_tokens(live.model, sample).support
        live.set(theta)
        after = measure_tokens(live.model, sample).support
        thin = _places((after < _FLOOR) & (before >= _FLOOR))
    if not (cold or hot or thin):
        return None
    found = Collapse(cold=cold, hot=hot, thin=thin)
    warnings.warn(_message(found, bounds, prior_sd, plan), CollapseWarning, stacklevel=3)
    return found


def _places(heads: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(place) for place in heads.nonzero().tolist())


def _message(found: Collapse, bounds: Bounds, prior_sd: float, plan: Layout) -> str:
    return (
        f"tuned temperatures collapsed ([layer, head] of {plan.describe()}): {found}; "
        f"try a smaller prior_sd (now {prior_sd:g}), fewer steps, more data, or other bounds "
        f"(now {bounds[0]:g} to {bounds[1]:g})"
    )
