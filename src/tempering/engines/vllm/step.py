"""What a step of the engine says of its requests beside vLLM's results: failures and traces.

It takes the way of vLLM's own results. The worker that samples puts it into the output of its
step. There it is known which drafted tokens were accepted: what happened at a row that nothing was
sampled from is forgotten. The scheduler, in another process, ends the requests that failed
(`failing`) and hands the traces on (`tracing`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tempering.engines.vllm.failing import end_failed, failed_outputs
from tempering.engines.vllm.settings import PerEngine
from tempering.engines.vllm.streams import Draw
from tempering.engines.vllm.tracing import hand_over

_OUTCOME = "tempering_outcome"  # an attribute of a step's output


class Outcome(NamedTuple):
    """By the ids of requests: the reasons of those that failed, and the traces of new tokens."""

    failed: dict[str, str]
    traced: dict[str, list[dict[str, Any]]]


class Step:
    """What happened to the rows of one step, by the places of their requests.

    ahead: how many drafted tokens of its request stand before a row.
    """

    def __init__(self) -> None:
        self._failed: dict[int, tuple[int, str]] = {}
        self._draws: dict[int, dict[int, Draw]] = {}

    def fail(self, place: int, ahead: int, reason: str) -> None:
        """A row could not be tempered."""
        first = self._failed.get(place)
        if first is None or ahead < first[0]:
            self._failed[place] = ahead, reason

    def drew(self, place: int, ahead: int, draw: Draw) -> None:
        """The token of a row is drawn from this."""
        self._draws.setdefault(place, {})[ahead] = draw

    def places(self) -> Iterable[int]:
        """The places that anything happened at."""
        return self._failed.keys() | self._draws.keys()

    def outcome(self, names: Mapping[int, str], sampled: Mapping[str, Sequence[int]]) -> Outcome:
        """What happened, by the requests' ids, given the tokens that they got in the step."""
        failed = {
            names[place]: reason
            for place, (ahead, reason) in self._failed.items()
            if ahead < len(sampled[names[place]])
        }
        traced = {
            names[place]: [
                draws[ahead].entry(token)
                for ahead, token in enumerate(sampled[names[place]])
                if ahead in draws
            ]
            for place, draws in self._draws.items()
        }
        return Outcome(failed, {name: entries for name, entries in traced.items() if entries})


# For each engine in this process: a method that returns its last step, and forgets it. The
# reference is weak, because the method's owner, a processor, holds the configuration that is the
# key.
LAST_STEP: PerEngine[weakref.WeakMethod[Callable[[], Step]]] = PerEngine()


def sample_tokens(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """vLLM's `Worker.sample_tokens`, whose output has the outcome of the step."""
    output = original(self, *args, **kwargs)
    known = LAST_STEP.get(self.vllm_config)
    last_step = None if known is None else known()
    if last_step is None:
        return output
    step = last_step()
    names = {place: _request_at(self.model_runner, place) for place in step.places()}
    if not names or output is None:
        return output
    if not hasattr(output, "get_output"):
        return _with_outcome(output, step, names)
    later = output.get_output
    output.get_output = lambda: _with_outcome(later(), step, names)
    return output


def _with_outcome(output: Any, step: Step, names: Mapping[int, str]) -> Any:
    rows, tokens = output.req_id_to_index, output.sampled_token_ids
    sampled = {
        name: tokens[rows[name]] if tokens and name in rows else [] for name in names.values()
    }
    setattr(output, _OUTCOME, step.outcome(names, sampled))
    return output


def _request_at(runner: Any, place: int) -> str:
    """The id of the request in a row of the older model runner, or in a slot of the newer."""
    slots = getattr(runner, "req_states", None)
    return str(runner.input_batch.req_ids[place] if slots is None else slots.index_to_req_id[place])


def update_from_output(
    original: Callable[..., Any], self: Any, scheduled: Any, output: Any, *args: Any, **kwargs: Any
) -> Any:
    """vLLM's `Scheduler.update_from_output`, with what it does about a step's outcome."""
    outcome: Outcome | None = getattr(output, _OUTCOME, None)
    if outcome is None:
        return original(self, scheduled, output, *args, **kwargs)
    ended = end_failed(self, outcome.failed)
    outputs = original(self, scheduled, output, *args, **kwargs)
    failed_outputs(outputs, ended, outcome.failed)
    hand_over(outputs, outcome.traced)
    return outputs
