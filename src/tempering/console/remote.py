"""A running `tempering serve`: its profile swapped, its text streamed, its limits said.

What a server doesn't tell can't be shown: attention and statistics of heads stay in its workers,
and so do the weights. Columns are requests in flight together: the profile in force, and named
profiles, which the server was started with.
"""

from __future__ import annotations

import itertools
import math
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tempering.attention.layout import AttentionLayer, Layout
from tempering.attention.profiles.profile import Profile
from tempering.console.fields import MOST_COLUMNS, Fields
from tempering.console.subject import Subject
from tempering.console.turns import Event, Job
from tempering.engines.providers.keys import key_of
from tempering.engines.vllm.client import (
    active_profile,
    served_model,
    streamed_events,
    swap_remote,
)
from tempering.errors import InputError, ProfileError, RefusedError, TemperingError

_ALTERNATIVES = 12
_HEADS = "a server keeps attention in its workers and tells nothing about heads"
_WEIGHTS = "it needs the model in this process; open the console with --model for that"
# Control on the page -> why a server can't give it. `columns` are more painted profiles.
CANNOT = {
    "watch": _HEADS,
    "measure": _HEADS,
    "ask": _WEIGHTS,
    "find": _WEIGHTS,
    "meter": _WEIGHTS,
    "cost-file": _WEIGHTS,
    "run-stages": "use tempering throb --engine vllm:ADDRESS",
    "bake": _WEIGHTS,
    "add-column": "a server has one profile in force; name others that it was started with",
    "edit": "a server swaps profiles between requests, so an edit starts again",
    "save-record": "a server doesn't tell what a record holds of each token",
}


@dataclass(frozen=True)
class Remote:
    """A server, and the shape of the model that it serves.

    key: TEMPERING_SERVER_KEY or VLLM_API_KEY.
    """

    url: str
    model: str
    key: str | None = field(repr=False)

    @classmethod
    def at(cls, engine: str) -> Remote:
        """From `vllm:ADDRESS`; RefusedError where no tempering server answers there."""
        kind, colon, url = engine.partition(":")
        if kind != "vllm" or not colon or not url:
            raise InputError(f"--engine is vllm:ADDRESS (vllm:http://localhost:8000), not {engine}")
        url = url if "://" in url else f"http://{url}"
        key = key_of("server") or os.environ.get("VLLM_API_KEY")
        active_profile(url, key)
        return cls(url, served_model(url, key), key)

    def for_page(self) -> dict[str, Any]:
        """What the page needs to know of it."""
        return {"address": self.url, "model": self.model, "cannot": CANNOT}

    def in_force(self) -> Event:
        """The digest of the profile that acts on requests that name none."""
        return {"type": "in force", "digest": active_profile(self.url, self.key)}

    def put(self, profile: Profile | None) -> Iterator[Event]:
        """Swap; comes when every worker has the profile."""
        yield {"type": "in force", "digest": swap_remote(self.url, profile, self.key)}

    def write(self, order: RemoteOrder, job: Job) -> Iterator[Event]:
        """Every column's tokens as they come, all requests in flight together."""
        yield {"type": "prompt", "tokens": [], "texts": []}
        events: queue.Queue[Event | None] = queue.Queue()
        gone = threading.Event()
        readers = [
            threading.Thread(target=self._read, args=(order, row, name, events, gone), daemon=True)
            for row, name in enumerate(order.names)
        ]
        for reader in readers:
            reader.start()
        counts, open_rows = [0] * len(readers), len(readers)
        try:
            while open_rows:
                try:
                    event = events.get(timeout=0.1)
                except queue.Empty:
                    job.check()
                    continue
                if event is None:
                    open_rows -= 1
                    continue
                if isinstance(event.get("error"), TemperingError):
                    raise event["error"]
                counts[event["row"]] += 1
                yield event
        finally:
            gone.set()
        yield {"type": "done", "tokens": counts}

    def _read(
        self,
        order: RemoteOrder,
        row: int,
        name: str | None,
        events: queue.Queue[Event | None],
        gone: threading.Event,
    ) -> None:
        """One column, in a thread of its own; its request ends when the page has gone."""
        stream = streamed_events(self.url, self.key, order.body(self.model, name))
        try:
            for event in stream:
                if gone.is_set():
                    break
                for choice in event.get("choices") or ():
                    for token in _tokens(choice):
                        events.put({"type": "token", "row": row, **token})
        except TemperingError as error:
            events.put({"row": row, "error": error})
        except Exception as error:  # a server that answers in another form
            events.put({"row": row, "error": RefusedError(f"{self.url}: {error!r}")})
        finally:
            stream.close()  # type: ignore[attr-defined]
            events.put(None)


def _tokens(choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The tokens of one streamed choice, with their likeliest alternatives where it has them."""
    told = choice.get("logprobs") or {}
    known = told.get("content") or []
    if not known:
        text = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
        if text and not told.get("tokens"):
            yield {"text": text, "log_probability": "NaN", "alternatives": []}
    # The plain interface tells the same in columns.
    columns = (told.get(name) or () for name in ("tokens", "token_logprobs", "top_logprobs"))
    for token, logprob, top in itertools.zip_longest(*columns):
        likeliest = sorted((top or {}).items(), key=lambda item: -item[1])
        yield {
            "text": str(token),
            "log_probability": "NaN" if logprob is None else _number(logprob),
            "alternatives": [
                {"text": text, "after": math.exp(float(other))} for text, other in likeliest
            ],
        }
    for item in known:
        yield {
            "text": str(item["token"]),
            "log_probability": _number(item["logprob"]),
            "alternatives": [
                {"text": str(other["token"]), "after": math.exp(float(other["logprob"]))}
                for other in item.get("top_logprobs") or []
            ],
        }


def _number(value: Any) -> float | str:
    found = float(value)
    return found if math.isfinite(found) else "-Infinity"


@dataclass(frozen=True)
class RemoteOrder:
    """What the page wants a server to write. names: None is the profile in force."""

    prompt: str
    tokens: int
    policy: str
    seed: int
    names: tuple[str | None, ...]
    chat: bool

    @classmethod
    def of(cls, given: Fields) -> RemoteOrder:
        """Checked before anything is sent; the server checks the policy and the names."""
        prompt = given.text("prompt")
        if not prompt.strip():
            raise InputError("the prompt is empty; give some text to continue")
        names = [str(name) for name in given.items("names", MOST_COLUMNS)]
        return cls(
            prompt,
            given.whole("tokens", 1, 100_000, 64),
            given.text("policy", "constant(0.7)"),
            given.whole("seed", 0, 2**63 - 1, 0),
            (None, *names),
            given.flag("chat", True),
        )

    def body(self, model: str, name: str | None) -> dict[str, Any]:
        """A request as a chat turn or of plain text; the policy is the one temperature."""
        extra: dict[str, Any] = {"tempering": self.policy}
        if name is not None:
            extra["tempering_profile"] = name
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": self.tokens,
            "temperature": 1,
            "seed": self.seed,
            "vllm_xargs": extra,
        }
        if not self.chat:
            return {**body, "prompt": self.prompt, "logprobs": _ALTERNATIVES}
        turn = [{"role": "user", "content": self.prompt}]
        return {**body, "messages": turn, "logprobs": True, "top_logprobs": _ALTERNATIVES}


def shape_of(profile: Profile, name: str) -> Subject:
    """A subject without weights: the layers that a profile names, in its order."""
    if profile.names is None or profile.partial:
        raise ProfileError(
            "this profile doesn't name every layer, so it tells no model's shape; give one that "
            "`tempering tune` or `tempering profile` wrote, or --model"
        )
    layers: Sequence[AttentionLayer] = [
        AttentionLayer(layer, "decoder", index, len(row), len(row))
        for index, (layer, row) in enumerate(zip(profile.names, profile.rows, strict=True))
    ]
    plan = Layout(tuple(layers), profile.untempered, {"decoder": len(layers)})
    return Subject(name, None, None, plan, dict(profile.model or {}))
