"""How a request whose policy fails ends alone, with the reason, while the engine goes on.

The worker that samples puts the reason into the output of its step (`step`). The scheduler ends the
request, as vLLM ends one whose keys and values are lost. The process that took the request in
answers its client with HTTP 500 and the reason. The tokens of the step in which it failed are
dropped: one of them was sampled from the untempered row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tempering.errors import TemperingError

_SIGN = "tempering: "  # begins every reason


def failure_message(error: BaseException, policy: object = None) -> str:
    """The message for the client whose request failed."""
    what = _text(error) or "no message"
    if not isinstance(error, TemperingError):
        what = f"{type(error).__name__}: {what}"
    which = "its policy" if policy is None else f"the policy {_text(policy):.200}"
    return f"{_SIGN}{which} failed on this request alone: {what:.1000}"


def _text(thing: object) -> str:
    try:
        return str(thing)
    except Exception:  # a broken object may not even have a text
        return f"({type(thing).__name__})"


def end_failed(scheduler: Any, failed: Mapping[str, str]) -> list[Any]:
    """End the requests that failed in a step, before the scheduler reads its tokens."""
    if not failed:
        return []
    from vllm.v1.request import RequestStatus

    known = [scheduler.requests[name] for name in failed if name in scheduler.requests]
    ended = [request for request in known if not request.is_finished()]
    names = [request.request_id for request in ended]
    scheduler.finish_requests(names, RequestStatus.FINISHED_ERROR)
    return ended


def failed_outputs(outputs: Any, ended: Sequence[Any], failed: Mapping[str, str]) -> None:
    """Add the last output of each request that was ended: the error, with its reason."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

    for request in ended:
        error_output = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=FinishReason.ERROR,
            stop_reason=failed[request.request_id],
            events=request.take_events(),
            trace_headers=request.trace_headers,
        )
        known = outputs.get(request.client_index)
        if known is None:
            outputs[request.client_index] = EngineCoreOutputs(outputs=[error_output])
        else:
            known.outputs.append(error_output)


def put(original: Callable[..., Any], self: Any, output: Any) -> None:
    """vLLM's `RequestOutputCollector.put`, which hands a failed request's reason to its client.

    vLLM alone would answer "Internal server error". An `InputStreamError`, its error for streamed
    input, is raised as the error that it wraps, and ends the other samples of the prompt as well.
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
