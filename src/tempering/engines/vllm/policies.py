"""The policies of requests in a vLLM worker: what both of vLLM's interfaces of processors share.

No exception leaves a processor. Whatever goes wrong with a request, while its policy is made or
its logits are divided, is kept as the failure of that request; `step` says how the reason reaches
its client.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from tempering.engines.vllm.admission import check_request
from tempering.engines.vllm.arguments import asked_by, asks_policy, asks_trace, sample_of
from tempering.engines.vllm.failing import failure_message
from tempering.engines.vllm.settings import configured
from tempering.engines.vllm.step import LAST_STEP, Step
from tempering.engines.vllm.streams import (
    DraftedStates,
    LogitsRow,
    Stream,
    Tempered,
    temper_rows,
)
from tempering.engines.vllm.wrapping import registered
from tempering.errors import RefusedError


class PlacedRow(NamedTuple):
    """A row of logits and whose it is.

    place: of the request, a row of the batch or a slot. ahead: how many tokens that were drafted
    for the request stand before the row's.
    """

    row_index: int
    stream: Stream
    states: DraftedStates
    place: int
    ahead: int


class EnginePolicies(LogitsProcessor):
    """The policies of the requests in a worker, and what they did in the step that is sampled."""

    def __init__(self, config: Any) -> None:
        if configured(config) and not registered():
            raise RefusedError(
                "tempering is configured, but vLLM has not loaded its plugin, without which no "
                "layer is tempered; let VLLM_PLUGINS name 'tempering', or unset it"
            )
        self.config = config
        self.speculates = getattr(config, "speculative_config", None) is not None
        self.step = Step()
        self._tokenizer: Any = None
        LAST_STEP.set(config, weakref.WeakMethod(self._take_step))

    def _take_step(self) -> Step:
        """What happened in the last step; forgets it."""
        taken, self.step = self.step, Step()
        return taken

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """ValueError for arguments that can't be carried out."""
        check_request(sampling_params)

    def stream_of(self, params: Any) -> Stream | Exception | None:
        """The stream of a request, or the error of making it; None when it asks for no policy."""
        try:
            if not asks_policy(params):
                return None
            if self._tokenizer is None and not self.config.model_config.skip_tokenizer_init:
                from vllm.tokenizers import cached_tokenizer_from_config

                self._tokenizer = cached_tokenizer_from_config(self.config.model_config)
            asked = asked_by(params, self._tokenizer)
            if asked is None:
                return None
            return Stream(
                asked.policy,
                sample_of(params, asked.policy, child=True),
                float(params.temperature),
                asked.given,
                traced=asks_trace(params),
            )
        except Exception as error:
            return error

    def temper(self, logits: Tensor, rows: Sequence[PlacedRow], *, divided: bool) -> Tensor:
        """Temper rows in place; the step keeps those that failed, and the draws of traced ones."""
        known = {row.row_index: row for row in rows}
        given = [LogitsRow(r.row_index, r.stream, partial(r.states.after, r.ahead)) for r in rows]
        try:
            result = temper_rows(logits, given, divided=divided)
        except Exception as error:
            result = Tempered(dict.fromkeys(known, error), {})
        for index, reason in result.failed.items():
            row = known[index]
            self.step.fail(row.place, row.ahead, failure_message(reason, row.stream.policy))
        for index, draw in result.draws.items():
            self.step.drew(known[index].place, known[index].ahead, draw)
        return logits
