"""`tempering_trace`: what each token was drawn from, in replies of a server that speculates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from tests.vllm.reference import TEXTS
from tests.vllm.serving import KEY, Running, serving

NGRAMS = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}'
COOLING = "schedule(linear(1.5,0.5), length=6)"
AS_IDS = {"return_tokens_as_token_ids": True}


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("trace")
    template = home / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    options = ("--speculative-config", NGRAMS, "--chat-template", str(template))
    with serving(tiny[0], home, *options) as running:
        yield running


def traced(policy: str | None = COOLING, **more: Any) -> dict[str, Any]:
    """The body of a request that asks for a trace."""
    extra = {"tempering_trace": True, **({} if policy is None else {"tempering": policy}), **more}
    return {**AS_IDS, "ignore_eos": True, "vllm_xargs": extra}


def complete(server: Running, prompt: Any, body: dict[str, Any], **settings: Any) -> Any:
    given = {"temperature": 1.0, "max_tokens": 8, "logprobs": 0, **settings}
    return server.client.completions.create(model="tiny", prompt=prompt, extra_body=body, **given)


def tokens_of(logprobs: Any) -> list[int]:
    return [int(token.removeprefix("token_id:")) for token in logprobs.tokens]


def check(model: Any, prompt: list[int], tokens: list[int], trace: list[dict[str, Any]]) -> None:
    """Every entry against the formulas in float64, from transformers' logits of the same text."""
    assert [entry["token_id"] for entry in trace] == tokens
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 :].double()
    for row, token, entry in zip(logits, tokens, trace):
        raw, after = ((row / T).log_softmax(-1) for T in (1.0, entry["temperature"]))
        entropies = [float(-(p.exp() * p).sum()) for p in (raw, after)]
        wanted = {
            "entropy_before": entropies[0],
            "entropy_after": entropies[1],
            "support": math.exp(entropies[1]),
            "log_probability_raw": float(raw[token]),
            "log_probability": float(after[token]),
        }
        assert {name: entry[name] for name in wanted} == pytest.approx(wanted, rel=1e-3, abs=1e-3)
        assert entry.keys() == {"token_id", "phase", "temperature", *wanted}


def cooled(trace: list[dict[str, Any]]) -> None:
    """T of COOLING, by hand."""
    wanted = [1.5 - min(place, 5) / 5 for place in range(len(trace))]
    assert [entry["temperature"] for entry in trace] == pytest.approx(wanted)
    assert {entry["phase"] for entry in trace} == {""}


@pytest.mark.parametrize("prompts", [1, 2])
def test_completions_whole_and_streamed(server, tiny, prompts):
    """n samples of several prompts: every choice has its own trace, in every part of a stream."""
    _, model, tokenizer = tiny
    asked = [tokenizer(text).input_ids[:25] for text in TEXTS[:prompts]]
    reply = complete(server, asked, traced(), n=2, max_tokens=12)
    assert len(reply.choices) == 2 * prompts
    for choice in reply.choices:
        trace = choice.tempering_trace
        check(model, asked[choice.index // 2], tokens_of(choice.logprobs), trace)
        cooled(trace)
    assert reply.usage.completion_tokens == sum(len(c.tempering_trace) for c in reply.choices)
    got: dict[int, tuple[list[int], list[Any]]] = {i: ([], []) for i in range(2 * prompts)}
    for part in complete(server, asked, traced(), n=2, max_tokens=12, stream=True):
        for choice in part.choices:
            tokens = tokens_of(choice.logprobs) if choice.logprobs else []
            assert [entry["token_id"] for entry in choice.tempering_trace] == tokens
            got[choice.index][0].extend(tokens)
            got[choice.index][1].extend(choice.tempering_trace)
    for index, (tokens, trace) in got.items():
        check(model, asked[index // 2], tokens, trace)
        cooled(trace)


def test_chats_whole_and_streamed(server, tiny):
    _, model, tokenizer = tiny
    turns = [{"role": "user", "content": TEXTS[0]}]
    prompt = tokenizer(f"{TEXTS[0]}\n").input_ids
    given = {"model": "tiny", "messages": turns, "temperature": 1.0, "max_tokens": 9, "n": 2}
    given |= {"logprobs": True, "extra_body": traced("support(5)")}
    reply = server.client.chat.completions.create(**given)
    for choice in reply.choices:
        tokens = [int(x.token.removeprefix("token_id:")) for x in choice.logprobs.content]
        check(model, prompt, tokens, choice.tempering_trace)
        assert [e["support"] for e in choice.tempering_trace] == pytest.approx([5] * 9, rel=1e-3)
    got: list[tuple[list[int], list[Any]]] = [([], []), ([], [])]
    opened = 0
    for part in server.client.chat.completions.create(**given, stream=True):
        for choice in part.choices:
            if not hasattr(choice, "tempering_trace"):
                assert choice.delta.role == "assistant" and not choice.delta.content
                opened += 1
                continue
            content = choice.logprobs.content if choice.logprobs else []
            tokens, trace = got[choice.index]
            tokens += [int(x.token.removeprefix("token_id:")) for x in content]
            trace += choice.tempering_trace
    assert opened == 2
    for tokens, trace in got:
        assert len(tokens) == 9
        check(model, prompt, tokens, trace)


def test_a_trace_has_every_token_that_counts(server, tiny):
    """A stop text in the middle of accepted drafts, an end of text, an echo."""
    ids = tiny[2](TEXTS[0]).input_ids[:25]
    whole = complete(server, ids, traced("constant(0)"), max_tokens=20).choices[0]
    text, trace = whole.text, whole.tempering_trace
    for more in ({"stop": [text[5:8]]}, {"echo": True}, {"stop": [text[9]], "stream": True}):
        reply = complete(server, ids, traced("constant(0)"), max_tokens=20, logprobs=None, **more)
        if "stream" in more:
            parts = [entry for part in reply for entry in part.choices[0].tempering_trace]
            assert 0 < len(parts) <= len(trace)
        else:
            (choice,) = reply.choices
            parts = choice.tempering_trace
            assert len(parts) == reply.usage.completion_tokens
        assert [e["token_id"] for e in parts] == [e["token_id"] for e in trace[: len(parts)]]


def test_a_trace_without_a_policy_is_of_the_request_s_own_settings(server, tiny):
    """T and top-p of the request: the probability is the one that the token was drawn with."""
    _, model, tokenizer = tiny
    ids = tokenizer(TEXTS[1]).input_ids[:25]
    (choice,) = complete(server, ids, traced(None), temperature=0.7, max_tokens=9).choices
    check(model, ids, tokens_of(choice.logprobs), choice.tempering_trace)
    heats = [entry["temperature"] for entry in choice.tempering_trace]
    assert heats == pytest.approx([0.7] * 9)
    body = {**traced(None), "top_k": 2}
    (choice,) = complete(server, ids, body, temperature=0.7, max_tokens=9).choices
    tokens = tokens_of(choice.logprobs)
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1].double()
    for row, token, entry in zip(logits, tokens, choice.tempering_trace, strict=True):
        best = (row / 0.7).topk(2)
        p = dict(zip(best.indices.tolist(), best.values.log_softmax(-1).tolist()))
        assert entry["log_probability"] == pytest.approx(p[token], abs=1e-3)
    assert choice.logprobs.token_logprobs == pytest.approx(
        [entry["log_probability"] for entry in choice.tempering_trace], abs=1e-3
    )


def test_limits_are_words_where_json_has_no_number(server, tiny):
    ids = tiny[2](TEXTS[0]).input_ids[:25]
    (hot,) = complete(server, ids, traced("constant(inf)")).choices
    assert {entry["temperature"] for entry in hot.tempering_trace} == {"inf"}
    (cold,) = complete(server, ids, traced("constant(0)")).choices
    assert {entry["log_probability"] for entry in cold.tempering_trace} == {0.0}


def test_requests_beside_a_traced_one_are_untouched(server, tiny):
    """Many at once, traced and not, each with a temperature of its own."""
    _, model, tokenizer = tiny
    ids = tokenizer(TEXTS[2]).input_ids[:25]

    def ask(number: int) -> None:
        T = 0.5 + number / 16
        body = {**AS_IDS, "ignore_eos": True}
        if number % 2:
            body = traced(f"constant({T})", tempering_trace=number % 4 == 1)
        reply = complete(server, ids, body, max_tokens=24, temperature=1.0, stream=number % 3 == 0)
        choices = [p.choices[0] for p in reply] if number % 3 == 0 else reply.choices
        trace = [entry for c in choices for entry in getattr(c, "tempering_trace", [])]
        tokens = [t for c in choices if c.logprobs for t in tokens_of(c.logprobs)]
        if number % 4 == 1:
            check(model, ids, tokens, trace)
            assert [entry["temperature"] for entry in trace] == pytest.approx([T] * 24)
        else:
            assert not any(hasattr(choice, "tempering_trace") for choice in choices)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(24)))


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", {"vllm_xargs": {"tempering_trace": "yes"}}, "is true or false, got 'yes'"),
        ("completions", {"vllm_xargs": {"tempering_trace": 2}}, "is true or false"),
        ("completions", {"vllm_xargs": {"tempering_trace": [1]}}, "is true or false"),
        ("completions", {"tempering_trace": True}, "send it inside vllm_xargs"),
        ("completions", {"temperature": 0}, "temperature=0 makes vLLM take the likeliest token"),
        ("completions", {"use_beam_search": True}, "would ignore 'tempering_trace'"),
        ("completions", {"vllm_xargs": {"tempering_trce": True}}, "did you mean tempering_trace"),
        ("chat/completions", {"include_reasoning": False}, "hides tokens that tempering_trace"),
        ("responses", {"input": "Hi"}, "choices of /v1/chat/completions and /v1/completions alone"),
        ("messages", {}, "choices of /v1/chat/completions and /v1/completions alone"),
        ("chat/completions/batch", {"messages": [[{"role": "user", "content": "a"}]]}, "alone"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_is_http_400(server, path, body, message, stream):
    if stream and (path.endswith("batch") or "use_beam_search" in body):
        pytest.skip("vLLM doesn't stream these")
    turn = [{"role": "user", "content": "Hi"}]
    start = {"completions": {"prompt": "Hi"}, "responses": {}}.get(path, {"messages": turn})
    whole = {"model": "tiny", "max_tokens": 3, "stream": stream, **start}
    whole |= {"vllm_xargs": {"tempering_trace": True}, **body}
    if "tempering_trace" in body:
        del whole["vllm_xargs"]
    answer = httpx.post(
        f"{server.url}/v1/{path}",
        json=whole,
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=60,
    )
    assert message in answer.text
    if stream and answer.status_code == 200:  # vLLM has begun the stream before it takes a request
        error = json.loads(answer.text.split("\n")[0].removeprefix("data: "))["error"]
        assert error["code"] == 400
    else:
        assert answer.status_code == 400, answer.text


def test_an_llm_has_traces_in_its_outputs(engines, tiny):
    """In Python, without a server, on an engine that doesn't speculate."""
    from vllm import SamplingParams

    directory, model, tokenizer = tiny
    llm = engines(directory, enforce_eager=True)
    ids = tokenizer(TEXTS[0]).input_ids[:25]
    asked = {"tempering": COOLING, "tempering_trace": True}
    params = SamplingParams(n=2, temperature=1.0, max_tokens=7, ignore_eos=True, extra_args=asked)
    plain = SamplingParams(temperature=1.0, max_tokens=7, ignore_eos=True)
    traced, other = llm.generate([{"prompt_token_ids": ids}] * 2, [params, plain], use_tqdm=False)
    for output in traced.outputs:
        check(model, ids, list(output.token_ids), output.tempering_trace)
        cooled(output.tempering_trace)
    assert not hasattr(other.outputs[0], "tempering_trace")
