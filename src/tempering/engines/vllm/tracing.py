"""`tempering_trace`: what each token was drawn from, from the engine to the reply's choices.

The worker knows it (`step`). The scheduler hands it to the process that took the request in, beside
the tokens of the step, in the mapping that vLLM has for parameters of a key-value connector; there
it is taken out again before vLLM looks. It then follows the request's tokens: into the part of a
stream that brings them, into the whole reply, into `CompletionOutput.tempering_trace` of an `LLM`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tempering.engines.vllm.arguments import TRACE

Entries = list[dict[str, Any]]


def hand_over(outputs: Mapping[int, Any], traced: Mapping[str, Entries]) -> None:
    """Lay the traces of a step's tokens beside those that the scheduler has kept."""
    for each in outputs.values() if traced else ():
        for one in each.outputs:
            if entries := traced.get(one.request_id, [])[: len(one.new_token_ids)]:
                one.kv_transfer_params = {**(one.kv_transfer_params or {}), TRACE: entries}


def process_outputs(
    original: Callable[..., Any], self: Any, outputs: Any, *args: Any, **kwargs: Any
) -> Any:
    """vLLM's `OutputProcessor.process_outputs`, before which the traces are taken out."""
    for one in outputs:
        if one.kv_transfer_params and TRACE in one.kv_transfer_params:
            entries = one.kv_transfer_params.pop(TRACE)
            one.kv_transfer_params = one.kv_transfer_params or None
            state = self.request_states.get(one.request_id)
            if state is not None:
                vars(state).setdefault(TRACE, []).extend(entries)
    return original(self, outputs, *args, **kwargs)


def completion_output(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """vLLM's `RequestState._new_completion_output`, with the trace of its tokens."""
    output = original(self, *args, **kwargs)
    entries: Entries | None = getattr(self, TRACE, None)
    if entries is not None:
        # Of all tokens, or in a stream of the last ones; none behind a stop text is left by now.
        end = self.detokenizer.num_output_tokens()
        setattr(output, TRACE, entries[end - len(output.token_ids) : end])
    return output


def add_output(original: Callable[..., Any], self: Any, later: Any, aggregate: bool) -> None:
    """vLLM's `RequestOutput.add`, which joins parts of a stream: their traces, too."""
    before = {each.index: (each, trace_of(each)) for each in self.outputs}
    original(self, later, aggregate)
    for each in later.outputs if aggregate else ():
        if each.index in before and hasattr(each, TRACE):
            joined, entries = before[each.index]
            setattr(joined, TRACE, [*entries, *trace_of(each)])


def trace_of(output: Any) -> Entries:
    """The trace of the tokens of vLLM's `CompletionOutput`."""
    entries: Entries = getattr(output, TRACE, [])
    return entries
