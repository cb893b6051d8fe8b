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
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.attention.tuning.live import frozen
from tempering.attention.tuning.objective import Batch, target_logits
from tempering.attention.tuning.pieces import Objective
from tempering.errors import DataError, InputError
from tempering.evaluation.evidence import cluster_bootstrap
from tempering.evaluation.journal import Journal
from tempering.evaluation.paired import Estimate


class Scores(NamedTuple):
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
    damage: Estimate
    returned: Estimate
    share: Estimate
    agreement: tuple[float, float]
    accuracy: tuple[float, float, float]
    n: int
    seed: int

    def row(self) -> dict[str, Any]:
        """Plain values for a record; None where there is no interval."""

        def plain(estimate: Estimate) -> list[float | None]:
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
) -> dict[str, Scores]:
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
                found[test.name] = Scores(**journal[key])
                continue
            own = Scores([], [], [])
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
    reference: Scores,
    compressed: Scores,
    repaired: Scores,
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


def _right(scores: Scores) -> float:
    return sum(scores.right) / len(scores.right)


def agreement(one: Scores, other: Scores) -> float:
    """Share of targets whose likeliest token is the same under both."""
    same = [
        a == b
        for first, second in zip(one.likeliest, other.likeliest, strict=True)
        for a, b in zip(first, second, strict=True)
    ]
    return sum(same) / len(same)


def cluster_ratio(
    tops: Float[Tensor, "pieces"],
    bottoms: Float[Tensor, "pieces"],
    clusters: Int[Tensor, "pieces"],
    *,
    seed: int,
    draws: int = 2000,
) -> Estimate:
    """sum tops / sum bottoms with a percentile bootstrap over whole clusters.

    NaN where the bottoms sum to 0 or less: of nothing, no share can come back.
    """
    _, places = clusters.unique(return_inverse=True)
    count = int(places.max()) + 1
    top = torch.zeros(count, dtype=torch.float64).index_add_(0, places, tops)
    bottom = torch.zeros(count, dtype=torch.float64).index_add_(0, places, bottoms)
    if not float(bottom.sum()) > 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, count)
    value = float(top.sum() / bottom.sum())
    if count == 1:
        return Estimate(value, math.nan, math.nan, math.nan, 1)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(count, (draws, count), generator=generator)
    below = bottom[picks].sum(1)
    # A draw without damage has no share: such draws make the interval endless, not shorter.
    drawn = torch.where(below > 0, top[picks].sum(1) / below, torch.inf)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    spread = float(drawn.std()) if bool(drawn.isfinite().all()) else math.inf
    return Estimate(value, spread, low, high, count)
