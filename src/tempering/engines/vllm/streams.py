"""The policy and state of one request in an engine, and the tempering of a batch of such requests.

Whatever goes wrong with one request is returned under its row, never raised: an exception while an
engine samples would end all requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.errors import RefusedError
from tempering.tokens.applying import apply_policy
from tempering.tokens.policy import Policy
from tempering.tokens.settings import RequestSettings
from tempering.tokens.temper import token_energies
from tempering.tokens.token_state import NOTHING_GIVEN, TokenState
from tempering.tokens.trace import TraceStep, trace_entry, trace_steps


class Stream:
    """The state of one request, followed token by token and rebuilt when tokens are taken back.

    Parameters
    ----------
    policy: of this request.
    sample: which of the n samples of its prompt it is.
    temperature: the request's own, by which the engine divides, too.
    given: the request's own settings, where the policy takes them over.
    traced: whether its client wants to know what each token was drawn from.
    """

    def __init__(
        self,
        policy: Policy,
        sample: int = 0,
        temperature: float = 1.0,
        given: RequestSettings = NOTHING_GIVEN,
        *,
        traced: bool = False,
    ) -> None:
        self.policy = policy
        self.given = given
        self.sample = sample
        self.temperature = temperature
        self.traced = traced
        self.reads_tokens = policy.reads_tokens
        self._state: TokenState | None = None
        self._count = 0

    def at(
        self, count: int, prompt: Callable[[], Sequence[int]], token: Callable[[int], int]
    ) -> TokenState:
        """The state after `count` generated tokens.

        prompt, token: the prompt's ids, and the id of generated token i; asked only of policies
        that read them.
        """
        reads = self.reads_tokens
        if self._state is None or count < self._count:
            ids = prompt() if reads else ()
            self._state = self.policy.start(ids, sample=self.sample, given=self.given)
            self._count = 0
        while self._count < count:
            token_id = token(self._count) if reads else 0
            if token_id < 0:
                raise RefusedError(
                    f"{self.policy}: the engine doesn't say which token {self._count} was; this is "
                    "a defect of tempering under asynchronous scheduling: serve with "
                    "--no-async-scheduling"
                )
            self._state = self.policy.advance(self._state, token_id)
            self._count += 1
        return self._state


class DraftedStates:
    """The states of a request along tokens that were drafted for it, of which none is accepted yet.

    Each state is made from the one before, so tokens that are rejected leave nothing to take back.

    Parameters
    ----------
    stream: of the request. known: a call for its state before the drafted tokens.
    tokens: the drafted ones, in order. One below 0 is none: engines reject it, and sample nothing
        after it.

    Attributes
    ----------
    reach: how many of the drafted tokens may be accepted.
    """

    def __init__(
        self, stream: Stream, known: Callable[[], TokenState], tokens: Sequence[int] = ()
    ) -> None:
        self._stream = stream
        self._known = known
        self._tokens = tokens
        self._states: list[TokenState] = []
        none = (place for place, token in enumerate(tokens) if token < 0)
        self.reach = next(none, len(tokens))

    def after(self, ahead: int) -> TokenState:
        """The state after so many of the drafted tokens."""
        if not self._states:
            self._states.append(self._known())
        for token in self._tokens[len(self._states) - 1 : ahead]:
            self._states.append(self._stream.policy.advance(self._states[-1], token))
        return self._states[ahead]


class LogitsRow(NamedTuple):
    """One row of logits: its index in the batch, its request's stream, and a call for its state."""

    row_index: int
    stream: Stream
    state: Callable[[], TokenState]


class Draw(NamedTuple):
    """What the token of a traced row is drawn from; log probabilities of the whole vocabulary."""

    step: TraceStep
    raw: Float[Tensor, " vocab"]
    tempered: Float[Tensor, " vocab"]

    def entry(self, token: int) -> dict[str, Any]:
        """The trace of the token that was drawn."""
        return trace_entry(token, self.step, float(self.raw[token]), float(self.tempered[token]))


class Tempered(NamedTuple):
    """Index in the batch -> error, of rows that could not be tempered; -> draw, of traced rows."""

    failed: dict[int, Exception]
    draws: dict[int, Draw]


def temper_rows(
    logits: Float[Tensor, "rows vocab"], rows: Sequence[LogitsRow], *, divided: bool
) -> Tempered:
    """Temper some rows of a batch in place, each by its own policy.

    Rows of one policy are done together. A row that has no finite maximum (NaN, overflow, or
    everything masked) stays as it is: it has no tempered posterior, and the engine decides what to
    sample from it. A row that fails is unchanged as well.

    Parameters
    ----------
    divided: whether the engine has divided by the requests' own temperatures already; otherwise it
        does so afterwards. Either way that division is undone, so that the policy's alone counts.
    """
    result = Tempered({}, {})
    sound = torch.isfinite(logits.amax(-1)).tolist()
    groups: dict[int, list[tuple[LogitsRow, TokenState]]] = {}
    for row in rows:
        try:
            state = row.state()
        except Exception as error:
            result.failed[row.row_index] = error
            continue
        if sound[row.row_index]:
            groups.setdefault(id(row.stream.policy), []).append((row, state))
        elif row.stream.traced:
            result.draws[row.row_index] = _unknown(state, logits[row.row_index])
    for members in groups.values():
        try:
            result.draws.update(_temper_group(logits, members, divided))
        except Exception as error:
            if len(members) == 1:
                result.failed[members[0][0].row_index] = error
                continue
            for member in members:  # alone, to find those that fail
                try:
                    result.draws.update(_temper_group(logits, [member], divided))
                except Exception as error:
                    result.failed[member[0].row_index] = error
    return result


def _temper_group(
    logits: Float[Tensor, "rows vocab"],
    members: Sequence[tuple[LogitsRow, TokenState]],
    divided: bool,
) -> dict[int, Draw]:
    """Temper the rows of one policy: all of them, or none where one fails."""
    rows, states = zip(*members)
    indices = [row.row_index for row in rows]
    whole = indices == list(range(len(logits)))
    given = logits if whole else logits[indices]
    divisor = given.new_tensor([row.stream.temperature for row in rows]).unsqueeze(-1)
    plain = bool((divisor == 1).all())
    raw = given * divisor if divided and not plain else given
    energies = token_energies(raw)
    result, temperature = apply_policy(rows[0].stream.policy, raw, energies, states)
    draws = {}
    if traced := [place for place, row in enumerate(rows) if row.stream.traced]:
        steps = trace_steps(energies[traced], temperature[traced], [states[i] for i in traced])
        logs = (each[traced].log_softmax(-1, torch.float32) for each in (raw, result))
        draws = {indices[i]: Draw(*d) for i, *d in zip(traced, steps, *logs, strict=True)}
    if not divided and not plain:
        result = result * divisor
    if whole:
        logits.copy_(result)
    else:
        logits[indices] = result.to(logits.dtype)
    return draws


def _unknown(state: TokenState, row: Float[Tensor, " vocab"]) -> Draw:
    """The draw of a row that has no tempered posterior."""
    nothing = torch.full_like(row, math.nan)
    return Draw(TraceStep(state.phase, *[math.nan] * 4), nothing, nothing)
