"""What a stage of agents asks of an engine, and what comes back.

Agents know no engine: they hand over `Call`s and get a `Reply` for each, as it comes. Engines
(`tempering.engines.generating.local`, `tempering.engines.providers`) follow the protocol `Engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tempering.errors import TemperingError


class EngineError(TemperingError):
    """An engine can't answer, also after retries; the message says why."""


class StageError(TemperingError):
    """All workers of a stage failed; the rows made before, with their cost, are kept."""


@dataclass(frozen=True)
class Call:
    """One generation.

    key: names the call in a run; the same over retries and resumptions.
    prompt: the user's turn. system: the system turn before it, or None.
    temperature: of sampling, as asked, on the engine's own scale; None is the model's default.
    tokens: new tokens at most. seed: of its random numbers, where the engine takes one.
    top_p: probability mass of the nucleus that is sampled from; None for all tokens.
    attention: pattern over depth of relative attention temperatures, or None for the model's own.
    raw: continue the prompt as a text; an engine that only chats takes the prompt as a user's turn.
    stop: text before which the output ends, e.g. a line break.
    token_policy: text of a policy of the sampling temperature by token, beside a temperature of 1;
        what its samplers leave out is then not truncated, or as the server has it.
    """

    key: str
    prompt: str
    temperature: float | None
    tokens: int
    seed: int
    system: str | None = None
    top_p: float | None = None
    attention: str | None = None
    raw: bool = False
    stop: str | None = None
    token_policy: str | None = None


@dataclass(frozen=True)
class Reply:
    """What became of a call: an output or an error, and what it cost.

    A reply that came without text, or with only a part of it, has an output (perhaps "") and the
    error that says why. A reply that never came has an error and the output None.

    temperature_sent: None where none was sent. seed_sent: whether the engine took the seed.
    score: mean log probability of the output's tokens under the untempered model at T = 1,
        nats per token; None where the engine doesn't tell.
    finish: why the output ended: "end", "length", or the provider's word. attempts: 1 without
        retries.
    note: what a reader of the record should know, e.g. the provider's advice.
    replica: address of the server that answered, where several serve the model; None otherwise.
    tokens_discarded: tokens in and out of earlier replies to this call, which were paid for and
        could not be read.
    """

    output: str | None
    error: str | None = None
    temperature_sent: float | None = None
    seed_sent: bool = False
    tokens_in: int = 0
    tokens_out: int = 0
    finish: str | None = None
    score: float | None = None
    attempts: int = 1
    note: str | None = None
    tokens_discarded: int = 0
    replica: str | None = None


Done = Callable[[int, Reply], None]
# (index of the call, "running" | "retrying", tokens so far, or attempts so far when retrying)
Progress = Callable[[int, str, int], None]
Stop = Callable[[], bool]


@runtime_checkable
class Engine(Protocol):
    """Where generations run.

    name, model: what a record calls the engine and its model. has_attention: whether calls may
    carry `attention`.
    """

    name: str
    model: str
    has_attention: bool

    def temperature(self, normalised: float) -> float:
        """The sampling temperature that 0 (cold) to 1 (hot) stands for on this model."""

    def check(self, calls: Sequence[Call]) -> None:
        """Raise the error that these calls are certain to meet, before anything is sent."""

    def count(self, call: Call) -> int:
        """Tokens of the prompt: exact, or an estimate where the engine can't know."""

    def run(self, calls: Sequence[Call], done: Done, progress: Progress, stop: Stop) -> None:
        """Run the calls; `done` is called once for each, as it finishes.

        When `stop()` turns true, no new call is started. Calls under way, which are paid for, are
        waited for; `done` is not called for the others.
        """

    def describe(self) -> dict[str, Any]:
        """Settings for the record, without the API key."""


@runtime_checkable
class Ledger(Protocol):
    """Finished rows by name; `tempering.evaluation.journal.Journal` keeps them on disk."""

    def __contains__(self, name: str) -> bool: ...
    def __getitem__(self, name: str) -> Any: ...
    def put(self, name: str, value: Any) -> None: ...


class Memory(dict[str, Any]):
    """A ledger without a disk."""

    def put(self, name: str, value: Any) -> None:
        """Keep one row."""
        self[name] = value


def no_progress(index: int, state: str, count: int) -> None:
    """A `Progress` that shows nothing."""


def never() -> bool:
    """A `Stop` that never stops."""
    return False
