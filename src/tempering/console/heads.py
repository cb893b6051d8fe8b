"""What every head keeps of its keys at one step, and what one head attends to.

One query is looked at, the last: its logits are a row over the keys for each head, so memory
stays linear in the context.
"""

from __future__ import annotations

import base64
import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.attention.axes import STANDARD
from tempering.attention.examining.stored import input_device
from tempering.attention.layout import AttentionLayer, Layout
from tempering.attention.logits import AttentionCall
from tempering.attention.measuring.measure import watching
from tempering.attention.measuring.statistics import posterior_statistics
from tempering.attention.profiles.profile import Profile
from tempering.console.subject import Subject
from tempering.errors import InputError

STATISTICS = ("support", "sink_share", "peak")


class LastQuery:
    """An observer that keeps the last query's logits of every layer, [rows, heads, keys].

    wanted: of this layer alone; the forward pass ends there.
    """

    def __init__(self, model: Any, plan: Layout, wanted: int | None = None) -> None:
        self.plan, self.wanted = plan, wanted
        modules = [model.get_submodule(layer.name) for layer in plan.layers]
        self._places = {id(module): index for index, module in enumerate(modules)}
        self._by_layer = {layer.name: index for index, layer in enumerate(plan.layers)}
        self.found: dict[int, tuple[Tensor, int]] = {}  # layer -> logits, place of the sink

    def see_call(
        self, module: Any, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> None:
        index = self._places[id(getattr(module, "_module", module))]
        if self.wanted in (None, index):
            self._keep(index, *_last_logits(AttentionCall.of(module, query, key, mask, kwargs)))

    def see_logits(self, layer: AttentionLayer, logits: Tensor) -> None:
        index = self._by_layer[layer.name]
        if self.wanted in (None, index):
            floor = max(layer.mask_floor, torch.finfo(logits.dtype).min / 2)
            row = logits[:, :, -1].to(torch.promote_types(logits.dtype, torch.float32))
            self._keep(index, row.masked_fill(row <= floor, -math.inf), 0)

    def see_product(
        self, layer: AttentionLayer, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        index = self._by_layer[layer.name]
        if self.wanted in (None, index):
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            causal = args[5] if len(args) > 5 else kwargs.get("is_causal", False)
            own = {"scaling": kwargs.get("scale"), "is_causal": causal}
            self._keep(index, *_last_logits(AttentionCall.of(None, args[0], args[1], mask, own)))

    def _keep(self, index: int, logits: Tensor, sink: int) -> None:
        self.found[index] = (logits, sink)
        if index == self.wanted:
            raise _FoundError

    def statistics(self, rows: int) -> Float[Tensor, "statistics rows layers heads"]:
        """Support, sink share and peak of every head since the last call; NaN where none is."""
        heads = max(self.plan.heads)
        table = torch.full((3, rows, len(self.plan.layers), heads), math.nan)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, (logits, sink) in self.found.items():
            groups.setdefault((logits.shape, sink, logits.device), []).append(index)
        for (shape, sink, _), layers in groups.items():
            # Layers of one shape at once: a step of a small model is many small operations.
            together = torch.stack([self.found[index][0] for index in layers])
            entropy, _, peak, share = posterior_statistics(together, sink)
            own = torch.stack([entropy.exp(), share, peak]).transpose(1, 2).float().cpu()
            table[:, :, layers, : shape[1]] = own.expand(-1, rows, -1, -1)
        self.found = {}
        return table


def _last_logits(call: AttentionCall) -> tuple[Float[Tensor, "rows heads keys"], int]:
    """The last query's finished logits, and the place of the sink among them.

    Heads that share keys are multiplied with them together, so that no key is copied.
    """
    rows, heads, q_seq, width = call.query.shape
    kv_heads = call.key.shape[1]
    last = torch.tensor([q_seq - 1], device=call.query.device)
    query = call.query[:, :, -1].reshape(rows, kv_heads, heads // kv_heads, width).to(call.work)
    products = query @ call.key.to(call.work).transpose(-1, -2) * call.scaling
    logits = call.finish(products.reshape(rows, heads, 1, -1), last)
    if call.sinks is None:
        return logits[:, :, 0], 0
    return torch.cat([logits, call.sink_column(last)], dim=-1)[:, :, 0], -1


class _FoundError(Exception):
    """The wanted layer was met: what lies above it need not run."""


def packed(table: Tensor) -> str:
    """Numbers for the page: float32, little-endian, base64."""
    return base64.b64encode(table.contiguous().numpy().astype("<f4").tobytes()).decode("ascii")


def attention_row(
    subject: Subject, tokens: Sequence[int], profile: Profile, layer: int, head: int
) -> Iterator[dict[str, Any]]:
    """What one head attends to from the last of the tokens, before and after, over the context.

    A learned sink, which stands at no place, has a share of its own.
    """
    plan = subject.plan
    own = plan.layers[layer]
    if own.stack != "decoder" or own.axes != (STANDARD,):
        raise InputError(f"{own.name} attends to something else than the tokens of this text")
    ids = torch.tensor([list(tokens)], device=input_device(subject.model))
    found = []
    for each in (None, profile):
        observer = LastQuery(subject.model, plan, layer)
        watched = watching(subject.model, plan, each, observer)
        with watched, torch.no_grad(), contextlib.suppress(_FoundError):
            subject.model(input_ids=ids, use_cache=False)
        logits, sink = observer.found[layer]
        found.append((torch.softmax(logits[0, head].double(), -1), sink))
        yield {"type": "progress", "done": len(found), "total": 2}
    keys = [row[: len(row) - (sink == -1)] for row, sink in found]
    if any(len(row) != len(tokens) for row in keys):
        raise InputError(f"{own.name} attends to keys that are not the tokens of this text")
    yield {
        "type": "attention",
        "layer": layer,
        "head": head,
        "before": packed(keys[0].cpu()),
        "after": packed(keys[1].cpu()),
        "sink": [float(row[-1]) if place == -1 else None for row, place in found],
    }
