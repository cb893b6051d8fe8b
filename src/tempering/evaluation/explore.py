"""Sample checkable tasks under several strategies, and compare their benefit at equal k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tempering.agents.aggregators import AGGREGATORS, Decision
from tempering.agents.checkers import Checker
from tempering.agents.contract import Engine, Ledger, Memory, Stop, never
from tempering.agents.ladder import Strategy
from tempering.errors import InputError
from tempering.evaluation.passk import Compared, compared, pass_at_k, pass_at_share
from tempering.evaluation.sampling import Report, Sampling, check_tasks, no_report

Task = Mapping[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Exploration:
    """The result of a run.

    rows: one a sample, unfinished tasks included. tasks: those that every strategy finished.
    compared: means and paired differences, by metric and strategy. complete: False after Ctrl-C
    or a failed disk, or when an engine that answers nothing was given up. failed: samples and
    syntheses for which no reply came; they count as wrong. by_kind: right samples and solved tasks
    by kind and level. replies: how many samples of each strategy had which fate, see `fates`.
    warnings: what a reader of the numbers must know. unanswered: strategies without any answer;
    their numbers say nothing about the model.
    """

    rows: list[Row]
    tasks: list[Task]
    compared: list[Compared]
    complete: bool
    failed: int
    by_kind: list[Row] = field(default_factory=list)
    replies: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)


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
    chosen: strategies with the same number k of rungs; differences are from the first one.
    tokens: new tokens of a sample, at most; a task may say fewer.
    seed: sample i of a task draws from the same seed under each strategy, so that differences are
        paired by sample too.
    stop_support: stop sampling a task when the support of its answers, with one sample set aside
        for an unseen one, falls under this; samples then come in waves of 3. pass@k is left out.
    synthesise: also let the engine merge each task's answers (one more, cold call a task).
    """
    k = len(chosen[0].rungs)
    if any(len(strategy.rungs) != k for strategy in chosen):
        raise InputError("strategies are compared at an equal number of samples")
    check_tasks(tasks, checkers)
    run = Sampling(engine, list(tasks), list(checkers), tokens, seed,
                   Memory() if ledger is None else ledger, report or no_report, stop)  # fmt: skip
    for strategy in chosen:
        engine.check([run.call(strategy, 0, i) for i in range(k)])
    run.sample(chosen, stop_support)
    for strategy in chosen:
        run.check_made(strategy)
    if synthesise and not stop():
        for strategy in chosen:
            run.synthesise(strategy)
    return _compare(run, chosen, stop_support, synthesise, seed)


def _compare(
    run: Sampling,
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
    summary = run.summary(chosen, synthesise)
    if not finished:
        return Exploration(rows, [], [], False, failed, [], *summary)
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
        found += _at_equal_tokens(run, chosen, finished, right, seed)
    scored = all(row["score"] is not None for row in rows if row["answer"] is not None)
    for label, aggregator in AGGREGATORS.items():
        if not scored and label in ("tempered vote", "best of n"):
            continue
        decisions = {s.name: [aggregator(run.answers(s, t)) for t in finished] for s in chosen}
        found += compared(_accuracy(run, finished, decisions), f"accuracy, {label}", seed=seed)
    if synthesise:
        decisions = {s.name: [run.merged(s, t) for t in finished] for s in chosen}
        found += compared(_accuracy(run, finished, decisions), "accuracy, synthesis", seed=seed)
    unread = {
        s.name: [
            sum(row["answer"] is None for row in run.rows(s, t)) / len(run.rows(s, t))
            for t in finished
        ]
        for s in chosen
    }
    found += compared(unread, "share of unreadable answers", seed=seed)
    for name, label in (
        ("tokens_out", "tokens written a task"),
        ("tokens_in", "tokens read a task"),
        ("tokens_discarded", "tokens of replies thrown away, a task"),
    ):
        spent = {
            s.name: [float(sum(row.get(name) or 0 for row in run.rows(s, t))) for t in finished]
            for s in chosen
        }
        if name != "tokens_discarded" or any(map(sum, spent.values())):
            found += compared(spent, label, seed=seed)
    tasks = [run.tasks[task] for task in finished]
    kinds = _by_kind(run, chosen, finished, right)
    return Exploration(rows, tasks, found, complete, failed, kinds, *summary)


def _at_equal_tokens(
    run: Sampling,
    chosen: Sequence[Strategy],
    finished: Sequence[int],
    right: Mapping[str, list[int]],
    seed: int,
) -> list[Compared]:
    """pass@k with as many samples as fit the tokens that the tersest strategy writes.

    Nothing where all write equally many, or an engine counts none: equal samples say it all then.
    """
    k = len(chosen[0].rungs)
    written = {
        s.name: sum(row["tokens_out"] or 0 for t in finished for row in run.rows(s, t))
        for s in chosen
    }
    least = min(written.values())
    if least == 0 or least == max(written.values()):
        return []
    values = {
        name: [pass_at_share(k, c, k * least / written[name]) for c in counts]
        for name, counts in right.items()
    }
    return compared(values, f"pass@{k} at equal tokens", seed=seed)


def _accuracy(
    run: Sampling, finished: Sequence[int], decisions: Mapping[str, Sequence[Decision]]
) -> dict[str, Sequence[float]]:
    """1 where the decision is right; 0 where it is wrong or there is no answer."""
    return {
        name: [
            float(
                decision.answer is not None
                and run.checkers[task].correct(decision.answer, run.tasks[task])
            )
            for task, decision in zip(finished, column, strict=True)
        ]
        for name, column in decisions.items()
    }


def _by_kind(
    run: Sampling,
    chosen: Sequence[Strategy],
    finished: Sequence[int],
    right: Mapping[str, list[int]],
) -> list[Row]:
    """Mean share of right samples, and of tasks solved at all, by kind and level."""
    groups: dict[tuple[str, int], list[int]] = {}
    for place, task in enumerate(finished):
        fields = run.tasks[task]
        if "kind" in fields and "level" in fields:
            groups.setdefault((str(fields["kind"]), int(fields["level"])), []).append(place)
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
