"""`tempering serve` under the openai client: policies, bad requests by the hundred, swaps."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import pytest
import torch

from tempering.engines.vllm.client import active_profile, swap_remote
from tempering.engines.vllm.worker import digest
from tempering.errors import ProfileError, RefusedError
from tests.vllm.reference import TEXTS, greedy, per_head, per_layer
from tests.vllm.serving import KEY, serving


class Server(NamedTuple):
    url: str
    client: Any
    model: Any
    tokenizer: Any
    profiles: dict[str, Any]
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory) -> Iterator[Server]:
    directory, model, tokenizer = tiny
    home = tmp_path_factory.mktemp("server")
    profiles = {"own": per_layer(model), "hot": per_head(model, 1)}
    paths = {name: p.save(home / f"{name}.json") for name, p in profiles.items()}
    arguments = ("--profile", str(paths["own"]), "--named", f"hot={paths['hot']}")
    with serving(directory, home, *arguments) as running:
        yield Server(running.url, running.client, model, tokenizer, profiles, running.process)


def complete(server: Server, prompt: list[int], extra: dict[str, Any] | None = None, **settings):
    body = {} if extra is None else {"vllm_xargs": extra}
    given = {"temperature": 1.0, "max_tokens": 1, **settings}
    more = {"ignore_eos": True, **given.pop("extra_body", {}), **body}
    return server.client.completions.create(model="tiny", prompt=prompt, extra_body=more, **given)


def ids_of(server: Server, choice: Any) -> list[int]:
    return [int(token.removeprefix("token_id:")) for token in choice.logprobs.tokens]


AS_IDS = {"extra_body": {"return_tokens_as_token_ids": True}, "logprobs": 0}


def test_the_openai_client_works_unchanged(server):
    ids = server.tokenizer(TEXTS[0]).input_ids
    answer = complete(server, ids, temperature=0.0, max_tokens=8, **AS_IDS)
    assert ids_of(server, answer.choices[0]) == greedy(server.model, ids, server.profiles["own"], 8)
    named = complete(
        server, ids, {"tempering_profile": "hot"}, temperature=0.0, max_tokens=8, **AS_IDS
    )
    assert ids_of(server, named.choices[0]) == greedy(server.model, ids, server.profiles["hot"], 8)
    text = server.client.completions.create(model="tiny", prompt=TEXTS[1], max_tokens=3)
    assert text.usage.completion_tokens <= 3


def _policy(draw: random.Random) -> tuple[dict[str, Any], float, Any]:
    """(arguments, the request's temperature, T of the first token)."""
    hot, cold = round(draw.uniform(1.1, 2), 4), round(draw.uniform(0.2, 0.9), 4)
    return draw.choice(
        (
            ({}, hot, hot),
            ({"tempering": f"constant({cold})"}, 1.0, cold),
            ({"tempering": f"schedule(linear({hot},{cold}), length=9)"}, 1.0, hot),
            ({"tempering": f"phases(thinking={hot}, answer={cold})"}, 1.0, cold),
            ({"temperature_thinking": hot}, cold, cold),
            ({"post_thinking": f'{{"temperature": {cold}}}'}, hot, cold),
            ({"tempering": f"ladder({cold},{hot}, n=3)", "tempering_sample": 2}, 1.0, hot),
            ({"tempering": f"constant({hot})|clip(0,1.05)"}, 1.0, 1.05),
        )
    )


BAD = (
    {"tempering": "suport(3)"},
    {"tempering": "support(-3)"},
    {"tempering": "constant(nan)"},
    {"tempering": "phases(thinking=1)"},
    {"tempering": 'phases(thinking=between(1, ""), answer=1)'},
    {"tempering": "phases(thinking=between(1, ids(99999)), answer=1)"},
    {"tempering": "("},
    {"tempering": "(" * 9999},
    {"tempering": ""},
    {"tempering": 3},
    {"tempering": ["support(3)"]},
    {"tempering": "ladder(0.5,2, n=3)"},
    {"tempering": "ladder(0.5,2, n=3)", "tempering_sample": 7},
    {"tempering": "support(3)", "dynatemp_range": 0.5},
    {"tempering_profile": "cold"},
    {"tempering_sample": 1},
    {"temperings": "support(3)"},
    {"dynatemp_exponent": 1},
    {"dynatemp_range": "wide"},
    {"temperature_thinking": -1},
    {"post_thinking": "{"},
    {"post_thinking": '{"top_p": 2}'},
    {"tempering": "schedule(throb(12,3,1,12), length=0)"},
    {"tempering": "schedule(linear(1,2), length=99999999)"},
    {"tempering": "constant(1)" + "|room(1)" * 330},
    {"tempering": "schedule(shuffle(linear(2,1), seed=0), length=1048576)"},
    {"temperature_think": 0.5},
    {"dynatemp_rnge": 0.5},
    {"post_thinking": {"temperature": 0.2}},
)


def test_hundreds_of_requests_good_and_bad(server):
    """No request gets another's temperature, every bad one is HTTP 400, the engine lives."""
    from openai import BadRequestError

    draw = random.Random(0)
    prompts = [server.tokenizer(text).input_ids[:20] for text in TEXTS]
    with_profile = [
        log_softmax_at_end(server.model, ids, server.profiles["own"]) for ids in prompts
    ]
    cases = []
    for _ in range(400):
        which = draw.randrange(len(prompts))
        if draw.random() < 0.4:
            extra = dict(draw.choice(BAD))
            cases.append((which, extra, 1.0, None))
        elif draw.random() < 0.1:
            two = draw.choice((0.0, 0.5))
            cases.append((which, {"tempering": "support(3)"}, two, None))
        else:
            extra, own, T = _policy(draw)
            cases.append((which, extra, own, T))

    def run(case: Any) -> Any:
        which, extra, own, _ = case
        try:
            return complete(
                server, prompts[which], extra or None, temperature=own, max_tokens=2, **AS_IDS
            )
        except BadRequestError as error:
            return error

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(run, cases))
    for (which, extra, _, T), answer in zip(cases, answers, strict=True):
        if T is None:
            assert isinstance(answer, BadRequestError), (extra, answer)
            assert answer.status_code == 400 and len(answer.message) > 20
            continue
        assert not isinstance(answer, BadRequestError), (extra, answer)
        token = ids_of(server, answer.choices[0])[0]
        wanted = (with_profile[which] / T).log_softmax(-1)[token]
        assert math.isclose(
            answer.choices[0].logprobs.token_logprobs[0], float(wanted), abs_tol=2e-4
        ), extra


def test_an_object_is_explained_in_our_words(server):
    from openai import BadRequestError

    ids = server.tokenizer(TEXTS[0]).input_ids[:20]
    with pytest.raises(BadRequestError, match="post_thinking in vllm_xargs is a text or a number"):
        complete(server, ids, {"post_thinking": {"temperature": 0.2}})


def log_softmax_at_end(model: Any, ids: list[int], profile: Any) -> torch.Tensor:
    from tempering.attention import tempered

    with tempered(model, profile), torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].float()


def test_beam_search_is_refused_rather_than_untempered(server):
    from openai import BadRequestError

    ids = server.tokenizer(TEXTS[2]).input_ids[:20]
    beams = {"extra_body": {"use_beam_search": True}, "temperature": 0.0, "n": 2}
    with pytest.raises(BadRequestError, match="beam search makes requests of its own"):
        complete(server, ids, {"tempering": "support(3)"}, **beams)
    assert len(complete(server, ids, **beams).choices) == 2


@pytest.mark.parametrize(
    "beside",
    [
        {"tempering": "constant(0.5)"},
        {"temperature_thinking": 0.5},
        {"post_thinking": {"temperature": 0.2}},
        {"tempering_profile": "hot"},
        {"dynatemp_range": 0.5, "vllm_xargs": {"tempering": "constant(0.5)"}},
    ],
)
def test_an_argument_beside_vllms_own_is_refused(server, beside):
    for path, body in {
        "completions": {"prompt": "a"},
        "completions ": {"prompt": "a", "use_beam_search": True, "n": 2},
    }.items():
        answer = httpx.post(
            f"{server.url}/v1/{path.strip()}",
            json={"model": "tiny", **body, **beside},
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=120,
        )
        assert answer.status_code == 400 and "inside vllm_xargs" in answer.text, (path, answer.text)


def test_a_ladder_gives_each_sample_its_own(server):
    ids = server.tokenizer(TEXTS[2]).input_ids[:20]
    raw = log_softmax_at_end(server.model, ids, server.profiles["own"])
    answer = complete(server, ids, {"tempering": "ladder(0.5,2, n=3)"}, n=3, **AS_IDS)
    for choice, T in zip(sorted(answer.choices, key=lambda c: c.index), (0.5, 1.0, 2.0)):
        wanted = float((raw / T).log_softmax(-1)[ids_of(server, choice)[0]])
        assert math.isclose(choice.logprobs.token_logprobs[0], wanted, abs_tol=2e-4)


def test_a_swap_waits_for_requests_in_flight(server):
    """Requests that began under one profile end under it; later ones have the new one alone."""
    ids = server.tokenizer(TEXTS[0]).input_ids
    other = per_head(server.model, 5)
    assert active_profile(server.url, KEY) == digest(server.profiles["own"])
    with pytest.raises(RefusedError, match="give --api-key"):
        active_profile(server.url)
    started = threading.Event()
    written: list[int] = []

    def long() -> None:
        body = {"ignore_eos": True, "return_tokens_as_token_ids": True}
        stream = server.client.completions.create(
            model="tiny",
            prompt=ids,
            temperature=0.0,
            max_tokens=150,
            logprobs=0,
            stream=True,
            extra_body=body,
        )
        for part in stream:
            written.extend(ids_of(server, part.choices[0]))
            started.set()

    thread = threading.Thread(target=long)
    thread.start()
    assert started.wait(60)
    before = len(written)
    try:
        assert swap_remote(server.url, other, KEY) == digest(other)
    finally:
        thread.join(120)
    assert before < 150  # the request was in flight
    assert written == greedy(server.model, ids, server.profiles["own"], 150)
    assert written != greedy(server.model, ids, other, 150)
    answer = complete(server, ids, temperature=0.0, max_tokens=12, **AS_IDS)
    assert ids_of(server, answer.choices[0]) == greedy(server.model, ids, other, 12)
    alien = type(other).from_json({**other.to_json(), "model": {"architecture": "GPT2LMHeadModel"}})
    with pytest.raises((ProfileError, ValueError), match="made for GPT2LMHeadModel"):
        swap_remote(server.url, alien, KEY)
    assert active_profile(server.url, KEY) == digest(other)
    assert swap_remote(server.url, None, KEY) == "untempered"
    answer = complete(server, ids, temperature=0.0, max_tokens=12, **AS_IDS)
    assert ids_of(server, answer.choices[0]) == greedy(server.model, ids, None, 12)
    swap_remote(server.url, server.profiles["own"], KEY)


def test_a_server_that_dies_in_the_middle_of_a_swap(server):
    """The last test: whoever swapped is told, and nothing waits for ever."""
    errors: list[BaseException] = []

    def swap() -> None:
        try:
            swap_remote(server.url, None, KEY)
        except RefusedError as error:
            errors.append(error)

    os.killpg(server.process.pid, signal.SIGSTOP)  # so that the swap can't be done before
    thread = threading.Thread(target=swap)
    thread.start()
    time.sleep(0.5)
    os.killpg(server.process.pid, signal.SIGKILL)
    thread.join(60)
    assert not thread.is_alive()
    assert len(errors) == 1 and "all workers have changed or none has" in str(errors[0])
