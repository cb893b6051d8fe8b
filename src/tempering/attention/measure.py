"""How many keys stay alive in every head of a model, on real text."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.attention import routes
from tempering.attention.control import Tempering, tempered
from tempering.attention.layout import AttentionLayer, Layout, layout, unwrapped
from tempering.attention.logits import has_sinks, sliced_logits
from tempering.attention.modes import evaluation_mode
from tempering.attention.profile import Profile
from tempering.attention.statistics import Sums
from tempering.chunks import token_chunks
from tempering.errors import InputError

QUANTITIES = (
    "entropy",
    "support",
    "support_without_sink",
    "peak",
    "sink_share",
    "heat_capacity",
)


@dataclass(frozen=True, eq=False)
class Measurement:
    """What the heads of a model kept of their keys on a text; means over queries.

    All tensors are Float[Tensor, "layers heads"] (float64, NaN where a layer has fewer heads).

    entropy: mean of S, nats. support: exp(mean S), keys.
    support_without_sink: the same for the posterior renormalised over all keys but the sink
        (the first key, or the learned sink logit where the architecture has one).
    peak: mean of max r. sink_share: mean r of the sink. heat_capacity: mean Var_r(d)/T^2, nats.
    entropy_by_chunk: Float[Tensor, "chunks layers heads"], for intervals.
    """

    layers: tuple[AttentionLayer, ...]
    entropy: Tensor
    support: Tensor
    support_without_sink: Tensor
    peak: Tensor
    sink_share: Tensor
    heat_capacity: Tensor
    entropy_by_chunk: Tensor
    chunk_length: int

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
        from tempering.chunks import t_quantile

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
    text: str,
    *,
    profile: Profile | None = None,
    chunk: int = 512,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Run a model over a text and measure the posterior of every head at every query.

    Parameters
    ----------
    model, tokenizer: of transformers.
    text: at least one chunk of tokens; chunks are read separately.
    profile: temperatures to measure under; those already in force count as well.
    chunk: tokens in a chunk. limit: chunks at most, spread over the text.
    progress: called with (chunks done, chunks in all).

    Raises DataError when the text is too short, ArchitectureError when the model's attention
    can't be observed exactly.
    """
    chunks = token_chunks(tokenizer, text, chunk, limit)
    return measure_tokens(model, chunks, profile=profile, progress=progress)


def measure_tokens(
    model: nn.Module,
    chunks: Int[Tensor, "chunks length"],
    *,
    profile: Profile | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """`measure` on token ids."""
    if chunks.numel() == 0:
        raise InputError(f"measuring needs at least one chunk of tokens, not {tuple(chunks.shape)}")
    model = unwrapped(model)
    plan = layout(model)
    network: Any = model
    device = network.get_input_embeddings().weight.device
    totals = {layer.name: Sums.zeros(layer.heads) for layer in plan.layers}
    by_chunk = []
    with watching(model, plan, profile) as observer:
        for index, ids in enumerate(chunks):
            observer.sums = {layer.name: Sums.zeros(layer.heads) for layer in plan.layers}
            _forward(model, ids[None].to(device))
            by_chunk.append(_matrix(plan, observer.sums, "entropy"))
            for name, sums in observer.sums.items():
                totals[name].merge(sums)
            if progress is not None:
                progress(index + 1, len(chunks))
    entropy = _matrix(plan, totals, "entropy")
    return Measurement(
        layers=plan.layers,
        entropy=entropy,
        support=entropy.exp(),
        support_without_sink=_matrix(plan, totals, "entropy_without_sink").exp(),
        peak=_matrix(plan, totals, "peak"),
        sink_share=_matrix(plan, totals, "sink"),
        heat_capacity=_matrix(plan, totals, "heat_capacity"),
        entropy_by_chunk=torch.stack(by_chunk),
        chunk_length=chunks.shape[1],
    )


def _forward(model: nn.Module, ids: Tensor) -> None:
    """The layers alone: the head over the vocabulary tells nothing about attention."""
    config: Any = model.config
    body: Any = model if config.is_encoder_decoder else getattr(model, "base_model", model)
    with torch.no_grad():
        if config.is_encoder_decoder:
            body(input_ids=ids, decoder_input_ids=ids, use_cache=False)
        else:
            body(input_ids=ids, use_cache=False)


def _matrix(plan: Layout, sums: dict[str, Sums], quantity: str) -> Tensor:
    table = torch.full((len(plan.layers), max(plan.heads)), math.nan, dtype=torch.float64)
    for index, layer in enumerate(plan.layers):
        own = sums[layer.name]
        count = own.others if quantity == "entropy_without_sink" else own.queries
        table[index, : layer.heads] = getattr(own, quantity) / count.clamp(min=1)
    return table


class Observer:
    """Sums the statistics of the posteriors that it is shown."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names
        self.sums: dict[str, Sums] = {}

    def see_call(
        self, module: Any, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> None:
        """Called with the arguments of an attention function, temperatures applied."""
        # A module with tempered sinks comes wrapped; its own identity is inside.
        name = self.names[id(getattr(module, "_module", module))]
        sink = -1 if has_sinks(module, kwargs) else 0
        for logits in sliced_logits(module, query, key, mask, kwargs):
            self.sums[name].add(logits, sink)

    def see_logits(self, layer: AttentionLayer, logits: Tensor) -> None:
        """Called with the input of a softmax, temperatures applied."""
        if layer.folded:
            logits = logits.view(-1, layer.heads, *logits.shape[-2:])
        work = torch.promote_types(logits.dtype, torch.float32)
        floor = max(layer.mask_floor, torch.finfo(logits.dtype).min / 2)
        for part in logits.split(512, dim=2):
            self.sums[layer.name].add(part.to(work).masked_fill(part <= floor, float("-inf")))

    def see_product(
        self, layer: AttentionLayer, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        """Called with the arguments of a scaled dot product attention, temperatures applied."""
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        causal = args[5] if len(args) > 5 else kwargs.get("is_causal", False)
        own = {"scaling": kwargs.get("scale"), "is_causal": causal}
        for logits in sliced_logits(None, args[0], args[1], mask, own):
            self.sums[layer.name].add(logits)


@contextlib.contextmanager
def watching(
    model: nn.Module, plan: Layout, profile: Profile | None, observer: Any = None
) -> Iterator[Any]:
    """Temper a model and show an observer what reaches its softmaxes."""
    modules = [model.get_submodule(layer.name) for layer in plan.layers]
    if observer is None:
        names = {id(m): layer.name for m, layer in zip(modules, plan.layers, strict=True)}
        observer = Observer(names)
    handle = (
        tempered(model, profile)
        if profile is not None
        else Tempering(model, plan, [Profile.neutral(plan)])
    )
    with handle, evaluation_mode(model):
        states = [getattr(module, routes.STATE) for module in modules]
        before = [state.observer for state in states]
        try:
            for state in states:
                state.observer = observer
            yield observer
        finally:
            for state, old in zip(states, before, strict=True):
                state.observer = old
