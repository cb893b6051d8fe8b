"""Another profile for each request of a batch: token -> row of the layers' tables, before a step.

A batch holds the tokens of its requests side by side. Before vLLM's forward pass the index is
filled with each token's profile; inside it every layer looks up beta[profile, head] by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tempering.engines.vllm.policies import PROFILE


class Assignment:
    """Which row of the profiles' tables each request of an engine uses.

    Parameters
    ----------
    rows: profile's name -> its row; 0 is for requests that name none.
    index: of token -> row, read by every layer; written in place.
    """

    def __init__(self, rows: Mapping[str, int], index: torch.Tensor) -> None:
        self._rows = rows
        self._index = index
        self._of: dict[str, int] = {}

    def follow(self, scheduled: Any) -> None:
        """Take in what a step schedules: new requests, and those that are finished."""
        for request_id in scheduled.finished_req_ids:
            self._of.pop(request_id, None)
        for request in scheduled.scheduled_new_reqs:
            extra = getattr(request.sampling_params, "extra_args", None) or {}
            self._of[request.req_id] = self._rows[extra[PROFILE]] if PROFILE in extra else 0

    def fill(self, request_ids: Sequence[str], counts: Sequence[int]) -> None:
        """Write the rows of a batch: `counts[i]` tokens of request i, one after another."""
        rows = torch.tensor([self._of[request_id] for request_id in request_ids])
        flat = rows.repeat_interleave(torch.tensor([int(count) for count in counts]))
        # The rest of the index belongs to padding, whose answers nobody reads.
        self._index[: len(flat)].copy_(flat, non_blocking=True)


def follow_requests(runner: Any, assignment: Assignment) -> None:
    """Make a model runner tell the assignment of its batches."""
    newer = hasattr(runner, "prepare_inputs")
    name = "prepare_inputs" if newer else "_prepare_inputs"
    own_inputs, own_step = getattr(runner, name), runner.execute_model

    def inputs(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        if newer:
            batch = own_inputs(scheduled, *args, **kwargs)
            assignment.fill(batch.req_ids, batch.num_scheduled_tokens)
            return batch
        ids = runner.input_batch.req_ids
        counts = args[0] if args else kwargs["num_scheduled_tokens"]
        assignment.fill(ids[: len(counts)], counts)
        return own_inputs(scheduled, *args, **kwargs)

    def step(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        assignment.follow(scheduled)
        return own_step(scheduled, *args, **kwargs)

    setattr(runner, name, inputs)
    runner.execute_model = step
