"""Servers of one model behind one engine: the one with the fewest requests under way gets the next.

A replica that can't be reached rests, and its calls go on at the others; so one that dies loses
nothing. What differs between replicas is found before the first call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from tempering.agents.contract import EngineError
from tempering.engines.providers.addresses import checked
from tempering.engines.providers.bodies import load, mapping
from tempering.engines.providers.retry import classify
from tempering.engines.providers.transport import (
    HTTPResponse,
    HTTPStatusError,
    NoAnswerError,
    Wire,
    connected,
)
from tempering.engines.vllm.client import PATH
from tempering.errors import InputError
from tempering.files import read_text

# Seconds that a replica which didn't answer gets no calls, where another one can take them.
REST = 10.0


# HTTP statuses that say something of the request, not of the server.
_OF_REQUEST = (400, 413, 422)


def at_fault(error: Exception) -> bool:
    """Whether a failure is the server's own, so that another replica may do better at once."""
    if isinstance(error, HTTPStatusError):
        return error.response.status_code not in _OF_REQUEST
    return isinstance(error, NoAnswerError)


class Replica:
    """One server: its client, its connections, and the requests under way."""

    def __init__(self, client: Any, wire: Wire) -> None:
        self.client, self.wire = client, wire
        self.under_way = 0
        self.rests_until = 0.0

    @property
    def resting(self) -> bool:
        """Whether it failed to answer a moment ago."""
        return time.monotonic() < self.rests_until

    def rest(self) -> None:
        """Leave the next calls to others."""
        self.rests_until = time.monotonic() + REST

    @contextmanager
    def busy(self) -> Iterator[None]:
        """One request is under way."""
        self.under_way += 1
        try:
            yield
        except Exception as error:
            if at_fault(error) or isinstance(error, TimeoutError):
                self.rest()
            raise
        else:
            self.rests_until = 0.0
        finally:
            self.under_way -= 1


class Replicas:
    """The replicas of a run."""

    def __init__(self, every: Sequence[Replica]) -> None:
        self.every = list(every)

    def next(self, after: Replica | None = None) -> Replica:
        """The replica for the next request: one that answers, with the fewest under way.

        after: the one that just failed, which is the last choice among equals.
        """
        return min(self.every, key=lambda each: (each.resting, each is after, each.under_way))

    def another(self, than: Replica) -> bool:
        """Whether a call that this replica didn't answer can go on at another one at once."""
        return any(each is not than and not each.resting for each in self.every)


@asynccontextmanager
async def all_connected(clients: Sequence[Any], concurrency: int) -> AsyncIterator[Replicas]:
    """Connections to all replicas, any of which may take all `concurrency` requests."""
    async with AsyncExitStack() as stack:
        every = []
        for client in clients:
            wire = await stack.enter_async_context(connected(client.address, concurrency))
            every.append(Replica(client, wire))
        yield Replicas(every)


def addresses_in(text: str) -> list[str]:
    """Addresses separated by commas, or one a line in a file of this name; # begins a comment.

    Raises InputError for an address that is none, or is there twice.
    """
    if "," not in text and Path(text).is_file():
        lines = (line.split("#")[0].strip() for line in read_text(text).splitlines())
        found = [checked(line, f"an address in {text}") for line in lines if line]
        if not found:
            raise InputError(f"{text} names no server; write an address a line")
    elif "," in text:
        found = [checked(part.strip()) for part in text.split(",")]
    else:
        return [text]
    twice = next((address for address in found if found.count(address) > 1), None)
    if twice is not None:
        raise InputError(f"the server {twice} is named twice; name each replica once")
    return found


async def check_alike(replicas: Replicas, model: str, timeout: float) -> None:
    """EngineError for replicas that serve other models or profiles than the first, by name.

    model: as calls name it; every replica must list it. Of the attention profile in use the digests
    are compared, which servers of `tempering serve` state. What a server of another name for the
    same weights, or of the same name for other weights, runs can't be seen from outside.
    """
    if len(replicas.every) == 1:
        return
    found = await asyncio.gather(*(_described(each, timeout) for each in replicas.every))
    silent = [why for why, _, _ in found if why is not None]
    if silent:
        raise EngineError(
            f"{len(silent)} of {len(found)} replicas can't be asked what they serve: "
            f"{'; '.join(silent)}. Start them, or leave them out"
        )
    for each, (_, models, profile) in zip(replicas.every, found, strict=True):
        address = each.client.address
        if model not in models:
            raise EngineError(
                f"the replica {address} serves {', '.join(sorted(models)) or 'no model'} and not "
                f"{model}; leave it out, or name a model that all replicas serve"
            )
        if profile != found[0][2]:
            raise EngineError(
                f"the replica {address} serves {profile}, and {replicas.every[0].client.address} "
                f"{found[0][2]}; give all the same (tempering swap PROFILE --url ADDRESS)"
            )


async def _described(each: Replica, timeout: float) -> tuple[str | None, set[str], str]:
    """(why it can't be asked, its models, its attention profile in words)."""
    base = each.client.address.removesuffix("/v1")
    try:
        models = await listed_models(each, timeout)
        try:
            active = (await _got(each, base + PATH, timeout)).get("active")
        except HTTPStatusError as error:
            if error.response.status_code not in (404, 405):
                raise
            return None, models, "attention profiles not at all"
    except Exception as error:
        return f"{each.client.address}: {classify(error).reason}", set(), ""
    return None, models, f"the attention profile {active}"


async def listed_models(each: Replica, timeout: float) -> set[str]:
    """The names of the models that a server lists."""
    listed = await _got(each, f"{each.client.address}/models", timeout)
    return {str(mapping(item).get("id")) for item in listed.get("data") or ()}


async def _got(each: Replica, url: str, timeout: float) -> Mapping[str, Any]:
    async with asyncio.timeout(timeout):
        response: HTTPResponse = await each.wire.get(url, each.client.headers())
    return mapping(load(response.content))
