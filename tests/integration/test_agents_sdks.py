"""The requests are those of the providers' own SDKs, but for what they would do unasked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tempering.agents.contract import Call, never, no_progress
from tempering.engines.providers import provider
from tests.integration.agents_server import serving

KEY = "sk-0123456789-abcdef"
CALL = Call("k", "hi", 0.5, 40, 7, system="be brief", top_p=0.9, stop="END")


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)


def ours(spec: str, model: str, call: Call = CALL) -> None:
    provider(spec, model, policy="omit").run([call], lambda index, reply: None, no_progress, never)


def test_openai(monkeypatch):
    openai = pytest.importorskip("openai")
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    with serving() as (address, log):
        monkeypatch.setenv("OPENAI_BASE_URL", f"{address}/v1")
        ours("openai", "gpt-4.1")
        with openai.OpenAI() as sdk:
            sdk.chat.completions.create(
                model="gpt-4.1", messages=turns, max_completion_tokens=40, temperature=0.5,
                top_p=0.9, seed=7, stop="END",
            )  # fmt: skip
    assert_same(*log.requests, "authorization")


def test_anthropic(monkeypatch):
    anthropic = pytest.importorskip("anthropic")
    with serving() as (address, log):
        monkeypatch.setenv("ANTHROPIC_BASE_URL", address)
        ours("anthropic", "claude-haiku-4-5")
        with anthropic.Anthropic() as sdk:
            sdk.messages.create(
                model="claude-haiku-4-5", max_tokens=40, system="be brief", stop_sequences=["END"],
                messages=[{"role": "user", "content": "hi"}], extra_body={"temperature": 0.5},
            )  # fmt: skip
    assert_same(*log.requests)
    # The version that the SDK chooses may take no temperature.
    assert log.requests[0]["headers"]["anthropic-version"] == "2023-06-01"


def test_gemini(monkeypatch):
    genai = pytest.importorskip("google.genai")
    with serving() as (address, log):
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", address)
        ours("gemini", "gemini-3-flash")
        config = genai.types.GenerateContentConfig(
            max_output_tokens=40, temperature=0.5, top_p=0.9, seed=7, stop_sequences=["END"],
            system_instruction="be brief",
        )  # fmt: skip
        sdk = genai.Client(api_key=KEY, http_options=genai.types.HttpOptions(base_url=address))
        sdk.models.generate_content(model="gemini-3-flash", contents="hi", config=config)
        sdk.close()
    assert_same(*log.requests, "x-goog-api-key")


def assert_same(own: dict[str, Any], sdks: dict[str, Any], *headers: str) -> None:
    assert own["path"] == sdks["path"].split("?")[0]
    assert own["body"] == sdks["body"], json.dumps([own["body"], sdks["body"]])
    for name in ("content-type", *headers):
        assert own["headers"][name] == sdks["headers"][name]
