"""The engine `local`: a transformers model in this process, many workers in one batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tempering.agents.contract import Call, Done, Progress, Reply, Stop
from tempering.agents.temperatures import ProviderRule, Sent, rule_for
from tempering.attention.profiles.profile import Profile
from tempering.engines.generating.row_sampling import BatchRow
from tempering.engines.generating.row_scores import score_rows
from tempering.engines.generating.rows import Written, generate_rows
from tempering.errors import InputError
from tempering.tokens.grammar import parse_policy
from tempering.tokens.policy import Policy


class LocalEngine:
    """Runs calls on a model in this process; every row has a temperature and a profile of its own.

    Parameters
    ----------
    model, tokenizer: of transformers, as `load_model` gives them.
    name: what a record calls the model.
    batch: rows at once.
    score: also tell each output's likelihood under the untempered model (one more pass).
    rule: its row in the table of temperatures. policy: strict, clamp or omit, for what it refuses.
    heard: told of every token but the last of a call as it is written, by the call's key.
    """

    name = "local"
    has_attention = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        batch: int = 64,
        score: bool = False,
        rule: ProviderRule | None = None,
        policy: str = "strict",
        heard: Callable[[str, int], None] | None = None,
    ) -> None:
        if batch < 1:
            raise InputError(f"a batch has 1 row or more, got {batch}")
        self.model = name
        self.network = model
        self.tokenizer = tokenizer
        self.batch = batch
        self.score = score
        self.rule = rule_for("local", name) if rule is None else rule
        self.policy = policy
        self.heard = heard
        self._profiles: dict[str, Profile] = {}
        self._policies: dict[str, Policy] = {}
        self._stopping: dict[str, tuple[int, ...]] = {}

    def temperature(self, normalised: float) -> float:
        """The sampling temperature that 0 (cold) to 1 (hot) stands for."""
        return self.rule.temperature(normalised)

    def check(self, calls: Sequence[Call]) -> None:
        """Raise for a temperature, a pattern or a length that the model can't take."""
        room = getattr(self.network.config.get_text_config(), "max_position_embeddings", math.inf)
        for call in calls:
            if call.temperature is not None and not 0 <= call.temperature < math.inf:
                raise InputError(f"{call.key}: temperature {call.temperature} is no temperature")
            self._sent(call)
            self.profile(call)
            self.token_policy(call)
            needed = self.count(call) + call.tokens
            if needed > room:
                raise InputError(
                    f"{call.key}: prompt and new tokens come to {needed}, the model has {room} "
                    "positions; shorten the task, or set fewer tokens"
                )

    def count(self, call: Call) -> int:
        """Tokens of the prompt."""
        return len(self.ids(call))

    def run(self, calls: Sequence[Call], done: Done, progress: Progress, stop: Stop) -> None:
        """Run the calls in batches; a call that can't run gets a reply with its error.

        A batch that has begun is finished.
        """
        ready: list[tuple[int, BatchRow]] = []
        room = getattr(self.network.config.get_text_config(), "max_position_embeddings", math.inf)
        for index, call in enumerate(calls):
            row = self._row(call)
            if len(row.prompt) + row.tokens > room:
                error = (
                    f"a prompt of {len(row.prompt)} tokens and {row.tokens} new ones don't fit "
                    f"the model's {room} positions"
                )
                done(index, Reply(None, error=error))
                continue
            ready.append((index, row))
        ready = _like_with_like(ready)
        for start in range(0, len(ready), self.batch):
            part = ready[start : start + self.batch]
            if stop():
                return

            places = tuple(index for index, _ in part)

            def told(row: int, count: int, newest: int, places: tuple[int, ...] = places) -> None:
                if self.heard is not None:
                    self.heard(calls[places[row]].key, newest)
                progress(places[row], "running", count)

            rows = [row for _, row in part]
            written = generate_rows(self.network, rows, progress=told)
            scores: list[float | None] = [None] * len(rows)
            if self.score:
                outputs = [own.tokens + ([] if own.end is None else [own.end]) for own in written]
                scores = score_rows(self.network, [row.prompt for row in rows], outputs)
            for (index, row), own, score in zip(part, written, scores, strict=True):
                text = self._text(calls[index], own)
                done(
                    index,
                    Reply(
                        output=text,
                        error=None if text else "the model wrote nothing",
                        temperature_sent=row.temperature,
                        note=self._sent(calls[index]).note,
                        seed_sent=True,
                        tokens_in=len(row.prompt),
                        tokens_out=len(own.tokens) + (own.end is not None),
                        finish="length" if own.end is None else "end",
                        score=score,
                    ),
                )

    def describe(self) -> dict[str, Any]:
        """Settings for the record."""
        return {"engine": self.name, "batch": self.batch}

    def profile(self, call: Call) -> Profile | None:
        """The profile that a call's attention pattern stands for on this model."""
        if call.attention is None:
            return None
        if call.attention not in self._profiles:
            self._profiles[call.attention] = Profile.from_schedule(call.attention, self.network)
        return self._profiles[call.attention]

    def token_policy(self, call: Call) -> Policy | None:
        """The policy by token that a call's text stands for under this tokenizer."""
        text = call.token_policy
        if text is None:
            return None
        if call.temperature != 1 or call.top_p is not None:
            raise InputError(
                f"{call.key}: a policy by token stands beside temperature 1 and no top_p, which "
                f"are its own; got {call.temperature} and {call.top_p}"
            )
        if text not in self._policies:
            made = parse_policy(text, self.tokenizer)
            if made.samples is not None:
                raise InputError(
                    f"{made} has a temperature for each of {made.samples} samples of a prompt, and "
                    "a call is one sample; give a policy without ladder"
                )
            self._policies[text] = made
        return self._policies[text]

    def ids(self, call: Call) -> Int[Tensor, " length"]:
        """Token ids of a call's prompt."""
        if call.raw or not self.tokenizer.chat_template:
            text = call.prompt if call.system is None else f"{call.system}\n\n{call.prompt}"
            return self.tokenizer(text, return_tensors="pt").input_ids[0]
        turns = [{"role": "user", "content": call.prompt}]
        if call.system is not None:
            turns.insert(0, {"role": "system", "content": call.system})
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        found = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        return found.to(torch.long)

    def _sent(self, call: Call) -> Sent:
        return self.rule.settle(call.temperature, call.top_p, self.policy, self.model)

    def _row(self, call: Call) -> BatchRow:
        sent = self._sent(call)
        return BatchRow(
            prompt=self.ids(call),
            temperature=1.0 if sent.temperature is None else sent.temperature,
            profile=self.profile(call),
            seed=call.seed,
            tokens=call.tokens,
            top_p=sent.top_p,
            stop=() if call.stop is None else self._stops(call.stop),
            policy=self.token_policy(call),
        )

    def _stops(self, stop: str) -> tuple[int, ...]:
        """The tokens whose text holds the character `stop`."""
        if len(stop) != 1:
            raise InputError(f"the engine local stops at one character, not at {stop!r}")
        if stop not in self._stopping:
            texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
            self._stopping[stop] = tuple(i for i, text in enumerate(texts) if stop in text)
        return self._stopping[stop]

    def _text(self, call: Call, own: Written) -> str:
        """The output up to the stop character, before which its last token may have text."""
        stopped = call.stop is not None and own.end is not None
        tokens = [*own.tokens, own.end] if stopped else own.tokens
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if call.stop is not None:
            text = text.split(call.stop)[0]
        return text.strip()


_HEAD = 16  # tokens of a prompt by which beginnings are compared


def _like_with_like(ready: Sequence[tuple[int, BatchRow]]) -> list[tuple[int, BatchRow]]:
    """Rows in an order that makes good batches.

    A batch reads the common beginning of its prompts once, and pads all rows to its longest
    prompt. So rows are sorted by the beginning that they share with others, then by length.
    """
    prompts = {tuple(row.prompt.tolist()) for _, row in ready}
    heads = Counter(prompt[:_HEAD] for prompt in prompts)

    def place(item: tuple[int, BatchRow]) -> tuple[tuple[int, ...], int]:
        head = tuple(item[1].prompt[:_HEAD].tolist())
        return (head if heads[head] > 1 else (), len(item[1].prompt))

    return sorted(ready, key=place)
