"""Log probabilities of prompts from an OpenAI-compatible server: /completions with `echo`.

Prompts go as token ids, so that the server's tokenizer has no say; a server that takes texts alone
is sent those, and the tokens that it echoes are compared with the ones that were meant.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Sequence
from typing import Any

from tempering.engines.providers.addresses import checked
from tempering.engines.providers.bodies import count, first, mapping
from tempering.engines.providers.keys import key_of
from tempering.engines.providers.remote import RemoteEngine
from tempering.engines.providers.replies import MalformedError, opened
from tempering.engines.providers.retry import Backoff, classify
from tempering.engines.providers.transport import HTTPStatusError, NoAnswerError, Wire, connected
from tempering.errors import InputError, RefusedError

_NO_IDS = re.compile(r"string|text|str\b|type", re.IGNORECASE)


class EchoServer:
    """A server that says how likely it finds each token of a prompt.

    url: e.g. http://localhost:8000/v1. model: its name there. tokenizer: of the model that it
    should serve. timeout: seconds for one request. backoff: how often to try again, and when.
    """

    precision: str | None = None

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: Any,
        *,
        timeout: float = 120.0,
        backoff: Backoff | None = None,
    ) -> None:
        self.name = self.address = checked(url)
        self.model, self.tokenizer, self.timeout = model, tokenizer, timeout
        self.backoff = Backoff() if backoff is None else backoff
        self.key = key_of("server")
        self.takes_ids = True

    def logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float | None]]:
        """log q of every token of every prompt, nats; None for the first.

        Raises RefusedError for a server that doesn't answer, gives none, cuts or lengthens the
        prompt; InputError for one with another tokenizer, which shows the first other token.
        """
        found: list[list[list[float | None]]] = []
        RemoteEngine.blocking(lambda: found.append(asyncio.run(self._all(prompts))))
        return found[0]

    async def _all(self, prompts: Sequence[Sequence[int]]) -> list[list[float | None]]:
        async with connected(self.address, 1) as wire:
            return [await self._one(wire, list(ids)) for ids in prompts]

    async def _one(self, wire: Wire, ids: list[int]) -> list[float | None]:
        prompt = ids if self.takes_ids else self._text(ids)
        body = {
            "model": self.model,
            "prompt": prompt,
            "echo": True,
            "logprobs": 1,
            "max_tokens": 1,  # some servers refuse 0
            "temperature": 0,
        }
        try:
            payload = await self._asked(wire, body)
        except _RefusedIdsError:
            self.takes_ids = False
            return await self._one(wire, ids)
        return self._read(payload, ids)

    async def _asked(self, wire: Wire, body: dict[str, Any]) -> dict[str, Any]:
        headers = {} if self.key is None else {"authorization": f"Bearer {self.key}"}
        rng, attempt = random.Random(0), 0
        while True:
            attempt += 1
            try:
                async with asyncio.timeout(self.timeout):
                    response = await wire.post(f"{self.address}/completions", headers, body)
                return opened(response)
            except (HTTPStatusError, NoAnswerError, MalformedError, TimeoutError) as error:
                failure = classify(error)
                status = getattr(getattr(error, "response", None), "status_code", None)
                if status in (400, 422) and self.takes_ids and _NO_IDS.search(failure.reason):
                    raise _RefusedIdsError from error
                wait = self.backoff.wait(attempt, failure, rng)
                if wait is None:
                    raise RefusedError(f"{self.address}: {failure.reason}") from error
                await asyncio.sleep(wait)

    def _text(self, ids: list[int]) -> str:
        text = str(self.tokenizer.decode(ids))
        if self.tokenizer(text, add_special_tokens=False).input_ids != ids:
            raise RefusedError(
                f"{self.address} takes texts and no token ids, and the reference's tokenizer "
                "doesn't read a prompt's text back as its tokens; cut the text elsewhere"
            )
        return text

    def _read(self, payload: dict[str, Any], ids: list[int]) -> list[float | None]:
        choice = first(payload.get("choices"))
        found = mapping(choice.get("logprobs"))
        values, tokens = found.get("token_logprobs"), found.get("tokens")
        if not isinstance(values, list) or not isinstance(tokens, list):
            raise RefusedError(
                f"{self.address} gives no log probabilities of its prompt (choices[0].logprobs."
                "token_logprobs, asked for with echo and logprobs); some servers need an option "
                "for it. llama.cpp's own server has none: give --engine llamacpp"
            )
        written = count(mapping(payload.get("usage")).get("completion_tokens"))
        read = len(values) - (1 if written is None else written)
        shown = [self.tokenizer.decode([token]) for token in ids]
        if read <= 1:
            raise RefusedError(
                f"{self.address} gives the log probabilities of what it wrote and not of its "
                f"prompt ({len(values)} for {len(ids)} tokens): it ignores `echo`"
            )
        if read > len(ids):
            more = [str(token) for token in tokens[: read - len(ids)]]
            raise RefusedError(
                f"{self.address} read {read} tokens where {len(ids)} were sent: it puts "
                f"{', '.join(map(repr, more))} before the prompt (a BOS?); tell the server not to, "
                "or send prompts that begin with it"
            )
        for place, (token, own) in enumerate(zip(tokens[:read], shown, strict=False)):
            if _plain(token) and _plain(own) and str(token).strip() != own.strip():
                raise InputError(
                    f"{self.address} has another tokenizer than the reference: token {place} is "
                    f"{str(token)!r} there and {own!r} here; name the model that it serves"
                )
        if read < len(ids):
            raise RefusedError(
                f"{self.address} read {read} of {len(ids)} tokens: it cuts prompts; give shorter "
                f"ones (--chunk {read})"
            )
        return [_number(value) for value in values[:read]]


class _RefusedIdsError(Exception):
    """The server takes no token ids."""


def _plain(token: Any) -> bool:
    """Whether servers agree on how to write a token: no parts of characters, no special ones."""
    return isinstance(token, str) and token.strip().isascii() and token.strip().isalnum()


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
