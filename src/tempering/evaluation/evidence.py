"""Evidence: the effect of a tuned profile on data that its search never saw, beside its controls.

    change = sum_i n_i (after_i - before_i) / sum_i n_i       nats per target, over pieces i

with a 95% interval from a bootstrap over clusters, such as documents (by default every piece is a
cluster): a cluster that is drawn brings all its pieces. For questions also the share answered
rightly: every token of the answer is the likeliest in its place, as greedy decoding needs.

Controls: the same temperatures shuffled over all heads, and negated (1/T).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from tempering.attention.control.tempered import tempered
from tempering.attention.profiles.profile import Profile
from tempering.attention.tuning.alternatives import Alternative
from tempering.attention.tuning.batches import Batch, target_logits
from tempering.attention.tuning.objectives import Constraint, Objective, Piece
from tempering.attention.tuning.outcome import Tuned
from tempering.attention.tuning.split import refuse_overlap
from tempering.attention.tuning.tunable import frozen
from tempering.errors import InputError
from tempering.evaluation.clusters import cluster_bootstrap
from tempering.evaluation.journal import Journal, Progress
from tempering.evaluation.paired import IntervalEstimate
from tempering.evaluation.shared_ledger import SharedLedger
from tempering.ranks import here


@dataclass(frozen=True)
class Contender:
    """One way to run the model, whose effect is measured.

    family: "tuned", "control" or "alternative". numbers: how many numbers were learned.
    active: gives a context manager in which the model runs in this way.
    """

    label: str
    family: str
    numbers: int
    active: Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class EvidenceRow:
    """The effect of one contender on one test, against the untempered model.

    metric: "loss" in nats per target, or "accuracy", a share. change: value - untempered.
    n: clusters. targets: tokens (of accuracy: questions).
    """

    label: str
    family: str
    numbers: int
    test: str
    metric: str
    untempered: float
    value: float
    change: IntervalEstimate
    targets: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a profile or a record; null where there is no interval."""
        interval = {"se": self.change.se, "low": self.change.low, "high": self.change.high}
        return {
            "label": self.label,
            "family": self.family,
            "numbers": self.numbers,
            "test": self.test,
            "metric": self.metric,
            "untempered": self.untempered,
            "value": self.value,
            "change": self.change.value,
            **{name: None if math.isnan(x) else x for name, x in interval.items()},
            "n": self.change.n,
            "targets": self.targets,
        }


def contenders(
    model: nn.Module,
    profile: Profile,
    *,
    numbers: int | None = None,
    shuffles: int = 5,
    alternatives: Sequence[Alternative] = (),
) -> list[Contender]:
    """The profile, its controls, and fitted alternatives.

    numbers: how many numbers the profile learned; None for one a head. shuffles: how many shuffled
        controls, with seeds 0, 1, ...
    """
    count = sum(len(row) for row in profile.rows)
    count = count if numbers is None else numbers

    def under(other: Profile) -> Callable[[], AbstractContextManager[Any]]:
        return lambda: tempered(model, other)

    found = [Contender("tuned", "tuned", count, under(profile))]
    found.append(Contender("negated", "control", count, under(profile.scaled(-1.0))))
    for seed in range(shuffles):
        label = f"shuffled, seed {seed}"
        found.append(Contender(label, "control", count, under(profile.shuffled(seed))))
    for item in alternatives:
        found.append(Contender(item.label, "alternative", item.numbers, item.active))
    return found


def measure_evidence(
    model: nn.Module,
    tests: Sequence[Objective],
    rivals: Sequence[Contender],
    *,
    learned: Sequence[Objective] = (),
    clusters: Mapping[str, Sequence[int]] | None = None,
    draws: int = 2000,
    seed: int = 0,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> list[EvidenceRow]:
    """Measure contenders on tests, paired with the untempered model.

    Parameters
    ----------
    tests: text or answers, each with a name of its own.
    learned: data that was learned from or watched; tests must not overlap it.
    clusters: test's name -> cluster of each piece.
    draws, seed: of the bootstrap. journal: keeps finished measurements for a later run.

    Raises DataError when a test overlaps `learned`, InputError for two tests or two contenders of
    one name, RankError where ranks were given different ones.
    """
    names = [test.name for test in tests]
    labels = [rival.label for rival in rivals]
    for kind, items in (("tests", names), ("contenders", labels)):
        if len(set(items)) != len(items):
            raise InputError(f"two {kind} have one name in {', '.join(items)}; rename one")
    refuse_overlap(learned, tests, "calibration and test")
    here().agree(
        {
            "tests": [(test.name, test.digest) for test in tests],
            "contenders": labels,
            "clusters": clusters,
            "draws and seed": (draws, seed),
        }
    )
    plain = Contender("", "", 0, contextlib.nullcontext)
    rows = []
    ledger = SharedLedger(journal)
    with frozen(model), torch.no_grad():
        for test in tests:
            groups = (clusters or {}).get(test.name, range(len(test.pieces)))
            if len(groups) != len(test.pieces):
                raise InputError(
                    f"'{test.name}' has {len(test.pieces)} pieces and {len(groups)} clusters; "
                    "give each piece its cluster"
                )
            measured = {}
            for place, rival in enumerate((plain, *rivals), 1):
                measured[rival.label] = _measure(model, test, rival, ledger)
                if progress is not None:
                    progress(f"evidence, {test.name}", place, len(rivals) + 1)
            for rival in rivals:
                after, before = measured[rival.label], measured[""]
                rows += _rows(test, rival, after, before, groups, draws, seed)
    return rows


def _measure(
    model: nn.Module, test: Objective, rival: Contender, ledger: SharedLedger
) -> dict[str, list[float]]:
    """{metric: a value for each piece} of one contender on one test."""
    name = f"{test.digest}:{rival.label}"
    if name in ledger:
        return dict(ledger[name])
    scores = torch.zeros(2, len(test.pieces), dtype=torch.float64)
    with here().together(), rival.active():
        for place in here().mine(len(test.pieces)):
            scores[:, place] = torch.tensor(_score(model, test.pieces[place]), dtype=torch.float64)
    (scores,) = here().sum(scores)
    found = {"loss": scores[0].tolist()}
    if test.kind == "answers":
        found["accuracy"] = scores[1].tolist()
    with here().together():
        ledger.put(name, found)
    return found


def _score(model: nn.Module, piece: Piece) -> tuple[float, float]:
    """Mean loss of a piece, and 1 where every target is the likeliest token."""
    if not isinstance(piece.source, Batch):
        return float(piece.losses(model).mean()), 0.0
    logits, goals = target_logits(model, piece.source)
    loss = torch.nn.functional.cross_entropy(logits.float(), goals)
    return float(loss), float((logits.argmax(-1) == goals).all())


def _rows(
    test: Objective,
    rival: Contender,
    after: dict[str, list[float]],
    before: dict[str, list[float]],
    groups: Sequence[int],
    draws: int,
    seed: int,
) -> list[EvidenceRow]:
    rows = []
    for metric, values in after.items():
        counts = [1 if metric == "accuracy" else piece.count for piece in test.pieces]
        weights = torch.tensor(counts, dtype=torch.float64)
        new, old = (torch.tensor(v, dtype=torch.float64) for v in (values, before[metric]))
        rows.append(
            EvidenceRow(
                label=rival.label,
                family=rival.family,
                numbers=rival.numbers,
                test=test.name,
                metric=metric,
                untempered=float((old * weights).sum() / weights.sum()),
                value=float((new * weights).sum() / weights.sum()),
                change=cluster_bootstrap(
                    new - old, weights, torch.tensor(list(groups)), seed=seed, draws=draws
                ),
                targets=sum(counts),
                seed=seed,
            )
        )
    return rows


def with_evidence(
    tuned: Tuned,
    objectives: Sequence[Objective],
    rows: Sequence[EvidenceRow],
    *,
    constraint: Constraint | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Profile:
    """The tuned profile with its evidence: how it was found, and what was measured."""
    evidence = {
        "made by": f"tempering {version('tempering')}",
        "tuned for": [
            {
                "name": o.name,
                "kind": o.kind,
                "weight": o.weight,
                "targets": o.count,
                "sha256": o.digest[:16],
            }
            for o in objectives
        ],
        "constraint": constraint
        and {
            "name": constraint.objective.name,
            "kind": constraint.kind,
            "within": constraint.within,
            tuned.watched: tuned.cost,
            "sha256": constraint.objective.digest[:16],
        },
        "numbers": len(tuned.names),
        "targets learned from": tuned.targets,
        "step": tuned.step,
        "room": tuned.room,
        "stopped because": tuned.stopped_because,
        "seed": tuned.seed,
        tuned.watched: {"untempered": tuned.before, "tuned": tuned.after},
        "settings": dict(settings or {}),
        "measured": [row.to_json() for row in rows],
    }
    return replace(tuned.profile, evidence=evidence)
