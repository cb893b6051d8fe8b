"""What an engine says of prompts, as checked log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from tempering.audit.scores import Scored, scored


@runtime_checkable
class AskedEngine(Protocol):
    """What gives log probabilities of prompts."""

    def logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float | None]]:
        """log q of every token of every prompt, nats; None for the first."""
        ...


def ask(engine: AskedEngine, prompts: Sequence[Sequence[int]], first: int = 0) -> list[Scored]:
    """What an engine says of prompts; first: the number of the first, for messages."""
    rows = engine.logprobs(prompts)
    return [
        scored(list(ids), row, f"prompt {first + place}")
        for place, (ids, row) in enumerate(zip(prompts, rows, strict=True))
    ]
