"""Many rows in one batch, each with a prompt, a temperature, a profile and a seed of its own.

    token = argmax over v of  log r_v + g_v,     g_v = -log(-log u_v)        (Gumbel-max: exact)

The numbers u come from the row's seed, the step and the token alone, so what a row says depends
neither on the rows beside it nor on the device: rounding, which the shape of a batch changes in
the last bit, matters only where two tokens tie to that bit. The same seed at two temperatures
meets the same numbers, which makes paired comparisons sharper.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tempering.attention.control import tempered
from tempering.attention.layout import layout
from tempering.attention.profile import Profile
from tempering.errors import InputError, TemperatureError
from tempering.posterior import responsibilities

# Constants of SplitMix64 (Steele, Lea and Flood 2014), as signed 64-bit numbers.
_GOLDEN, _MIX_A, _MIX_B = -7046029254386353131, -4658895280553007687, -7723592293110705685
_SELECTABLE = ("DynamicLayer", "DynamicSlidingWindowLayer")
_SCORED_BYTES = 2**29  # logits at once when scoring


@dataclass(frozen=True)
class Row:
    """What one row is to generate.

    prompt: token ids. temperature: of sampling; 0 is the limit. profile: None for the model's own
    attention. tokens: new ones at most. top_p: nucleus, after the temperature. stop: tokens that
    end the row as the model's end token does.
    """

    prompt: Int[Tensor, " length"]
    temperature: float = 1.0
    profile: Profile | None = None
    seed: int = 0
    tokens: int = 64
    top_p: float | None = None
    stop: tuple[int, ...] = ()


@dataclass(frozen=True)
class Written:
    """What one row generated. tokens: without the token that ended it. end: that token, or None.

    score: mean log probability of the tokens, the end token included, under the untempered model
        at T = 1, nats per token; None where none was asked for.
    """

    tokens: list[int]
    end: int | None
    score: float | None


def generate_rows(
    model: Any,
    rows: Sequence[Row],
    *,
    score: bool = False,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[Written] | None:
    """Generate all rows in one batch, padded on the left.

    progress: (row, tokens so far), after every token. stop: asked before every token; when it
    says so the batch is given up and None returned.

    Raises TemperatureError or InputError for a row that can't be sampled, before any work.
    """
    _check(model, rows)
    device = model.get_input_embeddings().weight.device
    ids, mask = _padded([row.prompt for row in rows], model, device)
    keys = torch.tensor([_key(row.seed) for row in rows], device=device)
    temperature = torch.tensor([row.temperature for row in rows], dtype=torch.float64)
    temperature = temperature.to(device, torch.float32)
    nucleus = None
    if any(row.top_p is not None for row in rows):
        nucleus = torch.tensor([row.top_p or 1.0 for row in rows], device=device)
    ends, kind = _ending(model, rows, device)
    limits = torch.tensor([row.tokens for row in rows], device=device)
    steps = int(limits.max())
    written = torch.zeros(len(rows), steps, dtype=torch.long, device=device)
    lengths = torch.zeros(len(rows), dtype=torch.long, device=device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    alive = torch.ones(len(rows), dtype=torch.bool, device=device)
    if stop is not None and stop():
        return None
    logits, past = _prefill(model, rows, ids, mask)
    options = _options(model)
    with _profiles(model, rows), torch.no_grad():
        for step in range(steps):
            weights = responsibilities(-logits.float(), temperature)
            if nucleus is not None:
                weights = _nucleus(weights, nucleus)
            token = _pick(weights, keys, step)
            written[:, step] = token
            ended |= alive & ends[kind, token]
            alive &= ~ended
            lengths += alive
            alive &= lengths < limits
            if progress is not None:
                for row in alive.nonzero()[:, 0].tolist():
                    progress(row, step + 1)
            # Asking the device every token would wait for it every token.
            if (device.type == "cpu" or step % 8 == 7) and not bool(alive.any()):
                break
            if stop is not None and stop():
                return None
            if step + 1 < steps:
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
                out = model(
                    input_ids=token[:, None],
                    attention_mask=mask,
                    past_key_values=past,
                    use_cache=True,
                    **options(mask, 1),
                )
                logits, past = out.logits[:, -1], out.past_key_values
    found = []
    for own, count, end in zip(written.tolist(), lengths.tolist(), ended.tolist(), strict=True):
        found.append(Written(own[:count], own[count] if end else None, None))
    if not score:
        return found
    outputs = [own.tokens + ([] if own.end is None else [own.end]) for own in found]
    scores = score_rows(model, [row.prompt for row in rows], outputs)
    return [replace(own, score=value) for own, value in zip(found, scores, strict=True)]


def _prefill(
    model: Any,
    rows: Sequence[Row],
    ids: Int[Tensor, "rows length"],
    mask: Int[Tensor, "rows length"],
) -> tuple[Float[Tensor, "rows vocab"], Any]:
    """Logits after the prompts, and the cache; rows alike in prompt and profile are read once."""
    first: dict[tuple[Any, ...], int] = {}
    place = []
    for row in rows:
        alike = (tuple(row.prompt.tolist()), id(row.profile))
        place.append(first.setdefault(alike, len(first)))
    chosen = [place.index(i) for i in range(len(first))]
    logits, past = _read(model, [rows[i] for i in chosen], ids[chosen], mask[chosen])
    if len(chosen) == len(rows):
        return logits, past
    # Only these kinds of cache are known to hold nothing but what `batch_select_indices` selects.
    if not all(type(layer).__name__ in _SELECTABLE for layer in getattr(past, "layers", [None])):
        return _read(model, rows, ids, mask)
    index = torch.tensor(place, device=ids.device)
    past.batch_select_indices(index)
    return logits[index], past


def _read(
    model: Any, rows: Sequence[Row], ids: Tensor, mask: Tensor
) -> tuple[Float[Tensor, "rows vocab"], Any]:
    with _profiles(model, rows), torch.no_grad():
        out = model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            **_options(model)(mask, ids.shape[1]),
        )
    return out.logits[:, -1], out.past_key_values


def score_rows(
    model: Any, prompts: Sequence[Int[Tensor, " length"]], outputs: Sequence[Sequence[int]]
) -> list[float | None]:
    """Mean log probability of each output after its prompt, nats per token; None for an empty one.

    The model is used as it is: untempered, unless the caller holds a profile on it.
    """
    device = model.get_input_embeddings().weight.device
    longest = max(map(len, prompts)) + max(map(len, outputs))
    vocabulary = int(model.config.get_text_config().vocab_size)
    most = max(1, _SCORED_BYTES // (4 * vocabulary * max(1, max(map(len, outputs)))))
    options = _options(model)
    results: list[float | None] = []
    for start in range(0, len(prompts), most):
        part = slice(start, start + most)
        own = [torch.tensor(output, dtype=torch.long) for output in outputs[part]]
        whole = [torch.cat([p.cpu(), o]) for p, o in zip(prompts[part], own, strict=True)]
        ids, mask = _padded(whole, model, device, longest)
        width = max(1, max(map(len, own)))
        with torch.no_grad():
            out = model(
                input_ids=ids, attention_mask=mask, **options(mask, ids.shape[1], width + 1)
            )
        logits = out.logits[:, -(width + 1) : -1].float()
        chosen = logits.gather(-1, ids[:, -width:, None])[..., 0] - logits.logsumexp(-1)
        for row, output in zip(chosen.double().cpu(), own, strict=True):
            results.append(float(row[-len(output) :].mean()) if len(output) else None)
    return results


def _check(model: Any, rows: Sequence[Row]) -> None:
    if not rows:
        raise InputError("there is no row to generate")
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for i, row in enumerate(rows):
        if not 0 <= row.temperature < float("inf"):
            raise TemperatureError(
                f"row {i}: a sampling temperature is 0 or more and finite, not {row.temperature}"
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


def _profiles(model: Any, rows: Sequence[Row]) -> AbstractContextManager[Any]:
    if all(row.profile is None for row in rows):
        return nullcontext()
    own = Profile.neutral(layout(model))
    return tempered(model, [row.profile if row.profile is not None else own for row in rows])


def _padded(
    prompts: Sequence[Tensor], model: Any, device: torch.device, length: int | None = None
) -> tuple[Int[Tensor, "rows length"], Int[Tensor, "rows length"]]:
    """Token ids and mask, on the right of `length` columns."""
    length = max(map(len, prompts)) if length is None else length
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt.cpu()
        mask[row, length - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _pick(
    weights: Float[Tensor, "rows vocab"], keys: Int[Tensor, " rows"], step: int
) -> Int[Tensor, " rows"]:
    """One token of each row: the least -log(u)/r, which is the argmax of log r + g."""
    places = torch.arange(weights.shape[-1], device=weights.device) + (step << 32)
    numbers = uniform(keys[:, None] + places * _GOLDEN)
    return (-numbers.log() / weights.double()).argmin(-1)


def uniform(counter: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """SplitMix64 of a counter as float64 in (0, 1), 52 bits, never 0 or 1."""
    bits = counter
    for shift, factor in ((30, _MIX_A), (27, _MIX_B)):
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))) * factor
    bits = bits ^ ((bits >> 31) & ((1 << 33) - 1))
    return (((bits >> 12) & ((1 << 52) - 1)).double() + 0.5) * 2.0**-52


def _key(seed: int) -> int:
    """64 bits, signed, that share nothing between neighbouring seeds."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _nucleus(
    weights: Float[Tensor, "rows vocab"], top_p: Float[Tensor, " rows"]
) -> Float[Tensor, "rows vocab"]:
    """The likeliest tokens whose sum first reaches top_p; the others have weight 0."""
    ordered, places = weights.sort(-1, descending=True)
    before = ordered.double().cumsum(-1) - ordered
    ordered = torch.where(before < top_p[:, None], ordered, 0.0)
    return torch.zeros_like(weights).scatter(-1, places, ordered)


def _options(model: Any) -> Callable[..., dict[str, Any]]:
    """What the model's forward takes besides: positions under padding, how many logits to keep."""
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
    model: Any, rows: Sequence[Row], device: torch.device
) -> tuple[Bool[Tensor, "kinds vocab"], Int[Tensor, " rows"]]:
    """Which tokens end a row, for each kind of row, and each row's kind."""
    end = model.generation_config.eos_token_id
    own = [] if end is None else end if isinstance(end, list) else [end]
    kinds = {stop: i for i, stop in enumerate(dict.fromkeys(row.stop for row in rows))}
    vocabulary = model.get_output_embeddings().weight.shape[0]
    table = torch.zeros(len(kinds), vocabulary, dtype=torch.bool)
    for stop, i in kinds.items():
        table[i, [*own, *stop]] = True
    return table.to(device), torch.tensor([kinds[row.stop] for row in rows], device=device)
