"""The engine over HTTP: concurrency, retries, timeouts, policy, and what is kept of a reply."""

from __future__ import annotations

import asyncio
import random
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from tempering.agents.contract import Call, Done, EngineError, Progress, Reply, Stop
from tempering.agents.temperatures import ProviderRule, Sent
from tempering.engines.providers.keys import redacted
from tempering.engines.providers.reasons import cut, plain
from tempering.engines.providers.replicas import (
    Replica,
    Replicas,
    all_connected,
    at_fault,
    check_alike,
)
from tempering.engines.providers.replies import Completion, MalformedError
from tempering.engines.providers.retry import Backoff, Failure, classify
from tempering.engines.providers.transport import HTTPResponse, NoAnswerError
from tempering.errors import InputError
from tempering.files import whole_characters

# What a server that tempers attention, or tokens, answers 400 to.
NO_PATTERN, NO_POLICY = "no pattern at all", "no policy at all"
_PROBE = Call("probe", "Say hello.", None, 1, 0)


@runtime_checkable
class Client(Protocol):
    """The form of one provider's requests and replies.

    spec: the provider's name on the command line. address: of the server, without the path of one
    kind of call. has_policies: whether its server may take policies by token.
    """

    provider: str
    spec: str
    address: str
    has_attention: bool
    has_policies: bool

    def url(self, model: str) -> str:
        """The address of calls."""

    def headers(self) -> dict[str, str]:
        """Key and version, and nothing that belongs to another provider."""

    def body(self, call: Call, sent: Sent, model: str, seed: bool) -> dict[str, Any]:
        """The request."""

    def amend(self, body: dict[str, Any], reason: str) -> bool:
        """Whether a request that was refused for this reason has another form of the same meaning.

        Later requests then have that form.
        """

    def read(self, response: HTTPResponse) -> Completion:
        """The content of a reply; MalformedError or HTTPStatusError where it has none."""


class RemoteEngine:
    """Runs calls on a provider, several at once; a failed one is tried again where that may help.

    Parameters
    ----------
    clients: the provider, or several servers of the same model; each call goes to the one with the
        fewest under way (see `replicas`). model: name of the model at the provider.
    rule: the model's row in the table of temperatures. policy: strict, clamp or omit.
    concurrency: requests at once, of all servers together. timeout: seconds for one try.
    backoff: how often to try again, and when.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        model: str,
        rule: ProviderRule,
        *,
        policy: str = "strict",
        concurrency: int = 8,
        timeout: float = 120.0,
        backoff: Backoff | None = None,
    ) -> None:
        if concurrency < 1 or not timeout > 0:
            raise InputError(
                f"concurrency is 1 or more and a timeout above 0; got {concurrency} and {timeout:g}"
            )
        self.clients = list(clients)
        self.name = self.clients[0].provider
        self.model = model
        self.has_attention = self.clients[0].has_attention
        self._met = False
        self.rule = rule
        self.policy = policy
        self.concurrency = concurrency
        self.timeout = timeout
        self.backoff = Backoff() if backoff is None else backoff

    def temperature(self, normalised: float) -> float:
        """The sampling temperature that 0 (cold) to 1 (hot) stands for on this model."""
        return self.rule.temperature(normalised)

    def check(self, calls: Sequence[Call]) -> None:
        """Raise the error for a call that the policy refuses, before anything is sent."""
        for call in calls:
            self._sent(call)
            if call.attention is not None and not self.has_attention:
                raise InputError(
                    f"{call.key}: the engine {self.name} can't temper attention; use the engine "
                    "local, or vllm:URL with a server that tempering serves"
                )
            if call.token_policy is not None and not self.clients[0].has_policies:
                raise InputError(
                    f"{call.key}: {self.clients[0].spec} has one temperature for all tokens of a "
                    "reply (constant(T)); for other policies use the engine local, or the address "
                    "of a server that tempering serves"
                )

    def count(self, call: Call) -> int:
        """An estimate of the prompt's tokens: in most texts a token is 3 bytes or more."""
        return len((call.prompt + (call.system or "")).encode()) // 3 + 16

    def describe(self) -> dict[str, Any]:
        """Settings for the record: never a key."""
        first, *others = self.clients
        many = {"replicas": [client.address for client in self.clients]} if others else {}
        return {
            "engine": first.spec,
            "address": first.address,
            **many,
            "policy": self.policy,
            "rule": f"{self.rule.match} ({self.rule.date}, {self.rule.source})",
            "concurrency": self.concurrency,
            "timeout": self.timeout,
            "retries": self.backoff.retries,
        }

    def run(self, calls: Sequence[Call], done: Done, progress: Progress, stop: Stop) -> None:
        """Run the calls; see `Engine.run`. What fails for good is a reply with its error."""
        self.check(calls)
        self.blocking(lambda: asyncio.run(self._run(calls, done, progress, stop)))

    @staticmethod
    def blocking(work: Callable[[], None]) -> None:
        """Run `work`, in a thread of its own where this one runs an event loop (a notebook)."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            work()
            return
        failed: list[BaseException] = []

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=guarded)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    async def _run(self, calls: Sequence[Call], done: Done, progress: Progress, stop: Stop) -> None:
        gate = asyncio.Semaphore(self.concurrency)
        halt = asyncio.Event()
        failed: list[BaseException] = []

        async def watch() -> None:
            while not stop():
                await asyncio.sleep(0.05)
            halt.set()

        async def one(replicas: Replicas, index: int, call: Call) -> None:
            async with gate:
                reply = await self._try(replicas, index, call, progress, halt)
            if reply is None:
                return
            try:
                done(index, reply)
            except BaseException as error:
                # Calls in flight are paid for, so they finish and are kept too.
                failed.append(error)
                halt.set()

        async with all_connected(self.clients, self.concurrency) as replicas:
            if not self._met:
                await check_alike(replicas, self.model, self.timeout)
            if any(call.attention is not None for call in calls):
                wrong = replace(_PROBE, attention=NO_PATTERN)
                for replica in replicas.every:
                    await self._probe(replica, wrong, "attention patterns", "set amplitude: 1")
            if any(call.token_policy is not None for call in calls):
                wrong = replace(_PROBE, token_policy=NO_POLICY)
                for replica in replicas.every:
                    await self._probe(replica, wrong, "policies by token", "give constant(T)")
            self._met = True
            watcher = asyncio.create_task(watch())
            try:
                async with asyncio.TaskGroup() as group:
                    for index, call in enumerate(calls):
                        group.create_task(one(replicas, index, call))
            finally:
                watcher.cancel()
        if failed:
            raise failed[0]

    async def _try(
        self, replicas: Replicas, index: int, call: Call, progress: Progress, halt: asyncio.Event
    ) -> Reply | None:
        """The reply to one call, after all its tries; None when the run halted before that.

        Where a replica doesn't answer and another one can, the call goes on there at once, which
        is none of the tries that `backoff` counts; so often as there are replicas.
        """
        sent = self._sent(call)
        name = uuid.uuid4().hex
        rng = random.Random()
        attempt = discarded = moved = 0
        amended: set[str] = set()
        replica: Replica | None = None
        while not halt.is_set():
            attempt += 1
            replica = replicas.next(replica)
            client = replica.client
            progress(index, "running" if attempt == 1 else "retrying", attempt - 1)
            body = self._body(client, call, sent)
            response = None
            try:
                with replica.busy():
                    async with asyncio.timeout(self.timeout):
                        response = await self._post(replica, body, name)
                completion = client.read(response)
            except Exception as error:
                failure = classify(error)
                discarded += self._lost(call, error, response)
                fresh = client.address not in amended and not failure.retry
                if fresh and client.amend(body, failure.reason):
                    amended.add(client.address)
                    continue
                gone = at_fault(error) and moved < len(replicas.every)
                if gone and replicas.another(replica):
                    moved += 1
                    continue
                wait = self.backoff.wait(attempt - moved, failure, rng)
                if wait is None:
                    return Reply(
                        None,
                        error=self._given_up(failure, attempt, client.address),
                        replica=self._named(client),
                        temperature_sent=sent.temperature,
                        attempts=attempt,
                        note=sent.note,
                        tokens_discarded=discarded,
                    )
                try:
                    await asyncio.wait_for(halt.wait(), wait)
                except TimeoutError:
                    continue
                return None
            reply = self._reply(call, completion, sent, attempt, discarded)
            return replace(reply, replica=self._named(client))
        return None

    def _named(self, client: Client) -> str | None:
        return client.address if len(self.clients) > 1 else None

    def _lost(self, call: Call, error: Exception, response: HTTPResponse | None) -> int:
        """Tokens that a failed try cost: of a reply with status 200, cut or unreadable."""
        size = error.begun if isinstance(error, NoAnswerError) else None
        if isinstance(error, MalformedError) and response is not None:
            size = len(response.content)
        return 0 if size is None else self.count(call) + _written(size, call)

    def _body(self, client: Client, call: Call, sent: Sent) -> dict[str, Any]:
        # `_reply` cuts the output at the stop text in any case.
        asked = replace(call, stop=None) if "stop" in self.rule.refuses else call
        return client.body(asked, sent, self.model, self.rule.seed)

    async def _post(self, replica: Replica, body: dict[str, Any], name: str) -> HTTPResponse:
        headers = {**replica.client.headers(), "idempotency-key": name}
        return await replica.wire.post(replica.client.url(self.model), headers, body)

    def _given_up(self, failure: Failure, attempts: int, address: str) -> str:
        """Why a call is not tried again, and what to do about it."""
        reason = failure.reason
        if reason == "timed out":
            reason += f": no reply of {address} in {self.timeout:g} s (--timeout)"
        if failure.retry and self.backoff.too_long(failure):
            reason += (
                f"; the server asks to wait {failure.after:.0f} s, and at most "
                f"{self.backoff.patience:g} s are waited for: go on after that"
            )
        return reason + (f" after {attempts} tries" if attempts > 1 else "")

    def _reply(
        self, call: Call, completion: Completion, sent: Sent, attempt: int, discarded: int
    ) -> Reply:
        """The reply to keep: its text, also a part of one, and all tokens that were paid for."""
        said = whole_characters(completion.text)
        text = said.strip()
        if call.stop is not None:
            text = text.split(call.stop)[0].strip()
        error = None
        if completion.refused is not None or not text:
            error = completion.refused or "the reply has no text"
            if completion.finish is not None and completion.finish not in error:
                error += f" (finish: {completion.finish})"
            if completion.finish in ("length", "max_tokens", "MAX_TOKENS"):
                error += "; allow more tokens, which include what a reasoning model thinks"
            error = cut(redacted(plain(error)))
        read, written, note = completion.tokens_in, completion.tokens_out, sent.note
        if read is None or written is None:
            counted = "the reply doesn't count its tokens: reckoned at 3 bytes each"
            note = counted if note is None else f"{note}; {counted}"
            read = self.count(call) if read is None else read
            written = _written(len(said.encode()), call) if written is None else written
        return Reply(
            output=text,
            error=error,
            temperature_sent=sent.temperature,
            seed_sent=self.rule.seed,
            tokens_in=read,
            tokens_out=written,
            finish=completion.finish,
            attempts=attempt,
            note=note,
            tokens_discarded=discarded,
        )

    async def _probe(self, replica: Replica, wrong: Call, ignored: str, otherwise: str) -> None:
        """EngineError unless the server reads patterns of attention, or policies by token.

        It must refuse a wrong one: a server that doesn't know the argument ignores it, and every
        temperature would be wrong.
        """
        try:
            async with asyncio.timeout(self.timeout):
                body = self._body(replica.client, wrong, self._sent(wrong))
                await self._post(replica, body, uuid.uuid4().hex)
        except Exception as error:
            reason = classify(error).reason
            if reason.startswith(("HTTP 400", "HTTP 422")):
                return
            if self._met and len(self.clients) > 1 and isinstance(error, NoAnswerError):
                replica.rest()  # it was asked before; the others take its calls
                return
            raise EngineError(
                f"can't ask {replica.client.spec} whether it reads {ignored}: {reason}"
            ) from None
        raise EngineError(
            f"{replica.client.spec} ignores {ignored} (it accepted a wrong one); serve it "
            f"with tempering's plugin, or {otherwise}"
        )

    def _sent(self, call: Call) -> Sent:
        return self.rule.settle(call.temperature, call.top_p, self.policy, self.model)


def _written(size: int, call: Call) -> int:
    """Estimated tokens of a text of `size` bytes.

    One token for 3 bytes, but no more than the call allows; and at least one for 8 bytes, the most
    that tokens of a long text hold on average, also where the server let it grow beyond the limit.
    """
    return max(min(size // 3 + 1, call.tokens), size // 8) if size else 0
