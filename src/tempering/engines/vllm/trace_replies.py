"""The field `tempering_trace` in the choices of vLLM's replies over HTTP, whole and streamed.

vLLM's chats and completions are made by methods that take the engine's results and give replies.
The results are watched on their way in, and their traces put into the replies on their way out.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from tempering.engines.vllm.admission import refuse_trace_of
from tempering.engines.vllm.arguments import TRACE, trace_asked
from tempering.engines.vllm.tracing import Entries, trace_of

_EVENT = "data: "


def wrap_replies() -> None:
    """Wrap the methods that make replies, and those whose replies have no room for a trace."""
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    from tempering.engines.vllm.wrapping import wrap

    wrap(OpenAIServingChat, "chat_completion_full_generator", _whole_chat)
    wrap(OpenAIServingChat, "chat_completion_stream_generator", _streamed_chat)
    wrap(OpenAIServingCompletion, "request_output_to_completion_response", _whole_completion)
    wrap(OpenAIServingCompletion, "completion_stream_generator", _streamed_completion)
    wrap(OpenAIServingChatBatch, "chat_completion_full_generator_batch", _refused)


def _asked(serving: Any, request: Any) -> bool:
    """Whether a chat wants a trace; refused where another kind of reply is made of the chat's."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

    if type(serving) is not OpenAIServingChat:
        refuse_trace_of(request)
    return trace_asked(request.vllm_xargs or {})


def _refused(original: Callable[..., Any], self: Any, request: Any, *a: Any, **k: Any) -> Any:
    refuse_trace_of(request)
    return original(self, request, *a, **k)


async def _whole_chat(
    original: Callable[..., Any], self: Any, request: Any, results: Any, *args: Any, **kwargs: Any
) -> Any:
    if not _asked(self, request):
        return await original(self, request, results, *args, **kwargs)
    traces: dict[int, Entries] = {}

    async def watched() -> AsyncIterator[Any]:
        async for result in results:
            traces.update({output.index: trace_of(output) for output in result.outputs})
            yield result

    reply = await original(self, request, watched(), *args, **kwargs)
    for choice in getattr(reply, "choices", ()):  # an error has none
        setattr(choice, TRACE, traces.get(choice.index, []))
    return reply


def _whole_completion(
    original: Callable[..., Any], self: Any, results: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    reply = original(self, results, request, *args, **kwargs)
    if trace_asked(request.vllm_xargs or {}):
        outputs = [output for result in results for output in result.outputs]
        for choice, output in zip(reply.choices, outputs, strict=True):
            setattr(choice, TRACE, trace_of(output))
    return reply


def _streamed_chat(
    original: Callable[..., Any], self: Any, request: Any, results: Any, *args: Any, **kwargs: Any
) -> Any:
    if not _asked(self, request):
        return original(self, request, results, *args, **kwargs)
    return _traced(
        results,
        lambda result: ((output.index, output) for output in result.outputs),
        lambda watched: original(self, request, watched, *args, **kwargs),
    )


def _streamed_completion(
    original: Callable[..., Any],
    self: Any,
    request: Any,
    prompts: Any,
    results: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not trace_asked(request.vllm_xargs or {}):
        return original(self, request, prompts, results, *args, **kwargs)
    samples = request.n or 1
    return _traced(
        results,
        lambda item: ((out.index + item[0] * samples, out) for out in item[1].outputs),
        lambda watched: original(self, request, prompts, watched, *args, **kwargs),
    )


async def _traced(
    results: AsyncIterator[Any],
    outputs: Callable[[Any], Iterable[tuple[int, Any]]],
    replies: Callable[[AsyncIterator[Any]], AsyncIterator[str]],
) -> AsyncIterator[str]:
    """The parts of a stream, each with the trace of the tokens since its choice's last part.

    outputs: the numbers of choices and what they got, of a result.
    """
    untold: dict[int, Entries] = {}

    async def watched() -> AsyncIterator[Any]:
        async for result in results:
            for index, output in outputs(result):
                untold.setdefault(index, []).extend(trace_of(output))
            yield result

    opened: set[int] = set()
    async for part in replies(watched()):
        yield _with_traces(part, untold, opened)


def _with_traces(part: str, untold: dict[int, Entries], opened: set[int]) -> str:
    if not part.startswith(_EVENT + "{"):
        return part
    body = json.loads(part.removeprefix(_EVENT))
    for choice in body.get("choices") or ():
        index = choice["index"]
        # A chat opens each choice by a role, before any of its tokens.
        if "role" in choice.get("delta", ()) and index not in opened:
            opened.add(index)
        else:
            choice[TRACE] = untold.pop(index, [])
    return f"{_EVENT}{json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
