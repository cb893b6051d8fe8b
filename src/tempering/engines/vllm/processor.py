"""The entry point `vllm.logits_processors`: token policies in vLLM, for both its model runners.

The older runner tells a processor how rows are added, moved and removed; the newer one names a
slot for each row. Either way a row's state is made from its own request's tokens, so no request
gets another's temperature. The order is that of transformers: penalties and constraints, then
the policy in place of the temperature, then min-p, top-k and top-p.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from tempering.engines.vllm.admission import check_request
from tempering.engines.vllm.policies import asks_policy, policy_of, sample_of
from tempering.engines.vllm.settings import configured
from tempering.engines.vllm.streams import Stream, temper_rows
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

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """ValueError for arguments that can't be carried out."""
        check_request(sampling_params)

    def _stream(self, params: Any) -> Stream | None:
        """The stream of a request; None when it asks for no policy."""
        if not asks_policy(params):
            return None
        if self._tokenizer is None and not self._config.model_config.skip_tokenizer_init:
            from vllm.tokenizers import cached_tokenizer_from_config

            self._tokenizer = cached_tokenizer_from_config(self._config.model_config)
        policy = policy_of(params, self._tokenizer)
        if policy is None:
            return None
        return Stream(policy, sample_of(params, policy, child=True), float(params.temperature))


class _Row(NamedTuple):
    """A request of the older runner. generated: the runner's own list, which grows."""

    stream: Stream
    prompt: list[int] | None
    generated: list[int]

    def state(self) -> TokenState:
        return self.stream.at(
            len(self.generated), lambda: self.prompt or (), self.generated.__getitem__
        )


class ByRow(TemperingPolicies):
    """The interface of vLLM's older model runner: a row of logits is a row of the batch."""

    def __init__(self, config: Any, device: Any, is_pin_memory: bool) -> None:
        super().__init__(config, device, is_pin_memory)
        self._rows: dict[int, _Row] = {}
        self.told: Callable[[bool], None] | None = None

    def is_argmax_invariant(self) -> bool:
        # A temperature never changes the likeliest token. vLLM so calls the processor after the
        # penalties, and never for a batch that is greedy throughout.
        return True

    def update_state(self, batch_update: Any) -> None:
        """Follow rows that are added, removed and moved."""
        from vllm.v1.sample.logits_processor.builtin import process_dict_updates

        process_dict_updates(self._rows, batch_update, self._added)
        if batch_update and self.told is not None:
            self.told(any(row.stream.policy.reads_tokens for row in self._rows.values()))

    def _added(self, params: Any, prompt: list[int] | None, generated: list[int]) -> _Row | None:
        stream = self._stream(params)
        return None if stream is None else _Row(stream, prompt, generated)

    def apply(self, logits: Tensor) -> Tensor:
        """Temper the rows of requests with a policy; vLLM has divided by their temperature."""
        if not self._rows:
            return logits
        places = sorted(self._rows)
        rows = [self._rows[place] for place in places]
        states = [row.state() for row in rows]
        streams = [row.stream for row in rows]
        return temper_rows(logits, places, streams, states, divided=True)


class BySlot(TemperingPolicies):
    """The interface of vLLM's newer model runner: rows come in any order, each names its slot."""

    def __init__(self, config: Any, state: Any) -> None:
        super().__init__(config, state)
        self._state = state
        self._slots: dict[int, Stream] = {}

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
        if not any(slot in self._slots for slot in slots):
            return logits
        if len(slots) != len(logits):
            raise RefusedError(
                f"{len(logits)} rows of logits for {len(slots)} requests: drafted tokens are "
                "verified without the policies; serve without --speculative-config"
            )
        rows, streams, states = [], [], []
        for row, slot in enumerate(slots):
            stream = self._slots.get(slot)
            if stream is None:
                continue
            start = int(self._state.prompt_len.np[slot])
            count = int(ctx.seq_lens_upper_bound_np[row]) - start
            if count < 0:
                continue  # a part of the prompt, of which no token is sampled
            states.append(self._state_of(stream, slot, start, count))
            rows.append(row)
            streams.append(stream)
        return temper_rows(logits, rows, streams, states, divided=False)

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
