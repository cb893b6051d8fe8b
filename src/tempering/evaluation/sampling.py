"""Samples and syntheses of a comparison: asked for, kept in a ledger, read by checkers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tempering.agents.aggregators import Answer, Decision, settled, synthesis, synthesis_prompt
from tempering.agents.checkers import Checker
from tempering.agents.contract import Call, Engine, EngineError, Ledger, Reply, Stop, no_progress
from tempering.agents.ladder import Strategy
from tempering.agents.run import worker_seed
from tempering.errors import InputError
from tempering.evaluation.fates import ladder_warnings, read_reply, tally, warnings_of

Task = Mapping[str, Any]
Row = dict[str, Any]
HOPELESS = 48  # failed samples without any other, after which the engine is given up
TOKENS = ("tokens_in", "tokens_out", "tokens_discarded")
Report = Callable[[str, int, int], None]


@dataclass
class Sampling:
    """One run over tasks. checkers: one for each task. judged: rows with answers, by name."""

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
        rung, fields = strategy.rungs[i], self.tasks[task]
        return Call(
            key=self.name(strategy, task, i),
            prompt=fields["prompt"],
            temperature=rung.temperature,
            tokens=min(self.tokens, fields.get("tokens", self.tokens)),
            seed=worker_seed(self.seed, fields["id"], i),
            attention=rung.attention,
            raw=bool(fields.get("raw", False)),
            stop=fields.get("stop") or None,
            token_policy=rung.token_policy,
        )

    def sample(self, chosen: Sequence[Strategy], stop_support: float | None) -> None:
        """Ask for all samples, or for as many as settle each task under each strategy.

        Calls go task by task, so that an interruption leaves tasks that can be compared, and an
        engine that reads a prompt once for many rows does so for all strategies.
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
                if not self.has_sample(strategy, task, i)
            ]
            if todo and not self.stop():
                self.ask(todo)

    def ask(self, todo: Sequence[tuple[Strategy, int, int]]) -> None:
        """Ask for samples: (strategy, task, which of its samples)."""
        calls = [self.call(*item) for item in todo]
        count = lost = 0

        def done(index: int, reply: Reply) -> None:
            nonlocal count, lost
            count += 1
            lost += reply.output is None
            strategy, task, i = todo[index]
            self.ledger.put(calls[index].key, self.row(strategy, task, i, reply))
            self.judged.pop(calls[index].key, None)  # of an earlier try that failed
            self.report("sampling", count, len(todo))

        def halted() -> bool:
            # Nothing but failures: the engine is down, and the other calls would fail as well.
            return self.stop() or (count == lost and count >= HOPELESS)

        self.engine.run(calls, done, no_progress, halted)

    def row(self, strategy: Strategy, task: int, i: int, reply: Reply) -> Row:
        rung, fields = strategy.rungs[i], self.tasks[task]
        key = self.name(strategy, task, i)
        return {
            "strategy": strategy.name,
            "task": fields["id"],
            "sample": i,
            "output": reply.output,
            "error": reply.error,
            "finish": reply.finish,
            "note": reply.note,
            "temperature_asked": rung.temperature,
            "temperature_sent": reply.temperature_sent,
            "attention": rung.attention,
            "token_policy": rung.token_policy,
            "seed": worker_seed(self.seed, fields["id"], i),
            "score": reply.score,
            "tokens_in": reply.tokens_in,
            "tokens_out": reply.tokens_out,
            "tokens_discarded": reply.tokens_discarded + self.paid_before(key),
            **({} if reply.replica is None else {"replica": reply.replica}),
        }

    def paid_before(self, key: str) -> int:
        """Tokens of an earlier try at a sample or a synthesis, which this one replaces."""
        if key not in self.ledger:
            return 0
        return sum(self.ledger[key].get(name) or 0 for name in TOKENS)

    def has_sample(self, strategy: Strategy, task: int, i: int) -> bool:
        """Whether a sample has a reply; a later run tries a failed one again."""
        name = self.name(strategy, task, i)
        return name in self.ledger and self.ledger[name]["output"] is not None

    def check_made(self, strategy: Strategy) -> None:
        """EngineError when a strategy's samples all failed."""
        rows = [row for task in range(len(self.tasks)) for row in self.rows(strategy, task)]
        if rows and all(row["output"] is None for row in rows):
            reasons = sorted({str(row["error"]) for row in rows})
            raise EngineError(
                f"all {len(rows)} samples of '{strategy.name}' failed: {'; '.join(reasons[:3])}"
            )

    def finished(self, strategy: Strategy, task: int, stop_support: float | None) -> bool:
        """Whether a task has all its samples, or enough to settle it."""
        if len(self.rows(strategy, task)) == len(strategy.rungs):
            return True
        return stop_support is not None and settled(self.answers(strategy, task), stop_support)

    def rows(self, strategy: Strategy, task: int) -> list[Row]:
        """The samples of a task, with the answer that the checker reads and whether it is right."""
        fields, checker = self.tasks[task], self.checkers[task]
        found = []
        for i in range(len(strategy.rungs)):
            name = self.name(strategy, task, i)
            if name not in self.ledger:
                continue
            if name not in self.judged:
                row = self.ledger[name]
                read, fate = read_reply(row, checker, fields)
                right = read is not None and checker.correct(read, fields)
                self.judged[name] = {**row, "answer": read, "fate": fate, "correct": right}
            found.append(self.judged[name])
        return found

    def answers(self, strategy: Strategy, task: int) -> list[Answer]:
        checker = self.checkers[task]
        return [
            Answer(
                text=row["answer"],
                output=row["output"] or "",
                score=row["score"],
                temperature=row["temperature_asked"],
                heat=strategy.rungs[row["sample"]].heat,
                tokens=row["tokens_out"],
                form=None if row["answer"] is None else checker.form(row["answer"]),
            )
            for row in self.rows(strategy, task)
        ]

    def synthesise(self, strategy: Strategy) -> None:
        """Ask for one cold call a task that merges its answers."""
        calls = []
        for task, fields in enumerate(self.tasks):
            name = self.name(strategy, task, "synthesis")
            answers = self.answers(strategy, task)
            if self.has_synthesis(strategy, task) or all(a.text is None for a in answers):
                continue
            prompt = synthesis_prompt(answers, fields["prompt"])
            calls.append(Call(name, prompt, self.engine.temperature(0.0), self.tokens, 0))

        count = 0

        def done(index: int, reply: Reply) -> None:
            nonlocal count
            count += 1
            key = calls[index].key
            row = {
                "output": reply.output,
                "error": reply.error,
                "finish": reply.finish,
                "tokens_in": reply.tokens_in,
                "tokens_out": reply.tokens_out,
                "tokens_discarded": reply.tokens_discarded + self.paid_before(key),
                **({} if reply.replica is None else {"replica": reply.replica}),
            }
            self.ledger.put(key, row)
            self.report(f"synthesis, {strategy.name}", count, len(calls))

        if calls:
            self.engine.run(calls, done, no_progress, self.stop)

    def has_synthesis(self, strategy: Strategy, task: int) -> bool:
        """Whether a synthesis has a reply; a later run tries a failed one again."""
        name = self.name(strategy, task, "synthesis")
        return name in self.ledger and self.ledger[name]["output"] is not None

    def merged(self, strategy: Strategy, task: int) -> Decision:
        """The decision of the synthesis that `synthesise` asked for."""
        return synthesis(
            self.answers(strategy, task),
            ask=lambda prompt: "",
            read=lambda text: self.merged_answer(strategy, task)[0],
            task=self.tasks[task]["prompt"],
        )

    def merged_answer(self, strategy: Strategy, task: int) -> tuple[str | None, str]:
        """(answer or None, fate) of a synthesis."""
        missing = {"output": None}
        name = self.name(strategy, task, "synthesis")
        row = self.ledger[name] if self.has_synthesis(strategy, task) else missing
        return read_reply(row, self.checkers[task], self.tasks[task])

    def summary(
        self, chosen: Sequence[Strategy], synthesise: bool
    ) -> tuple[list[Row], list[str], list[str]]:
        """Tallies of the replies, warnings, and the strategies without any answer."""
        every = range(len(self.tasks))
        tallies, found, unanswered = [], [], []
        for strategy in chosen:
            by_task = [self.rows(strategy, task) for task in every]
            row = tally(strategy.name, by_task)
            tallies.append(row)
            found += ladder_warnings(strategy.name, [r for rows in by_task for r in rows])
            if row["samples"]:
                found += warnings_of(row, self.tokens)
            if row["samples"] and not row["answered"] and row["unreadable"] < row["samples"]:
                unanswered.append(strategy.name)
            if synthesise:
                asked = [t for t in every if any(r["answer"] is not None for r in by_task[t])]
                fates = [self.merged_answer(strategy, task)[1] for task in asked]
                lost = [f"{fates.count(f)} {f}" for f in dict.fromkeys(fates) if f != "answered"]
                if lost:
                    found.append(
                        f"'{strategy.name}': of {len(fates)} syntheses some have no answer and "
                        f"count as wrong: {', '.join(lost)}"
                    )
        return tallies, found, unanswered


def check_tasks(tasks: Sequence[Task], checkers: Sequence[Checker]) -> None:
    """InputError unless each task has a checker, which takes its own answer for right."""
    if len(tasks) != len(checkers) or not tasks:
        raise InputError(f"{len(tasks)} tasks and {len(checkers)} checkers; give one each")
    for task, checker in zip(tasks, checkers, strict=True):
        checker.read(str(task["answer"]), task)  # a checker that fails does so before it costs
        if not checker.correct(str(task["answer"]), task):
            raise InputError(
                f"task {task['id']!r}: the checker {checker.name} doesn't take the task's own "
                f"answer {task['answer']!r} for right"
            )


def no_report(what: str, done: int, total: int) -> None:
    """A `Report` that shows nothing."""
