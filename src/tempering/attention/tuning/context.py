"""Temperatures for the context at hand: fitted on the context itself, for so many seconds.

Nothing but the context is learned from. It is cut into spans, of which some are drawn, as many as
there is time for. A span is learned to be recalled:

    the span, then four excerpts of it, of each of which the second half is to be predicted

So an excerpt is a question that the context itself answers: how did this go on? A quarter of the
spans is held out and judges. The spans' own next tokens are not learned: they are many, and drown
the questions. The context is read afterwards, once, under the temperatures found, so no keys or
values are computed twice. After: test-time training of query weights, Bansal et al. 2025 (arXiv
2512.13898).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tempering.attention.examining.stored import input_device
from tempering.attention.profiles.profile import Profile
from tempering.attention.tuning.batches import Batch
from tempering.attention.tuning.fit import tune
from tempering.attention.tuning.live_temperatures import Bounds
from tempering.attention.tuning.objectives import Objective, from_batches
from tempering.attention.tuning.outcome import Tuned
from tempering.counts import whole_number
from tempering.errors import DataError, InputError

_FEWEST = 4  # spans: three to learn from, one to judge by
_HELD_OUT = 0.25
_EXCERPTS = 4
_ROWS = 4  # spans side by side
# What three Newton steps take, in forwards of all spans alone: three passes with gradients, one of
# them with a draw, of the spans learned from, and four forwards of those held out.
_THREE_STEPS = 11


class ContextFit(NamedTuple):
    """Temperatures fitted to a context, and what they took.

    profile: T is 1 everywhere where nothing was gained on the spans held out.
    seconds: of the whole call. spans: drawn of the context. tuned: the run.
    """

    profile: Profile
    seconds: float
    spans: int
    tuned: Tuned


def tune_context(
    model: nn.Module,
    ids: Tensor,
    *,
    seconds: float | int,
    start: Sequence[int] = (),
    span: int = 256,
    bounds: Bounds = (0.5, 2.0),
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> ContextFit:
    """Fit temperatures to one context, to be used for what is asked of that context.

    Parameters
    ----------
    model: a causal model of transformers. ids: the context's tokens, [length].
    seconds: for the whole call, of which a tenth is kept for what follows the fit; the fit ends in
        time, at the best point that it has seen.
    start: tokens that a text of the model begins with, such as <bos>; every span gets them.
    span: tokens of a span; a context of fewer than four spans has shorter ones, of 16 at least.
    bounds: of T. seed: draws spans and excerpts. progress: (stage, done, total).

    Raises
    ------
    InputError: seconds or ids that are none. DataError: a context of fewer than 64 tokens, or one
    that repeats itself.

    Warns
    -----
    ConvergenceWarning: nothing was gained on the spans held out, so T is 1 everywhere.
    """
    begun = time.perf_counter()
    if isinstance(seconds, bool) or not (math.isfinite(seconds) and seconds > 0):
        raise InputError(f"seconds is a positive number, not {seconds}")
    ids = _checked(ids, model)
    span, seed = whole_number(span, "span", 16), whole_number(seed, "seed") % 2**63
    size = min(span, len(ids) // _FEWEST)
    positions = getattr(model.config, "max_position_embeddings", None)
    while isinstance(positions, int) and size > 16 and _tokens(size, start) > positions:
        size -= 1
    if size < 16:
        raise DataError(
            f"the context has {len(ids)} tokens, and temperatures are fitted to 64 or more; "
            "leave a context so short as it is"
        )
    spans = ids[: len(ids) // size * size].reshape(-1, size).cpu()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(spans), generator=generator)
    one = _forward_seconds(model, spans[order[0]])
    affordable = (0.9 * seconds - (time.perf_counter() - begun)) / (_THREE_STEPS * one)
    count = max(_FEWEST, int(min(affordable, len(spans))))
    drawn = spans[order[:count].sort().values]
    if len(drawn.unique(dim=0)) < 2:
        raise DataError(
            f"the {count} spans of {size} tokens that were drawn of the context are all alike, so "
            "none can be held out to judge by; leave a context that repeats itself as it is"
        )
    tuned = tune(
        model,
        context_objective(drawn, generator, start),
        bounds=bounds,
        held_out=_HELD_OUT,
        rows=_ROWS,
        seed=seed,
        until=begun + 0.9 * seconds,
        progress=progress,
    )
    return ContextFit(tuned.profile, time.perf_counter() - begun, len(drawn), tuned)


def _checked(ids: Any, model: nn.Module) -> Int[Tensor, "length"]:
    """The tokens of a context as int64; InputError for what is none."""
    if not isinstance(ids, Tensor):
        raise InputError(f"ids are a tensor of one context's tokens, [length]; got {type(ids)}")
    if ids.ndim != 1 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise InputError(
            f"ids are the tokens of one context, integers [length]; got {ids.dtype} "
            f"{list(ids.shape)}"
        )
    ids = ids.long()
    known = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < known):
        raise InputError(
            f"ids lie in {int(ids.min())} to {int(ids.max())}, and the model has tokens 0 to "
            f"{known - 1}; take ids of its own tokenizer"
        )
    return ids


def _excerpt(size: int) -> int:
    """Tokens of an excerpt of a span."""
    return max(8, size // 8)


def _tokens(size: int, start: Sequence[int]) -> int:
    """Tokens of a span with what stands before and behind it."""
    return len(start) + size + _EXCERPTS * _excerpt(size)


def context_objective(
    spans: Int[Tensor, "spans size"], generator: torch.Generator, start: Sequence[int] = ()
) -> Objective:
    """To recall excerpts of each span; piece k is span k."""
    size = spans.shape[1]
    first = torch.tensor(start, dtype=spans.dtype)
    length = _excerpt(size)
    begins = torch.randint(size - length + 1, (len(spans), _EXCERPTS), generator=generator)
    asked = (torch.arange(length) >= length // 2).repeat(_EXCERPTS)
    targets = torch.cat([torch.zeros(len(first) + size, dtype=torch.bool), asked])[None]
    pieces = []
    for place, (own, at) in enumerate(zip(spans, begins.tolist(), strict=True)):
        ids = torch.cat([first, own, *(own[begin : begin + length] for begin in at)])[None]
        pieces.append(Batch(ids, targets, f"span {place}"))
    return from_batches("recall", pieces, kind="answers")


def _forward_seconds(model: Any, span: Int[Tensor, "size"]) -> float:
    """Time of one forward of a span, after one that warms up."""
    seconds = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        with torch.no_grad():
            # An item of the result waits for a GPU.
            model(span[None].to(input_device(model)), use_cache=False).logits[0, -1, 0].item()
        seconds = time.perf_counter() - begin
    return seconds
