"""Requests drawn to break a server with policies, and what each must come to.

A request is right when its answer is what was drawn for it: the temperature that its policy says,
read off the log probability of its first token; HTTP 400; either of both; or a forced text.
"""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from tests.vllm.serving import KEY, Running, healthy

START, END = "<think>", "</think>"
REASONING = json.dumps({"reasoning_start_str": START, "reasoning_end_str": END})

# Pieces of policies for mutations: valid ones, and what a hostile hand puts between them.
VALID = (
    "phases(thinking=1, answer=0.2)|clip(0.1,2)",
    "support(throb(12,3,1,12), length=256)",
    "schedule(linear(1,2)|room(0.5), length=9)",
    "entropy(T0=1.2, theta=0.5)",
    "dynatemp(0.5, exponent=2, temperature=0.8)",
    "ladder(0.5,2, n=3)",
    'phases(x=between(1.3, "a", "b"), y=between(2, ids(3)), answer=0)',
    "schedule(shuffle(nest(throb(2,1), throb(1.2,1)), seed=7), length=99)",
    "constant(inf)|room(2)",
    "phases(thinking=sampler(T=1, top_p=0.95, top_k=20), answer=sampler(T=0.3, min_p=0.05))",
    "sampler(T=support(9))|order(min_p, top_k, top_p, temperature)",
)
SCRAPS = (
    *"()|,=\"'.0123456789einfa -x\\\x00é\u202e😀",
    *("1e39", "1e999", "1e-400", "-0", "nan", "|room(1)", "|clip(0,inf)", "ids(", "between("),
    *("phases(", "length=1048576", "shuffle(", "|amplitude(2)", "nest(", "constant(1e300)"),
)


@dataclass(frozen=True)
class Case:
    """body: of POST /v1/completions, bytes where no JSON is meant to stand. wanted: T of the first
    token, "bad" (HTTP 400), "any" (200 or 400), "cancel", or ("text", what must appear)."""

    body: Any
    wanted: Any
    prompt: int = 0


@dataclass
class Report:
    """What came of all requests."""

    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest_health: float = 0.0
    memory: list[tuple[int, int]] = field(default_factory=list)  # requests done, MiB of the server

    def lines(self) -> list[str]:
        """For a terminal."""
        memory = ", ".join(f"{mib} after {done}" for done, mib in self.memory)
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        return [
            f"requests: {counts}",
            f"wrong: {len(self.wrong)}",
            *self.wrong[:20],
            f"slowest /health: {self.slowest_health:.2f} s",
            f"memory of the server's processes, MiB: {memory}",
        ]


class Fuzz:
    """Draws cases, sends them to a server from many threads, and judges the answers.

    Parameters
    ----------
    model, tokenizer: what the server serves, for the right log probabilities.
    plain: send requests without policies alone, to compare the server's memory.
    """

    def __init__(
        self, server: Running, model: Any, tokenizer: Any, seed: int = 0, plain: bool = False
    ) -> None:
        self.server, self.plain = server, plain
        self.encode: Callable[[str], list[int]] = lambda text: tokenizer(text).input_ids
        texts = ("It is a truth universally", "Hot layers explore, cold", "3.14159 = \u03c0 \u2603")
        self.prompts = [self.encode(text) for text in texts]
        with torch.no_grad():
            self.raw = [model(torch.tensor([p])).logits[0, -1].float() for p in self.prompts]
        self.draw = random.Random(seed)
        self.report = Report()
        self._lock = threading.Lock()
        self._done = 0
        self._client = httpx.Client(
            base_url=server.url,
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=120,
            limits=httpx.Limits(max_connections=64),
        )

    # -- what is sent

    def case(self) -> Case:
        draw = self.draw
        if self.plain:
            T = round(draw.uniform(0.2, 2), 4)
            body, which = self._body(None, temperature=T)
            return Case(body, T, which)
        kind = draw.random()
        if kind < 0.45:
            return self._good()
        if kind < 0.6:
            return self._bad()
        if kind < 0.82:
            return self._mutated()
        if kind < 0.9:
            return self._forced()
        if kind < 0.96:
            return self._cancelled()
        return Case(draw.choice(_BODIES), "any")

    def _body(self, extra: Any, **more: Any) -> tuple[dict[str, Any], int]:
        which = self.draw.randrange(len(self.prompts))
        body = {"model": "tiny", "prompt": self.prompts[which], "temperature": 1.0}
        body |= {"max_tokens": self.draw.choice((1, 2, 5)), "logprobs": 0, "ignore_eos": True}
        body |= {"return_tokens_as_token_ids": True, **more}
        if extra is not None:
            body["vllm_xargs"] = extra
        if self.draw.random() < 0.4:
            body["seed"] = self.draw.choice((0, 1, 2**31, 12345))
        return body, which

    def _good(self) -> Case:
        draw = self.draw
        hot, cold = round(draw.uniform(1.1, 2), 4), round(draw.uniform(0.2, 0.9), 4)
        rung = draw.randrange(3)
        extra, own, T = draw.choice(
            (
                (None, hot, hot),
                ({"tempering": f"constant({cold})"}, 1.0, cold),
                ({"tempering": f"constant({cold})" + "|room(1)" * 40}, 1.0, cold),
                ({"tempering": "constant(1e39)"}, 1.0, math.inf),
                ({"tempering": "constant(2)|clip(1e39,inf)"}, 1.0, math.inf),
                ({"tempering": "entropy(T0=1e39, theta=0)"}, 1.0, math.inf),
                ({"tempering": f"schedule(linear({hot},{cold}), length=1048576)"}, 1.0, hot),
                ({"tempering": f"phases(thinking={hot}, answer={cold})"}, 1.0, cold),
                ({"tempering": _many(60, cold)}, 1.0, cold),
                ({"temperature_thinking": 1e39}, cold, cold),
                ({"temperature_thinking": hot}, cold, cold),
                ({"post_thinking": f'{{"temperature": {cold}}}'}, hot, cold),
                (
                    {"tempering": f"ladder({cold},{hot}, n=3)", "tempering_sample": rung},
                    1.0,
                    cold * (hot / cold) ** (rung / 2),
                ),
                ({"tempering": f"constant({hot})|clip(0,1.05)"}, 1.0, 1.05),
                ({"tempering": f"sampler(T={hot}, top_p=1)"}, 1.0, hot),
                ({"tempering": "sampler(top_k=0)|order(top_k, temperature)"}, cold, cold),
                ({"post_thinking": f'{{"temperature": {cold}, "min_p": 0}}'}, hot, cold),
            )
        )
        body, which = self._body(extra, temperature=own)
        if "tempering_sample" not in (extra or {}) and draw.random() < 0.2:
            body["n"] = draw.choice((2, 4))
        return Case(body, T, which)

    def _bad(self) -> Case:
        body, _ = self._body(self.draw.choice(_BAD))
        return Case(body, "bad")

    def _mutated(self) -> Case:
        draw = self.draw
        text = draw.choice(VALID)
        for _ in range(draw.randrange(1, 5)):
            place = draw.randrange(len(text) + 1)
            kind = draw.randrange(4)
            if kind == 0:
                text = text[:place] + draw.choice(SCRAPS) + text[place:]
            elif kind == 1:
                text = text[:place] + text[place + 1 :]
            elif kind == 2:
                text = text[:place] + text[draw.randrange(len(text) + 1) :]
            else:
                text = text[:place] + draw.choice(SCRAPS) * draw.choice((2, 60, 900))
        key = draw.choice(("tempering",) * 6 + ("dynatemp_range", "post_thinking", "temperings"))
        body, _ = self._body({key: text})
        body |= draw.choice(({}, {"n": 3}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}))
        return Case(body, "any")

    def _forced(self) -> Case:
        draw = self.draw
        policy = draw.choice(_HOT)
        body, _ = self._body({"tempering": policy})
        if draw.random() < 0.5:
            token = draw.randrange(300)
            body |= {"allowed_token_ids": [token], "max_tokens": 3}
            return Case(body, ("ids", [token] * 3))
        body |= {"prompt": self.encode(f"2+2?\n{START}"), "max_tokens": 24}
        body |= {"thinking_token_budget": draw.choice((1, 3)), "return_tokens_as_token_ids": False}
        return Case(body, ("text", END))

    def _cancelled(self) -> Case:
        policy = self.draw.choice((*_HOT, "phases(thinking=2, answer=1)", _many(40, 0.7)))
        body, _ = self._body({"tempering": policy}, stream=True, max_tokens=200)
        return Case(body, "cancel")

    # -- what came of it

    def run(self, requests: int, seconds: float, threads: int = 16) -> Report:
        """Send so many requests, for at most so long; what came of them."""
        end = time.monotonic() + seconds
        self.report.memory.append((0, self._memory()))
        stop = threading.Event()
        watch = threading.Thread(target=self._watch, args=(stop,))
        watch.start()
        try:
            step = max(1, requests // 10)
            with ThreadPoolExecutor(threads) as pool:
                while self._done < requests and time.monotonic() < end:
                    count = min(step, requests - self._done)
                    for case in pool.map(self._judged, [self.case() for _ in range(count)]):
                        if case is not None:
                            self.report.wrong.append(case)
                    self._done += count
                    self.report.memory.append((self._done, self._memory()))
        finally:
            stop.set()
            watch.join()
        if not healthy(self.server.url):
            self.report.wrong.append("the server is dead")
        return self.report

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(0.5):
            start = time.monotonic()
            healthy(self.server.url)
            taken = time.monotonic() - start
            self.report.slowest_health = max(self.report.slowest_health, taken)

    def _memory(self) -> int:
        """Resident memory of the server's process group, MiB."""
        pages = 0
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(place.name)) == self.server.process.pid:
                    pages += int((place / "statm").read_text().split()[1])
            except OSError:
                continue
        return pages * os.sysconf("SC_PAGE_SIZE") // 2**20

    def _judged(self, case: Case) -> str | None:
        """None, or what is wrong with the answer."""
        kind = case.wanted if isinstance(case.wanted, str) else "good"
        kind = case.wanted[0] if isinstance(case.wanted, tuple) else kind
        with self._lock:
            self.report.kinds[kind] += 1
        try:
            wrong = self._wrong(case)
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            wrong = f"{type(error).__name__}: {error}"
        return None if wrong is None else f"{wrong[:300]} <- {str(case.body)[:400]}"

    def _wrong(self, case: Case) -> str | None:
        if case.wanted == "cancel":
            return self._cancel(case.body)
        if isinstance(case.body, bytes):
            answer = self._client.post("/v1/completions", content=case.body, headers=_JSON)
        else:
            answer = self._client.post("/v1/completions", json=case.body)
        if answer.status_code not in (200, 400):
            return f"HTTP {answer.status_code}: {answer.text}"
        if case.wanted == "any":
            return None
        if case.wanted == "bad":
            return None if answer.status_code == 400 else f"was accepted: {answer.text}"
        if answer.status_code != 200:
            return f"was refused: {answer.text}"
        choices = answer.json()["choices"]
        if isinstance(case.wanted, tuple):
            return self._text(case.wanted, choices)
        return self._temperature(case, choices)

    def _text(self, wanted: Sequence[Any], choices: list[Any]) -> str | None:
        kind, what = wanted
        for choice in choices:
            got: Any = choice["text"] if kind == "text" else _ids(choice)
            if (what not in got) if kind == "text" else got != what:
                return f"{what!r} was forced, got {got!r}"
        return None

    def _temperature(self, case: Case, choices: list[Any]) -> str | None:
        raw, T = self.raw[case.prompt], case.wanted
        expected = (raw * 0 if math.inf == T else raw / T).log_softmax(-1)
        for choice in choices:
            wanted = float(expected[_ids(choice)[0]])
            got = choice["logprobs"]["token_logprobs"][0]
            if not math.isclose(got, wanted, abs_tol=3e-4):
                return f"T = {T:g}: log probability {got:.5f}, right {wanted:.5f}"
        return None

    def _cancel(self, body: Any) -> str | None:
        with self._client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                return f"HTTP {answer.status_code}"
            for number, _ in enumerate(answer.iter_lines()):
                if number > 6:
                    break
        return None


def _ids(choice: Any) -> list[int]:
    return [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]


def _many(phases: int, answer: float) -> str:
    """A phase for each of many delimiters, none in the prompts, with the longest schedules."""
    spans = ", ".join(
        f"p{i}=between(schedule(linear(2,0.{i + 1}),length=1048576),ids({i},{i},{i}),ids({i},0,0))"
        for i in range(phases)
    )
    return f"phases(answer={answer}, {spans})"


_JSON = {"Content-Type": "application/json"}
_HOT = (
    *("constant(inf)", "constant(1e39)", "support(12)", "support(200)|clip(0.5,inf)"),
    *("dynatemp(1e39)", "entropy(T0=1e39, theta=0.1)", "constant(50)", "constant(2)|room(1e300)"),
    *("schedule(throb(50,1e39), length=64)", "constant(0)"),
)
_BAD: tuple[Any, ...] = (
    {"tempering": "suport(3)"},
    {"tempering": "sampler(top_p=2)"},
    {"tempering": "constant(1)|order(top_k, top_p)"},
    {"post_thinking": '{"top_p": 0}'},
    {"top_p": 0.5},
    {"top_p_think": 0.5},
    {"min_p_thinking": 2},
    {"tempering": "support(-3)"},
    {"tempering": "constant(nan)"},
    {"tempering": "constant(1)" + "|room(1)" * 330},
    {"tempering": "schedule(constant(1)" + "|amplitude(2)" * 45 + "x, length=9)"},
    {"tempering": "schedule(shuffle(linear(2,1), seed=0), length=1048576)"},
    {"tempering": "(" * 9999},
    {"tempering": "phases(" * 900},
    {"tempering": "x" * 100_000},
    {"tempering": ""},
    {"tempering": 3},
    {"tempering": ["support(3)"]},
    {"tempering": "ladder(0.5,2, n=3)"},
    {"tempering": "support(3)", "dynatemp_range": 0.5},
    {"tempering_profile": "cold"},
    {"tempering_sample": 1},
    {"temperings": "support(3)"},
    {"temperature_think": 0.5},
    {"dynatemp_rnge": 0.5},
    {"Tempering": "support(3)"},
    {"temperature-thinking": 0.5},
    {"post_thinking": {"temperature": 0.2}},
    {"post_thinking": '{"temperature": ' + "9" * 5000 + "}"},
    {"post_thinking": "[" * 5000},
    {"dynatemp_exponent": 1},
    {"dynatemp_range": "wide"},
    {"dynatemp_range": int("9" * 400)},
    {"temperature_thinking": -1},
    {"tempering": 'phases(thinking=between(1, "\\ud800"), answer=1)'},
)
_BODIES: tuple[Any, ...] = (
    b"",
    b"{",
    b"[]",
    b'{"model": "tiny", "prompt": "a", "vllm_xargs": {"temperature_thinking": NaN}}',
    b'{"model": "tiny", "prompt": "a", "temperature": 1, "max_tokens": 2,'
    b' "vllm_xargs": {"temperature_thinking": Infinity}}',
    b'{"model": "tiny", "prompt": "a", "vllm_xargs": {"tempering": null}}',
    b'{"model": "tiny", "prompt": "a", "vllm_xargs": {"": "constant(1)"}}',
    b'{"model": "tiny", "prompt": "a", "vllm_xargs": "constant(1)"}',
    b'{"model": "tiny", "prompt": "a", "vllm_xargs": {"tempering": "constant(\\u0000)"}}',
    b'{"model": "tiny", "prompt": "\\ud800", "vllm_xargs": {"tempering": "constant(1)"}}',
    b'{"model": "tiny", "prompt": [], "vllm_xargs": {"tempering": "constant(1)"}}',
    b'{"model": "tiny", "prompt": "a", "n": 0, "vllm_xargs": {"tempering": "constant(2)"}}',
)
