"""One model, many tabs: jobs take turns in a thread of their own, in the order that they came.

A job is a generator of events. Between two events it may be stopped, so whatever it holds (a
profile in force on the model) is given back within a step. A patient job, such as the meter of
cost, goes to the end of the queue after each of its events when others wait; it holds nothing
between two events.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from tempering.errors import RefusedError, TemperingError

Event = dict[str, Any]
Work = Callable[["Job"], Iterator[Event]]


class StoppedError(Exception):
    """The page that asked for a job doesn't want it any more."""


class Job:
    """One piece of work on the model, and the events that it has sent."""

    def __init__(self, kind: str, work: Work, *, patient: bool = False) -> None:
        self.kind, self.patient = kind, patient
        self._work = work
        self._events: Iterator[Event] | None = None
        self._loop = asyncio.get_running_loop()
        self._sent: asyncio.Queue[Event | None] = asyncio.Queue()
        self._stopped = threading.Event()

    def send(self, event: Event | None) -> None:
        """Send one event to the page, from any thread; None ends the stream."""
        try:
            self._loop.call_soon_threadsafe(self._sent.put_nowait, event)
        except RuntimeError:  # the loop is closed: the server has gone
            self._stopped.set()

    def stop(self) -> None:
        """Have the job end before its next step."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """Whether it was told to end."""
        return self._stopped.is_set()

    def check(self) -> None:
        """StoppedError when the job was told to end; for work that has no events of its own."""
        if self.stopped:
            raise StoppedError

    async def events(self) -> AsyncIterator[Event]:
        """Everything that the job sends; leaving the loop early stops it."""
        try:
            while (event := await self._sent.get()) is not None:
                yield event
        finally:
            self.stop()

    def step(self) -> bool:
        """Run to the next event; False when there is none. In the thread of the model."""
        try:
            self.check()
            if self._events is None:
                self._events = self._work(self)
            self.send(next(self._events))
            return True
        except (StopIteration, StoppedError):
            pass
        except Exception as error:
            self.send(message(error))
        self.close()
        return False

    def close(self) -> None:
        """Give back what the work holds, and end the stream. In the thread of the model."""
        close = getattr(self._events, "close", None)  # a plain iterator holds nothing
        if close is not None:
            try:
                close()
            except Exception:
                traceback.print_exc()
        self.send(None)


def message(error: Exception) -> Event:
    """An error as the page is told it; column: where in a text, from 1.

    A crash is a message too, and the terminal has the rest of it.
    """
    if not isinstance(error, TemperingError):
        traceback.print_exception(error)
        return {"type": "error", "message": f"{type(error).__name__}: {error}"}
    return {
        "type": "error",
        "message": str(error),
        "kind": type(error).__name__,
        "column": getattr(error, "column", None),
    }


class ModelTurns:
    """The thread that runs the model, and the jobs that wait for it."""

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="tempering-model", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> Job:
        """Queue a job; it is told of its place until it runs."""
        with self._changed:
            if self._closed:
                raise RefusedError("the console is being stopped")
            self._waiting.append(job)
            self._tell()
            self._changed.notify()
        return job

    def _tell(self) -> None:
        """Tell waiting jobs whose turn it is; the lock is held."""
        whose = None if self._running is None else self._running.kind
        wanted = [job for job in self._waiting if not job.stopped]
        for ahead, job in enumerate(wanted, start=int(self._running is not None)):
            if ahead:
                job.send({"type": "waiting", "ahead": ahead, "whose": whose or "another"})

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    left = list(self._waiting)
                    self._waiting.clear()
                    break
                job = self._running = self._waiting.popleft()
                self._tell()
            self._turn(job)
        for job in left:
            job.stop()
            job.step()

    def _turn(self, job: Job) -> None:
        """Run one job to its end, or a patient one until others wait."""
        job.send({"type": "turn"})
        while job.step():
            if job.patient and self._waiting:
                break
        else:
            job = None  # type: ignore[assignment]
        with self._changed:
            self._running = None
            if job is not None:
                self._waiting.append(job)

    def stop_all(self) -> None:
        """Stop what runs and what waits; nothing is added any more. May be called twice."""
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *([self._running] if self._running else [])):
                job.stop()
            self._changed.notify()

    def close(self, patience: float = 30.0) -> bool:
        """Stop everything and wait for the thread; whether it ended."""
        self.stop_all()
        self._thread.join(patience)
        return not self._thread.is_alive()
