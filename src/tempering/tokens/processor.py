"""Policies in transformers: a `LogitsProcessor` for generate(), or for a loop of one's own."""

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
    TemperatureLogitsWarper,
)

from tempering.errors import InputError, RefusedError
from tempering.tokens.ends import end_tokens
from tempering.tokens.grammar import parse_policy
from tempering.tokens.histories import Histories
from tempering.tokens.order import effective_order
from tempering.tokens.pieces import pieces_of
from tempering.tokens.policy import Policy, token_temperatures
from tempering.tokens.recorder import Recorder
from tempering.tokens.temper import tempered, token_energies
from tempering.tokens.trace import Trace, measure


class _Run(NamedTuple):
    """What is known of one generate() call, or of the loops outside generate()."""

    histories: Histories
    recorder: Recorder | None


class TemperingLogitsProcessor(LogitsProcessor):
    """Tempers the logits of generate() by a policy.

    Give it as `model.generate(..., do_sample=True, logits_processor=[processor])`. It stands
    where transformers puts custom processors: after penalties and constraints, before top-k,
    top-p and min-p (see `effective_order`). Batches with left padding, num_return_sequences,
    beams and assisted decoding work, because the state of a row is read from its tokens.

    Rows with T = 1 come back bit for bit; others as tempered log probabilities, so that the sums
    that beam search keeps are log probabilities too.

    Parameters
    ----------
    policy: a policy or its text form.
    tokenizer: the model's; phases and traces need it.
    prompt_length: tokens of a row before the first generated one, padding included. None: what
        generate() was given, which only a call from inside generate() can know.
    trace: a `Trace` to record in; call `trace.complete(sequences)` after generate().

    Raises
    ------
    RefusedError: inside generate(), what `effective_order` refuses (a second temperature, greedy
    decoding, a ladder in beams), a second processor of this kind, a trace of assisted decoding, or
    phases over a prompt that is given as embeddings alone.
    InputError: outside generate() without prompt_length.
    """

    # Continuous batching hands rows of several requests over in one flat batch.
    supports_continuous_batching = False

    def __init__(
        self,
        policy: Policy | str,
        tokenizer: Any = None,
        prompt_length: int | None = None,
        trace: Trace | None = None,
    ) -> None:
        if trace is not None and tokenizer is None:
            raise InputError("a trace records the tokens' text; give the tokenizer as well")
        self.policy = parse_policy(policy, tokenizer) if isinstance(policy, str) else policy
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length
        self.trace = trace
        self._runs: dict[int, _Run] = {}  # by the identity of the call's own config

    def __call__(
        self, input_ids: Int[Tensor, "batch tokens"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """Tempered scores of each row, at least float32."""
        run = self._current(input_ids.shape[1])
        rows = input_ids.cpu().numpy().astype(np.int64, copy=False)
        states, parents = run.histories.read(np.ascontiguousarray(rows))
        energies = token_energies(scores)
        temperature = token_temperatures(self.policy, energies, states)
        result = tempered(scores, energies, temperature)
        if run.recorder is not None:
            steps = measure(energies, temperature, states)
            raw = (-energies).log_softmax(-1)
            run.recorder.record(rows, parents, steps, raw, result.log_softmax(-1))
        own = temperature == 1
        if bool(own.all()):
            return result
        return torch.where(own.unsqueeze(-1), result, result.log_softmax(-1))

    def _current(self, length: int) -> _Run:
        """The run that this call belongs to: each generate() copies its config, so has its own."""
        found = _generation()
        key = id(None if found is None else found.config)
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = self._begin(found, length)
            if found is not None:
                weakref.finalize(found.config, self._runs.pop, key, None)
        if self.trace is not None and run.recorder is not None:
            self.trace.watch(run.recorder)
        return run

    def _begin(self, found: _Generation | None, length: int) -> _Run:
        prompt_length = self.prompt_length
        ends = end_tokens(self.tokenizer if found is None else found.config)
        if found is None:
            if prompt_length is None:
                raise InputError(
                    "outside generate() nothing tells the prompt from what was generated; give "
                    "TemperingLogitsProcessor(..., prompt_length=input_ids.shape[1])"
                )
        else:
            effective_order(found.config, self.policy)
            found.check_alone(self.policy)
            if length == 0 and self.policy.reads_tokens:
                raise RefusedError(
                    f"{self.policy} reads the prompt's tokens, but this prompt is given as "
                    "embeddings alone; give its ids beside them: "
                    "generate(input_ids=..., inputs_embeds=...)"
                )
            prompt_length = length if prompt_length is None else prompt_length
            if self.trace is not None and found.assisted:
                raise RefusedError(
                    "assisted decoding samples tokens that it may take back, which a trace can't "
                    "follow; trace without an assistant"
                )
        recorder = None
        if self.trace is not None:
            pieces = pieces_of(self.tokenizer)
            recorder = Recorder(
                prompt_length,
                self.policy.samples,
                ends,
                lambda token: pieces(token).decode(errors="replace"),
            )
            self.trace.watch(recorder)
        return _Run(Histories(self.policy, prompt_length), recorder)


class _Generation(NamedTuple):
    config: GenerationConfig
    processors: LogitsProcessorList
    assisted: bool

    def check_alone(self, policy: Policy) -> None:
        """Refuse another temperature among the processors that generate() runs."""
        kinds = (TemperingLogitsProcessor, TemperatureLogitsWarper)
        if len(found := [type(p).__name__ for p in self.processors if isinstance(p, kinds)]) > 1:
            raise RefusedError(
                f"two temperatures: the policy {policy}, and among generate()'s processors "
                f"{' and '.join(found)}; give one"
            )


def _generation() -> _Generation | None:
    """The outermost generate() on the stack; None outside of one.

    transformers tells a processor nothing about the run that it serves: neither where the prompt
    ends nor whether another temperature follows. Its own frame does. The outermost one counts,
    because assisted decoding calls the assistant's generate() inside.
    """
    found: dict[str, Any] = {}
    assisted = False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "transformers.generation.utils":
            name = frame.f_code.co_name
            if name == "generate":
                found = frame.f_locals
            assisted = assisted or name == "_assisted_decoding"
        frame = frame.f_back
    if not found:
        return None
    try:
        return _Generation(found["generation_config"], found["prepared_logits_processor"], assisted)
    except KeyError as error:
        raise RefusedError(
            f"this version of transformers keeps no {error} in generate(), so a second "
            "temperature can't be ruled out; use a version from 5.17 to 5.23"
        ) from error
