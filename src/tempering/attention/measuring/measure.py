"""How many keys stay alive in every head of a model, on real text."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.attention.axes import FOLDED, STANDARD
from tempering.attention.control.handle import Tempering
from tempering.attention.control.layer_rule import RuleCount
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.examining.stored import input_device
from tempering.attention.examining.subject import check_subject, unwrapped
from tempering.attention.layout import AttentionLayer, Layout
from tempering.attention.logits import AttentionCall
from tempering.attention.measuring import fused
from tempering.attention.measuring.statistics import (
    OF_DISTANCE,
    OF_SINK,
    QueryStatistics,
    StatisticSums,
    buckets_of,
    statistics_of_moments,
)
from tempering.attention.measuring.streaming import first_key, moments, moments_of_logits
from tempering.attention.modes import evaluation_mode
from tempering.attention.profiles.fingerprint import agree_on_model
from tempering.attention.profiles.profile import Profile
from tempering.chunks import chunks_digest, token_chunks
from tempering.errors import EnergyError, InputError
from tempering.ranks import Ranks, here
from tempering.text_tables import TextTable

QUANTITIES = (
    "entropy",
    "support",
    "support_without_sink",
    "support_simpson",
    "peak",
    "sink_share",
    "mean_energy",
    "heat_capacity",
    "saturation",
    "distance",
    "distance_without_sink",
)
# Quantities that are the exponential of a mean, and of which.
_EXPONENTIALS = {
    "support": "entropy",
    "support_without_sink": "entropy_without_sink",
    "support_simpson": "log_simpson",
}


@dataclass(frozen=True, eq=False)
class Measurement:
    """What the heads of a model kept of their keys on a text; means over queries.

    All tensors are Float[Tensor, "layers heads"] (float64, NaN where a layer has fewer heads).

    entropy: mean of S, nats. support: exp(mean S), keys.
    support_without_sink: the same for the posterior renormalised over all keys but the sink
        (the first key, or the learned sink logit where the architecture has one).
    support_simpson: exp(mean of -log sum r^2), keys; at most `support` for each query.
    peak: mean of max r. sink_share: mean r of the sink.
    mean_energy: mean U/T = -mean sum r x for logits x, nats. heat_capacity: mean Var_r(d)/T^2.
    saturation: mean of 1 - sum r^2, the trace of the softmax's Jacobian: near 0 it is saturated.
    distance: mean of sum r |i - j|, tokens between a query and the keys it attends to;
        distance_without_sink: the same with the sink left out.
    entropy_by_chunk: Float[Tensor, "chunks layers heads"], for intervals.
    by_position: each quantity as Float[Tensor, "layers heads buckets"] over equal parts of the
        queries' positions; positions: the first and last position of each part.
    rules: for each layer with rules of the profile, how often they acted and T met its bounds.

    Where keys are not the tokens of the queries, in their order (cross attention; windows, blocks
    and compressed keys), distances are NaN; but for cross attention, so is what the first key
    would be the sink of.
    """

    layers: tuple[AttentionLayer, ...]
    entropy: Tensor
    support: Tensor
    support_without_sink: Tensor
    support_simpson: Tensor
    peak: Tensor
    sink_share: Tensor
    mean_energy: Tensor
    heat_capacity: Tensor
    saturation: Tensor
    distance: Tensor
    distance_without_sink: Tensor
    entropy_by_chunk: Tensor
    chunk_length: int
    by_position: dict[str, Tensor]
    positions: tuple[tuple[int, int], ...]
    rules: dict[str, list[RuleCount]] = field(default_factory=dict)

    @property
    def layer_support(self) -> Float[Tensor, "layers"]:
        """exp of the mean entropy over heads and queries: the support of each layer, keys."""
        return self.entropy.nanmean(dim=1).exp()

    @property
    def layer_support_without_sink(self) -> Float[Tensor, "layers"]:
        """The same with the sink left out."""
        return self.support_without_sink.log().nanmean(dim=1).exp()

    @property
    def layer_interval(self) -> Float[Tensor, "layers 2"]:
        """95% interval of `layer_support` over chunks (Student t); NaN with a single chunk."""
        from tempering.intervals import t_quantile

        means = self.entropy_by_chunk.nanmean(dim=2)
        chunks = len(means)
        if chunks < 2:
            return torch.full((means.shape[1], 2), math.nan, dtype=torch.float64)
        half = t_quantile(chunks - 1) * means.std(dim=0) / math.sqrt(chunks)
        middle = means.mean(dim=0)
        return torch.stack([middle - half, middle + half], dim=1).exp()

    def to_json(self) -> dict[str, Any]:
        """Names, matrices and layer means, for a record."""
        return {
            "layers": [layer.name for layer in self.layers],
            "chunks": len(self.entropy_by_chunk),
            "chunk_length": self.chunk_length,
            "layer_support": self.layer_support.tolist(),
            "layer_support_without_sink": self.layer_support_without_sink.tolist(),
            **{name: getattr(self, name).tolist() for name in QUANTITIES},
        }


def measure(
    model: nn.Module,
    tokenizer: Any,
    text: str | TextTable,
    *,
    profile: Profile | None = None,
    chunk: int = 512,
    limit: int | None = None,
    buckets: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Run a model over a text and measure the posterior of every head at every query.

    Parameters
    ----------
    model, tokenizer: of transformers.
    text: at least one chunk of tokens, or a table of texts; chunks are read separately.
    profile: temperatures to measure under; those already in force count as well.
    chunk: tokens in a chunk. limit: chunks at most, spread over the text.
    buckets: parts of a chunk that `by_position` tells apart; 4 by default.
    progress: called with (chunks done, chunks in all).

    Memory is linear in the length of a chunk. The ranks of a run (`tempering.ranks`) share the
    chunks. Raises DataError when the text is too short,
    ArchitectureError when the model's attention can't be observed exactly, EnergyError when a
    logit is NaN or infinite.
    """
    check_subject(unwrapped(model))
    chunks = token_chunks(tokenizer, text, chunk, limit)
    return measure_tokens(model, chunks, profile=profile, buckets=buckets, progress=progress)


def measure_tokens(
    model: nn.Module,
    chunks: Int[Tensor, "chunks length"],
    *,
    profile: Profile | None = None,
    buckets: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """`measure` on token ids."""
    if chunks.numel() == 0:
        raise InputError(f"measuring needs at least one chunk of tokens, not {tuple(chunks.shape)}")
    length = chunks.shape[1]
    buckets = min(4, length) if buckets is None else buckets
    if not 1 <= buckets <= length:
        raise InputError(
            f"positions are cut into 1 to {length} parts (the tokens of a chunk), not {buckets}"
        )
    model = unwrapped(model)
    model_layout = layout(model)
    network: Any = model
    device = input_device(network)
    ranks = here()
    if ranks.size > 1:
        agree_on_model(model)
        ranks.agree({"text": chunks_digest(chunks), "profile": profile and profile.to_text()})
    totals = {
        layer.name: StatisticSums.zeros(layer.heads, buckets) for layer in model_layout.layers
    }
    shape = (len(chunks), len(model_layout.layers), max(model_layout.heads))
    by_chunk = torch.zeros(shape, dtype=torch.float64)
    with watching(model, model_layout, profile) as observer:
        with ranks.together():
            for index in ranks.mine(len(chunks)):
                observer.sums = {
                    layer.name: StatisticSums.zeros(layer.heads, buckets)
                    for layer in model_layout.layers
                }
                run_layers(model, chunks[index][None].to(device))
                by_chunk[index] = _table(model_layout, observer.sums, "entropy")
                for name, sums in observer.sums.items():
                    totals[name].merge(sums)
                if progress is not None:
                    # The other ranks are taken to be as far as this one.
                    progress(min(len(chunks), index - ranks.rank + ranks.size), len(chunks))
        rules = _of_all(ranks, observer.rules())
    (by_chunk,) = ranks.sum(by_chunk)
    for own in totals.values():
        own.share(ranks)
    edges = [int((buckets_of(length, buckets) < bucket).sum()) for bucket in range(buckets + 1)]
    return Measurement(
        layers=model_layout.layers,
        **{name: _table(model_layout, totals, name) for name in QUANTITIES},
        entropy_by_chunk=by_chunk,
        chunk_length=length,
        by_position={name: _table(model_layout, totals, name, buckets) for name in QUANTITIES},
        positions=tuple((low, high - 1) for low, high in itertools.pairwise(edges)),
        rules=rules,
    )


def _of_all(ranks: Ranks, own: dict[str, list[RuleCount]]) -> dict[str, list[RuleCount]]:
    """How often the rules of each layer acted, on all ranks together."""
    every = ranks.each(own)
    return {
        layer: [
            RuleCount(
                count.rule,
                *(
                    sum(getattr(theirs[layer][place], name) for theirs in every)
                    for name in ("queries", "coldest", "hottest")
                ),
            )
            for place, count in enumerate(counts)
        ]
        for layer, counts in own.items()
    }


def run_layers(model: nn.Module, ids: Tensor) -> None:
    """The layers alone: the head over the vocabulary tells nothing about attention."""
    config: Any = model.config
    body: Any = model if config.is_encoder_decoder else getattr(model, "base_model", model)
    with torch.no_grad():
        if config.is_encoder_decoder:
            body(input_ids=ids, decoder_input_ids=ids, use_cache=False)
        else:
            body(input_ids=ids, use_cache=False)


def _table(
    model_layout: Layout, sums: dict[str, StatisticSums], quantity: str, buckets: int = 0
) -> Tensor:
    """[layers, heads] of one quantity, or [layers, heads, buckets]."""
    shape = (len(model_layout.layers), max(model_layout.heads), *([buckets] if buckets else []))
    table = torch.full(shape, math.nan, dtype=torch.float64)
    summed = _EXPONENTIALS.get(quantity, quantity)
    for index, layer in enumerate(model_layout.layers):
        own = sums[layer.name]
        values = own.mean(summed) if buckets else own.overall(summed)
        table[index, : layer.heads] = values.exp() if quantity in _EXPONENTIALS else values
    return table


class Observer:
    """Sums the statistics of the posteriors that it is shown."""

    def __init__(self, layers: dict[int, AttentionLayer]) -> None:
        self.layers = layers
        self.sums: dict[str, StatisticSums] = {}
        self.rules: Callable[[], dict[str, list[RuleCount]]] = dict

    def see_call(
        self, module: Any, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> None:
        """Called with the arguments of an attention function, temperatures applied."""
        # A module with tempered sinks comes wrapped; its own identity is inside.
        layer = self.layers[id(getattr(module, "_module", module))]
        with _named(layer.name):
            call = AttentionCall.of(module, query, key, mask, kwargs)
            self._add(layer, posteriors(call), call.sinks is not None, key.shape[2])

    def see_logits(self, layer: AttentionLayer, logits: Tensor) -> None:
        """Called with the input of a softmax, temperatures applied."""
        floor = max(layer.mask_floor, torch.finfo(logits.dtype).min / 2)
        first = logits[..., 0].masked_fill(logits[..., 0] <= floor, -math.inf)
        before = logits.shape[3] - logits.shape[2]
        with _named(layer.name):
            found = moments_of_logits(logits, floor, 1)
            statistics = statistics_of_moments(found, first, learned=False, first=before)
            self._add(layer, statistics, False, logits.shape[3])

    def see_product(
        self, layer: AttentionLayer, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        """Called with the arguments of a scaled dot product attention, temperatures applied."""
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        causal = args[5] if len(args) > 5 else kwargs.get("is_causal", False)
        own = {"scaling": kwargs.get("scale"), "is_causal": causal}
        with _named(layer.name):
            call = AttentionCall.of(None, args[0], args[1], mask, own)
            self._add(layer, posteriors(call), False, args[1].shape[2])

    def _add(
        self, layer: AttentionLayer, statistics: QueryStatistics, learned: bool, keys: int
    ) -> None:
        of_tokens = keys == statistics.seen.shape[2] and {*layer.axes} <= {STANDARD, FOLDED}
        if layer.stack == "cross":
            statistics = statistics.without(OF_DISTANCE)
        elif not of_tokens:
            statistics = statistics.without(OF_DISTANCE if learned else (*OF_DISTANCE, *OF_SINK))
        self.sums[layer.name].add(statistics)


@contextlib.contextmanager
def _named(layer: str) -> Iterator[None]:
    """Say the layer's name where its logits can't be measured."""
    try:
        yield
    except EnergyError as error:
        raise EnergyError(f"{layer}, {error}") from None


def posteriors(call: AttentionCall) -> QueryStatistics:
    """The statistics of an attention call; its sink is the learned one, or else the first key."""
    on_gpu = fused.serves(call)
    if call.sinks is None:
        before = 0 if call.causal else call.key.shape[2] - call.query.shape[2]
        if on_gpu:
            found, sink, _ = fused.run(call, 1)
        else:
            found, sink = moments(call, 1), first_key(call)
        return statistics_of_moments(found, sink, learned=False, first=before)
    queries = torch.arange(call.query.shape[2], device=call.query.device)
    found = fused.run(call).moments if on_gpu else moments(call)
    return statistics_of_moments(found, call.sink_column(queries)[..., 0], learned=True)


@contextlib.contextmanager
def watching(
    model: nn.Module, model_layout: Layout, profile: Profile | None, observer: Any = None
) -> Iterator[Any]:
    """Temper a model and show an observer what reaches its softmaxes."""
    modules = [model.get_submodule(layer.name) for layer in model_layout.layers]
    if observer is None:
        observer = Observer(
            {id(m): own for m, own in zip(modules, model_layout.layers, strict=True)}
        )
    handle = (
        tempered(model, profile)
        if profile is not None
        else Tempering(model, model_layout, [Profile.neutral(model_layout)])
    )
    with handle, evaluation_mode(model):
        states = handle.states()
        before = [state.observer for state in states]
        try:
            for state in states:
                state.observer = observer
            observer.rules = handle.rules
            yield observer
        finally:
            for state, old in zip(states, before, strict=True):
                state.observer = old
