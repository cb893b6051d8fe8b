"""Run a plan: stage after stage, round after round; each worker's row is kept when it is done.

    explore -> consolidate -> execute -> (the next round) explore ...

The outputs of a stage are the notes of the next one. A failed worker is a row with an error, and
the others go on; a stage whose workers all fail is a StageError. Rows are kept in a ledger under
"ROUND/STAGE/WORKER", so a run that was cut off goes on with the rows that it finds there.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, SupportsIndex

from tempering.agents import prompts
from tempering.agents.contract import Call, Engine, Ledger, Memory, Reply, StageError, Stop, never
from tempering.agents.plan import Plan, Stage
from tempering.counts import whole_number
from tempering.errors import DataError, InputError
from tempering.files import check_utf8

Row = dict[str, Any]
# (round, stage, worker, state, count); states as in `Progress`, and "done", "failed", "kept".
Watch = Callable[[int, Stage, int, str, int], None]


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    stages: as the section `stages` of a record. answer: of the last finished round, or None.
    tokens: in and out, over all workers. stopped: None when complete, else "budget" or
    "interrupted".
    """

    stages: list[Row]
    answer: str | None
    tokens: int
    stopped: str | None = None


def run_plan(
    plan: Plan,
    task: str,
    engine: Engine,
    *,
    rounds: SupportsIndex = 1,
    seed: SupportsIndex = 0,
    budget: SupportsIndex | None = None,
    ledger: Ledger | None = None,
    watch: Watch | None = None,
    stop: Stop = never,
) -> Outcome:
    """Run the stages of a plan on a task.

    Parameters
    ----------
    rounds: how often; a later round starts from the answer of the one before.
    seed: worker w of a stage draws from a seed made of this one, the round, the stage and w.
    budget: tokens, in and out. A worker that might not fit is not started. Each is reckoned at its
        prompt and all its new tokens, and tokens for one worker in each later stage of the round
        are kept in reserve, so that a round that starts ends in an answer.
    ledger: finished rows by name; the run goes on with them. watch: told of every change.
    stop: asked often; when it turns true, no new worker starts.

    Raises
    ------
    StageError: a stage whose workers all failed (its rows are in the ledger). InputError: an empty
    task, a budget too small for one worker a stage, an amplitude on an engine without attention.
    What `engine.check` raises, before anything is sent.
    """
    if not task.strip():
        raise InputError("the task is empty; say what is to be done")
    check_utf8(task, "the task")
    rounds, seed = whole_number(rounds, "rounds", 1), whole_number(seed, "seed")
    budget = None if budget is None else whole_number(budget, "budget", 0)
    runner = _Runner(plan, task, engine, seed, budget, Memory() if ledger is None else ledger,
                     watch or _no_watch, stop)  # fmt: skip
    runner.check(rounds)
    return runner.run(rounds)


def collect(plan: Plan, ledger: Ledger, rounds: int) -> list[Row]:
    """The section `stages` of a record from the rows of a ledger, whatever is missing."""
    stages = []
    for turn in range(1, rounds + 1):
        for stage in plan.stages:
            names = [_name(turn, stage, i) for i in range(stage.width)]
            workers = [ledger[name] for name in names if name in ledger]
            if workers:
                row = {"stage": stage.name, "width": stage.width, "round": turn}
                stages.append({**row, "workers": workers})
    return stages


def rows_of(stages: list[Row]) -> Iterator[tuple[str, Row]]:
    """(name in a ledger, row) of every worker in a record's section `stages`.

    Raises DataError for a row that lacks what a run needs to go on with it.
    """
    for stage in stages:
        for worker in stage["workers"]:
            missing = [name for name in ("worker", "of", "error", "output") if name not in worker]
            if stage.get("round") is None:
                missing.append("round")
            if missing:
                raise DataError(
                    f"the stage '{stage['stage']}' of the record has a worker without "
                    f"{', '.join(missing)}, so that no run can go on with it"
                )
            yield f"{stage['round']}/{stage['stage']}/{worker['worker']}", worker


def spent(stages: list[Row]) -> int:
    """Tokens in and out of all workers, replies that were thrown away included."""
    rows = [row for stage in stages for row in stage["workers"]]
    return sum(_tokens(row) for row in rows)


def _tokens(row: Row) -> int:
    names = ("tokens_in", "tokens_out", "tokens_discarded")
    return sum(row.get(name) or 0 for name in names)


def worker_seed(seed: int, *names: object) -> int:
    """31 bits from a seed and names, the same on every machine."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def _name(turn: int, stage: Stage, worker: int) -> str:
    return f"{turn}/{stage.name}/{worker + 1}"


def _template(turn: int, stage: Stage) -> str:
    return stage.again if turn > 1 and stage.again is not None else stage.prompt


def _no_watch(turn: int, stage: Stage, worker: int, state: str, count: int) -> None:
    pass


@dataclass
class _Runner:
    plan: Plan
    task: str
    engine: Engine
    seed: int
    budget: int | None
    ledger: Ledger
    watch: Watch
    stop: Stop

    def check(self, rounds: int) -> None:
        for stage in self.plan.stages:
            if stage.amplitude != (1.0, 1.0) and not self.engine.has_attention:
                raise InputError(
                    f"stage '{stage.name}' tempers attention (amplitude "
                    f"{max(stage.amplitude):g}), which the engine {self.engine.name} can't; set "
                    "amplitude: 1 in the plan, give --amplitude 1, or use the engine local"
                )
            self.engine.check(self.calls(1, stage, [""], "", stage.width))
        if self.budget is not None:
            least = self._reserve(1, 0, 0, "")
            if least > self.budget and not self._used(rounds):
                raise InputError(
                    f"a budget of {self.budget} tokens is too small: one worker in each stage may "
                    f"take {least}; raise it, or lower 'tokens' in the plan"
                )

    def run(self, rounds: int) -> Outcome:
        answer, result = "", None
        notes: list[str] = []
        for turn in range(1, rounds + 1):
            for index, stage in enumerate(self.plan.stages):
                halted = self._stage(turn, index, stage, notes, answer, rounds)
                workers = self._rows(turn, stage)
                if halted:
                    return self._outcome(rounds, result, halted)
                notes = [row["output"] for row in workers if row["error"] is None]
                if not notes:
                    reasons = sorted({str(row["error"]) for row in workers})
                    raise StageError(
                        f"all {len(workers)} workers of stage '{stage.name}' (round {turn}) "
                        f"failed: {'; '.join(reasons[:3])}. What was done before is kept; resume "
                        "the record when the cause is mended"
                    )
            answer = result = notes[0]
        return self._outcome(rounds, result, None)

    def _outcome(self, rounds: int, answer: str | None, stopped: str | None) -> Outcome:
        stages = collect(self.plan, self.ledger, rounds)
        return Outcome(stages, answer, spent(stages), stopped)

    def _stage(
        self, turn: int, index: int, stage: Stage, notes: list[str], answer: str, rounds: int
    ) -> str | None:
        """Run the missing workers of one stage. Returns why the run halts here, or None."""
        found = self._rows(turn, stage)
        later = self._begun_after(turn, index, rounds)
        if found:  # before the run was cut off, the notes were dealt to this many workers
            workers = found[0]["of"]
        elif self.stop():
            return "interrupted"
        else:
            workers = self._affordable(turn, index, notes, answer, rounds)
        if not workers:
            return "budget"
        calls = self.calls(turn, stage, notes, answer, workers)
        rungs = stage.rungs()
        # Once a later stage has read this one, a failed worker stays failed.
        keep = {row["worker"] - 1 for row in found if row["error"] is None or later}
        for worker in sorted(keep):
            self.watch(turn, stage, worker, "kept", 0)
        missing = [] if later else [i for i in range(workers) if i not in keep]
        if not missing:
            return None
        if self.stop():
            return "interrupted"
        made = 0

        def done(i: int, reply: Reply) -> None:
            nonlocal made
            made += 1
            worker = missing[i]
            key = calls[worker].key
            row = _row(worker, workers, calls[worker], reply, rungs[worker])
            if key in self.ledger:  # this worker failed before; that try's tokens still count
                row["tokens_discarded"] += _tokens(self.ledger[key])
            self.ledger.put(key, row)
            state = "done" if reply.error is None else "failed"
            self.watch(turn, stage, worker, state, reply.tokens_out)

        def progress(i: int, state: str, count: int) -> None:
            self.watch(turn, stage, missing[i], state, count)

        self.engine.run([calls[i] for i in missing], done, progress, self.stop)
        return "interrupted" if made < len(missing) else None

    def calls(
        self, turn: int, stage: Stage, notes: list[str], answer: str, workers: int
    ) -> list[Call]:
        """The calls of the first `workers` of a stage; the notes are dealt out among them."""
        template = _template(turn, stage)
        read = prompts.deal(notes, workers)
        found = []
        patterns = self.plan.patterns(stage)
        for worker, (normalised, _) in enumerate(stage.rungs()[:workers]):
            found.append(
                Call(
                    key=_name(turn, stage, worker),
                    prompt=prompts.fill(template, self.task, read[worker], answer),
                    system=stage.system,
                    temperature=self.engine.temperature(normalised),
                    top_p=stage.top_p,
                    attention=patterns[worker],
                    tokens=stage.tokens,
                    seed=worker_seed(self.seed, turn, stage.name, worker),
                )
            )
        return found

    def _rows(self, turn: int, stage: Stage) -> list[Row]:
        names = [_name(turn, stage, i) for i in range(stage.width)]
        return [self.ledger[name] for name in names if name in self.ledger]

    def _begun_after(self, turn: int, index: int, rounds: int) -> bool:
        """Whether a later stage has rows, which were made from the rows of this one."""
        places = [(t, s) for t in range(turn, rounds + 1) for s in range(len(self.plan.stages))]
        after = places[places.index((turn, index)) + 1 :]
        return any(self._rows(t, self.plan.stages[s]) for t, s in after)

    def _used(self, rounds: int) -> int:
        return spent(collect(self.plan, self.ledger, rounds))

    def _reserve(self, turn: int, index: int, notes: int, answer: str) -> int:
        """The most tokens of one worker in each stage from `index` on.

        notes: tokens of the notes that the first of these stages reads.
        """
        total = 0
        for stage in self.plan.stages[index:]:
            call = self.calls(turn, stage, [""], answer, 1)[0]
            read = _template(turn, stage).count("{notes}")
            total += self.engine.count(call) + read * notes + stage.tokens
            notes = stage.tokens
        return total

    def _affordable(self, turn: int, index: int, notes: list[str], answer: str, rounds: int) -> int:
        """The most workers that fit the budget beside the reserve for the later stages."""
        stage = self.plan.stages[index]
        if self.budget is None:
            return stage.width
        left = self.budget - self._used(rounds)

        def need(workers: int) -> int:
            calls = self.calls(turn, stage, notes, answer, workers)
            own = sum(self.engine.count(call) + call.tokens for call in calls)
            written = workers * stage.tokens + prompts.numbering(workers)
            return own + self._reserve(turn, index + 1, written, answer)

        return bisect.bisect_right(range(1, stage.width + 1), left, key=need)


def _row(worker: int, workers: int, call: Call, reply: Reply, rung: tuple[float, float]) -> Row:
    """One worker as the record shows it."""
    return {
        "worker": worker + 1,
        "of": workers,
        "prompt": call.prompt,
        "system": call.system,
        "output": reply.output,
        "error": reply.error,
        "temperature_normalised": rung[0],
        "temperature_asked": call.temperature,
        "temperature_sent": reply.temperature_sent,
        "top_p": call.top_p,
        "attention": call.attention,
        "seed": call.seed,
        "seed_sent": reply.seed_sent,
        "tokens_in": reply.tokens_in,
        "tokens_out": reply.tokens_out,
        "tokens_discarded": reply.tokens_discarded,
        "finish": reply.finish,
        "score": reply.score,
        "attempts": reply.attempts,
        "note": reply.note,
        **({} if reply.replica is None else {"replica": reply.replica}),
    }
