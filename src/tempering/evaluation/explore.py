"""Sample checkable tasks under several strategies, and compare what they buy at equal k."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tempering.agents.aggregators import (
    AGGREGATORS,
    Answer,
    Verdict,
    settled,
    synthesis,
    synthesis_prompt,
)
from tempering.agents.checkers import Checker
from tempering.agents.contract import (
    Call,
    Engine,
    EngineError,
    Ledger,
    Memory,
    Reply,
    Stop,
    never,
    quiet,
)
from tempering.agents.ladder import Strategy
from tempering.agents.run import worker_seed
from tempering.errors import InputError
from tempering.evaluation.passk import Compared, compared, pass_at_k

Task = Mapping[str, Any]
Row = dict[str, Any]
HOPELESS = 48  # samples, all failed
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Exploration:
    """What a run found.

    rows: one a sample, also of unfinished tasks. tasks: those that every strategy finished.
    compared: means and paired differences, by metric and strategy. complete: False after Ctrl-C
    or a failed disk, or when an engine that answers nothing was given up. failed: samples and
    syntheses that the engine could not make; they count as wrong.
    """

    rows: list[Row]
    tasks: list[Task]
    compared: list[Compared]
    complete: bool
    failed: int
    by_kind: list[Row] = field(default_factory=list)


def explore(
    engine: Engine,
    tasks: Sequence[Task],
    checkers: Sequence[Checker],
    chosen: Sequence[Strategy],
    *,
    tokens: int = 32,
    seed: int = 0,
    stop_support: float | None = None,
    synthesise: bool = False,
    ledger: Ledger | None = None,
    report: Report | None = None,
    stop: Stop = never,
) -> Exploration:
    """Run every strategy on every task and compare them.

    Parameters
    ----------
    tasks: mappings with id, prompt and answer, and perhaps raw, stop and tokens (at most).
    checkers: one for each task.
    chosen: strategies with the same number k of rungs; the first is what the others differ from.
    tokens: new ones a sample, or fewer where a task says so.
    seed: sample i of a task draws from the same seed under each strategy, so that differences are
        paired by sample too.
    stop_support: stop sampling a task when the support of its answers, with one sample set aside
        for an unseen one, falls under this; samples then come in waves of 3. pass@k is left out.
    synthesise: also let the engine merge each task's answers (one more, cold call a task).
    """
    k = len(chosen[0].rungs)
    if any(len(strategy.rungs) != k for strategy in chosen):
        raise InputError("strategies are compared at an equal number of samples")
    if len(tasks) != len(checkers) or not tasks:
        raise InputError(f"{len(tasks)} tasks and {len(checkers)} checkers; give one each")
    for task, checker in zip(tasks, checkers, strict=True):
        checker.read(str(task["answer"]), task)  # what it can't work with shows before it costs
        if not checker.correct(str(task["answer"]), task):
            raise InputError(
                f"task {task['id']!r}: the checker {checker.name} doesn't take the task's own "
                f"answer {task['answer']!r} for right"
            )
    run = _Run(engine, list(tasks), list(checkers), tokens, seed,
               Memory() if ledger is None else ledger, report or _silent, stop)  # fmt: skip
    for strategy in chosen:
        engine.check([run.call(strategy, 0, i) for i in range(k)])
    run.sample(chosen, stop_support)
    for strategy in chosen:
        run.check_made(strategy)
    if synthesise and not stop():
        for strategy in chosen:
            run.synthesise(strategy)
    return _compare(run, chosen, stop_support, synthesise, seed)


@dataclass
class _Run:
    engine: Engine
    tasks: list[Task]
    checkers: list[Checker]
    tokens: int
    seed: int
    ledger: Ledger
    report: Report
    stop: Stop
    judged: dict[str, Row] = field(default_factory=dict)

    def name(self, strategy: Strategy, task: int, i: int | str) -> str:
        return f"{strategy.name}/{self.tasks[task]['id']}/{i}"

    def call(self, strategy: Strategy, task: int, i: int) -> Call:
        rung, own = strategy.rungs[i], self.tasks[task]
        return Call(
            key=self.name(strategy, task, i),
            prompt=own["prompt"],
            temperature=rung.temperature,
            tokens=min(self.tokens, own.get("tokens", self.tokens)),
            seed=worker_seed(self.seed, own["id"], i),
            attention=rung.attention,
            raw=bool(own.get("raw", False)),
            stop=own.get("stop") or None,
        )

    def sample(self, chosen: Sequence[Strategy], stop_support: float | None) -> None:
        """All samples, or as many as each task needs to settle under each strategy.

        Task by task: what an interruption leaves can be compared, and an engine that reads a
        prompt once for many rows does so over strategies.
        """
        k = len(chosen[0].rungs)
        wave = k if stop_support is None else 3
        for start in range(0, k, wave):
            part = range(start, min(k, start + wave))
            todo = [
                (strategy, task, i)
                for task in range(len(self.tasks))
                for strategy in chosen
                if stop_support is None or not settled(self.answers(strategy, task), stop_support)
                for i in part
                if not self.made(strategy, task, i)
            ]
            if todo and not self.stop():
                self._run(todo)

    def _run(self, todo: Sequence[tuple[Strategy, int, int]]) -> None:
        calls = [self.call(*item) for item in todo]
        count = lost = 0

        def done(index: int, reply: Reply) -> None:
            nonlocal count, lost
            count += 1
            lost += reply.output is None
            strategy, task, i = todo[index]
            self.ledger.put(calls[index].key, self.row(strategy, task, i, reply))
            self.report("sampling", count, len(todo))

        def halted() -> bool:
            # Nothing but failures: the engine is down, the rest would fail as well.
            return self.stop() or (count == lost and count >= HOPELESS)

        self.engine.run(calls, done, quiet, halted)

    def row(self, strategy: Strategy, task: int, i: int, reply: Reply) -> Row:
        rung, own = strategy.rungs[i], self.tasks[task]
        return {
            "strategy": strategy.name,
            "task": own["id"],
            "sample": i,
            "output": reply.output,
            "error": reply.error if reply.output is None else None,
            "temperature_asked": rung.temperature,
            "temperature_sent": reply.temperature_sent,
            "attention": rung.attention,
            "seed": worker_seed(self.seed, own["id"], i),
            "score": reply.score,
            "tokens_in": reply.tokens_in,
            "tokens_out": reply.tokens_out,
        }

    def made(self, strategy: Strategy, task: int, i: int) -> bool:
        """Whether a sample is there; one that failed is tried again by a later run."""
        name = self.name(strategy, task, i)
        return name in self.ledger and self.ledger[name]["error"] is None

    def check_made(self, strategy: Strategy) -> None:
        """EngineError when a strategy's samples all failed."""
        rows = [row for task in range(len(self.tasks)) for row in self.rows(strategy, task)]
        if rows and all(row["output"] is None for row in rows):
            reasons = sorted({str(row["error"]) for row in rows})
            raise EngineError(
                f"all {len(rows)} samples of '{strategy.name}' failed: {'; '.join(reasons[:3])}"
            )

    def finished(self, strategy: Strategy, task: int, stop_support: float | None) -> bool:
        """Whether a task has all its samples, or as many as settle it."""
        if len(self.rows(strategy, task)) == len(strategy.rungs):
            return True
        return stop_support is not None and settled(self.answers(strategy, task), stop_support)

    def rows(self, strategy: Strategy, task: int) -> list[Row]:
        """The samples of a task, with the answer that its checker reads, and whether it's right."""
        own, checker = self.tasks[task], self.checkers[task]
        found = []
        for i in range(len(strategy.rungs)):
            name = self.name(strategy, task, i)
            if name not in self.ledger:
                continue
            if name not in self.judged:
                row = self.ledger[name]
                read = None if row["output"] is None else checker.read(row["output"], own)
                right = read is not None and checker.correct(read, own)
                self.judged[name] = {**row, "answer": read, "correct": right}
            found.append(self.judged[name])
        return found

    def answers(self, strategy: Strategy, task: int) -> list[Answer]:
        return [
            Answer(
                text=row["answer"],
                output=row["output"] or "",
                score=row["score"],
                temperature=row["temperature_asked"],
                heat=strategy.rungs[row["sample"]].heat,
                tokens=row["tokens_out"],
            )
            for row in self.rows(strategy, task)
        ]

    def synthesise(self, strategy: Strategy) -> None:
        """One cold call a task that merges its answers."""
        calls = []
        for task, own in enumerate(self.tasks):
            name = self.name(strategy, task, "synthesis")
            answers = self.answers(strategy, task)
            if self.synthesised(strategy, task) or all(a.text is None for a in answers):
                continue
            prompt = synthesis_prompt(answers, own["prompt"])
            calls.append(Call(name, prompt, self.engine.temperature(0.0), self.tokens, 0))

        count = 0

        def done(index: int, reply: Reply) -> None:
            nonlocal count
            count += 1
            kept = {"output": reply.output, "tokens_out": reply.tokens_out}
            self.ledger.put(calls[index].key, {**kept, "tokens_in": reply.tokens_in})
            self.report(f"synthesis, {strategy.name}", count, len(calls))

        if calls:
            self.engine.run(calls, done, quiet, self.stop)

    def synthesised(self, strategy: Strategy, task: int) -> bool:
        """Whether a synthesis is there; one that failed is tried again by a later run."""
        name = self.name(strategy, task, "synthesis")
        return name in self.ledger and self.ledger[name]["output"] is not None

    def merged(self, strategy: Strategy, task: int) -> Verdict:
        """The verdict of the synthesis that `synthesise` asked for."""
        own, checker = self.tasks[task], self.checkers[task]
        output = ""
        if self.synthesised(strategy, task):
            output = self.ledger[self.name(strategy, task, "synthesis")]["output"]
        return synthesis(
            self.answers(strategy, task),
            ask=lambda prompt: output,
            read=lambda text: checker.read(text, own),
            task=own["prompt"],
        )


def _compare(
    run: _Run,
    chosen: Sequence[Strategy],
    stop_support: float | None,
    synthesise: bool,
    seed: int,
) -> Exploration:
    k = len(chosen[0].rungs)
    every = range(len(run.tasks))
    finished = [task for task in every if all(run.finished(s, task, stop_support) for s in chosen)]
    rows = [row for strategy in chosen for task in every for row in run.rows(strategy, task)]
    complete = len(finished) == len(run.tasks) and not run.stop()
    failed = sum(row["output"] is None for row in rows)
    if synthesise:
        keys = [run.name(s, task, "synthesis") for s in chosen for task in every]
        failed += sum(key in run.ledger and run.ledger[key]["output"] is None for key in keys)
    if not finished:
        return Exploration(rows, [], [], False, failed)
    found: list[Compared] = []
    right = {
        s.name: [sum(row["correct"] for row in run.rows(s, task)) for task in finished]
        for s in chosen
    }
    if stop_support is None:
        for size in sorted({1, max(1, k // 3), k}):
            values = {
                name: [pass_at_k(k, c, size) for c in counts] for name, counts in right.items()
            }
            found += compared(values, f"pass@{size}", seed=seed)
    scored = all(row["score"] is not None for row in rows if row["answer"] is not None)
    for label, aggregator in AGGREGATORS.items():
        if not scored and label in ("tempered vote", "best of n"):
            continue
        verdicts = {s.name: [aggregator(run.answers(s, t)) for t in finished] for s in chosen}
        found += compared(_accuracy(run, finished, verdicts), f"accuracy, {label}", seed=seed)
    if synthesise:
        verdicts = {s.name: [run.merged(s, t) for t in finished] for s in chosen}
        found += compared(_accuracy(run, finished, verdicts), "accuracy, synthesis", seed=seed)
    unread = {
        s.name: [
            sum(row["answer"] is None for row in run.rows(s, t)) / len(run.rows(s, t))
            for t in finished
        ]
        for s in chosen
    }
    found += compared(unread, "share of unreadable answers", seed=seed)
    for metric in ("tokens_out", "tokens_in"):
        spent = {
            s.name: [float(sum(row[metric] for row in run.rows(s, t))) for t in finished]
            for s in chosen
        }
        label = "tokens written a task" if metric == "tokens_out" else "tokens read a task"
        found += compared(spent, label, seed=seed)
    tasks = [run.tasks[task] for task in finished]
    return Exploration(rows, tasks, found, complete, failed, _by_kind(run, chosen, finished, right))


def _accuracy(
    run: _Run, finished: Sequence[int], verdicts: Mapping[str, Sequence[Verdict]]
) -> dict[str, Sequence[float]]:
    """1 where the verdict is right; no answer is wrong."""
    return {
        name: [
            float(
                verdict.answer is not None
                and run.checkers[task].correct(verdict.answer, run.tasks[task])
            )
            for task, verdict in zip(finished, column, strict=True)
        ]
        for name, column in verdicts.items()
    }


def _by_kind(
    run: _Run, chosen: Sequence[Strategy], finished: Sequence[int], right: Mapping[str, list[int]]
) -> list[Row]:
    """Mean share of right samples, and of tasks solved at all, by kind and level."""
    groups: dict[tuple[str, int], list[int]] = {}
    for place, task in enumerate(finished):
        own = run.tasks[task]
        if "kind" in own and "level" in own:
            groups.setdefault((str(own["kind"]), int(own["level"])), []).append(place)
    found = []
    for (kind, level), places in sorted(groups.items()):
        row: Row = {"kind": kind, "level": level, "tasks": len(places)}
        for strategy in chosen:
            made = [len(run.rows(strategy, finished[p])) for p in places]
            counts = [right[strategy.name][p] for p in places]
            solved = sum(c > 0 for c in counts) / len(places)
            row[strategy.name] = f"{sum(counts) / sum(made):.2f} / {solved:.2f}"
        found.append(row)
    return found


def _silent(what: str, done: int, total: int) -> None:
    pass
