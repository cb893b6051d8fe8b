"""A plugin of vLLM, for tests alone: the policy `fault(step, after)` raises at a step of its life.

The server's path gets this folder and an entry point that names `register`.
"""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import dataclass
from typing import Any

STEPS = (
    "admission",  # reading the policy, in the process that takes requests in
    "parse",  # reading it again where it is sampled
    "stream",
    "start",
    "advance",
    "temperature",
    "nan",
    "negative",
    "shape",
    "text",
    "removal",  # a batch that loses a request: last, for it can't say which rows are whose
)


def register() -> None:
    """Make the policy known to the grammar, and `removal` raise in the worker."""
    from vllm.v1.sample.logits_processor import builtin

    from tempering.tokens import grammar
    from tempering.tokens.policy import POLICY_CLASSES, Policy
    from tempering.tokens.temper import one_per_row

    if "fault" in POLICY_CLASSES:
        return

    def fault(step: str) -> None:
        raise KeyError(f"injected at {step}")

    @dataclass(frozen=True, repr=False)
    class Fault(Policy):
        name, signature, summary, example = "fault", "fault(step, after)", "raises", "fault(0,0)"
        step: float | int
        after: float | int = 0

        def __post_init__(self) -> None:
            worker = multiprocessing.parent_process() is not None
            if self.at("admission") or (self.at("parse") and worker):
                fault(STEPS[int(self.step)])

        def at(self, step: str) -> bool:
            return STEPS[int(self.step)] == step

        @property
        def reads_tokens(self) -> bool:
            if self.at("stream") and multiprocessing.parent_process() is not None:
                fault("stream")
            return False

        def start(self, prompt: Any, **more: Any) -> Any:
            if self.at("start"):
                fault("start")
            return super().start(prompt, **more)

        def advance(self, state: Any, token: int) -> Any:
            if self.at("advance") and state.position >= self.after:
                fault("advance")
            return super().advance(state, token)

        def temperatures(self, energies: Any, states: Any) -> Any:
            due = any(state.position >= self.after for state in states)
            if due and (self.at("temperature") or self.at("text")):
                fault("temperature")
            value = {"nan": math.nan, "negative": -1.0}.get(STEPS[int(self.step)], 2.0)
            count = len(states) + 1 if due and self.at("shape") else len(states)
            return one_per_row([value if due else 1.0] * count, energies)

        def __str__(self) -> str:
            if self.at("text"):
                fault("text")
            return f"fault({self.step},{self.after})"

    grammar.POLICIES["fault"] = ("fault(step, after)", "raises", "fault(0,0)")
    own = builtin.process_dict_updates

    def updates(entries: Any, update: Any, new: Any) -> bool:
        ending = [] if not update else [entries.get(index) for index in update.removed]
        changed = bool(own(entries, update, new))
        for entry in ending:
            policy = getattr(getattr(entry, "stream", None), "policy", None)
            if isinstance(policy, Fault) and policy.at("removal"):
                fault("removal")
        return changed

    builtin.process_dict_updates = updates
