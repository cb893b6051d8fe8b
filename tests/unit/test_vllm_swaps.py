"""A swap ends in time: all workers have changed, or none has, or nothing more is served."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tempering.attention.profiles.profile import Profile
from tempering.engines.vllm import alive
from tempering.engines.vllm.swap import swap_profile, swap_served
from tempering.engines.vllm.worker import digest
from tempering.errors import InputError, ProfileError, RefusedError

PROFILE = Profile.from_matrix(torch.full((2, 4), 0.5))
NAME = digest(PROFILE)
BOUND = 20.0  # seconds, for what would wait for ever


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(alive, "_LOOK", 0.02)


class Engine:
    """A server's, with two workers; `dies_at` and `fails_at` name the call in which it does so.

    An engine that died leaves its calls unanswered, as vLLM's does.
    """

    def __init__(self, dies_at: str = "", fails_at: str = "", **answers: Any) -> None:
        self.dies_at, self.fails_at, self.answers = dies_at, fails_at, answers
        self.errored = self.paused = False
        self.calls: list[str] = []
        self.bounds: set[float] = set()

    async def _called(self, name: str, answer: Any) -> Any:
        self.calls.append(name)
        if name == self.fails_at:
            raise Exception("Call to collective_rpc method failed: cancelled")
        if name == self.dies_at:
            self.errored = True
            await asyncio.Event().wait()
        return answer

    async def collective_rpc(self, method: str, timeout: float, args: tuple[Any, ...]) -> Any:
        self.bounds.add(timeout)
        name = method.removeprefix("tempering_")
        return await self._called(name, self.answers.get(name, [["", NAME]] * 2))

    async def is_paused(self) -> bool:
        return await self._called("is_paused", self.paused)

    async def pause_generation(self, **how: Any) -> None:
        assert how == {"mode": "wait", "clear_cache": True}
        self.paused = True
        await self._called("pause", None)

    async def resume_generation(self) -> None:
        await self._called("resume", None)
        self.paused = False

    def swap(self) -> str:
        return asyncio.run(asyncio.wait_for(swap_served(self, PROFILE), BOUND))


def test_a_swap_goes_through_its_steps():
    engine = Engine()
    assert engine.swap() == NAME
    assert engine.calls == ["stage", "is_paused", "pause", "commit", "resume"]
    assert not engine.paused


@pytest.mark.parametrize("step", ["stage", "is_paused", "pause", "commit", "resume"])
def test_an_engine_that_dies_in_a_swap_ends_it(step):
    engine = Engine(dies_at=step)
    with pytest.raises(RefusedError, match="vLLM's engine has ended.*no profile is in use"):
        engine.swap()
    assert engine.calls[-1] == step  # nothing is asked of a dead engine


def test_an_engine_that_was_dead_before():
    engine = Engine()
    engine.errored = True
    with pytest.raises(RefusedError, match="has ended"):
        engine.swap()


@pytest.mark.parametrize("step", ["stage", "is_paused", "pause"])
def test_a_failure_before_any_worker_changes_leaves_the_server_running(step):
    engine = Engine(fails_at=step)
    with pytest.raises(RefusedError, match="failed to answer: .*cancelled") as told:
        engine.swap()
    assert "may have changed" not in str(told.value)
    assert not engine.paused and "commit" not in engine.calls


@pytest.mark.parametrize(
    "answers",
    [
        None,  # an error instead of answers
        [["", NAME], ["", "other"]],
        [["", NAME], ["RefusedError", "nothing is staged"]],
        [["InputError", "broken"], ["", NAME]],
    ],
)
def test_where_some_workers_may_have_changed_no_request_is_taken_up(answers):
    engine = Engine(fails_at="commit") if answers is None else Engine(commit=answers)
    with pytest.raises(RefusedError, match="takes up no request until it is started again"):
        engine.swap()
    assert engine.paused and engine.calls[-1] == "commit"
    with pytest.raises(RefusedError, match="paused, by someone else or since a swap broke off"):
        engine.swap()


def test_what_all_workers_refuse_changes_nothing():
    engine = Engine(commit=[["RefusedError", "nothing is staged"]] * 2)
    with pytest.raises(RefusedError, match="^nothing is staged$"):
        engine.swap()
    assert not engine.paused
    engine = Engine(stage=[["", NAME], ["ProfileError", "made for another model"]])
    with pytest.raises(ProfileError, match="another model"):
        engine.swap()
    assert engine.calls == ["stage"]


@pytest.mark.parametrize(("given", "bound"), [(None, 300.0), ("45", 45.0)])
def test_workers_have_as_long_to_answer_as_for_a_step(monkeypatch, given, bound):
    """vLLM itself would wait for ever for one on another host that was lost."""
    monkeypatch.delenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", raising=False)
    if given is not None:
        monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", given)
    served, offline = Engine(), Offline()
    assert served.swap() == swap_profile(offline, PROFILE) == NAME
    assert served.bounds == offline.bounds == {bound}


class Offline:
    """A `vllm.LLM`, whose engine runs in another process unless it has no `resources`."""

    def __init__(self, dies_at: str = "", local: bool = False) -> None:
        self.dies_at, self.threads, self.calls = dies_at, set(), []
        self.bounds: set[float] = set()
        self.resources = SimpleNamespace(engine_dead=False)
        core = SimpleNamespace() if local else SimpleNamespace(resources=self.resources)
        self.llm_engine = SimpleNamespace(engine_core=core, has_unfinished_requests=lambda: False)

    def _called(self, name: str, answer: Any) -> Any:
        self.calls.append(name)
        self.threads.add(threading.current_thread())
        if name == self.dies_at:
            self.resources.engine_dead = True
            threading.Event().wait(BOUND)  # a thread that nobody waits for
        return answer

    def collective_rpc(self, method: str, timeout: float, args: tuple[Any, ...]) -> Any:
        self.bounds.add(timeout)
        return self._called(method.removeprefix("tempering_"), [("", NAME)] * 2)

    def reset_prefix_cache(self, reset_connector: bool) -> bool:
        return self._called("reset", True)


@pytest.mark.parametrize("local", [True, False])
def test_an_engine_of_this_process_or_another(local):
    llm = Offline(local=local)
    assert swap_profile(llm, PROFILE) == NAME
    assert llm.calls == ["stage", "reset", "commit"]
    assert (llm.threads == {threading.current_thread()}) == local


@pytest.mark.parametrize("step", ["stage", "reset", "commit"])
def test_an_engine_without_a_server_that_dies_in_a_swap(step):
    llm = Offline(dies_at=step)
    begun = time.monotonic()
    with pytest.raises(RefusedError, match="has ended"):
        swap_profile(llm, PROFILE)
    assert time.monotonic() - begun < BOUND / 2
    assert llm.calls[-1] == step


@pytest.mark.parametrize("error", [ValueError("no"), TimeoutError(), InputError("bad")])
def test_what_a_call_raises_is_told(error):
    llm = Offline()

    def fails() -> None:
        raise error

    with pytest.raises(RefusedError, match=str(error) or "TimeoutError"):
        alive.answered(llm, fails)
