"""How traces follow the tokens of a request to vLLM: from a step to the parts of a stream."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from tempering.engines.vllm import trace_replies, tracing
from tempering.engines.vllm.arguments import TRACE


def entries(*tokens: int) -> list[dict[str, Any]]:
    return [{"token_id": token} for token in tokens]


def core_output(name: str, tokens: list[int], params: Any = None) -> Any:
    return SimpleNamespace(request_id=name, new_token_ids=tokens, kv_transfer_params=params)


def test_traces_lie_beside_the_tokens_that_the_scheduler_kept():
    one, other, third = core_output("a", [4, 5]), core_output("b", [6]), core_output("c", [])
    other.kv_transfer_params = {"block": 1}
    outputs = {0: SimpleNamespace(outputs=[one, third]), 1: SimpleNamespace(outputs=[other])}
    traced = {"a": entries(4, 5, 7), "b": entries(6), "c": entries(9), "gone": entries(1)}
    tracing.hand_over(outputs, traced)
    assert one.kv_transfer_params == {TRACE: entries(4, 5)}
    assert other.kv_transfer_params == {"block": 1, TRACE: entries(6)}
    assert third.kv_transfer_params is None
    # What vLLM then sees has nothing of ours.
    state = SimpleNamespace()
    processor = SimpleNamespace(request_states={"a": state})
    seen: list[Any] = []
    each = [one, other, third]
    tracing.process_outputs(lambda self, outs: seen.extend(o.kv_transfer_params for o in outs),
                            processor, each)  # fmt: skip
    assert seen == [None, {"block": 1}, None]
    assert getattr(state, TRACE) == entries(4, 5)


class State(SimpleNamespace):
    """What is read of vLLM's RequestState: the tokens that are left, and those of an output."""

    def output(self, tokens: list[int]) -> Any:
        made = SimpleNamespace(index=0, token_ids=tokens)
        return tracing.completion_output(lambda self: made, self)

    @property
    def detokenizer(self) -> Any:
        return SimpleNamespace(num_output_tokens=lambda: len(self.tokens))


def test_an_output_has_the_trace_of_its_own_tokens():
    state = State(tokens=[1, 2])
    assert not hasattr(state.output([1, 2]), TRACE)  # nobody asked for it
    vars(state)[TRACE] = entries(1, 2)
    assert getattr(state.output([1, 2]), TRACE) == entries(1, 2)
    vars(state)[TRACE] += entries(3, 4, 5)
    state.tokens = [1, 2, 3, 4]  # the fifth came behind a stop text
    assert getattr(state.output([3, 4]), TRACE) == entries(3, 4)  # a part of a stream
    assert getattr(state.output([1, 2, 3, 4]), TRACE) == entries(1, 2, 3, 4)  # all of it
    assert getattr(state.output([]), TRACE) == []


def result(*outputs: tuple[int, list[int] | None]) -> Any:
    made = []
    for index, tokens in outputs:
        output = SimpleNamespace(index=index)
        if tokens is not None:
            setattr(output, TRACE, entries(*tokens))
        made.append(output)
    return SimpleNamespace(outputs=made)


def test_parts_that_vllm_joins_have_their_traces_joined():
    def add(self, later, aggregate):
        known = {each.index for each in self.outputs}
        self.outputs += [each for each in later.outputs if each.index not in known]

    first = result((0, [1]), (2, None))
    tracing.add_output(add, first, result((0, [2, 3]), (1, [9]), (2, None)), True)
    tracing.add_output(add, first, result((0, []), (1, [8])), True)
    found = {each.index: getattr(each, TRACE, None) for each in first.outputs}
    assert found == {0: entries(1, 2, 3), 1: entries(9, 8), 2: None}
    whole = result((0, [1]))
    tracing.add_output(lambda *_: None, whole, result((0, [1, 2])), False)  # replaced by vLLM
    assert getattr(whole.outputs[0], TRACE) == entries(1)


def streamed(results: list[Any], replies: Any) -> list[str]:
    async def source():
        for each in results:
            yield each

    async def collected():
        outputs = lambda each: ((output.index, output) for output in each.outputs)  # noqa: E731
        return [part async for part in trace_replies._traced(source(), outputs, replies)]

    return asyncio.run(collected())


def chunk(*choices: dict[str, Any]) -> str:
    return f"data: {json.dumps({'id': 'x', 'choices': choices})}\n\n"


def test_a_stream_s_parts_bring_the_tokens_since_their_choice_s_last_part():
    """Text is held back, two choices take turns, one part has no choice, and a chat opens."""

    async def replies(results):
        async for number, each in enumerated(results):
            if number == 0:
                for index in (0, 1):
                    yield chunk({"index": index, "delta": {"role": "assistant", "content": ""}})
            for output in each.outputs:
                if output.index == 0 or number == 2:  # choice 1 is held back until its end
                    yield chunk({"index": output.index, "delta": {"content": "ä"}})
        yield chunk()
        yield 'data: {"error": {"message": "m"}}\n\n'
        yield "data: [DONE]\n\n"

    parts = streamed(
        [result((0, [1]), (1, [7])), result((0, [2, 3])), result((1, [8, 9]))], replies
    )
    *bodies, done = parts
    assert done == "data: [DONE]\n\n" and "ä" in parts[2]
    choices = [json.loads(part[6:]).get("choices", ()) for part in bodies]
    told = [(c["index"], c.get(TRACE)) for each in choices for c in each]
    assert told == [
        (0, None), (1, None), (0, entries(1)), (0, entries(2, 3)), (1, entries(7, 8, 9)),
    ]  # fmt: skip
    assert json.loads(bodies[-1][6:]) == {"error": {"message": "m"}}


async def enumerated(results):
    number = 0
    async for each in results:
        yield number, each
        number += 1


def test_an_error_of_the_engine_ends_the_stream_as_ever():
    async def replies(results):
        try:
            async for _ in results:
                yield chunk({"index": 0, "text": "a"})
        except KeyError as error:
            yield f"data: {json.dumps({'error': str(error)})}\n\n"

    async def failing():
        yield result((0, [1]))
        raise KeyError("engine")

    async def collected():
        outputs = lambda each: ((output.index, output) for output in each.outputs)  # noqa: E731
        return [part async for part in trace_replies._traced(failing(), outputs, replies)]

    first, last = asyncio.run(collected())
    assert json.loads(first[6:])["choices"][0][TRACE] == entries(1)
    assert "engine" in last


@pytest.mark.parametrize("value", ["yes", 2, [1], {}, -1, 0.5])
def test_only_true_and_false_ask(value):
    from tempering.engines.vllm.arguments import trace_asked
    from tempering.errors import InputError

    with pytest.raises(InputError, match="tempering_trace is true or false"):
        trace_asked({TRACE: value})
    assert [trace_asked({TRACE: x}) for x in (None, False, 0, True, 1, 1.0)] == [0, 0, 0, 1, 1, 1]
