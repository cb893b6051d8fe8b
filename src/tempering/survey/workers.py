"""Try many architectures, each in a process that may crash or hang without losing the others."""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tempering.survey.families import OTHER, Task
from tempering.survey.judge import NOT_BUILT, Verdict, judge


def state_of_code() -> dict[str, str]:
    """What verdicts hold for: releases of the libraries, and a hash of the code that is tried."""
    import tempering.attention
    import tempering.survey

    digest = hashlib.sha256()
    for package in (tempering.attention, tempering.survey):
        folder = Path(str(package.__file__)).parent
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    releases = {name: version(name) for name in ("torch", "transformers")}
    return {**releases, "code": digest.hexdigest()}


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    task: Task | None = None
    since: float = 0.0


def survey(
    tasks: Sequence[Task],
    *,
    workers: int = 2,
    limit: float = 120.0,
    progress: Callable[[int, int, Verdict], None] | None = None,
) -> list[Verdict]:
    """The verdicts on the tasks, in their order.

    Parameters
    ----------
    workers: processes, of one thread each. limit: seconds for one architecture.
    progress: called with (done, in all, the verdict).
    """
    found: dict[Task, Verdict] = {}
    for verdict in _verdicts(list(tasks), workers, limit):
        found[verdict.task] = verdict
        if progress is not None:
            progress(len(found), len(tasks), verdict)
    return [found[task] for task in tasks]


def _verdicts(waiting: list[Task], count: int, limit: float) -> Iterator[Verdict]:
    context = multiprocessing.get_context("spawn")
    workers = [_start(context) for _ in range(min(count, len(waiting)))]
    waiting.reverse()
    try:
        while waiting or any(worker.task for worker in workers):
            for worker in workers:
                if worker.task is None and waiting:
                    worker.task, worker.since = waiting.pop(), time.monotonic()
                    worker.pipe.send(worker.task)
            wait([worker.pipe for worker in workers if worker.task], timeout=1.0)
            for index, worker in enumerate(workers):
                task = worker.task
                if task is None:
                    continue
                problem = ""
                if worker.pipe.poll():
                    try:
                        yield worker.pipe.recv()
                        worker.task = None
                        continue
                    except EOFError:
                        problem = "the process that tried it died"
                elif time.monotonic() - worker.since > limit:
                    problem = f"it took more than {limit:g} s"
                if problem:
                    known: Any = {**task._asdict(), "family": OTHER}
                    failed = Verdict(**known, eager=NOT_BUILT, sdpa=NOT_BUILT, reason=problem)
                    _stop(worker)
                    workers[index] = _start(context)
                    yield failed
    finally:
        for worker in workers:
            _stop(worker)


def _start(context: Any) -> _Worker:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()


def _serve(pipe: Connection) -> None:
    """A worker: tasks in, verdicts out, on one thread."""
    import torch

    # Ctrl-C reaches every process; the one that started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(judge(task))
