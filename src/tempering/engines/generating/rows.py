"""Many rows in one batch, each with a prompt, a temperature, a profile and a seed of its own.

The text of a row depends neither on the other rows nor on the device: see `row_sampling`. (The
shape of a batch changes the last bit of logits, which matters only where two tokens tie to that
bit.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.examining.stored import input_device
from tempering.attention.profiles.profile import Profile
from tempering.engines.generating.row_sampling import BatchRow, RowSampler
from tempering.errors import InputError, TemperatureError
from tempering.tokens.end_tokens import end_tokens

_WORTH = 256  # tokens that a separate pass over the common beginning must save to be made
_SELECTABLE = ("DynamicLayer", "DynamicSlidingWindowLayer")


@dataclass(frozen=True)
class Written:
    """What one row generated. tokens: without the token that ended the row. end: that token, or
    None where the row reached its limit."""

    tokens: list[int]
    end: int | None


def generate_rows(
    model: Any,
    rows: Sequence[BatchRow],
    *,
    progress: Callable[[int, int, int], None] | None = None,
) -> list[Written]:
    """Generate all rows in one batch, padded on the left.

    Rows with the same prompt, the same profile and the same tokens so far are a single row for the
    model, whatever their temperatures and seeds. Rows that ended leave the batch.

    progress: (row, tokens so far, the newest of them), after every token but the last of a row.

    Raises TemperatureError or InputError for a row that can't be sampled, before any work.
    """
    _check(model, rows)
    device = input_device(model)
    sampler = RowSampler.of(rows, device)
    ends, kind = _ending(model, rows, device)
    limits = torch.tensor([row.tokens for row in rows], device=device)
    written = torch.zeros(len(rows), int(limits.max()), dtype=torch.long, device=device)
    lengths = torch.zeros(len(rows), dtype=torch.long, device=device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    place = torch.arange(len(rows), device=device)  # the rows still being written
    logits, past, node, mask, own = read_prompts(model, rows)
    options = forward_options(model)
    with _profiles(model, own) as handle, torch.no_grad():
        for step in range(written.shape[1]):
            token = sampler.pick(logits[node], place, step)
            written[place, step] = token
            over = ends[kind[place], token]
            ended[place] = over
            lengths[place] += ~over
            going = ~over & (lengths[place] < limits[place])
            place, node, token = place[going], node[going], token[going]
            if progress is not None:
                for row, newest in zip(place.tolist(), token.tolist(), strict=True):
                    progress(row, step + 1, newest)
            if not len(place):
                break
            if selectable(past):
                (parent, token), node = torch.stack([node, token]).unique(
                    dim=1, return_inverse=True
                )
                if not torch.equal(parent, torch.arange(len(mask), device=device)):
                    past.batch_select_indices(parent)
                    mask, own = mask[parent], [own[i] for i in parent.tolist()]
                    if handle is not None:
                        handle.update(_own_profiles(model, own))
            else:
                token, node = torch.zeros_like(limits).index_put((place,), token), place
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            out = model(
                input_ids=token[:, None],
                attention_mask=mask,
                past_key_values=past,
                use_cache=True,
                **options(mask, 1),
            )
            logits, past = out.logits[:, -1], out.past_key_values
    return [
        Written(own[:count], own[count] if end else None)
        for own, count, end in zip(written.tolist(), lengths.tolist(), ended.tolist(), strict=True)
    ]


class Prompts(NamedTuple):
    """Prompts that the model has read. node[i]: the place of row i in logits, past and mask.

    rows: one for each place.
    """

    logits: Float[Tensor, "nodes vocab"]
    past: Any
    node: Int[Tensor, " rows"]
    mask: Int[Tensor, "nodes length"]
    rows: list[BatchRow]


def read_prompts(model: Any, rows: Sequence[BatchRow]) -> Prompts:
    """Logits after the prompts, and the cache.

    Rows with the same prompt and profile are read once. The common beginning of all prompts is read
    once for each profile, where that saves enough to be worth a separate pass.
    """
    first: dict[tuple[Any, ...], int] = {}
    node = [
        first.setdefault((tuple(row.prompt.tolist()), id(row.profile)), len(first)) for row in rows
    ]
    alike = [rows[node.index(i)] for i in range(len(first))]
    found = _read_begun(model, alike) or _read(model, alike)
    if len(first) < len(rows) and not selectable(found.past):
        return _read(model, rows)
    return found._replace(node=torch.tensor(node, device=found.mask.device))


def _read_begun(model: Any, rows: Sequence[BatchRow]) -> Prompts | None:
    """Prompts read in two passes: their common beginning once for each profile, then the rest.

    None where that saves too little.
    """
    profiles = {id(row.profile): row for row in rows}
    start = _common([row.prompt for row in rows])
    if start * (len(rows) - len(profiles)) < _WORTH:
        return None
    begun = _read(model, [replace(row, prompt=row.prompt[:start]) for row in profiles.values()])
    if not selectable(begun.past):
        return None
    places = list(profiles)
    index = torch.tensor([places.index(id(row.profile)) for row in rows], device=begun.mask.device)
    begun.past.batch_select_indices(index)
    rest = [replace(row, prompt=row.prompt[start:]) for row in rows]
    return _read(model, rest, begun._replace(mask=begun.mask[index]))._replace(rows=list(rows))


def _common(prompts: Sequence[Tensor]) -> int:
    """The number of tokens that all prompts begin with; each keeps at least one token more."""
    length = min(map(len, prompts)) - 1
    head = torch.stack([prompt[:length].cpu() for prompt in prompts])
    return int((head == head[0]).all(0).long().cumprod(0).sum())


def _read(model: Any, rows: Sequence[BatchRow], begun: Prompts | None = None) -> Prompts:
    device = input_device(model)
    length = max(len(row.prompt) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, length - len(row.prompt) :] = row.prompt.cpu()
        mask[i, length - len(row.prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    if begun is not None:
        mask = torch.cat([begun.mask, mask], dim=1)
    with _profiles(model, rows), torch.no_grad():
        out = model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=None if begun is None else begun.past,
            use_cache=True,
            **forward_options(model)(mask, length),
        )
    node = torch.arange(len(rows), device=device)
    return Prompts(out.logits[:, -1], out.past_key_values, node, mask, list(rows))


def selectable(past: Any) -> bool:
    """Whether all layers of the cache are of kinds that `batch_select_indices` selects rightly."""
    return all(type(layer).__name__ in _SELECTABLE for layer in getattr(past, "layers", [None]))


def _check(model: Any, rows: Sequence[BatchRow]) -> None:
    if not rows:
        raise InputError("there is no row to generate")
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for i, row in enumerate(rows):
        if not 0 <= row.temperature < float("inf"):
            raise TemperatureError(
                f"row {i}: a sampling temperature is 0 or more and finite, not {row.temperature}"
            )
        if row.policy is not None and row.policy.samples is not None:
            raise InputError(
                f"row {i}: {row.policy} has a temperature for each of {row.policy.samples} samples "
                "of a prompt, and a row is one sample; give it a policy without ladder"
            )
        if row.top_p is not None and not 0 < row.top_p <= 1:
            raise InputError(f"row {i}: top_p lies in (0, 1], got {row.top_p}")
        if len(row.prompt) == 0 or row.tokens < 1:
            raise InputError(f"row {i}: a row needs a prompt and at least 1 new token")
        if room is not None and len(row.prompt) + row.tokens > room:
            raise InputError(
                f"row {i}: a prompt of {len(row.prompt)} tokens and {row.tokens} new ones don't "
                f"fit the model's {room} positions; shorten the prompt or generate fewer tokens"
            )


def _profiles(model: Any, rows: Sequence[BatchRow]) -> AbstractContextManager[Any]:
    if all(row.profile is None for row in rows):
        return nullcontext()
    return tempered(model, _own_profiles(model, rows))


def _own_profiles(model: Any, rows: Sequence[BatchRow]) -> list[Profile]:
    own = Profile.neutral(layout(model))
    return [row.profile if row.profile is not None else own for row in rows]


def forward_options(model: Any) -> Callable[..., dict[str, Any]]:
    """A function that gives further arguments of the model's forward, where it knows them.

    They are positions that don't count padding, and the number of logits to keep.
    """
    known = inspect.signature(type(model).forward).parameters

    def options(mask: Tensor, width: int, keep: int = 1) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if "position_ids" in known:
            found["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -width:]
        if "logits_to_keep" in known:
            found["logits_to_keep"] = keep
        return found

    return options


def _ending(
    model: Any, rows: Sequence[BatchRow], device: torch.device
) -> tuple[Bool[Tensor, "kinds vocab"], Int[Tensor, " rows"]]:
    """Whether each token ends a row, for each set of stop tokens; and which set a row has."""
    own = end_tokens(model.generation_config)
    kinds = {stop: i for i, stop in enumerate(dict.fromkeys(row.stop for row in rows))}
    vocabulary = model.get_output_embeddings().weight.shape[0]
    table = torch.zeros(len(kinds), vocabulary, dtype=torch.bool)
    for stop, i in kinds.items():
        table[i, [*own, *stop]] = True
    return table.to(device), torch.tensor([kinds[row.stop] for row in rows], device=device)
