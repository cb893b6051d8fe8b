"""A profile for each request of a batch: before each step, which row of the betas a token uses.

A batch holds the tokens of its requests side by side, and every layer holds a table of betas with a
row for each profile. Before vLLM's forward pass, each token's row and room are written down; in
the pass, every layer looks up beta[row, head] ** room by token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tempering.engines.vllm.arguments import profile_of


class RequestProfiles(ABC):
    """Which row of an engine's profiles, and which room, each of its requests uses.

    rows: name of a profile -> its row; requests that name none use row 0.
    """

    def __init__(self, rows: Mapping[str, int]) -> None:
        self._rows = rows
        self._place_of: dict[str, tuple[int, float]] = {}

    def follow(self, scheduled: Any) -> None:
        """Add the requests that a step begins, and forget those that are finished."""
        for request_id in scheduled.finished_req_ids:
            self._place_of.pop(request_id, None)
        for request in scheduled.scheduled_new_reqs:
            name, room = profile_of(request.sampling_params)
            self._place_of[request.req_id] = 0 if name is None else self._rows[name], room

    @abstractmethod
    def fill(self, request_ids: Sequence[str], counts: Sequence[int]) -> None:
        """Learn the next batch: `counts[i]` tokens of request i, one after another."""

    def at(self, positions: torch.Tensor) -> None:  # noqa: B027
        """Learn at which positions of their requests the tokens of this batch stand, from 0."""


class RowsOfTokens(RequestProfiles):
    """`RequestProfiles` for layers that hold a table of betas.

    index, rooms: token -> row, and token -> room, which every layer reads; written in place.
    """

    def __init__(self, rows: Mapping[str, int], index: torch.Tensor, rooms: torch.Tensor) -> None:
        super().__init__(rows)
        self._index, self._rooms = index, rooms

    def fill(self, request_ids: Sequence[str], counts: Sequence[int]) -> None:
        places = [self._place_of[request_id] for request_id in request_ids]
        lengths = torch.tensor([int(count) for count in counts])
        for buffer, values in (
            (self._index, torch.tensor([row for row, _ in places], dtype=torch.long)),
            (self._rooms, torch.tensor([room for _, room in places], dtype=torch.float32)),
        ):
            flat = values.repeat_interleave(lengths)
            # The rest of the index belongs to padding, whose outputs are never read.
            buffer[: len(flat)].copy_(flat, non_blocking=True)


def follow_requests(runner: Any, profiles: RequestProfiles) -> None:
    """Make a model runner report its requests and batches to `profiles`."""
    newer = hasattr(runner, "prepare_inputs")
    name = "prepare_inputs" if newer else "_prepare_inputs"
    prepare_inputs, execute_model = getattr(runner, name), runner.execute_model

    def inputs(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        if newer:
            batch = prepare_inputs(scheduled, *args, **kwargs)
            profiles.fill(batch.req_ids, batch.num_scheduled_tokens)
            profiles.at(batch.positions)
            return batch
        ids = runner.input_batch.req_ids
        counts = args[0] if args else kwargs["num_scheduled_tokens"]
        profiles.fill(ids[: len(counts)], counts)
        made = prepare_inputs(scheduled, *args, **kwargs)
        profiles.at(runner.positions)
        return made

    def step(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        profiles.follow(scheduled)
        return execute_model(scheduled, *args, **kwargs)

    setattr(runner, name, inputs)
    runner.execute_model = step
