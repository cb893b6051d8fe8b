"""How many keys compete with the best one: the gap-counting function N_n(g), streamed.

    N_n(g) = number of keys whose logit is within g of the largest, of the n that a query sees

It decides the softmax at every temperature,

    Z(T) = sum_k exp(-g_k / T) = int (1/T) exp(-g/T) N_n(g) dg,
    S(T) = log Z + (1/(T Z)) sum_k g_k exp(-g_k / T),    peak(T) = 1/Z(T)

so how a temperature must change with n to keep the entropy S, or the peak, follows from it (`law`).
Gaps are counted in bins, narrow near 0 and wider farther out, and taken to lie evenly in each; the
best key itself is exact. That moves S by less than 0.01 nats at T >= 1/4.

Source: Karakida and Hayase, "A unified framework for critical scaling of inverse temperature in
self-attention" (arXiv 2605.12697).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.attention.control.layer_rule import seen_keys
from tempering.attention.layout import AttentionLayer
from tempering.attention.logits import AttentionCall
from tempering.attention.measuring.streaming import tiles
from tempering.errors import ArchitectureError

# The upper edge of bin k is FARTHEST (k / BINS)^2 nats. At T = 4, 10^5 keys beyond weigh 5 in all.
FARTHEST, BINS = 40.0, 320
# T at which S and the peak are known; slopes that theory gives move T by less over a context.
TEMPERATURES = torch.logspace(math.log10(0.25), math.log10(4), 33, dtype=torch.float64)
# Lengths fall into half octaves from 16 keys on; below, supports of a few keys say little.
FEWEST, PER_OCTAVE, OCTAVES = 16, 2, 20
BUCKETS = PER_OCTAVE * OCTAVES


def gap_edges() -> Float[Tensor, "edges"]:
    """The edges of the bins, from 0 on, nats."""
    return FARTHEST * (torch.arange(BINS + 1, dtype=torch.float64) / BINS).square()


def bin_weights() -> tuple[Tensor, Tensor]:
    """The means of exp(-g/T) and of g/T exp(-g/T) in each bin, Float[Tensor, "bins temperatures"].

    The first bin is the best key, of gap 0.
    """
    T = TEMPERATURES[None]
    edges = gap_edges()[:, None]
    low, high, width = edges[:-1], edges[1:], edges.diff(dim=0)
    at_low, at_high = torch.exp(-low / T), torch.exp(-high / T)
    weight = (at_low - at_high) * T / width
    energy = ((low + T) * at_low - (high + T) * at_high) / width
    first = torch.ones_like(T)
    return torch.cat([first, weight]), torch.cat([torch.zeros_like(T), energy])


def bucket_of(n: Int[Tensor, "*queries"]) -> Int[Tensor, "*queries"]:
    """The bucket of a length, -1 below `FEWEST` keys."""
    found = (PER_OCTAVE * (n.double() / FEWEST).log2()).floor().long().clamp(max=BUCKETS - 1)
    return torch.where(n >= FEWEST, found, -1)


@dataclass
class GapSums:
    """Sums over the queries of one layer, by head and length; float64.

    queries: Float[Tensor, "buckets"]. log_n: of log n. counted: Float[Tensor, "heads buckets
    bins"], of keys in each bin of gaps. log_counted: of log N_n at the upper edge of each bin.
    entropy, log_peak: Float[Tensor, "heads buckets temperatures"].
    """

    heads: int
    queries: Tensor = field(init=False)
    log_n: Tensor = field(init=False)
    counted: Tensor = field(init=False)
    log_counted: Tensor = field(init=False)
    entropy: Tensor = field(init=False)
    log_peak: Tensor = field(init=False)

    def __post_init__(self) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        self.queries, self.log_n = zeros(BUCKETS), zeros(BUCKETS)
        self.counted = zeros(self.heads, BUCKETS, BINS + 1)
        self.log_counted = torch.zeros_like(self.counted)
        self.entropy = zeros(self.heads, BUCKETS, len(TEMPERATURES))
        self.log_peak = torch.zeros_like(self.entropy)

    def add(self, call: AttentionCall) -> None:
        """Count the gaps of every query of an attention call."""
        seen = seen_keys(call)
        if seen.shape[1] != 1:
            raise ArchitectureError(
                "heads of one layer see different keys, so a length of the layer has no meaning"
            )
        seen = seen[:, 0].cpu()
        for row in seen:
            known = bucket_of(row)
            kept = known >= 0
            self.queries.index_add_(0, known[kept], torch.ones(int(kept.sum())).double())
            self.log_n.index_add_(0, known[kept], row[kept].double().log())
        memory: dict[int, Tensor] = {}

        def space(which: int, shape: tuple[int, ...]) -> Tensor:
            size = math.prod(shape)
            if which not in memory or memory[which].numel() < size:
                memory[which] = torch.empty(size, device=call.query.device, dtype=call.work)
            return memory[which][:size].view(shape)

        for tile in tiles(call, 0, space):
            own = seen[tile.row, tile.queries.start : tile.queries.stop]
            buckets = bucket_of(own)
            if bool((buckets >= 0).any()):
                counts = binned(tile.logits * math.log(2)).cpu()
                self._reduce(counts, tile.heads, buckets)

    def _reduce(
        self, counts: Float[Tensor, "heads queries bins"], heads: slice, buckets: Tensor
    ) -> None:
        kept = buckets >= 0
        counts, buckets = counts[:, kept].double(), buckets[kept]
        weights, energies = bin_weights()
        z, energy = counts @ weights, counts @ energies
        self.entropy[heads].index_add_(1, buckets, z.log() + energy / z)
        self.log_peak[heads].index_add_(1, buckets, -z.log())
        self.counted[heads].index_add_(1, buckets, counts)
        self.log_counted[heads].index_add_(1, buckets, counts.cumsum(-1).log())


def binned(logits: Float[Tensor, "heads queries keys"]) -> Float[Tensor, "heads queries bins"]:
    """How many keys of each query fall into each bin of gaps below its largest logit, nats."""
    gap = logits.amax(-1, keepdim=True) - logits
    # Bin 0 holds the best key alone; gaps beyond the last bin, and hidden keys, are dropped.
    place = (gap / FARTHEST).sqrt_().mul_(BINS).ceil_().clamp_(max=BINS + 1).long()
    rows = place.shape[0] * place.shape[1]
    offset = torch.arange(rows, device=place.device).view(*place.shape[:2], 1) * (BINS + 2)
    counts = torch.bincount((place + offset).flatten(), minlength=rows * (BINS + 2))
    return counts.view(*place.shape[:2], BINS + 2)[..., : BINS + 1].to(torch.float64)


class GapObserver:
    """Counts the gaps of all that it is shown; for `watching`."""

    def __init__(self, layers: dict[int, AttentionLayer]) -> None:
        self.layers = layers
        self.sums = {layer.name: GapSums(layer.heads) for layer in layers.values()}
        self.rules: Any = dict

    def see_call(
        self, module: Any, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> None:
        """Called with the arguments of an attention function, temperatures applied."""
        layer = self.layers[id(getattr(module, "_module", module))]
        self.sums[layer.name].add(AttentionCall.of(module, query, key, mask, kwargs))
