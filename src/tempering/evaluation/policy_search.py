"""A policy by token learned from tasks: numbers searched for by the share of right samples.

Every policy answers the same tasks with the same seeds, so scores are compared task by task. A
trial that lies clearly below the best so far is left before it has seen all tasks. What is found is
compared with the untuned policy on tasks that the search never saw.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from tempering.agents.checkers import Checker
from tempering.agents.contract import Engine, Ledger, Memory, Stop, never
from tempering.agents.ladder import Strategy
from tempering.counts import whole_number
from tempering.errors import DataError, InputError
from tempering.evaluation.fates import tally, warnings_of
from tempering.evaluation.paired import IntervalEstimate, mean_estimate, paired_difference
from tempering.evaluation.policy_strategy import policy_strategy
from tempering.evaluation.policy_tuning import HeldOut, LearnedNumber, PolicyTrial, PolicyTuning
from tempering.evaluation.sampling import Report, Sampling, check_tasks, no_report
from tempering.evaluation.trial_statistics import clearly_worse, may_be_best
from tempering.proposals import Axis, Tried, need_optuna, proposal
from tempering.tokens.unknowns import OpenNumber, OpenPolicy, read_open_policy

Task = Mapping[str, Any]
UNTUNED = "constant(1)"
HELD_OUT = 0.4  # of the tasks: the gain on them is the answer
_LOOKS = 5  # parts of the tasks, after each of which a trial may be left
_FEWEST = 4  # tasks of a part: with fewer, no test tells trials apart
_FLAT = 8  # trials of equal scores, after which there is nothing to learn

OnTrial = Callable[[int, PolicyTrial, float], None]


def learn_policy(
    engine: Engine,
    text: str,
    tasks: Sequence[Task],
    checkers: Sequence[Checker],
    *,
    against: str = UNTUNED,
    trials: int = 40,
    samples: int = 4,
    tokens: int = 256,
    held_out: float | int = HELD_OUT,
    seed: int = 0,
    ledger: Ledger | None = None,
    on_trial: OnTrial | None = None,
    report: Report | None = None,
    stop: Stop = never,
) -> PolicyTuning:
    """Learn the open numbers of a policy.

    Parameters
    ----------
    text: a policy with `?` where numbers go, see `tempering.tokens.unknowns`.
    tasks, checkers: as for `explore`. against: the untuned policy, T = 1 everywhere by default.
    trials: policies to try, by Optuna's tree-structured Parzen estimator.
    samples: of each task under each policy. tokens: new ones of a sample, at most.
    held_out: share of the tasks that the search never sees.
    seed: of the split, of the proposals, and of all samples.
    ledger: keeps the samples; the same call goes on from it, to the result of a search in one
        piece. on_trial: told of each trial: its number, itself, and the best score so far.

    Raises
    ------
    Before anything is sampled: ScheduleError or InputError for a text without `?`, a policy that
    can't be made or that the engine refuses; InputError for fewer than two tasks on either side,
    or two tasks of one prompt; MissingExtraError without optuna. Later: DataError where no policy
    changes any score; EngineError where all samples of a policy failed.
    """
    open_policy = read_open_policy(text)
    for name, value in (("trials", trials), ("samples", samples)):
        whole_number(value, name, 1)
    check_tasks(tasks, checkers)
    seen, unseen = split_tasks(tasks, held_out, seed)
    need_optuna()
    run = Sampling(engine, list(tasks), list(checkers), tokens, seed,
                   Memory() if ledger is None else ledger, no_report, stop)  # fmt: skip
    search = _Search(run, open_policy, against, samples, trials, seen, report or no_report)
    run.report = search.show_sample
    search.check()
    search.run_trials(on_trial)
    return search.result(unseen)


def split_tasks(
    tasks: Sequence[Task], share: float | int, seed: int
) -> tuple[list[int], list[int]]:
    """Places of the tasks to search on, and of those held out, each in an order drawn by the seed.

    Raises InputError for fewer than two on either side, or two tasks of one prompt.
    """
    if not 0 < share < 1:
        raise InputError(f"the held-out share lies between 0 and 1, got {share:g}")
    first: dict[str, Any] = {}
    for task in tasks:
        other = first.setdefault(task["prompt"], task["id"])
        if other != task["id"]:
            raise InputError(
                f"tasks {other!r} and {task['id']!r} have one prompt, so neither is new to a "
                "search that saw the other; leave one out"
            )
    held = round(share * len(tasks))
    if held < 2 or len(tasks) - held < 2:
        raise InputError(
            f"{len(tasks)} tasks, of which a share of {share:g} is held out, are "
            f"{len(tasks) - held} to search on and {held} held out; there must be 2 or more of each"
        )
    order = list(range(len(tasks)))
    random.Random(f"held out/{seed}").shuffle(order)
    return order[held:], order[:held]


@dataclass
class _Search:
    """The trials of one search, and what they share."""

    run: Sampling
    open: OpenPolicy
    against: str
    samples: int
    most: int
    tasks: list[int]
    report: Report
    untuned: list[float] | None = None
    trials: list[PolicyTrial] = field(default_factory=list)
    complete: bool = False
    shown: int = 0  # samples that progress counts as done

    def check(self) -> None:
        """Raise what a policy of the search is certain to meet, before anything is sampled."""
        for text in (self.against, self.open.filled(self.open.start)):
            self._check(text, range(len(self.run.tasks)))
        self.open.check(lambda text: self._check(text, self.tasks[:1]))

    def _check(self, text: str, tasks: Iterable[int]) -> None:
        strategy = self._strategy(text)
        self.run.engine.check([self.run.call(strategy, task, 0) for task in tasks])

    def run_trials(self, on_trial: OnTrial | None) -> None:
        """The untuned policy on all tasks, then trial after trial."""
        size = max(_FEWEST, -(-len(self.tasks) // _LOOKS))
        parts = [self.tasks[i : i + size] for i in range(0, len(self.tasks), size)]
        # A server says only when it is asked whether it takes such a policy.
        first = self._strategy(self.open.filled(self.open.start))
        if not self.run.has_sample(first, self.tasks[0], 0):
            self.run.ask([(first, self.tasks[0], 0)])
            self.run.check_made(first)
        self.untuned = self._scores(self._strategy(self.against), parts, None)
        if self.untuned is None:
            return
        self._show(1)
        best = self.untuned
        while len(self.trials) < self.most:
            values = self._next()
            text = self.open.filled(values)
            scores = self._scores(self._strategy(text), parts, best)
            if scores is None:
                return
            left = len(scores) < len(best)
            score = fmean(scores)
            if left:
                score += fmean(best) - fmean(best[: len(scores)])
            self.trials.append(PolicyTrial(text, values, tuple(scores), score, left))
            if not left and score > fmean(best):
                best = scores
            self._show(1 + len(self.trials))
            if on_trial is not None:
                on_trial(len(self.trials), self.trials[-1], fmean(best))
            self._refuse_flat()
        self.complete = True

    def _strategy(self, text: str) -> Strategy:
        return policy_strategy(text, self.samples)

    def _next(self) -> tuple[float, ...]:
        if not self.trials:
            return self.open.start
        tried = [Tried(trial.values, trial.score) for trial in self.trials]
        axes = [Axis(n.low, n.high, n.log, n.whole) for n in self.open.numbers]
        found = proposal(tried, axes, self.run.seed)
        return tuple(n.rounded(x) for n, x in zip(self.open.numbers, found, strict=True))

    def _scores(
        self, strategy: Strategy, parts: Sequence[Sequence[int]], best: Sequence[float] | None
    ) -> list[float] | None:
        """The share of right samples of each task, part by part; None where the run was stopped.

        best: scores to be compared with; a trial clearly below them is left after a part.
        """
        found: list[float] = []
        for part in parts:
            if not self._sampled(strategy, part):
                return None
            found += [self._share(strategy, task) for task in part]
            if best is not None and len(found) < len(best) and clearly_worse(found, best):
                break
        return found

    def _sampled(self, strategy: Strategy, part: Sequence[int]) -> bool:
        run = self.run
        todo = [
            (strategy, task, i)
            for task in part
            for i in range(self.samples)
            if not run.has_sample(strategy, task, i)
        ]
        if todo:
            if run.stop():
                return False
            run.ask(todo)
            run.check_made(strategy)
        return all(run.finished(strategy, task, None) for task in part)

    def _share(self, strategy: Strategy, task: int) -> float:
        return fmean(row["correct"] for row in self.run.rows(strategy, task))

    def show_sample(self, what: str, count: int, total: int) -> None:
        """Count one more sample as done."""
        self.shown += 1
        self._report()

    def _show(self, policies: int) -> None:
        """Count so many policies as done: samples kept from before, and those left out, too."""
        self.shown = policies * len(self.tasks) * self.samples
        self._report()

    def _report(self) -> None:
        total = (self.most + 1) * len(self.tasks) * self.samples
        self.report("sampling", min(self.shown, total), total)

    def _refuse_flat(self) -> None:
        """DataError where trial after trial has the scores of the untuned policy, task by task."""
        if len(self.trials) < min(_FLAT, self.most) or self.untuned is None:
            return
        if any(list(trial.scores) != self.untuned for trial in self.trials):
            return
        one = f"{self.against} and {len(self.trials)} other policies"
        if not any(self.untuned):
            strategy = self._strategy(self.against)
            replies = tally(strategy.name, [self.run.rows(strategy, t) for t in self.tasks])
            why = "; ".join(warnings_of(replies, self.run.tokens, "--max-tokens"))
            raise DataError(
                f"no sample of {one} was right, so nothing can be learned; give easier tasks, or "
                f"see whether the checker fits the answers{f' ({why})' if why else ''}"
            )
        if min(self.untuned) == 1:
            raise DataError(
                f"every sample of {one} was right, so nothing can be learned; give harder tasks"
            )
        raise DataError(
            f"{one} have the same score on every task, so nothing can be learned: the samples "
            "don't depend on these numbers"
        )

    def result(self, unseen: Sequence[int]) -> PolicyTuning:
        """What was found, compared on the tasks held out."""
        base = self.untuned or []
        whole = [trial for trial in self.trials if not trial.left]
        best = max(whole, key=lambda trial: trial.score, default=None)
        warnings, held, policy, gain, numbers = list[str](), None, self.against, None, []
        if best is not None:
            gain = paired_difference(best.scores, base)
            numbers = self._numbers(best)
            if best.score > fmean(base):
                policy = best.text
                held = self._held_out(policy, unseen) if self.complete else None
                self.complete = held is not None
            elif self.complete:
                warnings.append(
                    f"no trial scored above {self.against} on the {len(base)} tasks of the search, "
                    "so that stays; try more trials, more tasks, or other ranges"
                )
        return self._told(policy, numbers, gain, held, unseen, warnings)

    def _numbers(self, best: PolicyTrial) -> list[LearnedNumber]:
        alike = [trial for trial in self.trials if may_be_best(trial.scores, best.scores)]

        def learned(i: int, number: OpenNumber) -> LearnedNumber:
            values = [trial.values[i] for trial in alike]
            tried = {trial.values[i] for trial in self.trials}
            low = max((v for v in tried if v < min(values)), default=number.low)
            high = min((v for v in tried if v > max(values)), default=number.high)
            return LearnedNumber(number.label, best.values[i], low, high, (number.low, number.high))

        return [learned(i, number) for i, number in enumerate(self.open.numbers)]

    def _at_bounds(self, numbers: Sequence[LearnedNumber]) -> Iterator[str]:
        """A warning for each number at an end of its range, where it could go on beyond it."""
        for i, number in enumerate(numbers):
            low, high = number.range
            if number.value not in number.range:
                continue
            half = low // 2 if self.open.numbers[i].whole else low / 2
            wider = (half, high) if number.value == low else (low, high * 2)
            values = [each.value for each in numbers]
            values[i] = wider[number.value == high]
            try:
                self._check(self.open.filled(values), self.tasks[:1])
            except InputError:  # top_p = 1 is an end of all that there is
                continue
            if values[i] != number.value:
                yield (
                    f"{number.label} is {number.value:g}, an end of its range; a wider one may "
                    f"have a better value: ?[{wider[0]:g},{wider[1]:g}]"
                )

    def _held_out(self, policy: str, unseen: Sequence[int]) -> HeldOut | None:
        columns = []
        for place, text in enumerate((self.against, policy)):
            self.run.report = no_report
            self.report("held-out tasks", place, 2)
            found = self._scores(self._strategy(text), [unseen], None)
            if found is None:
                return None
            columns.append(found)
        self.report("held-out tasks", 2, 2)
        before, after = columns
        return HeldOut(
            mean_estimate(before), mean_estimate(after), paired_difference(after, before)
        )

    def _told(
        self,
        policy: str,
        numbers: list[LearnedNumber],
        gain: IntervalEstimate | None,
        held: HeldOut | None,
        unseen: Sequence[int],
        warnings: list[str],
    ) -> PolicyTuning:
        seen = {trial.text: self.tasks[: len(trial.scores)] for trial in self.trials}
        seen[self.against] = self.tasks
        rows = []
        for text, own in seen.items():
            tested = unseen if text in (self.against, policy) else ()
            by_task = [self.run.rows(self._strategy(text), task) for task in (*own, *tested)]
            rows += [row for found in by_task for row in found]
            if text in (self.against, policy):
                counts = tally(text, by_task)
                if counts["samples"]:
                    warnings += warnings_of(counts, self.run.tokens, "--max-tokens")
        if policy != self.against:
            warnings += self._at_bounds(numbers)
        if held is not None and held.gain.low <= 0 <= held.gain.high:
            warnings.append(
                f"the {len(unseen)} held-out tasks don't tell the learned policy from "
                f"{self.against}: the interval of the gain has 0 in it"
            )
        return PolicyTuning(
            policy=policy,
            against=self.against,
            untuned=fmean(self.untuned) if self.untuned else None,
            trials=self.trials,
            numbers=numbers,
            searched=gain,
            held_out=held,
            tasks=(len(self.tasks), len(unseen)),
            samples=len(rows),
            tokens_in=sum(row["tokens_in"] or 0 for row in rows),
            tokens_out=sum(row["tokens_out"] or 0 for row in rows),
            failed=sum(row["output"] is None for row in rows),
            complete=self.complete,
            rows=rows,
            warnings=warnings,
        )
