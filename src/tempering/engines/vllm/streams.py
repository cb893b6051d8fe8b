"""One request's policy and state in an engine, and the tempering of a batch of such requests.

Whatever goes wrong with one request is returned beside its row, never raised: an exception while an
engine samples would end it for everybody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.errors import RefusedError
from tempering.tokens.policy import Policy, token_temperatures
from tempering.tokens.state import TokenState
from tempering.tokens.temper import tempered, token_energies


class Stream:
    """The state of one request, followed token by token and rebuilt when tokens are taken back.

    Parameters
    ----------
    policy: of this request.
    sample: which of the n samples of its prompt it is.
    temperature: the request's own, by which the engine divides as well.
    """

    def __init__(self, policy: Policy, sample: int = 0, temperature: float = 1.0) -> None:
        self.policy = policy
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
            self._state = self.policy.start(prompt() if reads else (), sample=self.sample)
            self._count = 0
        while self._count < count:
            read = token(self._count) if reads else 0
            if read < 0:
                raise RefusedError(
                    f"{self.policy}: the engine holds back which token {self._count} was; this is "
                    "a defect of tempering under asynchronous scheduling: --no-async-scheduling"
                )
            self._state = self.policy.advance(self._state, read)
            self._count += 1
        return self._state


class Row(NamedTuple):
    """One row of logits: its place, its request's stream, and what gives the state it is in."""

    place: int
    stream: Stream
    state: Callable[[], TokenState]


def temper_rows(
    logits: Float[Tensor, "rows vocab"], rows: Sequence[Row], *, divided: bool
) -> dict[int, Exception]:
    """Temper some rows of a batch in place, each by its own policy.

    Rows of one policy are done together. A row that has no finite maximum (NaN, overflow, or
    everything masked) stays as it is: no temperature changes what it says, and the engine
    answers for it.

    Parameters
    ----------
    divided: whether the engine has divided by the requests' own temperatures already; otherwise it
        does so afterwards. Either way that division is undone, and the policy's stands.

    Returns
    -------
    place -> what went wrong there, of rows that could not be tempered; they are unchanged.
    """
    failed: dict[int, Exception] = {}
    sound = torch.isfinite(logits.amax(-1)).tolist()
    groups: dict[int, list[tuple[Row, TokenState]]] = {}
    for row in rows:
        try:
            state = row.state()
        except Exception as error:
            failed[row.place] = error
            continue
        if sound[row.place]:
            groups.setdefault(id(row.stream.policy), []).append((row, state))
    for members in groups.values():
        try:
            _temper_group(logits, members, divided)
        except Exception as error:
            if len(members) == 1:
                failed[members[0][0].place] = error
                continue
            for member in members:  # one of them made all fail
                try:
                    _temper_group(logits, [member], divided)
                except Exception as error:
                    failed[member[0].place] = error
    return failed


def _temper_group(
    logits: Float[Tensor, "rows vocab"],
    members: Sequence[tuple[Row, TokenState]],
    divided: bool,
) -> None:
    """Temper rows of one policy; nothing is written unless all of them can be."""
    rows, states = zip(*members)
    places = [row.place for row in rows]
    whole = places == list(range(len(logits)))
    given = logits if whole else logits[places]
    own = given.new_tensor([row.stream.temperature for row in rows]).unsqueeze(-1)
    plain = bool((own == 1).all())
    raw = given * own if divided and not plain else given
    energies = token_energies(raw)
    temperature = token_temperatures(rows[0].stream.policy, energies, states)
    result = tempered(raw, energies, temperature)
    if not divided and not plain:
        result = result * own
    if whole:
        logits.copy_(result)
    else:
        logits[places] = result.to(logits.dtype)
