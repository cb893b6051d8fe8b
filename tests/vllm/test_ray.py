"""A Ray cluster of two nodes, for real: `ray start`, `tempering serve` over both, a node that dies.

Both nodes are on this machine, and vLLM runs on CPUs: see `ray_cpu` for what its CPU build lacks.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tempering.attention import tempered
from tempering.engines.vllm.client import active_profile, swap_remote
from tempering.engines.vllm.worker import digest
from tempering.errors import ProfileError, RefusedError
from tests.vllm.ray_cluster import Cluster, Node, ray_cluster
from tests.vllm.reference import EXTENSION, TEXTS, per_head, per_layer
from tests.vllm.serving import KEY, Running, serving

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed: make test-ray"
)
CLOSE = 1e-4  # nats; the engines sum in another order
PATIENCE = 5 * float(os.environ.get("TEMPERING_PATIENCE", 60))  # seconds, for anything that ends
FORMS = {"pipeline": "--pipeline-parallel-size", "tensor": "--tensor-parallel-size"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with ray_cluster(tmp_path_factory.mktemp("ray"), ("bare", "deaf", *FORMS)) as running:
        yield running


# Engines that vLLM starts in this process, one after another.
ATTEMPTS = """
import json, sys
from vllm import LLM

for settings in json.loads(sys.argv[2]):
    try:
        LLM(
            sys.argv[1], dtype="float32", max_model_len=64, enforce_eager=True,
            tensor_parallel_size=2, distributed_executor_backend="ray", **settings,
        )
    except Exception as error:
        print(f"REFUSED {type(error).__name__}: {error}", flush=True)
    else:
        print("STARTED", flush=True)
"""


def _attempts(
    cluster: Cluster, resource: str, directory: Path, settings: list[dict[str, Any]]
) -> list[str]:
    """What became of each engine that was to run on the nodes with a resource."""
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "RAY_CPU_RESOURCE": resource}
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, str(directory), json.dumps(settings)],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        env={**os.environ, **cluster.environment, **own},
    )
    told = [line for line in done.stdout.splitlines() if line.startswith(("REFUSED", "STARTED"))]
    assert len(told) == len(settings), done.stderr[-3000:]
    return told


def test_a_node_without_tempering_is_named_at_the_start(cluster, tiny, tmp_path):
    """Whether profiles are configured, or requests alone would send policies."""
    directory, model, _ = tiny
    path = str(per_layer(model).save(tmp_path / "own.json"))
    configured = {
        "additional_config": {"tempering": {"profile": path, "profiles": {"hot": path}}},
        "worker_extension_cls": EXTENSION,
    }
    with cluster.joined_by("bare", cluster.hidden):
        told = _attempts(cluster, "bare", directory, [configured, {}])
    for line in told:
        assert line.startswith("REFUSED RefusedError: tempering "), line
        # The bare node alone, by its address.
        assert line.count("(no tempering)") == 1 and ", node " in line, line
        assert "Install tempering" in line, line


def test_a_node_that_leaves_the_plugin_out_is_named_at_the_start(cluster, tiny):
    with cluster.joined_by("deaf", {"VLLM_PLUGINS": "ray_cpu"}):
        (line,) = _attempts(cluster, "deaf", tiny[0], [{}])
    assert line.startswith("REFUSED RefusedError: these workers run without"), line
    assert f"untempered: rank 1 on {socket.gethostname()};" in line, line


class Reply(NamedTuple):
    """What a request got: log p of its prompt's tokens after the first, and of those written."""

    prompt: list[int]
    written: list[int]
    prompt_scores: list[float]
    scores: list[float]
    begun: float
    ended: float


def ask(
    server: Running, prompt: list[int], tokens: int, extra: dict[str, Any], whole: bool = False
) -> Reply:
    """A request that draws at T = 1; whole: with the log probabilities of its prompt."""
    begun = time.monotonic()
    body: dict[str, Any] = {"ignore_eos": True, "return_tokens_as_token_ids": True}
    if extra:
        body["vllm_xargs"] = extra
    if whole:
        body["prompt_logprobs"] = 0
    answer = server.client.completions.create(
        model="tiny", prompt=prompt, max_tokens=tokens, temperature=1.0, logprobs=0, extra_body=body
    )
    choice = answer.choices[0]
    rows = (choice.model_extra or {}).get("prompt_logprobs") or [None]
    return Reply(
        prompt,
        [int(token.removeprefix("token_id:")) for token in choice.logprobs.tokens],
        [row[str(token)]["logprob"] for row, token in zip(rows[1:], prompt[1:])],
        list(choice.logprobs.token_logprobs),
        begun,
        time.monotonic(),
    )


def gap(model: Any, reply: Reply, profile: Any, T: float = 1.0) -> float:
    """The largest difference between a reply's log probabilities and those of one process."""
    ids = torch.tensor([[*reply.prompt, *reply.written]])
    with nullcontext() if profile is None else tempered(model, profile), torch.no_grad():
        logits = model(ids).logits[0, :-1].float()
    cut = len(reply.prompt) - 1
    logits[cut:] /= T  # vLLM gives those of a prompt as the model has them
    wanted = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    got = torch.tensor([*reply.prompt_scores, *reply.scores])
    return float((wanted[-len(got) :] - got).abs().max())


@pytest.mark.parametrize("form", FORMS)
def test_two_nodes_are_one_process(cluster, tiny, tmp_path, form):
    """Profile, named profiles, rooms, policies, a swap under load; then a node dies in a swap."""
    directory, model, tokenizer = tiny
    profiles = {"own": per_layer(model), "one": per_head(model, 1), "two": per_head(model, 2)}
    paths = {name: made.save(tmp_path / f"{name}.json") for name, made in profiles.items()}
    arguments = [
        *("--profile", str(paths["own"]), "--named", f"one={paths['one']}"),
        *("--named", f"two={paths['two']}", "--max-num-seqs", "8"),
        *("--distributed-executor-backend", "ray", FORMS[form], "2"),
    ]
    prompts = [tokenizer(text).input_ids[:24] for text in TEXTS]
    environment = {**cluster.environment, "RAY_CPU_RESOURCE": form}
    with (
        cluster.joined_by(form, {}) as second,
        serving(directory, tmp_path, *arguments, environment=environment) as server,
    ):
        _check_profiles(server, model, prompts, profiles)
        _check_layers(server)
        other = per_head(model, 3)
        _check_swap_under_load(server, model, prompts, profiles, other)
        alien = {**other.to_json(), "model": {"architecture": "GPT2LMHeadModel"}}
        with pytest.raises((ProfileError, ValueError), match="made for GPT2LMHeadModel"):
            swap_remote(server.url, type(other).from_json(alien), KEY)
        assert active_profile(server.url, KEY) == digest(other)
        _check_a_node_that_dies(server, second, prompts[0], waiting=form == "pipeline")


def _check_profiles(
    server: Running, model: Any, prompts: list[list[int]], profiles: dict[str, Any]
) -> None:
    """Side by side in one batch, twice, so that the prefix cache is used."""
    assert active_profile(server.url, KEY) == digest(profiles["own"])
    cases: list[tuple[dict[str, Any], Any, float]] = [
        ({}, profiles["own"], 1.0),
        ({"tempering_profile": "one"}, profiles["one"], 1.0),
        ({"tempering_profile": "two"}, profiles["two"], 1.0),
        (
            {"tempering_profile": "two", "tempering_room": -1.5},
            profiles["two"].scaled(-1.5),
            1.0,
        ),
        ({"tempering": "constant(0.6)"}, profiles["own"], 0.6),
        (
            {"tempering_profile": "one", "tempering": "constant(1.7)"},
            profiles["one"],
            1.7,
        ),
    ]
    for whole in (True, False):
        with ThreadPoolExecutor(len(cases)) as pool:
            for prompt in prompts[:2]:
                asked = [pool.submit(ask, server, prompt, 4, case[0], whole) for case in cases]
                for (extra, profile, T), reply in zip(cases, asked, strict=True):
                    found = reply.result(PATIENCE)
                    assert gap(model, found, profile, T) < CLOSE, extra
                    assert len(found.prompt_scores) == (len(prompt) - 1 if whole else 0)
                    assert gap(model, found, None, T) > 100 * CLOSE  # so none of them is idle


def _check_layers(server: Running) -> None:
    """All layers with all heads, whichever worker holds them."""
    import httpx

    answer = httpx.get(
        f"{server.url}/v1/tempering/layers",
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=PATIENCE,
    ).json()
    assert answer["depth"] == 4
    assert answer["layers"] == [[f"model.layers.{i}.self_attn.attn", 4, 2] for i in range(4)]


def _check_swap_under_load(
    server: Running, model: Any, prompts: list[list[int]], profiles: dict[str, Any], other: Any
) -> None:
    """Every reply is wholly of the old or the new profile, and the new one rules from then on."""
    old, ended = profiles["own"], threading.Event()
    loads: list[dict[str, Any]] = [
        {},
        {},
        {"tempering": "constant(0.6)"},
        {"tempering_profile": "one"},
    ]
    replies: list[list[Reply]] = [[] for _ in loads]
    deadline = time.monotonic() + PATIENCE

    def load(which: int) -> None:
        turn = which
        while not ended.is_set() and time.monotonic() < deadline:
            prompt = prompts[turn % len(prompts)][: 8 + turn % 16]
            replies[which].append(ask(server, prompt, 6, loads[which]))
            turn += 1

    with ThreadPoolExecutor(len(loads)) as pool:
        running = [pool.submit(load, which) for which in range(len(loads))]
        try:
            _until(lambda: all(replies), running)
            begun = time.monotonic()
            assert swap_remote(server.url, other, KEY) == digest(other)
            swapped = time.monotonic()
            _until(lambda: all(own[-1].begun > swapped for own in replies), running)
        finally:
            ended.set()
        for each in running:
            each.result(PATIENCE)
    for extra, own in zip(loads, replies, strict=True):
        T = 0.6 if "tempering" in extra else 1.0
        for reply in own:
            if "tempering_profile" in extra:
                assert gap(model, reply, profiles["one"], T) < CLOSE
                continue
            under = {
                name
                for name, profile in (("old", old), ("new", other))
                if gap(model, reply, profile, T) < CLOSE
            }
            assert len(under) == 1, (extra, under)
            if reply.ended < begun or reply.begun > swapped:
                assert under == {"old" if reply.ended < begun else "new"}


def _until(condition: Any, running: list[Any]) -> None:
    """AssertionError unless something happens in time; an error of the load is raised here."""
    for _ in range(int(10 * PATIENCE)):
        if condition():
            return
        for each in running:
            if each.done():
                each.result()
        time.sleep(0.1)
    raise AssertionError("the load made no progress")


def _check_a_node_that_dies(server: Running, node: Node, ids: list[int], waiting: bool) -> None:
    """Whoever swapped is told in time, and nobody is told that a profile is in use.

    waiting: the node dies while the swap waits for a request, else in a call to all workers.
    """
    from openai import APIError

    errors: list[Exception] = []
    parts: Iterator[Any] | None = None
    if waiting:
        body = {"ignore_eos": True}
        stream = server.client.completions.create(
            model="tiny", prompt=ids, max_tokens=480, temperature=0.0, stream=True, extra_body=body
        )
        parts = iter(stream)
        next(parts)  # a request is in flight
    else:
        node.signal(signal.SIGSTOP)  # so that its worker doesn't answer before it dies

    def swap() -> None:
        try:
            swap_remote(server.url, None, KEY)
        except RefusedError as error:
            errors.append(error)

    thread = threading.Thread(target=swap)
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    node.kill()
    begun = time.monotonic()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "the swap waits for ever"
    print(f"the swap ended {time.monotonic() - begun:.1f} s after the node: {errors}")
    assert len(errors) == 1
    message = str(errors[0])
    assert "vLLM's engine has ended" in message or (not waiting and "timed out" in message), message
    if parts is not None:
        with pytest.raises(APIError):  # the request that was in flight is told as well
            for _ in parts:
                pass
    server.process.wait(PATIENCE)
    with pytest.raises(RefusedError, match="no server answers"):
        active_profile(server.url, KEY)
