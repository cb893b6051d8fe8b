"""llama.cpp as an engine: log probabilities, policies, the same tokens, baked files, the server.

Needs cyllama, prebuilt llama.cpp: pip install cyllama. Skipped without it.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader

from tempering.attention import Profile, tempered
from tempering.audit import ask, audit
from tempering.cli import main
from tempering.engines.checkpoints.gguf import bake_gguf
from tempering.engines.generating.side_by_side import stream
from tempering.engines.llamacpp import requests
from tempering.engines.llamacpp.model import LlamaCpp
from tempering.engines.llamacpp.server import make_server
from tempering.engines.llamacpp.writing import SampledToken, WritingRows, write
from tempering.engines.loading.gguf_files import load_gguf
from tempering.engines.providers.echo import EchoServer
from tempering.errors import (
    CheckError,
    InputError,
    ModelError,
    RefusedError,
    TemperatureError,
)
from tempering.tokens import parse_policy
from tempering.tokens.engine_check import check_engine
from tempering.tokens.policy import ConstantPolicy
from tempering.tokens.request import Asked
from tempering.tokens.settings import RequestSettings
from tests.integration.llamacpp_tiny import write_gguf

llama = pytest.importorskip(
    "cyllama.llama.llama_cpp", reason="needs llama.cpp: pip install cyllama"
)

KINDS = ("llama", "qwen2", "gemma3")
# llama_ftype of llama.h.
FTYPES = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q8_0": 7, "Q4_K_M": 15}
IDS = [1, *range(5, 100)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    return {kind: write_gguf(folder / f"{kind}.gguf", kind) for kind in KINDS}


@pytest.fixture(scope="module")
def engine(files) -> Iterator[LlamaCpp]:
    with LlamaCpp(files["llama"], rows=4, threads=1) as model:
        yield model


@torch.no_grad()
def in_process(model: Any) -> torch.Tensor:
    rows = model(torch.tensor([IDS])).logits[0].float().log_softmax(-1)
    return rows[:-1].gather(1, torch.tensor(IDS)[1:, None])[:, 0]


def said(path: Path) -> torch.Tensor:
    with LlamaCpp(path, threads=1) as model:
        values = model.logprobs([IDS])[0]
    assert values[0] is None and len(values) == len(IDS)
    return torch.tensor(values[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_the_models(files, kind):
    model, _ = load_gguf(files[kind])
    wanted = in_process(model)
    # Keys and values are kept in float16.
    assert float((said(files[kind]) - wanted).abs().mean()) < 0.02 * float(wanted.std())


@pytest.mark.parametrize("name", FTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_baked_file_is_the_tempered_model(files, tmp_path, kind, name):
    cold, warm = tmp_path / "cold.gguf", tmp_path / "warm.gguf"
    plain = files[kind]
    if name == "Q4_K_M":  # blocks of 256 numbers: narrower layers would get other types
        plain = write_gguf(tmp_path / "wide.gguf", kind, width=256)
    settings = llama.LlamaModelQuantizeParams()
    settings.ftype, settings.nthread = FTYPES[name], 1
    llama.model_quantize(str(plain), str(cold), settings)
    types = {
        tensor.tensor_type.name for tensor in GGUFReader(cold).tensors if "attn_q.w" in tensor.name
    }
    assert types == {"Q4_K" if name == "Q4_K_M" else name}
    model, _ = load_gguf(cold)
    generator = torch.Generator().manual_seed(0)
    layers = model.config.num_hidden_layers
    # gemma3's heads share the norms that temperatures fold into.
    shape = (layers, 1) if kind == "gemma3" else (layers, 4)
    rows = torch.exp(torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5)
    profile = Profile.from_matrix(rows.expand(layers, 4))
    bake_gguf(cold, profile, warm, in_place=True)
    untempered = in_process(model)
    with tempered(model, profile):
        wanted = in_process(model)
    own = float((said(cold) - untempered).abs().mean())
    assert float((said(warm) - wanted).abs().mean()) <= 1.5 * own
    assert float((untempered - wanted).abs().mean()) > 5 * own


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_one_attention_temperature_without_a_second_file(files, kind, temperature):
    network, _ = load_gguf(files[kind])
    untempered = in_process(network)
    with tempered(network, Profile.from_matrix([[temperature] * 4] * 2)):
        wanted = in_process(network)
    with LlamaCpp(files[kind], threads=1, temperature=temperature) as model:
        got = torch.tensor(model.logprobs([IDS])[0][1:])
    own = float((said(files[kind]) - untempered).abs().mean())
    assert float((got - wanted).abs().mean()) <= 1.5 * own
    assert float((untempered - wanted).abs().mean()) > 20 * own


def test_an_attention_temperature_that_the_rotation_does_not_carry_is_refused(files):
    with pytest.raises(RefusedError, match="architecture gemma3"):
        LlamaCpp(files["gemma3"], threads=1, temperature=1.5)
    with pytest.raises(TemperatureError, match="the whole model"):
        LlamaCpp(files["llama"], threads=1, temperature=0.0)


def test_policies_pass_the_contract_of_engines():
    def run(policy: Any, requests: Any, logits: Any) -> Any:
        found = []
        for request, row in zip(requests, logits, strict=True):
            sample = SampledToken(policy, 0, request.sample, request.given)
            rows = WritingRows(request.prompt, [sample])
            for token in request.generated:
                rows.took(0, token)
            found.append(rows.temper([0], row[None])[0])
        return torch.cat(found)

    def together(policy: Any, requests: Any, logits: Any) -> Any:
        rows = WritingRows((), [SampledToken(policy, 0, each.sample) for each in requests])
        for place, request in enumerate(requests):
            rows.states[place] = policy.start(
                request.prompt, sample=request.sample, given=request.given
            )
            for token in request.generated:
                rows.took(place, token)
        return rows.temper(range(len(requests)), logits)[0]

    assert check_engine(run) == check_engine(together) > 100


class Elsewhere(LlamaCpp):
    """llama.cpp's place taken by transformers: the same logits as the other engine has."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        self.network, self._tokenizer, self.length, self.rows = network, tokenizer, 400, 4
        self.held: dict[int, list[int]] = {}

    def ends(self) -> frozenset[int]:
        return frozenset({2})

    @torch.no_grad()
    def read(self, row: int, ids: Any, between: Any = None) -> Any:
        self.held[row] = list(ids)
        return self.network(torch.tensor([self.held[row]])).logits[:, -1]

    def copy(self, source: int, target: int) -> None:
        self.held[target] = list(self.held[source])

    def forget(self, row: int) -> None:
        self.held.pop(row, None)

    def step(self, tokens: Any) -> Any:
        found = []
        for row, token, place in tokens:
            assert place == len(self.held[row])
            found.append(self.read(row, [*self.held[row], token]))
        return torch.cat(found)


@pytest.mark.parametrize(
    "text",
    ["constant(0.7)", "constant(0)", "support(5)", "schedule(linear(2,0.3), length=8)",
     "phases(thinking=1.5, answer=0.3)"],
)  # fmt: skip
def test_the_same_logits_and_numbers_give_the_same_tokens(files, text):
    network, tokenizer = load_gguf(files["llama"])
    policy, prompt = parse_policy(text, tokenizer), [1, 3, 20, 30]
    neutral = Profile.neutral(network)
    wanted = [
        step.token
        for step in stream(
            network, tokenizer, torch.tensor(prompt), [neutral], tokens=12, policy=policy, seed=5
        )
    ]
    fake = Elsewhere(network, tokenizer)
    steps = list(write(fake, prompt, [SampledToken(policy, 5), SampledToken(policy, 6)], tokens=12))
    assert [step.token for step in steps if step.row == 0] == wanted
    alone = list(write(fake, prompt, [SampledToken(policy, 6)], tokens=12))
    assert [s.token for s in steps if s.row == 1] == [s.token for s in alone]
    assert fake.held == {}


def test_samples_in_llamacpp_don_t_depend_on_their_neighbours(engine):
    policy = parse_policy("constant(1)")
    samples = [SampledToken(policy, seed) for seed in (3, 4, 5)]
    prompt = list(range(10, 40))
    together = list(write(engine, prompt, samples, tokens=10))
    for row, sample in enumerate(samples):
        alone = list(write(engine, prompt, [sample], tokens=10))
        mine = [step for step in together if step.row == row]
        assert [step.token for step in mine] == [step.token for step in alone]
        assert [s.raw for s in mine] == pytest.approx([s.raw for s in alone], abs=0.02)


def test_long_prompts_are_read_in_parts(files):
    ids = [1, *[5 + i % 200 for i in range(499)]]
    with LlamaCpp(files["llama"], threads=1) as model:
        model._at_once = 64
        parts = model.logprobs([ids])[0]
        model._at_once = 512
        whole = model.logprobs([ids])[0]
    assert parts[1:] == pytest.approx(whole[1:], abs=0.02)


def test_what_llamacpp_cannot_do_is_said(files, engine, tmp_path):
    with pytest.raises(ModelError, match="no GGUF file"):
        LlamaCpp(tmp_path / "absent.gguf")
    other = tmp_path / "other.gguf"
    other.write_text("not a model")
    with pytest.raises(ModelError, match="is no GGUF file"):
        LlamaCpp(other)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(files["llama"].read_bytes()[:5000])
    with pytest.raises(ModelError, match="can't read"):
        LlamaCpp(cut)
    policy = parse_policy("constant(1)")
    with pytest.raises(InputError, match="don't fit the 512"):
        next(write(engine, list(range(5, 200)), [SampledToken(policy, 0)], tokens=400))
    with pytest.raises(InputError, match="5 samples"):
        next(write(engine, [5, 6], [SampledToken(policy, 0)] * 5, tokens=4))
    for more, says in (
        ({"length": 513}, "length = 513 is not from 1 to 512"),
        ({"length": 10**12}, "what the model was trained for"),
        ({"rows": 257}, "rows = 257 is not from 1 to 256"),
        ({"threads": 513}, "threads = 513"),
        ({"threads": 0}, "threads = 0"),
    ):
        with pytest.raises(InputError, match=says):
            LlamaCpp(files["llama"], **more)
    with pytest.raises(InputError, match="token 999"):
        engine.logprobs([[5, 999]])
    with pytest.raises(InputError, match="no tokens"):
        engine.logprobs([[]])
    assert engine.logprobs([[5, 6]])[0][1] is not None


# The server


@contextlib.contextmanager
def serving(model: LlamaCpp, key: str | None = None) -> Iterator[str]:
    server = make_server(model, "tiny", port=0, key=key)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join(30)
        server.server_close()


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    with serving(engine) as address:
        yield address


def post(url: str, path: str, body: Any, key: str | None = None) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            raw = answer.read()
            if answer.headers["Content-Type"] == "text/event-stream":
                return answer.status, raw.decode()
            return answer.status, json.loads(raw)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


ASK = {"model": "tiny", "prompt": IDS[:20], "max_tokens": 12, "seed": 3, "n": 3}


def test_a_stream_is_the_whole_and_seeds_repeat(url):
    _, whole = post(url, "/completions", ASK)
    assert post(url, "/completions", ASK)[1]["choices"] == whole["choices"]
    assert len({choice["text"] for choice in whole["choices"]}) == 3
    assert whole["usage"]["prompt_tokens"] == 20
    options = {"stream": True, "stream_options": {"include_usage": True}}
    found = events(post(url, "/completions", {**ASK, **options})[1])
    texts, finish = [""] * 3, [None] * 3
    for event in found[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        finish[choice["index"]] = choice["finish_reason"] or finish[choice["index"]]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert finish == [choice["finish_reason"] for choice in whole["choices"]]
    assert found[-1]["usage"] == whole["usage"]


def test_a_policy_of_a_request_tempers_it(url, engine):
    body = {**ASK, "n": 1, "vllm_xargs": {"tempering": "constant(0)"}}
    _, cold = post(url, "/completions", body)
    _, zero = post(url, "/completions", {**ASK, "n": 1, "temperature": 0})
    assert cold["choices"][0]["text"] == zero["choices"][0]["text"]
    logits = engine.read(0, IDS[:20])
    first = engine.tokenizer.decode([int(logits.argmax())], skip_special_tokens=True)
    assert cold["choices"][0]["text"].startswith(first.replace("�", ""))
    ladder = {**ASK, "vllm_xargs": {"tempering": "ladder(0.5,2, n=3)"}}
    _, three = post(url, "/completions", ladder)
    alone = {**ladder, "n": 1, "seed": 5}
    alone["vllm_xargs"] = {**ladder["vllm_xargs"], "tempering_sample": 2}
    assert post(url, "/completions", alone)[1]["choices"][0]["text"] == three["choices"][2]["text"]


@pytest.mark.parametrize("chat", [False, True])
def test_a_trace_says_what_each_token_was_drawn_from(url, engine, chat):
    """Against the logits of the engine itself, in float64; a stream's parts are the whole's."""
    start = {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": IDS[:20]}
    path = "/chat/completions" if chat else "/completions"
    extra = {"tempering": "support(5)", "tempering_trace": True}
    body = {**start, "max_tokens": 9, "seed": 4, "n": 2, "vllm_xargs": extra}
    _, reply = post(url, path, body)
    read = engine.ids("user: Hi\nassistant: ") if chat else IDS[:20]
    for choice in reply["choices"]:
        tokens = list(read)
        for entry in choice["tempering_trace"]:
            logits = engine.read(0, tokens)[0].double()
            raw, tempered = (
                (logits / T).log_softmax(-1) for T in (1.0, float(entry["temperature"]))
            )
            entropies = [float(-(p.exp() * p).sum()) for p in (raw, tempered)]
            token = entry["token_id"]
            wanted = {
                "entropy_before": entropies[0],
                "entropy_after": entropies[1],
                "support": math.exp(entropies[1]),
                "log_probability_raw": float(raw[token]),
                "log_probability": float(tempered[token]),
            }
            assert {name: entry[name] for name in wanted} == pytest.approx(wanted, abs=2e-3)
            assert entry["support"] == pytest.approx(5, abs=1e-3) and entry["phase"] == ""
            tokens.append(token)
        assert len(tokens) - len(read) in range(1, 10)
    parts = events(post(url, path, {**body, "stream": True})[1])
    traces = [[], []]
    for event in parts:
        for choice in event["choices"]:
            traces[choice["index"]] += choice.get("tempering_trace", [])
    assert traces == [choice["tempering_trace"] for choice in reply["choices"]]
    plain = {**body, "vllm_xargs": {"tempering": "support(5)"}}
    streamed = events(post(url, path, {**plain, "stream": True})[1])
    for untraced in (post(url, path, plain)[1], *streamed):
        assert not any("tempering_trace" in choice for choice in untraced["choices"])


def test_a_trace_has_every_token_that_counts(url, engine):
    """A stop text in the middle, an echo, no new token, a stream that holds text back."""
    body = {**ASK, "n": 1, "temperature": 0, "vllm_xargs": {"tempering_trace": True}}
    _, whole = post(url, "/completions", body)
    stop = whole["choices"][0]["text"][2:5]
    for more in ({}, {"stop": stop}, {"echo": True}, {"echo": True, "max_tokens": 0}):
        _, reply = post(url, "/completions", {**body, **more})
        trace = reply["choices"][0]["tempering_trace"]
        assert len(trace) == reply["usage"]["completion_tokens"]
        assert trace == whole["choices"][0]["tempering_trace"][: len(trace)]
        if "echo" in more:
            continue
        parts = events(post(url, "/completions", {**body, **more, "stream": True})[1])
        assert [e for part in parts for e in part["choices"][0]["tempering_trace"]] == trace


def test_the_openai_client_hands_a_trace_through(url):
    openai = pytest.importorskip("openai", reason="no openai (pip install openai)")
    client = openai.OpenAI(base_url=url, api_key="none")
    extra = {"vllm_xargs": {"tempering": "support(5)", "tempering_trace": True}}
    asked = {"model": "tiny", "max_tokens": 4, "seed": 4, "extra_body": extra}
    turn = [{"role": "user", "content": "Hi"}]
    (choice,) = client.chat.completions.create(messages=turn, **asked).choices
    assert choice.tempering_trace[0]["support"] == pytest.approx(5, abs=1e-3)
    parts = [
        entry
        for part in client.chat.completions.create(messages=turn, stream=True, **asked)
        for item in part.choices
        for entry in getattr(item, "tempering_trace", [])
    ]
    assert parts == choice.tempering_trace


def test_a_trace_has_words_for_what_json_has_no_number_for(url):
    body = {**ASK, "n": 1, "vllm_xargs": {"tempering": "constant(inf)", "tempering_trace": True}}
    status, text = post(url, "/completions", body)
    assert status == 200
    assert text["choices"][0]["tempering_trace"][0]["temperature"] == "inf"


def test_a_stop_text_ends_a_sample_and_is_not_shown(url):
    body = {**ASK, "n": 1, "temperature": 0}
    _, whole = post(url, "/completions", body)
    text = whole["choices"][0]["text"]
    stop = text[2:4]
    for stream_it in (False, True):
        _, cut = post(url, "/completions", {**body, "stop": stop, "stream": stream_it})
        if stream_it:
            parts = events(cut)
            got = "".join(event["choices"][0]["text"] for event in parts)
            finish = parts[-1]["choices"][0]["finish_reason"]
        else:
            got, finish = cut["choices"][0]["text"], cut["choices"][0]["finish_reason"]
        assert (got, finish) == (text[: text.index(stop)], "stop")


def test_requests_truncate_with_a_policy_and_without(url):
    """top_k = 1 leaves the likeliest token at any temperature, whoever says so."""
    body = {"prompt": IDS[:9], "max_tokens": 6, "seed": 3}
    cold = post(url, "/completions", {**body, "temperature": 0})[1]["choices"][0]["text"]
    for more in (
        {"temperature": 5, "top_k": 1},
        {"temperature": 5, "min_p": 1},
        {"top_k": 1, "vllm_xargs": {"tempering": "constant(5)"}},
        {"temperature": 5, "vllm_xargs": {"tempering": "sampler(top_k=1)"}},
        {"top_k": 1, "vllm_xargs": {"tempering": "sampler(T=5)"}},
        {"top_k": 1, "vllm_xargs": {"tempering": "constant(5)|order(top_k, temperature)"}},
    ):
        found = post(url, "/completions", {**body, **more})[1]
        assert found["choices"][0]["text"] == cold, more
    hot = post(url, "/completions", {**body, "temperature": 5})[1]["choices"][0]["text"]
    assert hot != cold


def test_a_chat_goes_through_the_template(url, engine):
    turns = [{"role": "user", "content": "Hi"}]
    body = {"messages": turns, "max_tokens": 6, "seed": 1, "temperature": 0.5}
    _, reply = post(url, "/chat/completions", body)
    assert reply["object"] == "chat.completion"
    assert reply["usage"]["prompt_tokens"] == len(engine.ids("user: Hi\nassistant: "))
    found = events(post(url, "/chat/completions", {**body, "stream": True})[1])
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in found)
    assert text == reply["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "more, says",
    [
        ({"vllm_xargs": {"tempering": "constant(-1)"}}, "constant"),
        ({"vllm_xargs": {"temprature": 1}}, "no argument 'temprature'"),
        ({"vllm_xargs": {"tempering_profile": "hot"}}, "bake the profile"),
        ({"vllm_xargs": {"tempering_room": 0.5}}, "tempering_room: llama.cpp has no"),
        ({"vllm_xargs": {"tempering": "support(3)"}, "temperature": 0.5}, "two temperatures"),
        ({"vllm_xargs": {"tempering": "ladder(0.5,2, n=2)"}}, "send n=2"),
        ({"vllm_xargs": {"tempering_trace": "yes"}}, "tempering_trace is true or false"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k is a number from -1"),
        ({"min_p": 2}, "min_p lies in"),
        ({"vllm_xargs": {"tempering": "sampler(top_p=0.5)"}, "top_p": 0.9}, "given twice"),
        ({"vllm_xargs": {"post_thinking": '{"top_p": 2}'}}, "post_thinking.top_p lies in"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"n": 9}, "4 texts side by side"),
        ({"n": True}, "n is a whole number"),
        ({"max_tokens": 0}, "max_tokens is 1 or more"),
        ({"max_tokens": 9999}, "don't fit the 512"),
        ({"prompt": ""}, "prompt is one text"),
        ({"prompt": ["a", "b"]}, "prompt is one text"),
        ({"prompt": [5, 999]}, "token 999"),
        ({"model": "other"}, "has the model 'tiny'"),
        ({"seed": -1}, "seed"),
        ({"stop": [1]}, "stop is a text"),
        ({"stream": "yes"}, "stream is true or false"),
        ({"stream": True, "logprobs": 1}, "can't be streamed"),
        ({"stream": 1}, "stream is true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options is for streams"),
        ({"stream": True, "stream_options": {"usage": 1}}, 'is {"include_usage": true}'),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage is true or"),
        ({"n": 0}, "n is a whole number, 1 or more, got 0"),
        ({"n": False}, "n is a whole number"),
        ({"stop": ""}, "none of them empty"),
        ({"stop": ["a", ""]}, "none of them empty"),
        ({"stop": 0}, "stop is a text"),
        ({"vllm_xargs": []}, "vllm_xargs is a mapping"),
        ({"max_tokens": 10**400}, "max_tokens is a whole number"),
        ({"max_completion_tokens": 5}, "two limits"),
        ({"max_tokens": None, "prompt": IDS * 6}, "the prompt has 576 tokens"),
        ({"max_tokens": 1, "prompt": (IDS * 6)[:512], "echo": True}, "the prompt has 512 tokens"),
        ({"logprobs": 5}, "send logprobs=1"),
        ({"logprobs": "x"}, "logprobs is a whole number"),
        ({"presence_penalty": False}, "presence_penalty"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "/v1/completions takes prompt"),
        ({"prompt": "a\ud800"}, "half of a character at place 1"),
        ({"prompt": [[5, 6]]}, "prompt is one text"),
        ({"temperature": math.nan}, "temperature is a number"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_by_name(url, more, says):
    status, message = post(url, "/completions", {**ASK, **more})
    assert status == 400 and says in message
    assert post(url, "/completions", {**ASK, "max_tokens": 1})[0] == 200


@pytest.mark.parametrize(
    "more, says",
    [
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "half of a character"),
        ({"messages": [{"role": "user", "content": "x", "name": "b"}]}, "messages[0]: 'name'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
            "texts alone",
        ),
        ({"prompt": "x"}, "/v1/chat/completions takes messages"),
        ({"echo": True}, "'echo' can't be carried out"),
        ({"logprobs": 1}, "logprobs is true or false"),
        ({"top_logprobs": 3}, "top_logprobs"),
    ],
)
def test_what_a_chat_cannot_carry_out_is_refused_by_name(url, more, says):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    status, message = post(url, "/chat/completions", {**body, **more})
    assert status == 400 and says in message
    assert post(url, "/chat/completions", body)[0] == 200


def test_null_is_nothing_and_0_is_a_number(url):
    """A null beside a number takes nothing from it; logprobs=0 asks for the tokens' own."""
    body = {**ASK, "n": 1, "max_completion_tokens": None, "max_tokens": 3, "logprobs": 0}
    _, found = post(url, "/completions", body)
    assert found["usage"]["completion_tokens"] <= 3
    assert len(found["choices"][0]["logprobs"]["token_logprobs"]) <= 3
    whole = {"prompt": (IDS * 6)[:512], "max_tokens": 0, "echo": True, "logprobs": 1}
    status, echoed = post(url, "/completions", whole)
    assert status == 200 and len(echoed["choices"][0]["logprobs"]["tokens"]) == 512


class FailsLater(ConstantPolicy):
    """A policy with a bug that shows after some tokens."""

    def advance(self, state: Any, token: int) -> Any:
        if state.position >= 2:
            raise self.error
        return super().advance(state, token)


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), CheckError("its own words")])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_policy_that_fails_ends_its_own_request_alone(url, monkeypatch, error, streamed):
    whole = post(url, "/completions", ASK)[1]["choices"]
    failing = FailsLater(1.0)
    object.__setattr__(failing, "error", error)
    asked = Asked(failing, RequestSettings())
    monkeypatch.setattr(requests, "_asked", lambda *_: asked)
    status, reply = post(url, "/completions", {**ASK, "n": 1, "stream": streamed})
    says = "ZeroDivisionError: a bug" if isinstance(error, ZeroDivisionError) else "its own words"
    if streamed:
        *parts, last = [json.loads(x.removeprefix("data: ")) for x in reply.split("\n\n") if x]
        assert status == 200 and len(parts) == 2
        assert last["error"] == {"message": says, "type": "server_error", "code": 500}
    else:
        assert (status, reply) == (500, says)
    monkeypatch.undo()
    assert post(url, "/completions", ASK)[1]["choices"] == whole


def test_a_client_that_hangs_up_ends_its_request_alone(url, capfd):
    whole = post(url, "/completions", ASK)[1]["choices"]
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    data = json.dumps({**ASK, "max_tokens": 400, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    for reads in (0, 1, 200):
        with socket.create_connection((host, int(port))) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(head.encode() + data)
            if reads:
                client.recv(reads)
    assert post(url, "/completions", ASK)[1]["choices"] == whole
    assert capfd.readouterr().err == ""


class Halted:
    """The engine waits before its third step until the client has left; counts its work."""

    def __init__(self, engine: LlamaCpp, monkeypatch: Any) -> None:
        self.reached, self.left = threading.Event(), threading.Event()
        self.steps = self.reads = 0
        step, read = engine.step, engine.read

        def stepping(tokens: Any) -> Any:
            self.steps += 1
            if self.steps == 3:
                self.reached.set()
                assert self.left.wait(60)
            return step(tokens)

        def reading(*arguments: Any) -> Any:
            self.reads += 1
            return read(*arguments)

        monkeypatch.setattr(engine, "step", stepping)
        monkeypatch.setattr(engine, "read", reading)


def sent(url: str, body: Any) -> socket.socket:
    """A connection on which a request has been sent."""
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    client = socket.create_connection((host, int(port)), timeout=60)
    client.sendall(raw(body))
    return client


def raw(body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


@pytest.mark.parametrize(
    "more",
    [{}, {"echo": True, "logprobs": 1}, {"n": 1}, {"stream": True, "stop": "x" * 500}],
    ids=["whole", "echo", "one sample", "a stream that holds text back"],
)
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_left_stops_its_request_within_a_step(engine, url, monkeypatch, more, reset):
    halted = Halted(engine, monkeypatch)
    client = sent(url, {**ASK, "max_tokens": 400, **more})
    assert halted.reached.wait(60)
    if reset:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    halted.left.set()
    # Its turn comes when the other's is over; one token takes no step.
    assert post(url, "/completions", {**ASK, "max_tokens": 1})[0] == 200
    assert (halted.steps, halted.reads) == (3, 2)


def test_who_leaves_the_queue_is_not_served(engine, url, monkeypatch):
    halted = Halted(engine, monkeypatch)
    with sent(url, {**ASK, "max_tokens": 5}) as served:
        assert halted.reached.wait(60)
        sent(url, ASK).close()
        halted.left.set()
        assert served.recv(15) == b"HTTP/1.1 200 OK"
    assert post(url, "/completions", {**ASK, "max_tokens": 1})[0] == 200
    assert halted.reads == 2


def test_a_request_sent_ahead_is_no_hanging_up(url):
    with sent(url, {**ASK, "max_tokens": 5}) as client:
        client.sendall(raw({**ASK, "max_tokens": 6}))
        found = b""
        while found.count(b"completion_tokens") < 2:
            part = client.recv(65536)
            assert part, found
            found += part
    assert found.count(b"HTTP/1.1 200 OK") == 2


def test_a_prompt_is_read_in_parts_that_can_be_stopped(files):
    ids = [1, *[5 + i % 200 for i in range(299)]]

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyError

    with LlamaCpp(files["llama"], threads=1) as model:
        model._at_once = 64
        wanted = model.read(0, ids)
        for reading in (model.read, lambda _, ids, stop: model.logprobs([ids], stop)):
            calls: list[int] = []
            with pytest.raises(KeyError):
                reading(0, ids, stop)
            assert len(calls) == 3
        assert torch.equal(model.read(0, ids, lambda: None), wanted)


def test_the_ends_of_texts_are_looked_up_once(files):
    class Counted:
        def __init__(self, vocab: Any) -> None:
            self.vocab, self.asked = vocab, 0

        def is_eog(self, token: int) -> bool:
            self.asked += 1
            return bool(self.vocab.is_eog(token))

    with LlamaCpp(files["llama"], threads=1) as model:
        model.vocab = Counted(model.vocab)
        assert model.ends() == {2} and model.ends() == {2}
        assert model.vocab.asked == model.words


def test_bodies_that_are_none_and_keys(engine):
    with serving(engine, "secret-key") as url:
        assert post(url, "/completions", ASK)[0] == 401
        assert post(url, "/completions", ASK, "wrong")[0] == 401
        assert post(url, "/completions", b"{", "secret-key") == (
            400,
            "the body is no JSON: Expecting property name enclosed in double quotes: line 1 "
            "column 2 (char 1)",
        )
        assert post(url, "/completions", [1], "secret-key")[0] == 400
        assert post(url, "/nothing", ASK, "secret-key")[0] == 404
        assert post(url, "/completions", ASK, "secret-key")[0] == 200


def test_requests_at_once_are_each_their_own(url):
    wanted = [post(url, "/completions", {**ASK, "seed": seed})[1]["choices"] for seed in range(4)]
    found: dict[int, Any] = {}

    def ask_one(seed: int) -> None:
        found[seed] = post(url, "/completions", {**ASK, "seed": seed})[1]["choices"]

    threads = [threading.Thread(target=ask_one, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [found[seed] for seed in range(4)] == wanted


def test_an_audit_of_the_engine_and_of_the_server(files, engine, url):
    network, tokenizer = load_gguf(files["llama"])
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 200, (2, 90), generator=generator).tolist()
    direct = ask(engine, prompts)
    remote = ask(EchoServer(url, "tiny", tokenizer), prompts)
    for one, other in zip(direct, remote, strict=True):
        assert one.values == pytest.approx(other.values, abs=1e-5)
    right = audit(network, direct, name="llama.cpp", precision=engine.precision, layers=False)
    assert right.right is True and right.verdict.startswith("llama.cpp runs at T = 1.0")


def test_an_audit_finds_a_baked_temperature(files, tmp_path):
    network, _ = load_gguf(files["llama"])
    warm = tmp_path / "warm.gguf"
    profile = Profile.from_matrix([[1.2] * 4] * 2)
    bake_gguf(files["llama"], profile, warm, in_place=True)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 200, (2, 90), generator=generator).tolist()
    with LlamaCpp(warm, threads=1) as model:
        baked = ask(model, prompts)
    found = audit(network, baked, precision="q8", layers=False)
    assert found.right is False
    assert found.temperature.low <= 1.2 <= found.temperature.high
    assert audit(network, baked, precision="q8", profile=profile, layers=False).right is True


def test_the_command_generates_with_a_policy(files, tmp_path, capsys):
    arguments = ["generate", "Hello", "--engine", "llamacpp", "--model", str(files["llama"])]
    arguments += ["--tokens", "phases(thinking=1, answer=0.5)", "--max-tokens", "5", "--json"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--out", str(tmp_path)])
    assert done.value.code == 0
    record = json.loads(capsys.readouterr().out)
    (sample,) = record["results"]["generations"]["samples"]
    assert sample["label"] == "llama.cpp" and sample["tokens"] <= 5
    assert {row["phase"] for row in sample["trace"]} <= {"thinking", "answer"}
    with pytest.raises(SystemExit) as refused:
        main([*arguments, "--pattern", "linear(1.2,0.8)"])
    assert refused.value.code == 2 and "tempering bake" in capsys.readouterr().err


def test_the_command_compares_folded_files(files, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 10)
    with pytest.raises(SystemExit) as done:
        main(
            ["compare", "--engine", "llamacpp", "--model", str(files["llama"]), "--text", str(text),
             "--pattern", "constant(1.5)", "--chunk", "64", "--chunks", "3", "--json",
             "--out", str(tmp_path / "runs")]
        )  # fmt: skip
    assert done.value.code == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]["cost"]
    network, tokenizer = load_gguf(files["llama"])
    ids = tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt").input_ids[0]
    chunks = ids[: len(ids) // 64 * 64].view(-1, 64)
    chunks = chunks[torch.linspace(0, len(chunks) - 1, 3).round().long()]

    def loss() -> float:
        with torch.no_grad():
            rows = network(chunks).logits[:, :-1].float().log_softmax(-1)
        return float(-rows.gather(2, chunks[:, 1:, None]).mean())

    before = loss()
    with tempered(network, Profile.from_matrix([[1.5] * 4] * 2)):
        after = loss()
    assert row["cost"] == pytest.approx(after - before, abs=0.02)


def test_serve_reads_the_arguments_of_vllm(files, tmp_path, capsys):
    profile = tmp_path / "p.json"
    Profile.from_matrix([[1.2] * 4, [0.8] * 4]).save(profile)
    for more, says in (
        (["--profile", str(profile)], "tempering bake"),
        (["--tensor-parallel-size", "2"], "takes --host, --port"),
        (["--max-num-seqs", "0"], "--max-num-seqs is 1 or more"),
        (["--port", "99999"], "--port is a number"),
        (["--host", "999.1.1.1"], "can't listen"),
    ):
        with pytest.raises(SystemExit) as refused:
            main(["serve", str(files["llama"]), *more])
        assert refused.value.code == 2 and says in capsys.readouterr().err


def test_a_server_without_echo_is_told(monkeypatch, files):
    _, tokenizer = load_gguf(files["llama"])
    server = EchoServer("http://127.0.0.1:1/v1", "tiny", tokenizer)
    for payload, says in (
        ({"choices": [{"text": "x"}]}, "gives no log probabilities of its prompt"),
        (_echoed(["a"], [-1.0], 1), "ignores `echo`"),
        (_echoed(["<s>", "&", "'", "("], [None, -1.0, -1.0, -1.0], 0), "puts '<s>' before"),
        (_echoed(["&", "'"], [None, -1.0], 0), "read 2 of 3 tokens: it cuts prompts"),
    ):
        with pytest.raises(RefusedError, match=says):
            server._read(payload, [10, 11, 12])
    with pytest.raises(InputError, match="token 1 is 'C' there and 'B' here"):
        server._read(_echoed(["A", "C", "D"], [None, -1.0, -1.0], 0), [37, 38, 39])


def _echoed(tokens: list[str], values: list[Any], written: int) -> Any:
    choice = {"logprobs": {"tokens": tokens, "token_logprobs": values}}
    return {"choices": [choice], "usage": {"completion_tokens": written}}
