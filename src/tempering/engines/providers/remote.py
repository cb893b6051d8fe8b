"""What engines over HTTP share: concurrency, retries, timeouts, policy, and keys kept out."""

from __future__ import annotations

import asyncio
import random
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

from tempering.agents.contract import Call, Done, EngineError, Progress, Reply, Stop
from tempering.agents.temperatures import Rule, Sent
from tempering.engines.providers.keys import redacted
from tempering.engines.providers.retry import Backoff, MalformedError, classify
from tempering.errors import InputError

NO_PATTERN = "no pattern at all"  # what a server that tempers attention answers 400 to


class Completion(NamedTuple):
    """A provider's answer, in plain values."""

    text: str
    tokens_in: int
    tokens_out: int
    finish: str | None


@runtime_checkable
class Session(Protocol):
    """An open connection of an SDK."""

    async def send(self, call: Call, sent: Sent, model: str, seed: bool, name: str) -> Completion:
        """One request; `name` is the same over retries, for servers that look out for doubles."""


@runtime_checkable
class Client(Protocol):
    """One provider's SDK. spec: how the command line names it."""

    provider: str
    spec: str
    has_attention: bool

    def open(self, timeout: float) -> AbstractAsyncContextManager[Session]:
        """Connect, with the SDK's own retries off."""


def _counted(completion: Completion) -> Completion:
    """A completion whose tokens are numbers; what they cost is summed up later."""
    for count in (completion.tokens_in, completion.tokens_out):
        if not isinstance(count, int):
            raise MalformedError(f"a count of tokens is no number but {count!r}")
    return completion


class RemoteEngine:
    """Runs calls on a provider, several at once, each tried again where that may help.

    Parameters
    ----------
    client: the provider. model: its name there.
    rule: the model's row in the table of temperatures. policy: strict, clamp or omit.
    concurrency: requests at once. timeout: seconds for one try.
    backoff: how often to try again, and when.
    """

    def __init__(
        self,
        client: Client,
        model: str,
        rule: Rule,
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
        self.client = client
        self.name = client.provider
        self.model = model
        self.has_attention = client.has_attention
        self.rule = rule
        self.policy = policy
        self.concurrency = concurrency
        self.timeout = timeout
        self.backoff = Backoff() if backoff is None else backoff

    def temperature(self, normalised: float) -> float:
        """The sampling temperature that 0 (cold) to 1 (hot) stands for on this model."""
        return self.rule.temperature(normalised)

    def check(self, calls: Sequence[Call]) -> None:
        """Raise what the policy has against these calls, before anything is sent."""
        for call in calls:
            self._sent(call)
            if call.attention is not None and not self.has_attention:
                raise InputError(
                    f"{call.key}: the engine {self.name} can't temper attention; use the engine "
                    "local, or vllm:URL with a server that tempering serves"
                )

    def count(self, call: Call) -> int:
        """A guess at the prompt's tokens: a token is 3 bytes or more in most texts."""
        return len((call.prompt + (call.system or "")).encode()) // 3 + 16

    def describe(self) -> dict[str, Any]:
        """Settings for the record: never a key."""
        return {
            "engine": self.client.spec,
            "policy": self.policy,
            "rule": f"{self.rule.match} ({self.rule.date}, {self.rule.source})",
            "concurrency": self.concurrency,
            "timeout": self.timeout,
            "retries": self.backoff.retries,
        }

    def run(self, calls: Sequence[Call], done: Done, progress: Progress, stop: Stop) -> None:
        """Run the calls; see `Engine.run`. What fails for good is a reply with its error."""
        self.check(calls)
        self._blocking(lambda: asyncio.run(self._run(calls, done, progress, stop)))

    @staticmethod
    def _blocking(work: Callable[[], None]) -> None:
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

        async def one(session: Session, index: int, call: Call) -> None:
            async with gate:
                reply = await self._try(session, index, call, progress, halt)
            if reply is None:
                return
            try:
                done(index, reply)
            except BaseException as error:
                # The others in flight are paid for: let them finish and be kept too.
                failed.append(error)
                halt.set()

        async with self.client.open(self.timeout) as session:
            if any(call.attention is not None for call in calls):
                await self._probe(session)
            watcher = asyncio.create_task(watch())
            try:
                async with asyncio.TaskGroup() as group:
                    for index, call in enumerate(calls):
                        group.create_task(one(session, index, call))
            finally:
                watcher.cancel()
        if failed:
            raise failed[0]

    async def _try(
        self, session: Session, index: int, call: Call, progress: Progress, halt: asyncio.Event
    ) -> Reply | None:
        """One call to its end; None when the run halted before it was made."""
        sent = self._sent(call)
        name = uuid.uuid4().hex
        rng = random.Random()
        attempt = 0
        while not halt.is_set():
            attempt += 1
            progress(index, "running" if attempt == 1 else "retrying", attempt - 1)
            try:
                made = session.send(call, sent, self.model, self.rule.seed, name)
                completion = _counted(await asyncio.wait_for(made, self.timeout))
            except Exception as error:
                failure = classify(error)
                wait = self.backoff.wait(attempt, failure, rng)
                if wait is None:
                    tries = f" after {attempt} tries" if attempt > 1 else ""
                    return Reply(
                        None,
                        error=redacted(f"{failure.reason}{tries}"),
                        temperature_sent=sent.temperature,
                        attempts=attempt,
                        note=sent.note,
                    )
                try:
                    await asyncio.wait_for(halt.wait(), wait)
                except TimeoutError:
                    continue
                return None
            return self._reply(call, completion, sent, attempt)
        return None

    def _reply(self, call: Call, completion: Completion, sent: Sent, attempt: int) -> Reply:
        text = completion.text.strip()
        if call.stop is not None:
            text = text.split(call.stop)[0].strip()
        error = None
        if not text:
            error = f"the reply has no text (finish: {completion.finish})"
            if completion.finish in ("length", "max_tokens", "MAX_TOKENS"):
                error += "; allow more tokens, which include what a reasoning model thinks"
        return Reply(
            output=redacted(text),
            error=error,
            temperature_sent=sent.temperature,
            seed_sent=self.rule.seed,
            tokens_in=completion.tokens_in,
            tokens_out=completion.tokens_out,
            finish=completion.finish,
            attempts=attempt,
            note=sent.note,
        )

    async def _probe(self, session: Session) -> None:
        """EngineError unless the server reads attention patterns: it must refuse a wrong one.

        A server that doesn't know the argument ignores it, and every temperature would be wrong.
        """
        probe = Call("probe", "Say hello.", None, 1, 0, attention=NO_PATTERN)
        try:
            made = session.send(probe, self._sent(probe), self.model, False, uuid.uuid4().hex)
            await asyncio.wait_for(made, self.timeout)
        except Exception as error:
            reason = classify(error).reason
            if reason.startswith(("HTTP 400", "HTTP 422")):
                return
            raise EngineError(
                f"can't ask {self.client.spec} whether it tempers attention: {redacted(reason)}"
            ) from None
        raise EngineError(
            f"{self.client.spec} ignores attention patterns (it accepted a wrong one); serve it "
            "with tempering's plugin, or set amplitude: 1"
        )

    def _sent(self, call: Call) -> Sent:
        return self.rule.settle(call.temperature, call.top_p, self.policy, self.model)
