"""Statistics of softmaxes: entropy, support, peak, sink share and more, by query and summed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.attention.measuring.streaming import Moments
from tempering.errors import EnergyError
from tempering.ranks import Ranks


class QueryStatistics(NamedTuple):
    """Statistics of one layer's posteriors; all Float[Tensor, "batch heads q_seq"], float64.

    Logits x = -d/T are the finished logits of a softmax, r = softmax(x). Per query:

        S = log Z - sum r x            entropy, nats
        U/T = -sum r x                 mean energy in units of T, nats
        C = Var_r(x)                   heat capacity, nats
        max r                          peak, 1/keys..1
        r of the sink                  the first key, or the learned sink logit
        -log sum r^2                   log of the inverse-Simpson support (Hill number of order 2)
        1 - sum r^2                    saturation: trace of the softmax's Jacobian; 0 = saturated
        sum r |i - j|                  distance of query i to the keys j it attends to, tokens

    `..._without_sink`: of r renormalised over all keys but the sink. A learned sink stands at no
    place, nor does a class token among patches, so distances are over the keys with a place, with
    r renormalised over these. seen: 1 where a query sees anything; others: 1 where it sees more
    than the sink; located, located_others: the same, and it has a distance.
    """

    seen: Tensor
    others: Tensor
    entropy: Tensor
    mean_energy: Tensor
    heat_capacity: Tensor
    peak: Tensor
    sink_share: Tensor
    log_simpson: Tensor
    saturation: Tensor
    distance: Tensor
    entropy_without_sink: Tensor
    distance_without_sink: Tensor
    located: Tensor
    located_others: Tensor

    def without(self, names: Iterable[str]) -> QueryStatistics:
        """The same with NaN for some of them."""
        return self._replace(**{name: torch.full_like(self.seen, math.nan) for name in names})


# Statistics that depend on where the keys stand, and on which of them is the sink.
OF_DISTANCE = ("distance", "distance_without_sink")
OF_SINK = ("sink_share", "entropy_without_sink")


def statistics_of_moments(
    found: Moments,
    sink: Tensor,
    *,
    learned: bool,
    first: int = 0,
    places: Float[Tensor, "tokens axes"] | None = None,
) -> QueryStatistics:
    """The statistics of posteriors over the sink and the keys that `found` sums.

    The sink is added in closed form, from the log odds of the other keys against it. Subtracting
    it from sums over all keys would lose digits where it holds nearly all the weight.

    Parameters
    ----------
    found: moments over all keys but the sink.
    sink: Float[Tensor, "batch heads q_seq"], its logits; -inf where hidden.
    learned: whether it is a learned logit rather than the first key.
    first: position of the first query among the keys.
    places: where each token stands, as for `moments`.

    Raises EnergyError when a logit was NaN or infinite.
    """
    sink = sink.double()
    others = found.partition > 0
    z = found.partition.where(others, torch.ones((), dtype=sink.dtype, device=sink.device))
    log_z = torch.where(others, found.top + z.log(), found.top)
    _check(log_z, sink)
    mean = torch.where(others, found.top + found.first / z, torch.zeros_like(z))
    entropy = (z.log() - found.first / z).clamp(min=0)
    capacity = (found.second / z - (found.first / z).square()).clamp(min=0)
    squares = found.squares / z.square()
    there = sink > -torch.inf
    at_sink = sink.where(there, torch.zeros_like(sink))
    odds = torch.where(there, log_z - at_sink, torch.inf)  # -inf where the sink is alone
    share, rest = torch.sigmoid(-odds), torch.sigmoid(odds)
    seen = (others | there).double()
    share, rest = share * seen, rest * seen
    both = others & there
    logs = torch.nn.functional.logsigmoid(torch.stack([-odds, odds]).masked_fill(~both, 0.0))
    binary = -(share * logs[0] + rest * logs[1]) * both
    simpson = share.square() + rest.square() * squares
    if places is None:
        distance = found.distance / z
        away = torch.arange(first, first + sink.shape[-1], device=sink.device).abs().to(sink)
        with_sink = distance if learned else rest * distance + share * away
        located, located_others = seen, others.double()
    else:
        with_sink, distance, located, located_others = _distances_between(
            found, z, share, rest, places.to(sink)
        )
    return QueryStatistics(
        seen=seen,
        others=others.double(),
        entropy=binary + rest * entropy,
        mean_energy=-(rest * mean + share * at_sink),
        heat_capacity=rest * capacity + share * rest * (mean - at_sink).square(),
        peak=torch.maximum(share, rest / z),
        sink_share=share,
        log_simpson=-torch.where(seen > 0, simpson, torch.ones_like(simpson)).log(),
        saturation=2 * share * rest + rest.square() * (z.square() - found.squares) / z.square(),
        distance=with_sink,
        entropy_without_sink=entropy,
        distance_without_sink=distance,
        located=located,
        located_others=located_others,
    )


def _distances_between(
    found: Moments, z: Tensor, share: Tensor, rest: Tensor, places: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distances with and without the sink among tokens that have places, and where there are any.

    A token without a place is at no distance: as a key it is left out, as a query not counted.
    """
    has_place = ~places.isnan().any(-1)
    away = (places - places[0]).norm(dim=-1).nan_to_num(0.0)
    at_sink = share * has_place[0]
    weight = rest * found.placed / z
    others = (found.placed > 0) & has_place
    every = ((weight + at_sink) > 0) & has_place
    one = torch.ones_like(z)
    distance = found.distance / torch.where(others, found.placed, one)
    with_sink = (rest * found.distance / z + at_sink * away) / torch.where(
        every, weight + at_sink, one
    )
    return with_sink * every, distance * others, every.double(), others.double()


def _check(log_z: Tensor, sink: Tensor) -> None:
    bad = log_z.isnan() | sink.isnan() | (log_z == torch.inf) | (sink == torch.inf)
    if bool(bad.any()):
        row, head, query = (int(i) for i in bad.nonzero()[0])
        raise EnergyError(
            f"head {head}, query {query} (row {row} of the batch): a logit is NaN or infinite; "
            "the model can't be measured on this input (try --dtype float32)"
        )


# Which queries a statistic is a mean over, where that is not all that see anything.
_COUNTS = {
    "entropy_without_sink": "others",
    "distance": "located",
    "distance_without_sink": "located_others",
}


@dataclass
class StatisticSums:
    """Sums over queries of the statistics of one layer, per head and bucket of positions.

    All are Float[Tensor, "heads buckets"] in float64; see `QueryStatistics`.
    """

    seen: Tensor
    others: Tensor
    entropy: Tensor
    mean_energy: Tensor
    heat_capacity: Tensor
    peak: Tensor
    sink_share: Tensor
    log_simpson: Tensor
    saturation: Tensor
    distance: Tensor
    entropy_without_sink: Tensor
    distance_without_sink: Tensor
    located: Tensor
    located_others: Tensor

    @classmethod
    def zeros(cls, heads: int, buckets: int = 1) -> StatisticSums:
        """Nothing summed yet."""
        return cls(*(torch.zeros(heads, buckets, dtype=torch.float64) for _ in fields(cls)))

    def merge(self, other: StatisticSums) -> None:
        """Add another sum over the same heads and buckets."""
        for field in fields(self):
            getattr(self, field.name).add_(getattr(other, field.name))

    def share(self, ranks: Ranks) -> None:
        """Add those of all ranks."""
        names = [field.name for field in fields(self)]
        for name, total in zip(names, ranks.sum(*(getattr(self, name) for name in names))):
            setattr(self, name, total)

    def add(self, statistics: QueryStatistics) -> None:
        """Add the statistics of queries; those in the first 1/buckets of the text come first."""
        bucket = buckets_of(statistics.seen.shape[-1], self.seen.shape[1])
        for name, values in zip(QueryStatistics._fields, statistics, strict=True):
            getattr(self, name).index_add_(1, bucket, values.sum(0).cpu())

    def mean(self, name: str) -> Float[Tensor, "heads buckets"]:
        """The mean over queries; over those that see more than the sink where it is left out."""
        return getattr(self, name) / getattr(self, _COUNTS.get(name, "seen"))

    def overall(self, name: str) -> Float[Tensor, "heads"]:
        """`mean` over all buckets."""
        return getattr(self, name).sum(1) / getattr(self, _COUNTS.get(name, "seen")).sum(1)


def buckets_of(length: int, buckets: int) -> Int[Tensor, "length"]:
    """The bucket of every position: `buckets` parts of the length, as equal as can be."""
    return torch.arange(length) * buckets // length


def posterior_statistics(
    logits: Float[Tensor, "*batch keys"], sink: int = 0
) -> tuple[
    Float[Tensor, "*batch"],
    Float[Tensor, "*batch"],
    Float[Tensor, "*batch"],
    Float[Tensor, "*batch"],
]:
    """Entropy, heat capacity, peak and the share of key `sink` of softmax(logits).

    A row without a finite logit gives zeros.
    """
    top = logits.amax(-1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, torch.zeros((), dtype=top.dtype, device=top.device))
    x = logits - top
    weights = x.exp()
    norm = weights.sum(-1, keepdim=True)
    weights = weights / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    x = x.masked_fill(x == float("-inf"), 0.0)
    weighted = weights * x
    mean = weighted.sum(-1)
    entropy = torch.where(norm[..., 0] > 0, norm[..., 0].log() - mean, torch.zeros_like(mean))
    capacity = (weighted * x).sum(-1) - mean.square()
    return entropy.clamp(min=0), capacity.clamp(min=0), weights.amax(-1), weights[..., sink]
