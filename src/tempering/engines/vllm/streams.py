"""The policy and state of one request in an engine, and the tempering of a batch of such requests.

Whatever goes wrong with one request is returned under its row, never raised: an exception while an
engine samples would end all requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.errors import RefusedError
from tempering.tokens.applying import apply_policy
from tempering.tokens.policy import Policy
from tempering.tokens.settings import RequestSettings
from tempering.tokens.temper import token_energies
from tempering.tokens.token_state import NOTHING_GIVEN, TokenState


class Stream:
    """The state of one request, followed token by token and rebuilt when tokens are taken back.

    Parameters
    ----------
    policy: of this request.
    sample: which of the n samples of its prompt it is.
    temperature: the request's own, by which the engine divides, too.
    given: the request's own settings, where the policy takes them over.
    """

    def __init__(
        self,
        policy: Policy,
        sample: int = 0,
        temperature: float = 1.0,
        given: RequestSettings = NOTHING_GIVEN,
    ) -> None:
        self.policy = policy
        self.given = given
        self.sample = sample
        self.temperature = temperature
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


class LogitsRow(NamedTuple):
    """One row of logits: its index in the batch, its request's stream, and a call for its state."""

    row_index: int
    stream: Stream
    state: Callable[[], TokenState]


def temper_rows(
    logits: Float[Tensor, "rows vocab"], rows: Sequence[LogitsRow], *, divided: bool
) -> dict[int, Exception]:
    """Temper some rows of a batch in place, each by its own policy.

    Rows of one policy are done together. A row that has no finite maximum (NaN, overflow, or
    everything masked) stays as it is: it has no tempered posterior, and the engine decides what to
    sample from it.

    Parameters
    ----------
    divided: whether the engine has divided by the requests' own temperatures already; otherwise it
        does so afterwards. Either way that division is undone, so that the policy's alone counts.

    Returns
    -------
    Index in the batch -> error, of the rows that could not be tempered; these are unchanged.
    """
    failed: dict[int, Exception] = {}
    sound = torch.isfinite(logits.amax(-1)).tolist()
    groups: dict[int, list[tuple[LogitsRow, TokenState]]] = {}
    for row in rows:
        try:
            state = row.state()
        except Exception as error:
            failed[row.row_index] = error
            continue
        if sound[row.row_index]:
            groups.setdefault(id(row.stream.policy), []).append((row, state))
    for members in groups.values():
        try:
            _temper_group(logits, members, divided)
        except Exception as error:
            if len(members) == 1:
                failed[members[0][0].row_index] = error
                continue
            for member in members:  # alone, to find those that fail
                try:
                    _temper_group(logits, [member], divided)
                except Exception as error:
                    failed[member[0].row_index] = error
    return failed


def _temper_group(
    logits: Float[Tensor, "rows vocab"],
    members: Sequence[tuple[LogitsRow, TokenState]],
    divided: bool,
) -> None:
    """Temper the rows of one policy: all of them, or none where one fails."""
    rows, states = zip(*members)
    indices = [row.row_index for row in rows]
    whole = indices == list(range(len(logits)))
    given = logits if whole else logits[indices]
    divisor = given.new_tensor([row.stream.temperature for row in rows]).unsqueeze(-1)
    plain = bool((divisor == 1).all())
    raw = given * divisor if divided and not plain else given
    result, _ = apply_policy(rows[0].stream.policy, raw, token_energies(raw), states)
    if not divided and not plain:
        result = result * divisor
    if whole:
        logits.copy_(result)
    else:
        logits[indices] = result.to(logits.dtype)
