"""How many keys stay alive in every head of a model, on text, images or sound."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.attention.axes import FOLDED, STANDARD
from tempering.attention.control.handle import Tempering
from tempering.attention.control.layer_rule import RuleCount
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout_reached
from tempering.attention.examining.stored import input_device
from tempering.attention.examining.subject import check_of_transformers, unwrapped
from tempering.attention.layout import AttentionLayer, Layout
from tempering.attention.logits import AttentionCall
from tempering.attention.measuring import fused
from tempering.attention.measuring.measurement import QUANTITIES, Measurement
from tempering.attention.measuring.places import patch_places, unit_of
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
from tempering.chunks import token_chunks
from tempering.errors import EnergyError, InputError
from tempering.inputs.answers import called_on
from tempering.inputs.example import Example, Inputs, as_inputs, taken_by
from tempering.ranks import Ranks, here
from tempering.text_tables import TextTable

# Quantities that are the exponential of a mean, and of which.
_EXPONENTIALS = {
    "support": "entropy",
    "support_without_sink": "entropy_without_sink",
    "support_simpson": "log_simpson",
}


def measure(
    model: nn.Module,
    tokenizer: Any,
    text: Any,
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
    text: at least one chunk of tokens, or a table of texts; chunks are read separately. Or else
        inputs, as `measure_tokens` takes them; the tokenizer is not needed then, and may be None.
    profile: temperatures to measure under; those already in force count as well.
    chunk: tokens in a chunk. limit: chunks at most, spread over the text.
    buckets: parts of a chunk that `by_position` tells apart; 4 by default.
    progress: called with (chunks done, chunks in all).

    Memory is linear in the length of a chunk. The ranks of a run (`tempering.ranks`) share the
    chunks. Raises DataError when the text is too short,
    ArchitectureError when the model's attention can't be observed exactly, EnergyError when a
    logit is NaN or infinite.
    """
    check_of_transformers(unwrapped(model), "measure")
    given = (
        token_chunks(tokenizer, text, chunk, limit) if isinstance(text, str | TextTable) else text
    )
    return measure_tokens(model, given, profile=profile, buckets=buckets, progress=progress)


def measure_tokens(
    model: nn.Module,
    chunks: Int[Tensor, "chunks length"] | Any,
    *,
    profile: Profile | None = None,
    buckets: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """`measure` on token ids, or on whatever a processor gives.

    chunks: token ids, a chunk a row; or what the model's processor gives: a mapping of names to
        tensors, a list of such mappings, or `Inputs` (see `tempering.inputs.as_inputs`). Each row
        runs alone, without the padding that a batch gave it.
    """
    model = unwrapped(model)
    check_of_transformers(model, "measure_tokens")
    if isinstance(chunks, Tensor) and chunks.numel() == 0:
        raise InputError(f"measuring needs at least one chunk of tokens, not {tuple(chunks.shape)}")
    inputs = as_inputs(chunks, model)
    model_layout = layout_reached(model, inputs.sample)
    length = _length(inputs)
    buckets = min(4, length or 4) if buckets is None else buckets
    if not 1 <= buckets <= (length or buckets):
        raise InputError(
            f"positions are cut into 1 to {length} parts (the tokens of a chunk), not {buckets}"
        )
    ranks = here()
    if ranks.size > 1:
        agree_on_model(model)
        ranks.agree({"text": inputs.digest, "profile": profile and profile.to_text()})
    totals = {
        layer.name: StatisticSums.zeros(layer.heads, buckets) for layer in model_layout.layers
    }
    shape = (len(inputs), len(model_layout.layers), max(model_layout.heads))
    by_chunk = torch.zeros(shape, dtype=torch.float64)
    with watching(model, model_layout, profile) as observer:
        with ranks.together():
            for index in ranks.mine(len(inputs)):
                example = inputs.examples[index]
                observer.arguments = example.arguments
                observer.sums = {
                    layer.name: StatisticSums.zeros(layer.heads, buckets)
                    for layer in model_layout.layers
                }
                run_layers(model, model_layout, example)
                by_chunk[index] = _table(model_layout, observer.sums, "entropy")
                for name, sums in observer.sums.items():
                    totals[name].merge(sums)
                if progress is not None:
                    # The other ranks are taken to be as far as this one.
                    progress(min(len(inputs), index - ranks.rank + ranks.size), len(inputs))
        rules = _of_all(ranks, observer.rules())
        longest = max(ranks.each(observer.longest))
    (by_chunk,) = ranks.sum(by_chunk)
    for own in totals.values():
        own.share(ranks)
    length = length or longest
    edges = [int((buckets_of(length, buckets) < bucket).sum()) for bucket in range(buckets + 1)]
    return Measurement(
        layers=model_layout.layers,
        **{name: _table(model_layout, totals, name) for name in QUANTITIES},
        entropy_by_chunk=by_chunk,
        chunk_length=length,
        by_position={name: _table(model_layout, totals, name, buckets) for name in QUANTITIES},
        positions=tuple((low, high - 1) for low, high in itertools.pairwise(edges)),
        units=tuple(unit_of(model, layer) for layer in model_layout.layers),
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


def _length(inputs: Inputs) -> int:
    """The tokens of a chunk, where all examples are chunks of one length; 0 where they aren't."""
    arguments = [example.arguments for example in inputs]
    lengths = {item["input_ids"].shape[1] if {*item} == {"input_ids"} else 0 for item in arguments}
    return lengths.pop() if len(lengths) == 1 else 0


def run_layers(model: nn.Module, model_layout: Layout, example: Example) -> None:
    """The layers alone where they are all in the body: a head over the vocabulary takes memory."""
    body: Any = getattr(model, "base_model", model)
    prefix = next((name for name, module in model.named_modules() if module is body), "")
    inside = all(name.startswith(f"{prefix}.") for name in model_layout.names)
    takes = taken_by(body)
    if not inside or not all(name in takes for name in example.arguments):
        body = model
    config: Any = model.config
    if config.is_encoder_decoder and {*example.arguments} == {"input_ids"}:
        ids = example.arguments["input_ids"]
        example = replace(example, arguments={"input_ids": ids, "decoder_input_ids": ids})
    with torch.no_grad():
        called_on(body, example, input_device(model))


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
    """Sums the statistics of the posteriors that it is shown.

    arguments: of the forward call that runs. longest: the most queries of a call so far.
    """

    def __init__(self, model: nn.Module, layers: dict[int, AttentionLayer]) -> None:
        self.layers = layers
        self.sums: dict[str, StatisticSums] = {}
        self.rules: Callable[[], dict[str, list[RuleCount]]] = dict
        self.arguments: Mapping[str, Tensor] = {}
        self.longest = 0
        self._patches = {
            layer.name: model.get_submodule(layer.name)
            for layer in layers.values()
            if unit_of(model, layer) == "patches"
        }

    def see_call(
        self, module: Any, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> None:
        """Called with the arguments of an attention function, temperatures applied."""
        # A module with tempered sinks comes wrapped; its own identity is inside.
        layer = self.layers[id(getattr(module, "_module", module))]
        with _named(layer.name):
            self._add(layer, AttentionCall.of(module, query, key, mask, kwargs))

    def see_product(
        self, layer: AttentionLayer, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        """Called with the arguments of a scaled dot product attention, temperatures applied."""
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        causal = args[5] if len(args) > 5 else kwargs.get("is_causal", False)
        own = {"scaling": kwargs.get("scale"), "is_causal": causal}
        with _named(layer.name):
            self._add(layer, AttentionCall.of(None, args[0], args[1], mask, own))

    def see_logits(self, layer: AttentionLayer, logits: Tensor) -> None:
        """Called with the input of a softmax, temperatures applied."""
        floor = max(layer.mask_floor, torch.finfo(logits.dtype).min / 2)
        first = logits[..., 0].masked_fill(logits[..., 0] <= floor, -math.inf)
        before = logits.shape[3] - logits.shape[2]
        with _named(layer.name):
            found = moments_of_logits(logits, floor, 1)
            statistics = statistics_of_moments(found, first, learned=False, first=before)
            # Attention code of a model's own doesn't say how its patches lie.
            placed = layer.name not in self._patches
            self._sum(layer, statistics, False, logits.shape[3], placed)

    def _add(self, layer: AttentionLayer, call: AttentionCall) -> None:
        keys, places, placed = call.key.shape[2], None, True
        if layer.name in self._patches:
            places = patch_places(self._patches[layer.name], self.arguments, keys)
            placed = places is not None and keys == call.query.shape[2]
        statistics = posteriors(call, places if placed else None)
        self._sum(layer, statistics, call.sinks is not None, keys, placed)

    def _sum(
        self,
        layer: AttentionLayer,
        statistics: QueryStatistics,
        learned: bool,
        keys: int,
        placed: bool,
    ) -> None:
        queries = statistics.seen.shape[2]
        self.longest = max(self.longest, queries)
        of_tokens = keys == queries and {*layer.axes} <= {STANDARD, FOLDED}
        if layer.stack == "cross":
            statistics = statistics.without(OF_DISTANCE)
        elif not of_tokens:
            statistics = statistics.without(OF_DISTANCE if learned else (*OF_DISTANCE, *OF_SINK))
        elif not placed:
            statistics = statistics.without(OF_DISTANCE)
        self.sums[layer.name].add(statistics)


@contextlib.contextmanager
def _named(layer: str) -> Iterator[None]:
    """Say the layer's name where its logits can't be measured."""
    try:
        yield
    except EnergyError as error:
        raise EnergyError(f"{layer}, {error}") from None


def posteriors(
    call: AttentionCall, places: Float[Tensor, "tokens axes"] | None = None
) -> QueryStatistics:
    """The statistics of an attention call; its sink is the learned one, or else the first key.

    places: where each token stands (see `patch_places`); None for tokens in a row.
    """
    on_gpu = places is None and fused.serves(call)
    if call.sinks is None:
        before = 0 if call.causal else call.key.shape[2] - call.query.shape[2]
        if on_gpu:
            found, sink, _ = fused.run(call, 1)
        else:
            found, sink = moments(call, 1, places), first_key(call)
        return statistics_of_moments(found, sink, learned=False, first=before, places=places)
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
            model, {id(m): own for m, own in zip(modules, model_layout.layers, strict=True)}
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
