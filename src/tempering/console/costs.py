"""What the painted temperatures cost and do, on text: meter, budget, statistics, questions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tempering.attention.measuring.measure import Measurement, measure_tokens
from tempering.attention.profiles.profile import Profile
from tempering.chunks import token_chunks
from tempering.cli.shared.answers import answers
from tempering.console.subject import Subject
from tempering.console.turns import Event, Job
from tempering.data import sample_text
from tempering.errors import InputError
from tempering.evaluation.budget import LARGEST, largest_amplitude
from tempering.evaluation.cost import Variant, cost_rows, summarised
from tempering.evaluation.paired import IntervalEstimate
from tempering.schedules import schedule

CHUNK = 128  # tokens: a turn of the meter is over soon, and a new token waits for no more
_MOST_CHUNKS = 96
_BUDGET_CHUNKS = 8  # every amplitude is tried on these
_MEASURED_CHUNKS = 2
# What the grid shows of a measurement; `entropy` and the like as `Measurement` names them.
QUANTITIES = ("support", "sink_share", "entropy", "peak", "distance")
_LABEL = "painted"


def sample(subject: Subject, text: str | None) -> Tensor:
    """Chunks of a text (the package's own without one), in an order that is the same every time.

    Shuffled, so that the first few chunks are already a fair sample of the whole text.
    """
    subject.require()
    chunks = token_chunks(
        subject.tokenizer, sample_text("demo") if text is None else text, CHUNK, _MOST_CHUNKS
    )
    order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(0))
    return chunks[order]


def meter(subject: Subject, profile: Profile, chunks: Tensor) -> Iterator[Event]:
    """The cost over one more chunk with each event, with its interval."""
    variants = [Variant(_LABEL, profile)]
    rows: list[dict[str, list[float]]] = []
    for index in range(len(chunks)):
        rows += cost_rows(subject.model, chunks[index : index + 1], variants).rows
        (cost,) = summarised(rows, variants, [chunks.shape[1] - 1] * len(rows))
        yield {
            "type": "cost",
            "cost": _estimate(cost.cost),
            "kl": _estimate(cost.kl),
            "nll": cost.nll,
            "untempered": cost.untempered_nll,
            "tokens": cost.tokens,
            "chunks": len(rows),
            "of": len(chunks),
        }


def budget(
    subject: Subject,
    pattern: str | None,
    painted: Profile,
    nats: float,
    chunks: Tensor,
    job: Job,
) -> Iterator[Event]:
    """The largest amplitude whose cost stays within so many nats per token.

    A pattern is mapped onto temperatures from 1/a to a. What was painted by hand is raised to the
    power (its room) at which the temperature farthest from 1 is a or 1/a.
    """
    part = chunks[:_BUDGET_CHUNKS]
    reach = max(float(row.log().abs().max()) for row in painted.rows)
    if pattern is None:
        painted.refuse_rules("no amplitude scales them; change their level or their bounds")
    if pattern is None and reach == 0:
        raise InputError("every temperature is 1, which costs nothing; paint something first")

    def at(amplitude: float) -> Profile:
        if pattern is None:
            return painted.scaled(math.log(amplitude) / reach)
        return Profile.from_schedule(schedule(pattern).amplitude(amplitude), subject.plan)

    def cost_of(amplitude: float) -> IntervalEstimate:
        job.check()
        variants = [Variant(_LABEL, at(amplitude))]
        rows = []
        for index in range(len(part)):
            rows += cost_rows(subject.model, part[index : index + 1], variants).rows
            job.check()
        (found,) = summarised(rows, variants, [part.shape[1] - 1] * len(rows))
        job.send({"type": "tried", "amplitude": amplitude, "cost": _estimate(found.cost)})
        return found.cost

    found = largest_amplitude(cost_of, nats)
    yield {
        "type": "budget",
        "amplitude": found.amplitude,
        "room": None if pattern is not None else math.log(found.amplitude) / reach,
        "cost": None if found.cost is None else _estimate(found.cost),
        "bounded": found.bounded,
        "largest": LARGEST,
    }


def measured(subject: Subject, profile: Profile, chunks: Tensor) -> Iterator[Event]:
    """What every head keeps of its keys on the text, before and after."""
    part = chunks[:_MEASURED_CHUNKS]
    for name, own in (("before", None), ("after", profile)):
        found = measure_tokens(subject.model, part, profile=own)
        yield {"type": "measured", "when": name, "tokens": part.numel(), **_tables(found)}


def _tables(found: Measurement) -> dict[str, Any]:
    return {
        name: [[_number(x) for x in row] for row in getattr(found, name).tolist()]
        for name in QUANTITIES
    }


def questions(subject: Subject, profile: Profile, seed: int, job: Job) -> Iterator[Event]:
    """The demo's questions about a long text, answered before and after."""

    def told(done: int, total: int) -> None:
        job.send({"type": "progress", "done": done, "total": total})

    found = answers(
        subject.model,
        subject.tokenizer,
        profile,
        _LABEL,
        seed=seed,
        progress=told,
        check=job.check,
    )
    yield {"type": "answers", "label": _LABEL, **found}


def _estimate(found: IntervalEstimate) -> dict[str, Any]:
    return {name: _number(value) for name, value in found._asdict().items()}


def _number(value: float | int) -> float | int | None:
    return value if math.isfinite(value) else None
