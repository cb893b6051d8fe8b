"""Policies in transformers: a `LogitsProcessor` for generate(), or for your own sampling loop."""

from __future__ import annotations

import sys
import weakref
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tempering.errors import InputError, RefusedError
from tempering.tokens.applying import apply_policy
from tempering.tokens.end_tokens import end_tokens
from tempering.tokens.grammar import parse_policy
from tempering.tokens.histories import Histories
from tempering.tokens.policy import Policy
from tempering.tokens.processor_order import effective_order, taken_settings
from tempering.tokens.recorder import Recorder
from tempering.tokens.sampler import check_given
from tempering.tokens.settings import RequestSettings
from tempering.tokens.temper import token_energies
from tempering.tokens.token_bytes import token_bytes_of
from tempering.tokens.token_state import NOTHING_GIVEN
from tempering.tokens.trace import Trace, trace_steps


class _Run(NamedTuple):
    """What one generate() call keeps between its steps, or all loops outside generate()."""

    histories: Histories
    recorder: Recorder | None


class TemperingLogitsProcessor(LogitsProcessor):
    """Tempers the logits of generate() by a policy.

    Give it as `model.generate(..., do_sample=True, logits_processor=[processor])`. It runs where
    transformers puts custom processors: after penalties and constraints, before top-k,
    top-p and min-p (see `effective_order`). A policy that truncates takes these three over, with
    the temperature: generate() then runs none of its own. Batches with left padding,
    num_return_sequences, beams and assisted decoding work, because the state of a row is read from
    its tokens.

    Rows with T = 1 come back bit for bit. The others come back as tempered log probabilities, so
    that the sums that beam search keeps are log probabilities, too.

    Parameters
    ----------
    policy: a policy or its text form.
    tokenizer: the model's; phases and traces need it.
    prompt_length: tokens of a row before the first generated one, padding included. None: the
        length that generate() was given, which is known only inside generate().
    trace: a `Trace` to record in; call `trace.complete(sequences)` after generate().
    given: outside generate(), the settings that a policy that truncates takes over; inside, they
        are those of the generation config.

    Raises
    ------
    RefusedError: inside generate(), what `effective_order` refuses (a second temperature, greedy
    decoding, a ladder in beams), a second processor of this kind, a trace of assisted decoding, or
    phases over a prompt that is given as embeddings alone.
    InputError: outside generate() without prompt_length.
    """

    # Continuous batching passes the tokens of several requests as one flat row.
    supports_continuous_batching = False

    def __init__(
        self,
        policy: Policy | str,
        tokenizer: Any = None,
        prompt_length: int | None = None,
        trace: Trace | None = None,
        given: RequestSettings = NOTHING_GIVEN,
    ) -> None:
        if trace is not None and tokenizer is None:
            raise InputError("a trace records the tokens' text; give the tokenizer as well")
        self.policy = parse_policy(policy, tokenizer) if isinstance(policy, str) else policy
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length
        self.trace = trace
        self.given = given
        check_given(self.policy, given, "the settings")
        self._runs: dict[int, _Run] = {}  # by the id of the config of the generate() call

    def __call__(
        self, input_ids: Int[Tensor, "batch tokens"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """Tempered scores of each row, at least float32."""
        run = self._current(input_ids.shape[1])
        rows = input_ids.cpu().numpy().astype(np.int64, copy=False)
        states, parents = run.histories.read(np.ascontiguousarray(rows))
        energies = token_energies(scores)
        result, temperature = apply_policy(self.policy, scores, energies, states)
        if run.recorder is not None:
            steps = trace_steps(energies, temperature, states)
            raw = (-energies).log_softmax(-1)
            run.recorder.record(rows, parents, steps, raw, result.log_softmax(-1))
        unchanged = temperature == 1
        if self.policy.truncates or self.policy.forces:
            unchanged &= (result == scores).all(-1)
        if bool(unchanged.all()):
            return result
        return torch.where(unchanged.unsqueeze(-1), result, result.log_softmax(-1))

    def _current(self, length: int) -> _Run:
        """The run of this call; each generate() copies its config, by which the run is found."""
        generation = _generation()
        key = id(None if generation is None else generation.config)
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = self._begin(generation, length)
            if generation is not None:
                weakref.finalize(generation.config, self._runs.pop, key, None)
        if self.trace is not None and run.recorder is not None:
            self.trace.watch(run.recorder)
        return run

    def _begin(self, generation: _Generation | None, length: int) -> _Run:
        prompt_length, given = self.prompt_length, self.given
        ends = end_tokens(self.tokenizer if generation is None else generation.config)
        if generation is None:
            if prompt_length is None:
                raise InputError(
                    "outside generate() the prompt can't be told from what was generated; give "
                    "TemperingLogitsProcessor(..., prompt_length=input_ids.shape[1])"
                )
        else:
            if given != NOTHING_GIVEN:
                raise InputError(
                    "inside generate() the settings are those of its config; leave given= out"
                )
            effective_order(generation.config, self.policy)
            given = generation.taken_over(self.policy)
            generation.check_alone(self.policy)
            if length == 0 and self.policy.reads_tokens:
                raise RefusedError(
                    f"{self.policy} reads the prompt's tokens, but this prompt is given as "
                    "embeddings alone; give its ids beside them: "
                    "generate(input_ids=..., inputs_embeds=...)"
                )
            prompt_length = length if prompt_length is None else prompt_length
            if self.trace is not None and generation.assisted:
                raise RefusedError(
                    "assisted decoding samples tokens that it may take back, which a trace can't "
                    "follow; trace without an assistant"
                )
        recorder = None
        if self.trace is not None:
            token_bytes = token_bytes_of(self.tokenizer)
            recorder = Recorder(
                prompt_length,
                self.policy.samples,
                ends,
                lambda token: token_bytes(token).decode(errors="replace"),
            )
            self.trace.watch(recorder)
        return _Run(Histories(self.policy, prompt_length, given), recorder)


_WARPERS: dict[str, type[LogitsProcessor]] = {
    "temperature": TemperatureLogitsWarper,
    "top_p": TopPLogitsWarper,
    "top_k": TopKLogitsWarper,
    "min_p": MinPLogitsWarper,
}


class _Generation(NamedTuple):
    """A running generate(): its config, its processors, and whether it is assisted."""

    config: GenerationConfig
    processors: LogitsProcessorList
    assisted: bool

    def taken_over(self, policy: Policy) -> RequestSettings:
        """The settings that a policy takes over; generate()'s own processors of them are removed.

        generate() makes its list of processors anew for each call, and its own stand behind all
        that were given to it.
        """
        given = taken_settings(self.config, policy)
        for name in given.active():
            made = [p for p in self.processors if isinstance(p, _WARPERS[name])]
            if made:
                self.processors.remove(made[-1])
        return given

    def check_alone(self, policy: Policy) -> None:
        """Refuse another temperature among the processors that generate() runs."""
        kinds = (TemperingLogitsProcessor, TemperatureLogitsWarper)
        if len(names := [type(p).__name__ for p in self.processors if isinstance(p, kinds)]) > 1:
            raise RefusedError(
                f"two temperatures: the policy {policy}, and among generate()'s processors "
                f"{' and '.join(names)}; give one"
            )


def _generation() -> _Generation | None:
    """The outermost generate() on the stack; None outside of one.

    transformers doesn't tell a processor where the prompt ends or whether another temperature
    follows, but the frame of its generate() holds both. The outermost generate() counts, because
    assisted decoding calls that of the assistant inside.
    """
    outermost: dict[str, Any] = {}
    assisted = False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "transformers.generation.utils":
            name = frame.f_code.co_name
            if name == "generate":
                outermost = frame.f_locals
            assisted = assisted or name == "_assisted_decoding"
        frame = frame.f_back
    if not outermost:
        return None
    try:
        return _Generation(
            outermost["generation_config"], outermost["prepared_logits_processor"], assisted
        )
    except KeyError as error:
        raise RefusedError(
            f"this version of transformers keeps no {error} in generate(), so a second "
            "temperature can't be ruled out; use a version from 5.17 to 5.23"
        ) from error
