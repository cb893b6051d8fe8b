"""The entry point `vllm.logits_processors`: token policies in vLLM, for both of its model runners.

The older runner tells a processor how rows are added, moved and removed; the newer one names a
slot for each row. Either way the state of a row is made from the tokens of its own request, so no
request gets another's temperature. The order is that of transformers: penalties and constraints,
then the policy in place of the temperature, then min-p, top-k and top-p. A policy that truncates
does these itself, and vLLM's own are off for its request (`arguments.with_taken`).

No exception leaves a processor. Whatever goes wrong with a request, while its policy is made or
its logits are divided, is kept as the failure of that request; `failing` says how the reason
reaches its client.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from tempering.engines.vllm.admission import check_request
from tempering.engines.vllm.arguments import asked_by, asks_policy, sample_of
from tempering.engines.vllm.failing import LAST_STEP, failure_message
from tempering.engines.vllm.settings import configured
from tempering.engines.vllm.streams import LogitsRow, Stream, temper_rows
from tempering.engines.vllm.wrapping import registered
from tempering.errors import RefusedError
from tempering.tokens.token_state import TokenState


class TemperingPolicies(LogitsProcessor):
    """The class that vLLM loads: it makes a `ByRow` for the older model runner, else a `BySlot`."""

    def __new__(cls, config: Any, device_or_state: Any, is_pin_memory: bool | None = None) -> Any:
        # Only the older interface passes three arguments.
        return super().__new__(BySlot if is_pin_memory is None else ByRow)

    def __init__(
        self, config: Any, device_or_state: Any, is_pin_memory: bool | None = None
    ) -> None:
        if configured(config) and not registered():
            raise RefusedError(
                "tempering is configured, but vLLM has not loaded its plugin, without which no "
                "layer is tempered; let VLLM_PLUGINS name 'tempering', or unset it"
            )
        self._config = config
        self._tokenizer: Any = None
        self._failed: dict[int, str] = {}
        LAST_STEP.set(config, weakref.WeakMethod(self._take_failed))

    def _take_failed(self) -> dict[int, str]:
        """The rows (or slots) that failed in the last step, with their reasons; forgets them."""
        failed, self._failed = self._failed, {}
        return failed

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """ValueError for arguments that can't be carried out."""
        check_request(sampling_params)

    def _stream(self, params: Any) -> Stream | Exception | None:
        """The stream of a request, or the error of making it; None when it asks for no policy."""
        try:
            if not asks_policy(params):
                return None
            if self._tokenizer is None and not self._config.model_config.skip_tokenizer_init:
                from vllm.tokenizers import cached_tokenizer_from_config

                self._tokenizer = cached_tokenizer_from_config(self._config.model_config)
            asked = asked_by(params, self._tokenizer)
            if asked is None:
                return None
            sample = sample_of(params, asked.policy, child=True)
            return Stream(asked.policy, sample, float(params.temperature), asked.given)
        except Exception as error:
            return error


class _RowRequest(NamedTuple):
    """The request of a row in the older runner. generated: the runner's own list, which grows."""

    stream: Stream | Exception
    prompt: list[int] | None
    generated: list[int]


class ByRow(TemperingPolicies):
    """The interface of vLLM's older model runner: a row of logits is a row of the batch."""

    def __init__(self, config: Any, device: Any, is_pin_memory: bool) -> None:
        super().__init__(config, device, is_pin_memory)
        self._rows: dict[int, _RowRequest] = {}
        self._lost: Exception | None = None
        self.set_reads_tokens: Callable[[bool], None] | None = None

    def is_argmax_invariant(self) -> bool:
        # No temperature changes the likeliest token. Told so, vLLM calls the processor after the
        # penalties, and never for a batch whose rows are all greedy.
        return True

    def update_state(self, batch_update: Any) -> None:
        """Follow rows that are added, removed and moved."""
        try:
            from vllm.v1.sample.logits_processor.builtin import process_dict_updates

            process_dict_updates(self._rows, batch_update, self._added)
            if batch_update and self.set_reads_tokens is not None:
                streams = (row.stream for row in self._rows.values())
                self.set_reads_tokens(
                    any(isinstance(s, Stream) and s.reads_tokens for s in streams)
                )
        except Exception as error:  # it is no longer known which rows have policies
            self._lost = error

    def _added(
        self, params: Any, prompt: list[int] | None, generated: list[int]
    ) -> _RowRequest | None:
        stream = self._stream(params)
        return None if stream is None else _RowRequest(stream, prompt, generated)

    def apply(self, logits: Tensor) -> Tensor:
        """Temper the rows of requests with a policy; vLLM has divided by their temperature."""
        if self._lost is not None:
            # All rows of this batch fail, since any may have a policy; the next batch starts anew.
            self._failed = dict.fromkeys(range(len(logits)), failure_message(self._lost))
            self._rows.clear()
            self._lost = None
        if not self._rows:
            return logits
        rows: list[LogitsRow] = []
        for row, request in sorted(self._rows.items()):
            if isinstance(request.stream, Stream):
                rows.append(LogitsRow(row, request.stream, partial(_state, request)))
            else:
                self._failed[row] = failure_message(request.stream)
        self._failed |= _temper_or_reason(logits, rows, divided=True)
        return logits


def _state(request: _RowRequest) -> TokenState:
    if isinstance(request.stream, Exception):
        raise request.stream
    generated = request.generated
    return request.stream.at(len(generated), lambda: request.prompt or (), generated.__getitem__)


def _temper_or_reason(logits: Tensor, rows: list[LogitsRow], *, divided: bool) -> dict[int, str]:
    """Temper rows in place; returns index in the batch -> reason, of those that failed."""
    try:
        failed = temper_rows(logits, rows, divided=divided)
    except Exception as error:
        failed = dict.fromkeys((row.row_index for row in rows), error)
    policies = {row.row_index: row.stream.policy for row in rows}
    return {row: failure_message(error, policies[row]) for row, error in failed.items()}


class BySlot(TemperingPolicies):
    """The interface of vLLM's newer model runner: rows come in any order, each names its slot."""

    def __init__(self, config: Any, state: Any) -> None:
        super().__init__(config, state)
        self._state = state
        self._slots: dict[int, Stream | Exception] = {}

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Give a slot to a new request; the request that had it before is finished."""
        stream = self._stream(sampling_params)
        if stream is None:
            self._slots.pop(req_idx, None)
            return False
        self._slots[req_idx] = stream
        return True

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Temper the rows of requests with a policy; vLLM divides by their temperature after."""
        slots = ctx.idx_mapping_np.tolist()
        streams = {slot: self._slots[slot] for slot in slots if slot in self._slots}
        if not streams:
            return logits
        if len(slots) != len(logits):
            drafted = RefusedError(
                f"{len(logits)} rows of logits for {len(slots)} requests: drafted tokens are "
                "verified without the policies; serve without --speculative-config"
            )
            self._failed |= dict.fromkeys(streams, failure_message(drafted))
            return logits
        rows: list[LogitsRow] = []
        for row, slot in enumerate(slots):
            stream = streams.get(slot)
            if isinstance(stream, Exception):
                self._failed[slot] = failure_message(stream)
            elif stream is not None:
                start = int(self._state.prompt_len.np[slot])
                count = int(ctx.seq_lens_upper_bound_np[row]) - start
                if count >= 0:  # else a part of the prompt, of which no token is sampled
                    state = partial(self._state_of, stream, slot, start, count)
                    rows.append(LogitsRow(row, stream, state))
        failed = _temper_or_reason(logits, rows, divided=False)
        self._failed |= {slots[row]: reason for row, reason in failed.items()}
        return logits

    def _state_of(self, stream: Stream, slot: int, start: int, count: int) -> TokenState:
        ids = self._state.all_token_ids.gpu[slot]
        return stream.at(count, lambda: ids[:start].tolist(), lambda index: int(ids[start + index]))


def init_batch(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    """The older runner's `InputBatch.__init__`, then with the policies in their place.

    They go before min-p, so that min-p sees the tempered posterior, as top-k and top-p do. The
    batch is told when a policy reads tokens: otherwise, under asynchronous scheduling, it keeps
    placeholders in place of the tokens.
    """
    original(self, *args, **kwargs)
    order = self.logitsprocs.argmax_invariant
    order.sort(key=lambda processor: not isinstance(processor, ByRow))
    needed_before = self.logitsprocs_need_output_token_ids
    batch = weakref.ref(self)

    def set_reads_tokens(reads: bool) -> None:
        alive = batch()
        if alive is not None:
            alive.logitsprocs_need_output_token_ids = needed_before or reads

    for processor in order:
        if isinstance(processor, ByRow):
            processor.set_reads_tokens = set_reads_tokens
