"""Jobs on one model take turns; a stopped one ends within a step and gives back what it holds."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest

from tempering.console.serving import bound
from tempering.console.turns import Job, ModelTurns
from tempering.errors import InputError, RefusedError, ScheduleError


@pytest.fixture
def turns():
    found = ModelTurns()
    yield found
    assert found.close()


def run(work):
    return asyncio.run(asyncio.wait_for(work, 30))


def counting(count, held=None, seen=None):
    """Work of `count` events that notes that it was begun and given back."""

    def work(job):
        try:
            for i in range(count):
                if seen is not None:
                    seen.append(i)
                yield {"type": "count", "i": i}
        finally:
            if held is not None:
                held.append(threading.current_thread().name)

    return work


async def all_of(job):
    return [event async for event in job.events()]


def test_a_job_sends_its_turn_its_events_and_an_end(turns):
    async def main():
        return await all_of(turns.add(Job("a", counting(3))))

    events = run(main())
    assert [e["type"] for e in events] == ["turn", "count", "count", "count"]


def test_jobs_run_in_the_order_that_they_came_and_are_told_of_it(turns):
    order, gate = [], threading.Event()

    def work(name):
        def inner(job):
            gate.wait(10)
            order.append(name)
            yield {"type": "ran"}

        return inner

    async def main():
        jobs = [turns.add(Job(name, work(name))) for name in "abc"]
        await asyncio.sleep(0.1)
        gate.set()
        return await asyncio.gather(*map(all_of, jobs))

    found = run(main())
    assert order == ["a", "b", "c"]
    waits = [[(e["ahead"], e["whose"]) for e in each if e["type"] == "waiting"] for each in found]
    assert waits[0] == []
    assert waits[1][-1] == (1, "a")
    assert waits[2][-1] == (1, "b") and (2, "a") in waits[2]


def test_leaving_the_stream_stops_the_job_within_a_step(turns):
    held, seen = [], []

    async def main():
        job = turns.add(Job("a", counting(10**9, held, seen)))
        events = job.events()
        async for event in events:
            if event["type"] == "count":
                break
        await events.aclose()
        assert job.stopped
        # The model is free for the next one.
        return await all_of(turns.add(Job("b", counting(1))))

    assert [e["type"] for e in run(main())][-1] == "count"
    assert held == ["tempering-model"]
    assert len(seen) < 10**6


def test_a_job_that_was_stopped_while_it_waited_never_begins(turns):
    gate, begun = threading.Event(), []

    def slow(job):
        gate.wait(10)
        yield {"type": "ran"}

    async def main():
        first = turns.add(Job("a", slow))
        second = turns.add(Job("b", counting(3, seen=begun)))
        third = turns.add(Job("c", counting(1)))
        second.stop()
        gate.set()
        return await asyncio.gather(*map(all_of, (first, second, third)))

    found = run(main())
    assert begun == []
    assert "count" not in [e["type"] for e in found[1]]
    assert found[2][-1]["type"] == "count"


def test_a_patient_job_lets_others_pass_after_each_event(turns):
    order, gate = [], threading.Event()

    def patient(job):
        for i in range(4):
            order.append(f"p{i}")
            if i == 0:
                gate.wait(10)
            yield {"type": "count", "i": i}

    def other(job):
        order.append("b")
        yield {"type": "ran"}

    async def main():
        first = turns.add(Job("meter", patient, patient=True))
        while not order:
            await asyncio.sleep(0.01)
        second = turns.add(Job("b", other))
        gate.set()
        return await asyncio.gather(all_of(first), all_of(second))

    found = run(main())
    assert order == ["p0", "b", "p1", "p2", "p3"]
    assert [e["i"] for e in found[0] if e["type"] == "count"] == [0, 1, 2, 3]


def test_errors_are_the_last_event_and_the_next_job_runs(turns, capsys):
    def refused(job):
        yield {"type": "ran"}
        error = ScheduleError("column 3: no")
        error.column = 3
        raise error

    def crashed(job):
        raise RuntimeError("CUDA error: out of luck")
        yield {}

    async def main():
        jobs = [Job("a", refused), Job("b", crashed), Job("c", counting(1))]
        return await asyncio.gather(*(all_of(turns.add(job)) for job in jobs))

    found = run(main())
    told = found[0][-1]
    assert (told["message"], told["column"], told["kind"]) == ("column 3: no", 3, "ScheduleError")
    assert found[1][-1]["message"] == "RuntimeError: CUDA error: out of luck"
    assert found[2][-1]["type"] == "count"
    assert "out of luck" in capsys.readouterr().err  # the terminal has the traceback


def test_work_without_events_is_stopped_by_its_own_check(turns):
    def work(job):
        job.send({"type": "begun"})
        while True:
            job.check()
        yield {}

    async def main():
        job = turns.add(Job("a", work))
        async for event in job.events():
            if event["type"] == "begun":
                break
        job.stop()
        return await all_of(turns.add(Job("b", counting(1))))

    assert run(main())[-1]["type"] == "count"


def test_closing_ends_what_runs_and_what_waits_and_leaves_no_thread():
    turns, held = ModelTurns(), []

    async def main():
        jobs = [turns.add(Job(name, counting(10**9, held))) for name in "ab"]
        await asyncio.sleep(0.05)
        assert await asyncio.to_thread(turns.close)
        with pytest.raises(RefusedError, match="being stopped"):
            turns.add(Job("c", counting(1)))
        return await asyncio.gather(*map(all_of, jobs))

    found = run(main())
    assert held == ["tempering-model"]
    assert all(e["type"] != "count" for e in found[1])
    assert not turns._thread.is_alive()
    assert turns.close()  # twice is harmless


def test_a_loop_that_is_gone_stops_the_job(turns):
    """The server's loop may end while a step is computed."""

    async def main():
        return turns.add(Job("a", counting(10**9)))

    job = run(main())
    for _ in range(1000):
        if job.stopped and turns._running is None:
            break
        threading.Event().wait(0.01)
    assert turns._running is None


def test_a_port_in_use_is_the_next_one():
    first = bound("127.0.0.1", 0)
    port = first.getsockname()[1]
    second = bound("127.0.0.1", port)
    assert port < second.getsockname()[1] <= port + 19
    first.close()
    second.close()


def test_hosts_that_can_not_be_bound():
    with pytest.raises(InputError, match="no such address|can't be bound"):
        bound("no.such.host.invalid", 0)
    with pytest.raises(InputError, match="can't be bound"):
        bound("203.0.113.7", 0)


def test_no_free_port_is_said(monkeypatch):
    class Taken(socket.socket):
        def bind(self, address):
            import errno

            raise OSError(errno.EADDRINUSE, "in use")

    monkeypatch.setattr(socket, "socket", Taken)
    with pytest.raises(InputError, match="none of the ports 7861 to 7880 is free"):
        bound("127.0.0.1", 7861)
    with pytest.raises(InputError, match="none of the ports 65530 to 65535"):
        bound("127.0.0.1", 65530)


def test_a_page_that_leaves_before_its_answer_begins_stops_the_job(turns):
    """The stream is never read then, and so can't notice."""
    from tempering.console.routes import _Stream

    async def main():
        held, seen = [], []
        job = turns.add(Job("a", counting(10**9, held, seen)))

        async def gone(*_):
            raise OSError("the connection is closed")

        scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "extensions": {}}
        with pytest.raises(Exception, match="|closed"):
            await _Stream(job)(scope, gone, gone)
        assert job.stopped
        return await all_of(turns.add(Job("b", counting(1))))

    assert run(main())[-1]["type"] == "count"
