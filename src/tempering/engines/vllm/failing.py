"""How a request whose row can't be tempered fails alone, with its reason, while the engine goes on.

The reason travels where vLLM's own results do: from the worker that samples, in the output of its
step, to the scheduler, which ends the request as vLLM ends one whose keys and values are lost, and
from there to the process that took the request in, whose client gets HTTP 500 and the reason. The
token that was drawn from the row goes nowhere.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from tempering.engines.vllm.settings import PerEngine
from tempering.errors import TemperingError

_FAILED = "tempering_failed"  # an attribute of a step's output: request id -> reason
_SIGN = "tempering: "  # begins every reason

# Of the engine of a configuration, in this process: what gives, and forgets, the rows that failed
# in the last step: row or slot -> reason. Weak, since a processor holds its configuration.
LAST_STEP: PerEngine[weakref.WeakMethod[Callable[[], Mapping[int, str]]]] = PerEngine()


def reason_of(error: BaseException, policy: object = None) -> str:
    """What a client is told."""
    what = _text(error) or "no message"
    if not isinstance(error, TemperingError):
        what = f"{type(error).__name__}: {what}"
    which = "its policy" if policy is None else f"the policy {_text(policy):.200}"
    return f"{_SIGN}{which} failed on this request alone: {what:.1000}"


def _text(thing: object) -> str:
    try:
        return str(thing)
    except Exception:  # what is broken may not be able to say so
        return f"({type(thing).__name__})"


def sample_tokens(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """vLLM's `Worker.sample_tokens`, whose output names the requests that failed."""
    output = original(self, *args, **kwargs)
    known = LAST_STEP.get(self.vllm_config)
    last_step = None if known is None else known()
    rows = {} if last_step is None else last_step()
    if not rows or output is None:
        return output
    failed = {_request_at(self.model_runner, row): reason for row, reason in rows.items()}
    if not hasattr(output, "get_output"):
        setattr(output, _FAILED, failed)
        return output
    later = output.get_output

    def get_output() -> Any:
        result = later()
        setattr(result, _FAILED, failed)
        return result

    output.get_output = get_output
    return output


def _request_at(runner: Any, row: int) -> str:
    """The id of the request in a row of the older model runner, or in a slot of the newer."""
    slots = getattr(runner, "req_states", None)
    return str(runner.input_batch.req_ids[row] if slots is None else slots.index_to_req_id[row])


def update_from_output(
    original: Callable[..., Any], self: Any, scheduled: Any, output: Any, *args: Any, **kwargs: Any
) -> Any:
    """vLLM's `Scheduler.update_from_output`, before which the requests that failed are ended."""
    failed: Mapping[str, str] = getattr(output, _FAILED, None) or {}
    if not failed:
        return original(self, scheduled, output, *args, **kwargs)
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    from vllm.v1.request import RequestStatus

    ended = [self.requests[name] for name in failed if name in self.requests]
    ended = [request for request in ended if not request.is_finished()]
    self.finish_requests([request.request_id for request in ended], RequestStatus.FINISHED_ERROR)
    outputs = original(self, scheduled, output, *args, **kwargs)
    for request in ended:
        own = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=FinishReason.ERROR,
            stop_reason=failed[request.request_id],
            events=request.take_events(),
            trace_headers=request.trace_headers,
        )
        known = outputs.get(request.client_index)
        if known is None:
            outputs[request.client_index] = EngineCoreOutputs(outputs=[own])
        else:
            known.outputs.append(own)
    return outputs


def put(original: Callable[..., Any], self: Any, output: Any) -> None:
    """vLLM's `RequestOutputCollector.put`, which hands a failed request's reason to its client.

    vLLM would answer "Internal server error". Its error for streamed input is raised as the cause
    it holds, and takes the other samples of the same prompt along.
    """
    outputs = getattr(output, "outputs", None)
    for one in outputs if isinstance(outputs, list) else ():
        reason = getattr(one, "stop_reason", None)
        if one.finish_reason == "error" and isinstance(reason, str) and reason.startswith(_SIGN):
            from vllm.exceptions import GenerationError
            from vllm.v1.engine.async_llm import InputStreamError

            output = InputStreamError(GenerationError(reason))
            break
    original(self, output)
