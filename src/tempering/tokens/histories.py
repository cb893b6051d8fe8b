"""The states of rows of token ids, found by the tokens of a row and not by the order of calls."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tempering.errors import InputError, RefusedError
from tempering.tokens.policy import Policy
from tempering.tokens.settings import RequestSettings
from tempering.tokens.token_state import NOTHING_GIVEN, TokenState


class Reading(NamedTuple):
    """The state of each row, and the row of the call before that it continues (None: rebuilt)."""

    states: list[TokenState]
    parents: list[int | None]


class Histories:
    """The states of rows that grow token by token, also when rows change places.

    Where a row continues a row of the call before, at the same index or (in beam search) at
    another, that row's state is advanced by one token. The state of any other row (in a first call,
    after a rewind) is rebuilt from its tokens. Both ways give the same state, so calls may repeat,
    skip or go back.

    Parameters
    ----------
    policy: whose states these are.
    prompt_length: tokens in each row that come before the first generated one, padding included.
    given: the settings that the policy takes over from the request.
    """

    def __init__(
        self, policy: Policy, prompt_length: int, given: RequestSettings = NOTHING_GIVEN
    ) -> None:
        self.policy = policy
        self.given = given
        self.prompt_length = prompt_length
        self._rows: NDArray[np.int64] = np.empty((0, 0), dtype=np.int64)
        self._states: list[TokenState] = []

    def read(self, rows: NDArray[np.int64]) -> Reading:
        """The states of these rows, each [tokens], before their next token.

        Raises
        ------
        InputError: shorter than the prompt, or not n rows for each prompt of a ladder.
        RefusedError: a ladder whose rows changed places, as in beam search.
        """
        if rows.shape[1] < self.prompt_length:
            raise InputError(
                f"rows of {rows.shape[1]} tokens are shorter than prompt_length="
                f"{self.prompt_length}; prompt_length counts the tokens before the first "
                "generated one, padding included"
            )
        samples = self._samples(rows)
        parents = self._parents(rows)
        rebuilt: dict[tuple[bytes, int], TokenState] = {}
        states = []
        for row, (sample, parent) in enumerate(zip(samples, parents)):
            if parent is not None:
                state = self.policy.advance(self._states[parent], int(rows[row, -1]))
                if state.sample != sample:
                    raise RefusedError(
                        f"{self.policy}: row {row} continues what was row {parent}, as in beam "
                        "search, where a temperature for each sample has no meaning; sample "
                        "without beams"
                    )
            else:
                key = (rows[row].tobytes(), sample)
                if key not in rebuilt:
                    rebuilt[key] = self._rebuild(rows[row], sample)
                state = rebuilt[key]
            states.append(state)
        self._rows, self._states = rows.copy(), states
        return Reading(states, parents)

    def _rebuild(self, row: NDArray[np.int64], sample: int) -> TokenState:
        ids = row.tolist()
        prompt, generated = ids[: self.prompt_length], ids[self.prompt_length :]
        return self.policy.state(prompt, generated, sample=sample, given=self.given)

    def _parents(self, rows: NDArray[np.int64]) -> list[int | None]:
        before = self._rows
        if rows.shape[1] - 1 != before.shape[1] or before.shape[1] < self.prompt_length:
            return [None] * len(rows)
        if len(rows) == len(before) and np.array_equal(rows[:, :-1], before):
            return list(range(len(rows)))
        index_of: dict[bytes, int] = {}
        for index, row in enumerate(before):
            index_of.setdefault(row.tobytes(), index)
        parents: list[int | None] = []
        for index, row in enumerate(rows[:, :-1]):
            stayed = index < len(before) and np.array_equal(row, before[index])
            parents.append(index if stayed else index_of.get(row.tobytes()))
        return parents

    def _samples(self, rows: NDArray[np.int64]) -> list[int]:
        """Which sample each row is: generate() puts the samples of a prompt side by side."""
        n = self.policy.samples
        if n is None:
            return [0] * len(rows)
        prompts = rows[:, : self.prompt_length]
        if len(rows) % n or not all(
            np.array_equal(prompts[first], prompts[first + i])
            for first in range(0, len(rows), n)
            for i in range(1, n)
        ):
            raise InputError(
                f"{self.policy} has {n} temperatures for {n} samples of each prompt, but these "
                f"{len(rows)} rows are not {n} of each; give generate(num_return_sequences={n})"
            )
        return [row % n for row in range(len(rows))]
