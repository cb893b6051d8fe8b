"""The law of length of every head, from measurement alone: no gradient, no loss.

For each head, T(n) is solved for at every length n so that something stays as it is at n0 with
T = 1, and log T is fitted by a line in log n, weighted by queries:

    support    the mean entropy S stays
    peak       the mean log of the largest weight stays
    critical   T(n) is proportional to the critical temperature of Karakida and Hayase,
               1/T_c(n) = max_g (mean log N_n(g)) / g

In theory, 1/T grows as (log n)^p: with p = 1/2 where logits are normal, 1 where many keys crowd
within a fixed gap of the best, 2 where the crowd comes closer. `exponent` is p by `critical`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.attention.examining.layout_of import layout
from tempering.attention.examining.subject import unwrapped
from tempering.attention.layout import AttentionLayer
from tempering.attention.measuring.gaps import (
    BINS,
    FEWEST,
    TEMPERATURES,
    GapObserver,
    GapSums,
    gap_edges,
)
from tempering.attention.measuring.measure import run_layers, watching
from tempering.attention.profiles.adaptive import check_layer
from tempering.attention.profiles.length_rules import Power
from tempering.attention.profiles.profile import Profile
from tempering.attention.profiles.rule_base import PerHead
from tempering.errors import ArchitectureError, DataError, InputError
from tempering.inputs.example import as_inputs

HOLDS = ("support", "peak", "critical")
_NEAREST = 0.25  # nats
_LEAST_BUCKETS = 4  # two octaves: fewer lengths tell no slope


@dataclass(frozen=True, eq=False)
class MeasuredLaw:
    """How the temperature of each head must change with the length.

    layers: one a row. lengths: Float[Tensor, "lengths"], the geometric mean of n in each bucket.
    length: n0. lengths_kept: of each layer, where T = 1: n0, or the longest that it sees, where a
    window ends before n0. slopes: for each of `HOLDS`, Float[Tensor, "layers heads"] of log T in
    log n; NaN where a head has too few lengths, or none that T from 1/4 to 4 can hold.
    exponent: Float[Tensor, "layers heads"], p of 1/T_c ~ (log n)^p.
    counted: Float[Tensor, "layers heads lengths edges"], the mean of N_n(g) at `gaps`, nats.
    """

    layers: tuple[AttentionLayer, ...]
    lengths: Tensor
    length: int
    lengths_kept: tuple[float, ...]
    slopes: dict[str, Tensor]
    exponent: Tensor
    counted: Tensor
    gaps: Tensor

    def profile(self, model: nn.Module, hold: str = "support") -> Profile:
        """T = (n / n0)^slope for every head, as a profile; heads without a slope keep T = 1.

        n0 is that of the layer, in `lengths_kept`.
        """
        if hold not in HOLDS:
            raise InputError(f"a law holds {', '.join(HOLDS)}; not '{hold}'")
        for layer in self.layers:
            check_layer(layer, Power(0.0, float(self.length)))
        rules = tuple(
            Power(PerHead(row[: layer.heads].nan_to_num(0.0).tolist()), kept)
            for layer, row, kept in zip(
                self.layers, self.slopes[hold], self.lengths_kept, strict=True
            )
        )
        return Profile.neutral(model).with_rules(rules)


def measure_law(
    model: nn.Module,
    chunks: Int[Tensor, "chunks length"],
    *,
    length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MeasuredLaw:
    """Count gaps on token ids, and solve for the slopes.

    Parameters
    ----------
    chunks: texts that are read separately; slopes hold for their lengths.
    length: n0, by default a chunk over e: there log n has its mean.
    progress: called with (chunks done, chunks in all).

    Raises DataError for chunks too short to tell a slope, ArchitectureError where a layer attends
    by code of its own.
    """
    if chunks.ndim != 2 or chunks.numel() == 0:
        raise InputError(
            "measuring needs at least one chunk of tokens, [chunks, length], not "
            f"{tuple(chunks.shape)}"
        )
    tokens = chunks.shape[1]
    least = FEWEST * 2 ** (_LEAST_BUCKETS // 2)
    if tokens < least:
        raise DataError(
            f"a law of length is told from lengths of {FEWEST} to {least} keys at least, and a "
            f"chunk has {tokens}; give longer chunks"
        )
    n0 = max(FEWEST, round(tokens / math.e)) if length is None else length
    if not FEWEST <= n0 <= tokens:
        raise InputError(f"n0 lies in {FEWEST} to {tokens}, the length of a chunk, not {n0}")
    model = unwrapped(model)
    model_layout = layout(model)
    for layer in model_layout.layers:
        check_layer(layer, Power(0.0, float(n0)))
        if layer.route != "interface":
            raise ArchitectureError(
                f"{layer.name} has attention code of its own, which forms its logits by itself; "
                "gaps are counted from queries and keys"
            )
    modules = [model.get_submodule(layer.name) for layer in model_layout.layers]
    observer = GapObserver(
        {id(m): own for m, own in zip(modules, model_layout.layers, strict=True)}
    )
    with watching(model, model_layout, None, observer):
        for index, example in enumerate(as_inputs(chunks, model)):
            run_layers(model, model_layout, example)
            if progress is not None:
                progress(index + 1, len(chunks))
    return _law(model_layout.layers, observer.sums, n0)


def _law(layers: tuple[AttentionLayer, ...], sums: dict[str, GapSums], n0: int) -> MeasuredLaw:
    wide = max(layer.heads for layer in layers)
    nan = torch.full((len(layers), wide), torch.nan, dtype=torch.float64)
    slopes, exponent = {name: nan.clone() for name in HOLDS}, nan.clone()
    known = [sums[layer.name] for layer in layers]
    used = (torch.stack([own.queries for own in known]) > 0).any(0)
    counted = nan.new_full((len(layers), wide, int(used.sum()), BINS + 1), torch.nan)
    total = torch.stack([own.queries for own in known]).sum(0)[used]
    lengths = (torch.stack([own.log_n for own in known]).sum(0)[used] / total).exp()
    kept = [float(n0)] * len(layers)
    for index, (layer, own) in enumerate(zip(layers, known, strict=True)):
        counted[index, : layer.heads] = (own.counted / own.queries[:, None]).cumsum(-1)[:, used]
        there = own.queries > 0
        if int(there.sum()) < _LEAST_BUCKETS:
            continue  # a window of a few keys
        weight = own.queries[there]
        log_n = own.log_n[there] / weight
        kept[index] = min(float(n0), float(log_n.max().exp()))
        for head in range(layer.heads):
            mean = {
                "support": own.entropy[head, there] / weight[:, None],
                "peak": -own.log_peak[head, there] / weight[:, None],
            }
            for name, curves in mean.items():
                log_t = _held(curves, log_n, torch.tensor(kept[index]).log())
                slopes[name][index, head] = _slope(log_n, log_t, weight)
            log_beta = critical(own.log_counted[head, there] / weight[:, None]).log()
            slopes["critical"][index, head] = _slope(log_n, -log_beta, weight)
            exponent[index, head] = _slope(log_n.log(), log_beta, weight)
    return MeasuredLaw(layers, lengths, n0, tuple(kept), slopes, exponent, counted, gap_edges())


def critical(log_counted: Float[Tensor, "lengths bins"]) -> Float[Tensor, "lengths"]:
    """1/T_c = max_g (mean log N_n(g)) / g, over the edges of bins from a quarter of a nat on.

    Nearer, single queries whose two best keys happen to tie would decide.
    """
    edges = gap_edges()
    far = edges >= _NEAREST
    return (log_counted[:, far] / edges[far]).amax(-1)


def _held(
    curves: Float[Tensor, "lengths temperatures"], log_n: Tensor, log_n0: Tensor
) -> Float[Tensor, "lengths"]:
    """log T at each length that gives a quantity the value that it has at n0 with T = 1.

    curves: the quantity, rising with T. NaN where no T of the grid gives it.
    """
    log_t = TEMPERATURES.log()
    at_one = torch.stack([_interpolated(log_t, curve, log_t.new_zeros(())) for curve in curves])
    level = _interpolated(log_n, at_one, log_n0)
    found = []
    for curve in curves:
        inside = bool(curve[0] <= level <= curve[-1]) and bool(curve[-1] > curve[0])
        value = _interpolated(curve, log_t, level) if inside else log_t.new_tensor(torch.nan)
        found.append(value)
    return torch.stack(found)


def _interpolated(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """y at a place between rising x, linearly; the end values beyond."""
    place = int(torch.searchsorted(x.contiguous(), at.to(x)).clamp(1, len(x) - 1))
    span = x[place] - x[place - 1]
    share = ((at - x[place - 1]) / span).clamp(0, 1) if float(span) > 0 else at.new_zeros(())
    return y[place - 1] + share * (y[place] - y[place - 1])


def _slope(x: Tensor, y: Tensor, weight: Tensor) -> float:
    """Of y in x by weighted least squares; NaN with fewer than `_LEAST_BUCKETS` known values."""
    known = y.isfinite()
    if int(known.sum()) < _LEAST_BUCKETS:
        return float("nan")
    x, y, weight = x[known], y[known], weight[known] / weight[known].sum()
    x, y = x - (weight * x).sum(), y - (weight * y).sum()
    return float((weight * x * y).sum() / (weight * x * x).sum())
