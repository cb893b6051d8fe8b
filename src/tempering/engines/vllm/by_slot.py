"""Policies in vLLM's newer model runner, which calls processors for drafted tokens as well.

Its rows of logits come in any order, each names the slot of its request, and under speculation a
request has one row more than tokens were drafted for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tempering.engines.vllm.failing import failure_message
from tempering.engines.vllm.policies import EnginePolicies, PlacedRow
from tempering.engines.vllm.streams import DraftedStates, Stream
from tempering.errors import RefusedError
from tempering.tokens.token_state import TokenState


class _Rows(NamedTuple):
    """The rows of one request in a step: one more than tokens were drafted for it.

    first: index of the first. length: tokens of the request, prompt included, drafted ones not.
    """

    first: int
    slot: int
    length: int
    drafted: list[int]


class BySlot(EnginePolicies):
    """The interface of vLLM's newer model runner: rows come in any order, each names its slot."""

    def __init__(self, config: Any, state: Any) -> None:
        super().__init__(config)
        self._state = state
        self._slots: dict[int, Stream | Exception] = {}

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Give a slot to a new request; the request that had it before is finished."""
        stream = self.stream_of(sampling_params)
        if stream is None:
            self._slots.pop(req_idx, None)
            return False
        self._slots[req_idx] = stream
        return True

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Temper the rows of requests with a policy; vLLM divides by their temperature after."""
        slots = ctx.idx_mapping_np.tolist()
        if not any(slot in self._slots for slot in slots):
            return logits
        if not self.speculates and len(slots) != len(logits):
            unknown = RefusedError(
                f"{len(logits)} rows of logits for {len(slots)} requests, but this engine doesn't "
                "speculate; whose rows they are isn't known"
            )
            for slot in slots:
                if slot in self._slots:
                    self.step.fail(slot, 0, failure_message(unknown))
            return logits
        found = _verified_rows(ctx) if self.speculates else _plain_rows(ctx, slots)
        placed = [row for rows in found for row in self._placed(rows)]
        return self.temper(logits, placed, divided=False)

    def _placed(self, rows: _Rows) -> Iterator[PlacedRow]:
        stream = self._slots.get(rows.slot)
        if isinstance(stream, Exception):
            self.step.fail(rows.slot, 0, failure_message(stream))
        start = int(self._state.prompt_len.np[rows.slot])
        count = rows.length - start
        if not isinstance(stream, Stream) or count < 0:
            return  # below 0: a part of the prompt, of which no token is sampled
        ids = self._state.all_token_ids.gpu[rows.slot]

        def known() -> TokenState:
            return stream.at(
                count, lambda: ids[:start].tolist(), lambda index: int(ids[start + index])
            )

        states = DraftedStates(stream, known, rows.drafted)
        for ahead in range(states.reach + 1):
            yield PlacedRow(rows.first + ahead, stream, states, rows.slot, ahead)


def _plain_rows(ctx: Any, slots: list[int]) -> Iterator[_Rows]:
    """A row for each request, from what the host knows."""
    for row, slot in enumerate(slots):
        yield _Rows(row, slot, int(ctx.seq_lens_upper_bound_np[row]), [])


def _verified_rows(ctx: Any) -> Iterator[_Rows]:
    """Rows that verify drafts, from the device: the host doesn't know how many were accepted."""
    columns = (ctx.expanded_idx_mapping, ctx.expanded_local_pos, ctx.pos, ctx.input_ids)
    rows: _Rows | None = None
    for row, values in enumerate(torch.stack([x.long() for x in columns], -1).tolist()):
        slot, ahead, position, token = values
        if rows is not None and ahead:  # the rows of a request follow each other
            rows.drafted.append(token)
            continue
        if rows is not None:
            yield rows
        rows = _Rows(row, slot, position + 1, [])
    if rows is not None:
        yield rows
