"""OpenAI, and servers that speak its chat interface: vLLM, llama.cpp, Ollama and others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from tempering.agents.contract import Call
from tempering.agents.temperatures import Sent
from tempering.engines.providers.keys import key_of
from tempering.engines.providers.remote import Completion, Session
from tempering.engines.providers.retry import MalformedError
from tempering.errors import InputError, MissingExtraError

# A server of `tempering serve` has profiles by name (--named); a call's attention names one.
ATTENTION_ARGUMENT = "tempering_profile"


class OpenAICompatible:
    """A client of OpenAI, or of the server at `url`.

    url: e.g. http://localhost:8000/v1. attention: the server has tempering's plugin.
    """

    def __init__(self, url: str | None = None, *, attention: bool = False) -> None:
        self.provider = "openai" if url is None else "server"
        self.has_attention = attention
        self.spec = "openai" if url is None else ("vllm:" if attention else "") + _checked(url)
        self.url = url
        self.key = key_of(self.provider)

    @asynccontextmanager
    async def open(self, timeout: float) -> AsyncIterator[Session]:
        """Connect, with the SDK's own retries off."""
        try:
            from openai import AsyncOpenAI
        except ImportError:
            raise MissingExtraError("openai", "agents") from None
        options: dict[str, Any] = {} if self.url is None else {"base_url": self.url}
        # The SDK insists on a key; servers of one's own mostly ignore it.
        key = self.key if self.key is not None else "none"
        async with AsyncOpenAI(api_key=key, max_retries=0, timeout=timeout, **options) as sdk:
            yield _Session(sdk, self.provider == "openai")


class _Session:
    def __init__(self, sdk: Any, official: bool) -> None:
        self.sdk = sdk
        # OpenAI's reasoning models refuse max_tokens, older servers know nothing else.
        self.limit = "max_completion_tokens" if official else "max_tokens"

    async def send(self, call: Call, sent: Sent, model: str, seed: bool, name: str) -> Completion:
        messages = [{"role": "user", "content": call.prompt}]
        if call.system is not None:
            messages.insert(0, {"role": "system", "content": call.system})
        body: dict[str, Any] = {self.limit: call.tokens, **sent.extra}
        for field, value in (
            ("temperature", sent.temperature),
            ("top_p", sent.top_p),
            ("seed", call.seed if seed else None),
            ("stop", call.stop),
        ):
            if value is not None:
                body[field] = value
        if call.attention is not None:
            body["vllm_xargs"] = {ATTENTION_ARGUMENT: call.attention}
        reply = await self.sdk.chat.completions.create(
            model=model,
            messages=messages,
            extra_body=body,
            extra_headers={"Idempotency-Key": name},
        )
        try:
            choice = reply.choices[0]
            text, usage = choice.message.content, reply.usage
            return Completion(
                _text(text), usage.prompt_tokens, usage.completion_tokens, choice.finish_reason
            )
        except (AttributeError, TypeError, IndexError, KeyError) as error:
            raise MalformedError(f"no choices or no usage in the reply ({error})") from None


def _text(value: Any) -> str:
    """The content; a reply may have none, e.g. where thinking used up all tokens."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise MalformedError(f"the content is no text but {type(value).__name__}")
    return value


def _checked(url: str) -> str:
    """The address, without anything in it that may be a key."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise InputError(f"the engine's address can't be read: {error}") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError(
            "an engine's address holds no user, password or query; put the key into the "
            "environment variable TEMPERING_SERVER_KEY"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(
            f"the engine {url!r} is neither local, openai, anthropic, gemini nor an address such "
            "as http://localhost:8000/v1"
        )
    return url
