"""Answers of vLLM's engine, or its end: vLLM's own calls wait for ever for an engine that died.

An engine ends when a worker or its host is lost. vLLM's clients learn of it, but leave the calls
waiting that the engine has not answered yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

from tempering.errors import RefusedError

Answer = TypeVar("Answer")
_LOOK = 0.5  # seconds between looks at whether the engine lives
_ENDED = (
    "vLLM's engine has ended, since a worker or its host was lost (vLLM's log says more), so no "
    "profile is in use; start it again: it takes the profile that it is started with"
)


async def awaited(engine: Any, call: Awaitable[Answer]) -> Answer:
    """What a call to an engine of a server (`AsyncLLM`) answers.

    Raises
    ------
    RefusedError: the engine has ended, before the call or meanwhile, or failed to answer.
    """
    waiting = asyncio.ensure_future(call)
    try:
        while not waiting.done() and not engine.errored:
            await asyncio.wait({waiting}, timeout=_LOOK)
        return _result(waiting, lambda: bool(engine.errored))
    finally:
        waiting.cancel()


def answered(llm: Any, call: Callable[[], Answer]) -> Answer:
    """What a call to an `LLM` answers; otherwise as `awaited`."""
    resources = getattr(llm.llm_engine.engine_core, "resources", None)
    if resources is None:  # the engine is in this process, and ends with it
        return call()
    waiting: Future[Answer] = Future()

    def run() -> None:
        try:
            waiting.set_result(call())
        except Exception as error:
            waiting.set_exception(error)

    Thread(target=run, daemon=True).start()
    while not waiting.done() and not resources.engine_dead:
        try:
            waiting.exception(_LOOK)
        except TimeoutError:
            continue
    return _result(waiting, lambda: bool(resources.engine_dead))


def _result(call: Future[Answer] | asyncio.Future[Answer], ended: Callable[[], bool]) -> Answer:
    if not call.done():
        raise RefusedError(_ENDED)
    error = call.exception()
    if error is not None:
        raise RefusedError(
            _ENDED if ended() else f"vLLM's engine failed to answer: {str(error) or repr(error)}"
        ) from error
    return call.result()
