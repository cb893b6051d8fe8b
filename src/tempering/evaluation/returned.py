"""What compression took, and how much of it a repair gives back.

With c, r and u the losses of the compressed, the repaired and the uncompressed model on one piece
of text of n tokens, all paired:

    damage   = sum n (c - u) / sum n                  nats per token
    returned = sum n (c - r) / sum n                  nats per token
    share    = sum n (c - r) / sum n (c - u)          of the damage

Intervals are percentile bootstraps over pieces (or clusters of them), numerator and denominator
drawn together (Efron 1979). Agreement is the share of tokens for which a model's likeliest next
token is the uncompressed model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tempering.attention.tuning.batches import Batch, target_logits
from tempering.attention.tuning.objectives import Objective
from tempering.attention.tuning.tunable import frozen
from tempering.errors import DataError, InputError
from tempering.evaluation.clusters import cluster_bootstrap, cluster_ratio
from tempering.evaluation.journal import Journal
from tempering.evaluation.paired import IntervalEstimate


class PieceScores(NamedTuple):
    """A model on one test, a value for each piece.

    losses: mean -log q of its targets, nats. right: 1 where every target is the likeliest token.
    likeliest: the model's likeliest token at every target of each piece.
    """

    losses: list[float]
    right: list[float]
    likeliest: list[list[int]]


@dataclass(frozen=True)
class Returned:
    """One test: the three models' mean losses, what was taken and what came back.

    kind: "text" or "answers". agreement: before and after the repair. accuracy: of the three
    models, for answers. n: pieces. seed: of the bootstrap.
    """

    test: str
    kind: str
    reference: float
    compressed: float
    repaired: float
    damage: IntervalEstimate
    returned: IntervalEstimate
    share: IntervalEstimate
    agreement: tuple[float, float]
    accuracy: tuple[float, float, float]
    n: int
    seed: int

    def row(self) -> dict[str, Any]:
        """Plain values for a record; None where there is no interval."""

        def plain(estimate: IntervalEstimate) -> list[float | None]:
            ends = (estimate.value, estimate.low, estimate.high)
            return [None if math.isnan(end) else end for end in ends]

        share, low, high = plain(self.share)
        back, back_low, back_high = plain(self.returned)
        return {
            "test": self.test,
            "kind": self.kind,
            "reference": self.reference,
            "compressed": self.compressed,
            "repaired": self.repaired,
            "damage": self.damage.value,
            "returned": back,
            "returned_low": back_low,
            "returned_high": back_high,
            "share": share,
            "low": low,
            "high": high,
            "agreement_before": self.agreement[0],
            "agreement_after": self.agreement[1],
            **(
                dict(zip(("right_reference", "right_before", "right_after"), self.accuracy))
                if self.kind == "answers"
                else {}
            ),
            "n": self.n,
            "level": 0.95,
        }


def score(
    model: nn.Module,
    tests: Sequence[Objective],
    *,
    label: str,
    journal: Journal | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, PieceScores]:
    """A model's scores on every test, by name.

    label: names the model in the journal, which keeps finished tests.
    """
    names = [test.name for test in tests]
    if len(set(names)) != len(names):
        raise InputError(f"two tests have one name in {', '.join(names)}; rename one")
    found = {}
    with frozen(model), torch.no_grad():
        for test in tests:
            key = f"{label}:{test.digest}"
            if journal is not None and key in journal:
                found[test.name] = PieceScores(**journal[key])
                continue
            own = PieceScores([], [], [])
            for done, piece in enumerate(test.pieces, 1):
                if not isinstance(piece.source, Batch):
                    raise DataError(f"'{test.name}' is no text; damage is measured on tokens")
                logits, goals = target_logits(model, piece.source)
                likeliest = logits.argmax(-1)
                own.losses.append(float(torch.nn.functional.cross_entropy(logits.float(), goals)))
                own.right.append(float((likeliest == goals).all()))
                own.likeliest.append(likeliest.tolist())
                if progress is not None:
                    progress(f"{label}, {test.name}", done, len(test.pieces))
            if journal is not None:
                journal.put(key, own._asdict())
            found[test.name] = own
    return found


def returned(
    test: Objective,
    reference: PieceScores,
    compressed: PieceScores,
    repaired: PieceScores,
    *,
    clusters: Sequence[int] | None = None,
    seed: int = 0,
) -> Returned:
    """Set the three models' scores on one test side by side.

    clusters: the cluster of each piece; every piece is its own without them.
    """
    counts = torch.tensor([piece.count for piece in test.pieces], dtype=torch.float64)
    u, c, r = (
        torch.tensor(scores.losses, dtype=torch.float64)
        for scores in (reference, compressed, repaired)
    )
    groups = torch.arange(len(counts)) if clusters is None else torch.tensor(list(clusters))

    def mean(values: Tensor) -> float:
        return float((values * counts).sum() / counts.sum())

    return Returned(
        test=test.name,
        kind=test.kind,
        reference=mean(u),
        compressed=mean(c),
        repaired=mean(r),
        damage=cluster_bootstrap(c - u, counts, groups, seed=seed),
        returned=cluster_bootstrap(c - r, counts, groups, seed=seed),
        share=cluster_ratio((c - r) * counts, (c - u) * counts, groups, seed=seed),
        agreement=(agreement(compressed, reference), agreement(repaired, reference)),
        accuracy=(_right(reference), _right(compressed), _right(repaired)),
        n=len(counts),
        seed=seed,
    )


def _right(scores: PieceScores) -> float:
    return sum(scores.right) / len(scores.right)


def agreement(one: PieceScores, other: PieceScores) -> float:
    """Share of targets whose likeliest token is the same under both."""
    same = [
        a == b
        for first, second in zip(one.likeliest, other.likeliest, strict=True)
        for a, b in zip(first, second, strict=True)
    ]
    return sum(same) / len(same)
