"""Policies in vLLM's older model runner, whose rows of logits are the rows of its batch.

vLLM hands drafted tokens to `RejectionSampler`, and calls none of its processors for them but one
of its own. The policies are applied where that one is: at each drafted token to the target logits
of its slot, with the history that the slot would have. The rejection sampler accepts by these
logits and draws by them what it rejects, so every token keeps the law of its policy, whatever was
drafted, and by which method. The row after the last drafted token is sampled as ever.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tempering.engines.vllm.failing import failure_message
from tempering.engines.vllm.policies import EnginePolicies, PlacedRow
from tempering.engines.vllm.streams import DraftedStates, Stream
from tempering.engines.vllm.wrapping import wrap
from tempering.errors import RefusedError
from tempering.tokens.token_state import TokenState


class _Request(NamedTuple):
    """The request of a row. generated: the runner's own list, which grows."""

    stream: Stream | Exception
    prompt: list[int] | None
    generated: list[int]


class ByRow(EnginePolicies):
    """The interface of vLLM's older model runner: a row of logits is a row of the batch."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._rows: dict[int, _Request] = {}
        self._drafted: list[list[int]] | None = None
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
                self.set_reads_tokens(any(self._reads(stream) for stream in streams))
        except Exception as error:  # it is no longer known which rows have policies
            self._lost = error

    def _reads(self, stream: Stream | Exception) -> bool:
        # Under speculation only the tokens say how many were accepted.
        return isinstance(stream, Stream) and (stream.reads_tokens or self.speculates)

    def _added(
        self, params: Any, prompt: list[int] | None, generated: list[int]
    ) -> _Request | None:
        stream = self.stream_of(params)
        return None if stream is None else _Request(stream, prompt, generated)

    def apply(self, logits: Tensor) -> Tensor:
        """Temper the rows of requests with a policy; vLLM has divided by their temperature.

        Under speculation these are the rows after the last drafted token.
        """
        if self._lost is not None:
            # All rows of this batch fail, since any may have a policy; the next batch starts anew.
            for row in range(len(logits)):
                self.step.fail(row, 0, failure_message(self._lost))
            self._rows.clear()
            self._lost = None
        if not self._rows:
            return logits
        placed: list[PlacedRow] = []
        for row, request in sorted(self._rows.items()):
            drafted = self._drafted[row] if self._drafted else []
            placed += self._placed(row, request, drafted, [(row, len(drafted))])
        return self.temper(logits, placed, divided=True)

    def apply_to_drafts(self, logits: Tensor) -> Tensor:
        """Temper the target logits of drafted tokens; vLLM divides by the temperatures after."""
        placed: list[PlacedRow] = []
        start = 0
        for row, drafted in enumerate(self._drafted or ()):
            if row in self._rows:
                slots = [(start + ahead, ahead) for ahead in range(len(drafted))]
                placed += self._placed(row, self._rows[row], drafted, slots)
            start += len(drafted)
        return self.temper(logits, placed, divided=False) if placed else logits

    def _placed(
        self, row: int, request: _Request, drafted: list[int], slots: Sequence[tuple[int, int]]
    ) -> Iterator[PlacedRow]:
        """Rows of one request: (index of logits, number of drafted tokens before) each."""
        stream = request.stream
        if isinstance(stream, Exception):
            self.step.fail(row, 0, failure_message(stream))
            return
        states = DraftedStates(stream, lambda: self._known(stream, request), drafted)
        for index, ahead in slots:
            if ahead <= states.reach:
                yield PlacedRow(index, stream, states, row, ahead)

    def _known(self, stream: Stream, request: _Request) -> TokenState:
        generated = request.generated
        if self.speculates and generated and generated[-1] < 0:
            raise RefusedError(
                f"{stream.policy}: the engine doesn't say which drafted tokens were accepted; this "
                "is a defect of tempering under asynchronous scheduling: serve with "
                "--no-async-scheduling"
            )
        return stream.at(len(generated), lambda: request.prompt or (), generated.__getitem__)

    @property
    def busy(self) -> bool:
        """Whether a request of the batch has a policy."""
        return bool(self._rows) or self._lost is not None

    @contextmanager
    def verifying(self, counts: Sequence[int], tokens: Tensor) -> Iterator[None]:
        """While vLLM verifies drafts: so many tokens for each row of the batch, in order."""
        flat = iter(tokens.tolist())
        self._drafted = [[next(flat) for _ in range(count)] for count in counts]
        try:
            yield
        finally:
            self._drafted = None


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


def wrap_speculation() -> None:
    """Wrap the places where the older runner makes its processors and verifies drafts."""
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.worker import gpu_model_runner

    wrap(gpu_model_runner, "build_logitsprocs", _build_processors)
    wrap(rejection_sampler.RejectionSampler, "forward", _verify)
    wrap(rejection_sampler, "apply_sampling_constraints", _constrain)


def _build_processors(original: Callable[..., Any], config: Any, *args: Any, **kwargs: Any) -> Any:
    """The older runner's `build_logitsprocs`, which leaves ours out where the engine speculates."""
    built = original(config, *args, **kwargs)
    if config.speculative_config is not None and config.model_config.runner_type != "pooling":
        built.argmax_invariant.append(ByRow(config))
    return built


def _policies(sampling: Any) -> ByRow | None:
    order = sampling.logitsprocs.argmax_invariant
    return next((processor for processor in order if isinstance(processor, ByRow)), None)


def _verify(
    original: Callable[..., Any], self: Any, drafts: Any, probs: Any, logits: Any, sampling: Any
) -> Any:
    """The older runner's `RejectionSampler.forward`: what it samples from is tempered."""
    policies = _policies(sampling)
    if policies is None or not policies.busy:
        return original(self, drafts, probs, logits, sampling)
    with policies.verifying(drafts.num_draft_tokens, drafts.draft_token_ids):
        return original(self, drafts, probs, logits, sampling)


def _constrain(original: Callable[..., Any], logits: Tensor, ends: Tensor, sampling: Any) -> Tensor:
    """The older runner's `apply_sampling_constraints`, with the policies before them.

    These are the temperature, top-k and top-p of the drafted tokens' rows. `ends`: how many of the
    rows belong to each request and those before it.
    """
    policies = _policies(sampling)
    if policies is None or not policies.busy:
        return original(logits, ends, sampling)
    logits = policies.apply_to_drafts(logits)
    if logits.device.type != "cpu" or sampling.all_greedy:
        return original(logits, ends, sampling)
    # vLLM 0.32's kernel for CPUs, which repeats a request's settings for its rows, fills a copy of
    # the result and leaves the result itself as it was allocated (vllm.utils.cpu_triton_utils).
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    counts = ends.diff(prepend=ends.new_zeros(1)).long()
    top_k, top_p = (
        None if values is None else values.repeat_interleave(counts)
        for values in (sampling.top_k, sampling.top_p)
    )
    temperature = sampling.temperature.repeat_interleave(counts).unsqueeze(-1)
    logits.div_(torch.where(temperature == 0, 1.0, temperature))  # 0: greedy
    return apply_top_k_top_p(logits, top_k, top_p)
