"""Costs measured by vLLM servers with tempering's plugin, several replicas at once.

A server gives log q of the text's own tokens (`prompt_logprobs`). For each variant every replica
gets the variant's profile; chunks then go to whichever replica is free. A replica that doesn't
answer, or has another profile in use than it was given (it was started anew, or somebody else
swapped), is left for good, and its chunks go on at the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from tempering.agents.contract import EngineError, Ledger
from tempering.attention.layout import Layout
from tempering.attention.profiles.profile import UNTEMPERED, Profile
from tempering.engines.providers.bodies import first, load, mapping
from tempering.engines.providers.openai_compatible import OpenAICompatible
from tempering.engines.providers.remote import RemoteEngine
from tempering.engines.providers.replicas import (
    Replica,
    Replicas,
    addresses_in,
    all_connected,
    check_alike,
    listed_models,
)
from tempering.engines.providers.retry import classify
from tempering.engines.vllm.client import LAYERS, PATH
from tempering.engines.vllm.scoring import layout_of_workers
from tempering.errors import InputError
from tempering.evaluation.cost import Cost, Variant, check_labels, mean_loss, summarised

Note = Callable[[str], None]
_SWAP = 600.0  # seconds for a swap, at least
_TRIES = 3  # of one chunk at a replica that answers with an error which may pass
_PARTING = 30.0  # seconds for a replica that was left to tell which profile it has in use
# Nats per token of one chunk: other kernels and number formats differ by a tenth of this.
_ALIKE = 0.05


class ServedScorer:
    """vLLM servers that one model is served by, under no profile; they end as they were found.

    Parameters
    ----------
    spec: addresses separated by commas, or a file of them. concurrency: requests at once at each.
    timeout: seconds for one request. note: told of replicas that are left.

    `left` holds the replicas that were left, and why; `layout` the attention layers, once `meet`
    has asked for them.
    """

    def __init__(self, spec: str, *, concurrency: int, timeout: float, note: Note) -> None:
        self.clients = [OpenAICompatible(place, attention=True) for place in addresses_in(spec)]
        self.concurrency, self.timeout, self.note = concurrency, timeout, note
        self.left: dict[str, str] = {}
        self.given: set[str] = set()  # digests of profiles that replicas were given
        self.model = ""
        self.layout: Layout | None = None

    def meet(self) -> Layout:
        """Check that all replicas serve one model under no profile; its attention layers."""

        async def ask() -> None:
            async with all_connected(self.clients, self.concurrency) as replicas:
                self.layout = await self._meet(replicas)

        RemoteEngine.blocking(lambda: asyncio.run(ask()))
        if self.layout is None:
            raise RuntimeError("the servers were not asked")
        return self.layout

    def costs(
        self,
        chunks: Int[Tensor, "chunks length"],
        variants: Sequence[Variant],
        ledger: Ledger,
        progress: Callable[[int, int], None],
    ) -> list[Cost]:
        """The cost of each variant against the untempered model, paired over chunks; no KL.

        ledger: gets {"loss", "replica"} of each chunk and variant as it comes.

        Raises EngineError where replicas differ, are tempered already, or are all left; InputError
        for a variant that a server can't score.
        """
        check_labels(variants)
        for variant in variants:
            if variant.temperature != 1:
                raise InputError(
                    f"{variant.label}: a server gives log probabilities of prompts at the sampling "
                    "temperature 1 alone; leave it out, or use the engine in process"
                )
        runs = [("", None), *((variant.label, variant.profile) for variant in variants)]
        RemoteEngine.blocking(lambda: asyncio.run(self._run(chunks, runs, ledger, progress)))
        rows = [
            {label: [ledger[f"{index}:{label}"]["loss"], math.nan] for label, _ in runs}
            for index in range(len(chunks))
        ]
        return summarised(rows, variants, [chunks.shape[1] - 1] * len(rows))

    async def _run(
        self,
        chunks: Tensor,
        runs: Sequence[tuple[str, Profile | None]],
        ledger: Ledger,
        progress: Callable[[int, int], None],
    ) -> None:
        async with all_connected(self.clients, self.concurrency) as replicas:
            await self._meet(replicas)
            live = list(replicas.every)
            total = len(chunks) * len(runs)
            names = [f"{i}:{label}" for label, _ in runs for i in range(len(chunks))]
            done = sum(name in ledger for name in names)
            try:
                await self._compare_weights(live, chunks[0].tolist(), ledger)
                for label, profile in runs:
                    while todo := [i for i in range(len(chunks)) if f"{i}:{label}" not in ledger]:
                        active = await self._swap(live, profile)
                        self._some(live)

                        def put(index: int, loss: float, place: str, label: str = label) -> None:
                            nonlocal done
                            done += 1
                            ledger.put(f"{index}:{label}", {"loss": loss, "replica": place})
                            progress(done, total)

                        await self._score(live, todo, chunks, active, put)
            finally:
                await self._swap(live, None)
                gone = [each for each in replicas.every if each not in live]
                await asyncio.gather(*map(self._restore, gone))

    async def _compare_weights(self, live: list[Replica], ids: list[int], ledger: Ledger) -> None:
        """EngineError where replicas, or those of an earlier run, give one chunk other losses."""

        async def one(each: Replica) -> float | None:
            try:
                return await self._loss(each, ids)
            except EngineError as error:
                self._leave(live, each, str(error))
                return None

        every = list(live)
        scored = zip(every, await asyncio.gather(*map(one, every)), strict=True)
        losses = {each.client.address: loss for each, loss in scored if loss is not None}
        self._some(live)
        place, first_loss = next(iter(losses.items()))
        for other, loss in losses.items():
            if abs(loss - first_loss) > _ALIKE:
                raise EngineError(
                    f"the replicas {place} and {other} give the first chunk a loss of "
                    f"{first_loss:.4f} and {loss:.4f}: other weights under one name"
                )
        if "0:" not in ledger:
            ledger.put("0:", {"loss": first_loss, "replica": place})
        elif abs((kept := ledger["0:"]["loss"]) - first_loss) > _ALIKE:
            raise EngineError(
                f"{place} gives the first chunk a loss of {first_loss:.4f}, and what was finished "
                f"before has {kept:.4f}: another model under one name. Give another --out, or go "
                "on with that model"
            )

    def _some(self, live: Sequence[Replica]) -> None:
        """EngineError where no replica is left."""
        if not live:
            why = "; ".join(f"{place}: {said}" for place, said in self.left.items())
            raise EngineError(
                f"no replica is left ({why}). What was finished is kept; run the same command "
                "again when one answers"
            )

    async def _restore(self, each: Replica) -> None:
        """Take our profile out of a replica that was left, if it answers again."""
        try:
            async with asyncio.timeout(_PARTING):
                if await self._asked(each, None) in self.given:
                    await self._asked(each, {"profile": None})
        except (EngineError, InputError, TimeoutError):
            if self.given:
                with contextlib.suppress(Exception):
                    self.note(
                        f"the replica {each.client.address}, which was left, doesn't tell whether "
                        "a profile is still in use there; see to it before it serves again"
                    )

    async def _meet(self, replicas: Replicas) -> Layout:
        """`meet`, over connections."""
        first_one = replicas.every[0]
        try:
            listed = await listed_models(first_one, self.timeout)
        except Exception as error:
            raise EngineError(
                f"{first_one.client.address} doesn't tell its models: {classify(error).reason}"
            ) from None
        self.model = min(listed) if listed else ""
        await check_alike(replicas, self.model, self.timeout)
        for each in replicas.every:
            active = await self._asked(each, None)
            if active != UNTEMPERED:
                raise EngineError(
                    f"the replica {each.client.address} serves the profile {active}, and costs are "
                    "measured against the untempered model: start it without one"
                )
        found = [await self._layers(each) for each in replicas.every]
        for each, own in zip(replicas.every, found, strict=True):
            if own != found[0]:
                raise EngineError(
                    f"the replica {each.client.address} has other layers than "
                    f"{replicas.every[0].client.address}: another model under one name"
                )
        return layout_of_workers(found[0]["layers"], found[0]["depth"])

    async def _layers(self, each: Replica) -> dict[str, Any]:
        url = each.client.address.removesuffix("/v1") + LAYERS
        try:
            async with asyncio.timeout(self.timeout):
                response = await each.wire.get(url, each.client.headers())
            found = mapping(load(response.content))
            return {"layers": list(found["layers"]), "depth": int(found["depth"])}
        except Exception as error:
            raise EngineError(
                f"{each.client.address} doesn't tell its layers: {classify(error).reason}; is it "
                "served by `tempering serve` of this version?"
            ) from None

    async def _swap(self, live: list[Replica], profile: Profile | None) -> str:
        """Give every replica a profile; the digest in use. Those that don't answer are left."""
        body = {"profile": None if profile is None else profile.to_json()}

        async def one(each: Replica) -> str | None:
            try:
                return await self._asked(each, body)
            except EngineError as error:
                self._leave(live, each, str(error))
                return None

        digests = [digest for digest in await asyncio.gather(*map(one, list(live))) if digest]
        if len(set(digests)) > 1:
            raise EngineError(f"the replicas name one profile differently: {', '.join(digests)}")
        if profile is not None:
            self.given.update(digests)
        return digests[0] if digests else ""

    async def _asked(self, each: Replica, body: dict[str, Any] | None) -> str:
        """The digest of the profile in use, after a swap where there is a body."""
        url = each.client.address.removesuffix("/v1") + PATH
        headers = each.client.headers()
        try:
            # A swap waits for the requests in flight, which may be others'.
            async with asyncio.timeout(self.timeout if body is None else max(_SWAP, self.timeout)):
                if body is None:
                    response = await each.wire.get(url, headers)
                else:
                    response = await each.wire.post(url, headers, body)
            return str(mapping(load(response.content))["active"])
        except Exception as error:
            reason = classify(error).reason
            if reason.startswith("HTTP 400"):
                raise InputError(f"{each.client.address}: {reason}") from None
            raise EngineError(
                f"{each.client.address} can't be asked for its attention profile: {reason}"
            ) from None

    async def _score(
        self,
        live: list[Replica],
        todo: Sequence[int],
        chunks: Tensor,
        active: str,
        put: Callable[[int, float, str], None],
    ) -> None:
        """Score chunks, each at the replica with the fewest under way.

        Those whose replica is left in the middle are not scored.
        """
        gate = asyncio.Semaphore(self.concurrency * len(live))

        async def one(index: int) -> None:
            async with gate:
                if not live:
                    return
                each = Replicas(live).next()
                try:
                    with each.busy():
                        loss = await self._loss(each, chunks[index].tolist())
                        now = await self._asked(each, None)
                    if now != active:
                        raise EngineError(
                            f"it has the profile {now} in use, and was given {active}"
                        )
                except EngineError as error:
                    self._leave(live, each, str(error))
                    return
                put(index, loss, each.client.address)

        try:
            async with asyncio.TaskGroup() as group:
                for index in todo:
                    group.create_task(one(index))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _loss(self, each: Replica, ids: list[int]) -> float:
        """Mean -log q of the tokens after the first, nats."""
        body = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
        }
        for attempt in range(1, _TRIES + 1):
            try:
                async with asyncio.timeout(self.timeout):
                    url = f"{each.client.address}/completions"
                    response = await each.wire.post(url, each.client.headers(), body)
                break
            except Exception as error:
                failure = classify(error)
                if failure.reason.startswith(("HTTP 400", "HTTP 422")):
                    raise InputError(f"{each.client.address}: {failure.reason}") from None
                if attempt == _TRIES or not failure.retry:
                    raise EngineError(failure.reason) from None
                await asyncio.sleep(0.5 * attempt)
        try:
            body_back = mapping(load(response.content))
        except Exception as error:
            raise EngineError(classify(error).reason) from None
        rows: Any = first(body_back.get("choices")).get("prompt_logprobs")
        try:
            scores = [
                float(row[str(token)]["logprob"])
                for row, token in zip(rows[1:], ids[1:], strict=True)
            ]
        except (TypeError, ValueError, KeyError, IndexError):
            raise EngineError(
                "it gives no log probabilities of a prompt's tokens, as vLLM does; only vLLM "
                "servers can be compared on"
            ) from None
        if not all(map(math.isfinite, scores)):
            raise EngineError("it gives a token a log probability that is no number")
        return mean_loss([None, *scores])

    def _leave(self, live: list[Replica], each: Replica, why: str) -> None:
        if each in live:
            live.remove(each)
            self.left[each.client.address] = why
            with contextlib.suppress(Exception):
                self.note(f"the replica {each.client.address} is left: {why}")
