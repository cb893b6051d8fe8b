"""The entry point `vllm.logits_processors`: token policies in vLLM, for both its model runners.

The older runner tells a processor how rows are added, moved and removed; the newer one names a
slot for each row. Either way a row's state is made from its own request's tokens, so no request
gets another's temperature. The order is that of transformers: penalties and constraints, then
the policy in place of the temperature, then min-p, top-k and top-p.

No exception leaves a processor. What goes wrong with a request, from making its policy to dividing
its logits, is kept as that request's failure; see `failing` for the way it takes from here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from tempering.engines.vllm.admission import check_request
from tempering.engines.vllm.failing import LAST_STEP, reason_of
from tempering.engines.vllm.policies import asks_policy, policy_of, sample_of
from tempering.engines.vllm.settings import configured
from tempering.engines.vllm.streams import Row, Stream, temper_rows
from tempering.engines.vllm.wrapping import registered
from tempering.errors import RefusedError
from tempering.tokens.state import TokenState


class TemperingPolicies(LogitsProcessor):
    """What vLLM loads: `ByRow` for its older model runner, `BySlot` for the newer one."""

    def __new__(cls, config: Any, device_or_state: Any, is_pin_memory: bool | None = None) -> Any:
        # Only the older interface passes three arguments.
        return super().__new__(BySlot if is_pin_memory is None else ByRow)

    def __init__(
        self, config: Any, device_or_state: Any, is_pin_memory: bool | None = None
    ) -> None:
        if configured(config) and not registered():
            raise RefusedError(
                "tempering is configured, but vLLM has not loaded its plugin, without which no "
                "layer is tempered; see that VLLM_PLUGINS names 'tempering', or is not set"
            )
        self._config = config
        self._tokenizer: Any = None
        self._failed: dict[int, str] = {}
        LAST_STEP.set(config, weakref.WeakMethod(self._take_failed))

    def _take_failed(self) -> dict[int, str]:
        """The rows (or slots) that failed in the last step; they are forgotten here."""
        failed, self._failed = self._failed, {}
        return failed

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """ValueError for arguments that can't be carried out."""
        check_request(sampling_params)

    def _stream(self, params: Any) -> Stream | Exception | None:
        """The stream of a request, or why there is none; None when it asks for no policy."""
        try:
            if not asks_policy(params):
                return None
            if self._tokenizer is None and not self._config.model_config.skip_tokenizer_init:
                from vllm.tokenizers import cached_tokenizer_from_config

                self._tokenizer = cached_tokenizer_from_config(self._config.model_config)
            policy = policy_of(params, self._tokenizer)
            if policy is None:
                return None
            return Stream(policy, sample_of(params, policy, child=True), float(params.temperature))
        except Exception as error:
            return error


class _Request(NamedTuple):
    """A request of the older runner. generated: the runner's own list, which grows."""

    stream: Stream | Exception
    prompt: list[int] | None
    generated: list[int]


class ByRow(TemperingPolicies):
    """The interface of vLLM's older model runner: a row of logits is a row of the batch."""

    def __init__(self, config: Any, device: Any, is_pin_memory: bool) -> None:
        super().__init__(config, device, is_pin_memory)
        self._rows: dict[int, _Request] = {}
        self._lost: Exception | None = None
        self.told: Callable[[bool], None] | None = None

    def is_argmax_invariant(self) -> bool:
        # A temperature never changes the likeliest token. vLLM so calls the processor after the
        # penalties, and never for a batch that is greedy throughout.
        return True

    def update_state(self, batch_update: Any) -> None:
        """Follow rows that are added, removed and moved."""
        try:
            from vllm.v1.sample.logits_processor.builtin import process_dict_updates

            process_dict_updates(self._rows, batch_update, self._added)
            if batch_update and self.told is not None:
                streams = (row.stream for row in self._rows.values())
                self.told(any(isinstance(s, Stream) and s.reads_tokens for s in streams))
        except Exception as error:  # which rows have policies is lost with it
            self._lost = error

    def _added(
        self, params: Any, prompt: list[int] | None, generated: list[int]
    ) -> _Request | None:
        stream = self._stream(params)
        return None if stream is None else _Request(stream, prompt, generated)

    def apply(self, logits: Tensor) -> Tensor:
        """Temper the rows of requests with a policy; vLLM has divided by their temperature."""
        if self._lost is not None:
            # A batch whose rows can't be told apart fails as a whole, and the next starts anew.
            self._failed = dict.fromkeys(range(len(logits)), reason_of(self._lost))
            self._rows.clear()
            self._lost = None
        if not self._rows:
            return logits
        rows: list[Row] = []
        for place, request in sorted(self._rows.items()):
            if isinstance(request.stream, Stream):
                rows.append(Row(place, request.stream, partial(_state, request)))
            else:
                self._failed[place] = reason_of(request.stream)
        self._failed |= _tempered(logits, rows, divided=True)
        return logits


def _state(request: _Request) -> TokenState:
    if isinstance(request.stream, Exception):
        raise request.stream
    generated = request.generated
    return request.stream.at(len(generated), lambda: request.prompt or (), generated.__getitem__)


def _tempered(logits: Tensor, rows: list[Row], *, divided: bool) -> dict[int, str]:
    """Temper rows in place; place -> reason of those that failed."""
    try:
        failed = temper_rows(logits, rows, divided=divided)
    except Exception as error:
        failed = dict.fromkeys((row.place for row in rows), error)
    policies = {row.place: row.stream.policy for row in rows}
    return {place: reason_of(error, policies[place]) for place, error in failed.items()}


class BySlot(TemperingPolicies):
    """The interface of vLLM's newer model runner: rows come in any order, each names its slot."""

    def __init__(self, config: Any, state: Any) -> None:
        super().__init__(config, state)
        self._state = state
        self._slots: dict[int, Stream | Exception] = {}

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take over a slot; whatever it held belongs to a request that is gone."""
        stream = self._stream(sampling_params)
        if stream is None:
            self._slots.pop(req_idx, None)
            return False
        self._slots[req_idx] = stream
        return True

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Temper the rows of requests with a policy; vLLM divides by their temperature after."""
        slots = ctx.idx_mapping_np.tolist()
        own = {slot: self._slots[slot] for slot in slots if slot in self._slots}
        if not own:
            return logits
        if len(slots) != len(logits):
            drafted = RefusedError(
                f"{len(logits)} rows of logits for {len(slots)} requests: drafted tokens are "
                "verified without the policies; serve without --speculative-config"
            )
            self._failed |= dict.fromkeys(own, reason_of(drafted))
            return logits
        rows: list[Row] = []
        for place, slot in enumerate(slots):
            stream = own.get(slot)
            if isinstance(stream, Exception):
                self._failed[slot] = reason_of(stream)
            elif stream is not None:
                start = int(self._state.prompt_len.np[slot])
                count = int(ctx.seq_lens_upper_bound_np[place]) - start
                if count >= 0:  # else a part of the prompt, of which no token is sampled
                    state = partial(self._state_of, stream, slot, start, count)
                    rows.append(Row(place, stream, state))
        failed = _tempered(logits, rows, divided=False)
        self._failed |= {slots[place]: reason for place, reason in failed.items()}
        return logits

    def _state_of(self, stream: Stream, slot: int, start: int, count: int) -> TokenState:
        ids = self._state.all_token_ids.gpu[slot]
        return stream.at(count, lambda: ids[:start].tolist(), lambda index: int(ids[start + index]))


def attach(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    """The older runner's `InputBatch.__init__`, with the policies in their place.

    They go before min-p, which so sees the tempered posterior, as top-k and top-p do; and the
    batch is told when a policy reads tokens, which under asynchronous scheduling it would
    otherwise keep as placeholders.
    """
    original(self, *args, **kwargs)
    order = self.logitsprocs.argmax_invariant
    order.sort(key=lambda processor: not isinstance(processor, ByRow))
    asked = self.logitsprocs_need_output_token_ids
    batch = weakref.ref(self)

    def told(reads: bool) -> None:
        living = batch()
        if living is not None:
            living.logitsprocs_need_output_token_ids = asked or reads

    for processor in order:
        if isinstance(processor, ByRow):
            processor.told = told
