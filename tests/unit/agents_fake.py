"""An engine that says what a function says, and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tempering.agents.contract import Call, Done, Progress, Reply, Stop


class FakeEngine:
    """answer: call -> text, a whole reply, or an exception for a call that fails."""

    name = "fake"
    model = "fake-1"

    def __init__(
        self,
        answer: Callable[[Call], str | Reply | Exception] | None = None,
        *,
        attention: bool = True,
    ) -> None:
        self.answer = answer or (lambda call: f"said {call.key}")
        self.has_attention = attention
        self.asked: list[Call] = []

    def temperature(self, normalised: float) -> float:
        return 2 * normalised

    def check(self, calls: Sequence[Call]) -> None:
        pass

    def count(self, call: Call) -> int:
        return len(call.prompt.split())

    def run(self, calls: Sequence[Call], done: Done, progress: Progress, stop: Stop) -> None:
        for index, call in enumerate(calls):
            if stop():
                return
            self.asked.append(call)
            progress(index, "running", 0)
            said = self.answer(call)
            if isinstance(said, Reply):
                done(index, said)
                continue
            if isinstance(said, Exception):
                done(index, Reply(None, error=str(said), temperature_sent=call.temperature))
                continue
            done(
                index,
                Reply(
                    said,
                    temperature_sent=call.temperature,
                    seed_sent=True,
                    tokens_in=self.count(call),
                    tokens_out=len(said.split()),
                    finish="end",
                    score=-float(call.seed % 7) / 10,
                ),
            )

    def describe(self) -> dict[str, Any]:
        return {"engine": self.name}
