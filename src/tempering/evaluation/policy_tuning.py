"""What a search for a policy found: trials, numbers, and the gain on held-out tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tempering.evaluation.paired import IntervalEstimate

Row = dict[str, Any]


@dataclass(frozen=True)
class PolicyTrial:
    """One policy that was tried.

    scores: the share of right samples of each task that it was tried on, in the order of the
    search. score: their mean; of a trial that was left, an estimate from its difference to the best
    one. left: whether it was left before the last task.
    """

    text: str
    values: tuple[float, ...]
    scores: tuple[float, ...]
    score: float
    left: bool = False


@dataclass(frozen=True)
class LearnedNumber:
    """What a `?` became.

    value: of the best trial. low, high: between which it lies in the trials that the tasks don't
    tell from the best one (`may_be_best`), out to the next number that was tried on either side,
    since nothing is known of those between. range: that was searched.
    """

    label: str
    value: float
    low: float
    high: float
    range: tuple[float, float]


@dataclass(frozen=True)
class HeldOut:
    """Mean shares of right samples over tasks that the search never saw, and the paired gain."""

    untuned: IntervalEstimate
    learned: IntervalEstimate
    gain: IntervalEstimate


@dataclass(frozen=True)
class PolicyTuning:
    """The result of a search.

    policy: the best trial's text, also of a search that was stopped; that of the untuned policy
    where no trial beat it. against: the untuned policy. untuned: its score on the tasks of the
    search, None where it was stopped before. numbers: of the best trial.
    searched: its gain on the tasks of the search, flattered by having been chosen. held_out: None
    where the search was stopped, or nothing beat the untuned policy. samples, tokens_in,
    tokens_out: what all of it took. failed: samples without a reply; they count as wrong.
    """

    policy: str
    against: str
    untuned: float | None
    trials: list[PolicyTrial]
    numbers: list[LearnedNumber]
    searched: IntervalEstimate | None
    held_out: HeldOut | None
    tasks: tuple[int, int]
    samples: int
    tokens_in: int
    tokens_out: int
    failed: int
    complete: bool
    rows: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
