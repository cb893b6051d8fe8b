"""Policies by token over HTTP: sent to servers that take them, refused before the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tempering.agents.contract import Call, EngineError, Reply, never, no_progress
from tempering.engines.providers import Backoff, provider
from tempering.errors import InputError
from tests.integration.agents_server import serving


def engine(address: str) -> Any:
    made = provider(f"{address}/v1", "m")
    made.backoff = Backoff(retries=2, first=0.01, most=0.05)
    return made


def call(index: int = 0) -> Call:
    return Call(f"k{index}", f"prompt {index}", 0.5, 10, index)


def replies(made: Any, calls: list[Call]) -> dict[int, Reply]:
    found: dict[int, Reply] = {}
    made.run(calls, found.__setitem__, no_progress, never)
    return found


def refusing_policies(entry: dict[str, Any]) -> Any:
    """A server with tempering: HTTP 400 to a policy that is none."""
    text = entry["body"].get("vllm_xargs", {}).get("tempering", "")
    return (400, {}, '{"error": {"message": "no policy"}}') if text.startswith("no ") else None


def test_a_policy_by_token_goes_to_a_server_that_takes_policies():
    text = "phases(thinking=1, answer=0.2)"
    own = [replace(call(i), temperature=1.0, token_policy=text) for i in range(3)]
    with serving(refusing_policies) as (address, log):
        found = replies(engine(address), [*own, call(3)])
    assert len(found) == 4 and all(reply.output for reply in found.values())
    probe, *bodies = log.bodies
    assert probe["vllm_xargs"] == {"tempering": "no policy at all"}
    asked = sorted(bodies, key=lambda body: body["messages"][0]["content"])
    assert [body.get("vllm_xargs") for body in asked] == [{"tempering": text}] * 3 + [None]
    assert [body["temperature"] for body in asked] == [1, 1, 1, 0.5]


def test_a_server_that_ignores_policies_by_token_is_refused():
    own = replace(call(), temperature=1.0, token_policy="support(8)")
    with serving() as (address, log):
        with pytest.raises(EngineError, match="ignores policies by token .*or give constant"):
            replies(engine(address), [own])
        assert len(log.requests) == 1
    words = "can't ask .* whether it reads policies by token: HTTP 503"
    with (
        serving(lambda entry: (503, {}, "{}")) as (address, _),
        pytest.raises(EngineError, match=words),
    ):
        replies(engine(address), [own])


@pytest.mark.parametrize("spec", ["openai", "anthropic", "gemini"])
def test_providers_with_one_temperature_refuse_policies_before_anything_is_sent(spec, monkeypatch):
    for name in ("OPENAI", "ANTHROPIC", "GEMINI"):
        monkeypatch.setenv(f"{name}_API_KEY", "sk-none")
    model = {"openai": "gpt-4o", "anthropic": "claude-3-haiku", "gemini": "gemini-2.5-flash"}[spec]
    made = provider(spec, model)
    own = replace(call(), temperature=1.0, token_policy="support(8)")
    with pytest.raises(InputError, match=f"{spec} has one temperature for all tokens"):
        made.check([own])
    made.check([replace(own, token_policy=None)])
