"""Swapping the profile of a running engine on all its workers, without stale keys and values.

Keys and values in the cache depend on the temperatures of the layers below, so a swap empties the
prefix cache. A request that began under one profile must not end under another, so a swap of a
server waits for the requests in flight, and a swap of an `LLM` that is stepped by hand is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from tempering import errors
from tempering.attention.profiles.profile import Profile
from tempering.engines.vllm.alive import answered, awaited
from tempering.engines.vllm.layer_betas import layer_number
from tempering.errors import RefusedError, TemperingError


def swap_profile(llm: Any, profile: Profile | None) -> str:
    """Give a running `vllm.LLM` another profile, or none.

    Parameters
    ----------
    llm: started with tempering configured, and with the worker extension.
    profile: None for the model's own attention.

    Returns
    -------
    The digest of the profile now in use, the same on every worker.

    Raises
    ------
    RefusedError: requests are in flight, the workers answer differently, or the engine has ended.
    ProfileError: the profile fits another model; then no worker has changed.
    """
    if llm.llm_engine.has_unfinished_requests():
        raise RefusedError(
            "requests are in flight and would end under another profile than they began under; "
            "swap when they are finished"
        )
    name = agreed_answer(asked_of(llm, "tempering_stage", profile_json(profile)))
    if not answered(llm, lambda: llm.reset_prefix_cache(reset_connector=True)):
        raise RefusedError(
            "vLLM could not empty its prefix cache, whose keys and values depend on the profile in "
            "use; nothing was changed"
        )
    return agreed_answer(asked_of(llm, "tempering_commit", name))


def asked_of(llm: Any, method: str, *args: Any) -> list[Any]:
    """What every worker of a `vllm.LLM` answers to a method of the worker extension."""
    return answered(llm, lambda: llm.collective_rpc(method, timeout=_patience(), args=args))


async def swap_served(engine: Any, profile: Profile | None) -> str:
    """Give the engine of a server (`AsyncLLM`) another profile; otherwise as `swap_profile`.

    New requests wait, those in flight finish, then all workers change and the cache is emptied.
    Where it isn't sure that all have changed or none has, requests go on waiting.
    """
    name = agreed_answer(await asked_of_served(engine, "tempering_stage", profile_json(profile)))
    if await awaited(engine, engine.is_paused()):
        raise RefusedError(
            "the engine is paused, by someone else or since a swap broke off; resume it or start "
            "it again, then swap"
        )
    unsure = False
    try:
        # Ends when no request is in flight and the caches are empty; raises when they can't be.
        await awaited(engine, engine.pause_generation(mode="wait", clear_cache=True))
        unsure = True
        answers = await asked_of_served(engine, "tempering_commit", name)
        unsure = len({tuple(answer) for answer in answers}) > 1
        return agreed_answer(answers)
    except TemperingError as error:
        if not unsure or engine.errored:
            raise
        raise RefusedError(
            f"{error}; some workers may have changed and others not, so this server takes up no "
            "request until it is started again"
        ) from error
    finally:
        if not unsure and not engine.errored:
            await awaited(engine, engine.resume_generation())


async def asked_of_served(engine: Any, method: str, *args: Any) -> list[Any]:
    """What every worker of a server answers to a method of the worker extension."""
    call = engine.collective_rpc(method, timeout=_patience(), args=args)
    return list(await awaited(engine, call))


def _patience() -> float:
    """Seconds for all workers to answer: vLLM's own for a step.

    Without a bound, vLLM would wait for ever for a worker on another host that was lost meanwhile.
    """
    return float(os.environ.get("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", 300))


def profile_json(profile: Profile | None) -> str | None:
    """A profile as one line of JSON, as it is sent to the workers."""
    return None if profile is None else json.dumps(profile.to_json())


def agreed_answer(answers: Sequence[Any]) -> str:
    """The one answer of all workers; their error, or RefusedError when they differ."""
    given = sorted(set(_texts(answers)))
    if len(given) != 1:
        raise RefusedError(
            f"the workers answer differently: {', '.join(given)}; restart the engine, which takes "
            "the profile of its configuration on all of them"
        )
    return given[0]


def all_layers(answers: Sequence[Any]) -> list[list[Any]]:
    """[name, heads, key-value heads] of every attention layer, in order of depth.

    answers: of `tempering_layers`; the ranks of a pipeline stage answer alike, its stages for
        layers of their own. Raises the workers' error, or RefusedError when ranks differ.
    """
    shapes: dict[str, list[Any]] = {}
    for text in _texts(answers):
        for name, *shape in json.loads(text):
            if shapes.setdefault(name, shape) != shape:
                raise RefusedError(
                    f"the workers answer differently: {name} has {shapes[name][0]} heads on one "
                    f"rank, {shape[0]} on another"
                )
    return [[name, *shapes[name]] for name in sorted(shapes, key=layer_number)]


def _texts(answers: Sequence[Any]) -> list[str]:
    for kind, message in answers:
        if kind:
            raise getattr(errors, kind)(message)
    return [str(text) for _, text in answers]
