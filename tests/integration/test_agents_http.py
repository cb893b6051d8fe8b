"""Engines over HTTP against a real server: faults, retries, keys, and what is sent."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from typing import Any

import pytest

from tempering.agents.contract import Call, EngineError, Reply, StageError, never, no_progress
from tempering.agents.plan import Plan, Stage
from tempering.agents.run import run_plan
from tempering.engines.providers import Backoff, provider
from tempering.errors import InputError, TemperatureError
from tempering.evaluation.journal import Journal
from tempering.reports import Record
from tests.integration.agents_server import at_random, serving

FAST = Backoff(retries=12, first=0.01, most=0.05)
SECRET = "sk-very-secret-0123456789"


def engine(address: str, *, model: str = "m", backoff: Backoff = FAST, **options: Any) -> Any:
    made = provider(f"{address}/v1", model, **options)
    made.backoff = backoff
    return made


def plan(width: int, prompt: str = "{task}") -> Plan:
    return Plan((Stage("explore", width, (1.0, 0.0), prompt, tokens=20),))


def call(index: int = 0, **options: Any) -> Call:
    return Call(f"k{index}", f"prompt {index}", 0.5, 10, index, **options)


def replies(made: Any, calls: list[Call]) -> dict[int, Reply]:
    found: dict[int, Reply] = {}

    def done(index: int, reply: Reply) -> None:
        assert index not in found, "a call was answered twice"
        found[index] = reply

    made.run(calls, done, no_progress, never)
    return found


def test_a_thousand_calls_of_a_failing_server_none_lost_none_doubled(tmp_path):
    ledger, faults = Journal(tmp_path, "throb", {}), at_random(seed=1, share=0.3)

    def fault(entry: dict[str, Any]) -> Any:
        # The reply then says whose it is.
        entry["body"]["messages"][-1]["content"] += f" {entry['body']['seed']}"
        return faults(entry)

    # A timeout that only the slow replies miss, also on a busy machine.
    with serving(fault, slow=8.0) as (address, log):
        made = engine(address, concurrency=48, timeout=5.0)
        outcome = run_plan(plan(1000), "say it", made, ledger=ledger)
    Record.new("throb", settings={}, results={"stages": outcome.stages}).save(tmp_path / "r.json")
    (row,) = Record.load(tmp_path / "r.json").results["stages"]
    workers = row["workers"]
    assert [worker["worker"] for worker in workers] == list(range(1, 1001))
    assert all(worker["error"] is None for worker in workers)
    assert all(worker["output"] == f"echo: say it {worker['seed']}" for worker in workers)
    assert len({worker["seed"] for worker in workers}) == 1000
    # Bounded, and every request is accounted for.
    attempts = [worker["attempts"] for worker in workers]
    assert min(attempts) >= 1 and max(attempts) <= FAST.retries + 1
    assert 1000 < len(log.requests) <= sum(attempts)
    # Tries of one call share a name, calls don't; the server met all kinds of faults.
    names = Counter(entry["headers"]["idempotency-key"] for entry in log.requests)
    assert len(names) == 1000 and max(names.values()) <= max(attempts)
    assert len({str(entry["fault"]) for entry in log.requests}) == 9
    # The journal on disk holds the same.
    ledger.close()
    assert len(Journal(tmp_path, "throb", {}).entries) == 1000


def test_what_stays_broken_fails_alone_and_bounded(tmp_path):
    def fault(entry: dict[str, Any]) -> Any:
        odd = entry["body"]["seed"] % 2
        return (500, {}, '{"error": {"message": "no"}}') if odd else None

    calls = [call(i) for i in range(20)]
    with serving(fault) as (address, log):
        found = replies(engine(address, backoff=Backoff(2, 0.01, 0.02)), calls)
    assert sorted(found) == list(range(20))
    for index, reply in found.items():
        if index % 2:
            assert reply.output is None and reply.attempts == 3
            assert reply.error is not None and "HTTP 500" in reply.error
            assert "after 3 tries" in reply.error
        else:
            assert reply.output == f"echo: prompt {index}" and reply.attempts == 1
    assert len(log.requests) == 10 + 10 * 3


@pytest.mark.parametrize(
    ("wanted", "reason", "tries"),
    [
        ((429, {"Retry-After": "0.01"}, "{}"), "HTTP 429", 3),
        ((400, {}, '{"error": {"message": "bad seed"}}'), "HTTP 400.*bad seed", 1),
        ((401, {}, '{"error": {"message": "no key"}}'), "HTTP 401", 1),
        ((429, {"Retry-After": "9999"}, "{}"), "HTTP 429", 1),
        ("cut", "Connection|Protocol|incomplete|peer", 3),
        ("malformed", "malformed reply", 3),
        ("shape", "malformed reply: no choices", 3),
        ("slow", "timed out", 3),
    ],
)
def test_each_kind_of_fault_by_itself(wanted, reason, tries):
    with serving(lambda entry: wanted) as (address, log):
        timeout = 0.2 if wanted == "slow" else 20.0
        made = engine(address, backoff=Backoff(2, 0.01, 0.02), timeout=timeout)
        (reply,) = replies(made, [call()]).values()
    assert reply.attempts == tries == len(log.requests)
    assert reply.error is not None
    assert re.search(reason, reply.error), reply.error


def test_retry_after_is_waited_for():
    stamps = []

    def fault(entry: dict[str, Any]) -> Any:
        stamps.append(time.monotonic())
        return (429, {"Retry-After": "0.3"}, "{}") if len(stamps) == 1 else None

    with serving(fault) as (address, _):
        (reply,) = replies(engine(address), [call()]).values()
    assert reply.error is None and reply.attempts == 2
    assert stamps[1] - stamps[0] >= 0.3


def test_concurrency_is_bounded():
    now, most = [0], [0]
    lock = threading.Lock()

    def fault(entry: dict[str, Any]) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.02)
        with lock:
            now[0] -= 1

    with serving(fault) as (address, _):
        replies(engine(address, concurrency=3), [call(i) for i in range(30)])
    assert 2 <= most[0] <= 3


def test_a_stage_whose_workers_all_fail_keeps_what_was_paid(tmp_path):
    execute = Stage("execute", 1, (0.0, 0.0), "{notes}!")
    two = Plan((Stage("explore", 3, (1.0, 0.0), "{task}"), execute))
    ledger = Journal(tmp_path, "throb", {})

    def fault(entry: dict[str, Any]) -> Any:
        text = entry["body"]["messages"][-1]["content"]
        return (400, {}, '{"error": {"message": "not this"}}') if "!" in text else None

    with serving(fault) as (address, log):
        with pytest.raises(StageError, match=r"all 1 workers of stage 'execute'.*not this.*resume"):
            run_plan(two, "go", engine(address), ledger=ledger)
        assert len(log.requests) == 4
    ledger.close()
    kept = Journal(tmp_path, "throb", {})
    assert [kept[f"1/explore/{i}"]["output"] for i in (1, 2, 3)] == ["echo: go"] * 3
    # Resumed with the cause mended, only the failed stage is paid for again.
    with serving() as (address, log):
        outcome = run_plan(two, "go", engine(address), ledger=kept)
    kept.close()
    assert len(log.requests) == 1
    assert outcome.answer is not None and outcome.answer.startswith("echo: [1] echo: go")


def test_a_stop_keeps_what_is_under_way_and_starts_nothing_new():
    done_calls: dict[int, Reply] = {}
    with serving(lambda entry: threading.Event().wait(0.05)) as (address, log):
        made = engine(address, concurrency=2)
        made.run([call(i) for i in range(40)], done_calls.__setitem__, no_progress,
                 lambda: len(done_calls) >= 4)  # fmt: skip
        served = len(log.requests)
    assert 4 <= len(done_calls) < 40
    assert served == len(done_calls), "what was sent was paid for, and must be kept"
    assert all(reply.error is None for reply in done_calls.values())


def test_an_error_while_keeping_lets_the_others_finish():
    found = []

    def done(index: int, reply: Reply) -> None:
        found.append(index)
        if len(found) == 1:
            raise InputError("no room")

    with serving() as (address, log):
        with pytest.raises(InputError, match="no room"):
            engine(address, concurrency=4).run(
                [call(i) for i in range(50)], done, no_progress, never
            )
        assert len(found) == len(log.requests) < 50


def test_inside_a_running_event_loop():
    import asyncio

    async def notebook(made: Any) -> dict[int, Reply]:
        return replies(made, [call(i) for i in range(3)])

    with serving() as (address, _):
        assert len(asyncio.run(notebook(engine(address)))) == 3


def test_no_key_in_error_or_description_and_replies_as_they_came(monkeypatch):
    monkeypatch.setenv("TEMPERING_SERVER_KEY", SECRET)

    def fault(entry: dict[str, Any]) -> Any:
        if entry["body"]["seed"] == 1:
            return 401, {}, json.dumps({"error": {"message": f"bad key {SECRET}"}})
        entry["body"]["messages"][-1]["content"] += " " + entry["headers"]["authorization"]
        return None

    with serving(fault) as (address, log):
        made = engine(address)
        found = replies(made, [call(0), call(1)])
    assert log.requests[0]["headers"]["authorization"] == f"Bearer {SECRET}"
    # What a model says is never rewritten.
    assert found[0].output == f"echo: prompt 0 Bearer {SECRET}"
    assert found[1].error == "HTTP 401: bad key [TEMPERING_SERVER_KEY]"
    assert SECRET not in repr(made.describe())


def test_another_server_is_never_given_the_key_of_openai(monkeypatch):
    monkeypatch.delenv("TEMPERING_SERVER_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serving() as (address, log):
        replies(engine(address), [call()])
    assert SECRET not in json.dumps(log.requests)


def test_openai_sends_what_the_table_says(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    one = call(top_p=0.9, system="be brief", stop="\n")
    with serving() as (address, log):
        monkeypatch.setenv("OPENAI_BASE_URL", f"{address}/v1")
        for model, policy in (("gpt-4.1", "strict"), ("gpt-5.4", "strict"), ("o3", "clamp"),
                              ("gpt-6-sol", "omit")):  # fmt: skip
            (reply,) = replies(provider("openai", model, policy=policy), [one]).values()
            assert reply.error is None and (reply.tokens_in, reply.tokens_out) == (7, 5)
    bodies = log.bodies
    assert [body.get("temperature") for body in bodies] == [0.5, 0.5, 1, None]
    assert [body.get("seed") for body in bodies] == [0, None, None, None]
    assert [body.get("reasoning_effort") for body in bodies] == [None, "none", None, None]
    assert [body.get("top_p") for body in bodies] == [0.9, 0.9, None, None]
    assert [body.get("stop") for body in bodies] == ["\n", None, None, None]
    for body in bodies:
        assert body["max_completion_tokens"] == 10 and "max_tokens" not in body
        assert [turn["role"] for turn in body["messages"]] == ["system", "user"]


def test_anthropic_sends_what_the_table_says(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", SECRET)
    with serving() as (address, log):
        monkeypatch.setenv("ANTHROPIC_BASE_URL", address)
        warm = call(system="be brief", stop="\n")
        (reply,) = replies(provider("anthropic", "claude-haiku-4-5"), [warm]).values()
        new = provider("anthropic", "claude-opus-5-5", policy="omit")
        (omitted,) = replies(new, [call()]).values()
    assert reply.output == "echo: prompt 0" and reply.temperature_sent == 0.5
    assert omitted.temperature_sent is None
    assert omitted.note == "temperature left out: the model takes none"
    first, second = log.bodies
    assert first["temperature"] == 0.5 and first["max_tokens"] == 10
    assert first["system"] == "be brief" and "stop_sequences" not in first
    assert "temperature" not in second
    headers = log.requests[0]["headers"]
    assert headers["x-api-key"] == SECRET and headers["anthropic-version"] == "2023-06-01"


def test_gemini_sends_what_the_table_says(monkeypatch):
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    monkeypatch.setenv("GEMINI_API_KEY", SECRET)
    with serving(at_random(seed=3, share=0.3)) as (address, log):
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", address)
        made = provider("gemini", "gemini-3-flash-preview", timeout=20.0)
        made.backoff = FAST
        found = replies(made, [call(i, stop="\n") for i in range(20)])
    assert [found[i].output for i in range(20)] == [f"echo: prompt {i}" for i in range(20)]
    assert found[0].note == "the provider advises 1"
    config = log.bodies[0]["generationConfig"]
    assert config["temperature"] == 0.5 and config["maxOutputTokens"] == 10
    assert config["stopSequences"] == ["\n"] and "seed" in config


def test_strict_refuses_before_anything_is_sent(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", SECRET)
    with serving() as (address, log):
        monkeypatch.setenv("ANTHROPIC_BASE_URL", address)
        with pytest.raises(TemperatureError, match="claude-opus-4-8 takes no temperature.*omit"):
            run_plan(plan(2), "go", provider("anthropic", "claude-opus-4-8"))
        assert not log.requests


def test_attention_goes_to_servers_that_read_it_only():
    warm = [call(i, attention="constant(1.1)") for i in range(2)]

    def plugin(entry: dict[str, Any]) -> Any:
        text = entry["body"].get("vllm_xargs", {}).get("tempering_profile")
        known = text is None or text.startswith("constant")
        return None if known else (400, {}, '{"error": {"message": "no pattern"}}')

    with serving(plugin) as (address, log):
        made = provider(f"vllm:{address}/v1", "m")
        assert all(reply.error is None for reply in replies(made, warm).values())
        sent = [body["vllm_xargs"]["tempering_profile"] for body in log.bodies]
        assert sent.count("constant(1.1)") == 2 and len(sent) == 3
    with serving() as (address, log):
        with pytest.raises(EngineError, match="ignores attention patterns"):
            replies(provider(f"vllm:{address}/v1", "m"), warm)
        assert len(log.requests) == 1, "nothing but the question was sent"
        with pytest.raises(InputError, match="can't temper attention"):
            replies(engine(address), warm)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("http://user:word@host/v1", "no user, password or query"),
        ("http://host/v1?key=abc", "no user, password or query"),
        ("user:word@host/v1", "no user, password or query"),
        ("http:/user:word@host", "no user, password or query"),
        ("nonsense", "neither local, openai"),
        ("http://host:port/v1", "can't be read"),
    ],
)
def test_addresses_that_are_none(spec, message):
    with pytest.raises(InputError, match=message) as caught:
        provider(spec, "m")
    assert "word@" not in str(caught.value) and "abc" not in str(caught.value)


def test_an_address_of_the_environment_is_checked_and_named(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost:8000/v1")
    with pytest.raises(
        InputError, match="address in OPENAI_BASE_URL .* is not an address.*mean http"
    ):
        provider("openai", "gpt-4.1")


def test_a_missing_key_names_its_variable(monkeypatch):
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        provider("openai", "gpt-4.1")
    with pytest.raises(InputError, match="GEMINI_API_KEY or GOOGLE_API_KEY"):
        provider("gemini", "gemini-2.5-flash")
