"""`throb` in the page: stages of workers, shown as they run, kept as a record, resumed from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempering.agents.contract import Memory, StageError
from tempering.agents.plan import Plan
from tempering.agents.run import collect, rows_of, run_plan, spent
from tempering.cli.shared import engine_options
from tempering.console.fields import Fields
from tempering.console.saving import keep, recorded
from tempering.console.subject import Subject
from tempering.console.turns import Event, Job, StoppedError
from tempering.engines.generating.local import LocalEngine
from tempering.engines.generating.side_by_side import GrowingText
from tempering.errors import DataError
from tempering.reports import Record

_BATCH = 8  # workers at once: the tree moves, and a stop waits for no long batch


@dataclass(frozen=True)
class StagesRun:
    """One run of a plan, from its start or from a record.

    begun: rows of the record that it goes on with, by name.
    """

    subject: Subject
    out: Path
    plan: Plan
    task: str
    seed: int
    rounds: int
    begun: dict[str, Any]

    @classmethod
    def of(cls, subject: Subject, given: Fields, out: Path) -> StagesRun:
        """Checked, before the model is asked for anything."""
        subject.require()
        if "resume" in given.data:
            return cls._again(subject, given.text("resume"), out)
        plan = Plan.from_pattern(
            given.text("pattern"),
            amplitude=given.number("amplitude", 1.2),
            tokens=given.whole("tokens", 1, 100_000, 64),
        )
        seed, rounds = given.whole("seed", 0, 2**63 - 1, 0), given.whole("rounds", 1, 100, 1)
        return cls(subject, out, plan, given.text("task"), seed, rounds, {})

    @classmethod
    def _again(cls, subject: Subject, name: str, out: Path) -> StagesRun:
        record = recorded(out, name)
        settings = record.settings
        if record.kind != "throb" or not {"plan", "run", "task"} <= settings.keys():
            raise DataError(f"{name} is no whole record of throb but of '{record.kind}'")
        task, run = settings["task"], settings["run"]
        rounds = run.get("rounds") if isinstance(run, dict) else None
        if not isinstance(task, str) or isinstance(rounds, bool) or not isinstance(rounds, int):
            raise DataError(f"{name} doesn't say its task or how many rounds it has; run it anew")
        made_by = (record.model or {}).get("fingerprint")
        if made_by != subject.stated.get("fingerprint"):
            raise DataError(f"{name} was begun with another model ({made_by}); it goes on there")
        return cls(
            subject,
            out,
            Plan.from_data(settings["plan"], f"the plan in {name}"),
            task,
            int(record.seed or 0),
            rounds,
            dict(rows_of(record.results.get("stages", []))),
        )

    def work(self, job: Job) -> Iterator[Event]:
        """The tree, each change of it, and the name of the record at the end."""
        texts: dict[str, GrowingText] = defaultdict(lambda: GrowingText(self.subject.tokenizer))
        said: dict[str, str] = defaultdict(str)  # since the page was last told

        def heard(key: str, token: int) -> None:
            said[key] += texts[key].add(token)

        engine = LocalEngine(
            self.subject.model,
            self.subject.tokenizer,
            name=self.subject.name,
            batch=_BATCH,
            heard=heard,
        )
        ledger = _Told(job)
        for name, row in self.begun.items():
            ledger.put(name, row)
        yield {"type": "tree", "rounds": self.rounds, "stages": self._tree()}

        def watch(turn: int, stage: Any, worker: int, state: str, count: int) -> None:
            where = {"round": turn, "stage": stage.name, "worker": worker + 1}
            new = said.pop(f"{turn}/{stage.name}/{worker + 1}", "")
            job.send({"type": "worker", **where, "state": state, "tokens": count, "text": new})
            job.check()

        stopped: str | None = None
        failure: StageError | None = None
        try:
            outcome = run_plan(
                self.plan,
                self.task,
                engine,
                rounds=self.rounds,
                seed=self.seed,
                ledger=ledger,
                watch=watch,
                stop=lambda: job.stopped,
            )
            stopped = outcome.stopped
        except StoppedError:
            stopped = "interrupted"
        except StageError as error:
            stopped, failure = "failed", error
        rows = collect(self.plan, ledger, self.rounds)
        kept = self._save(rows, stopped, engine) if rows else None
        yield {"type": "record", "name": kept, "stopped": stopped, "tokens": spent(rows)}
        if failure is not None:
            raise failure

    def _tree(self) -> list[dict[str, Any]]:
        """Stages with the temperature and the attention pattern of each worker."""
        return [
            {
                "stage": stage.name,
                "workers": [
                    {"temperature": rung[0], "attention": pattern}
                    for rung, pattern in zip(stage.rungs(), self.plan.patterns(stage), strict=True)
                ],
            }
            for stage in self.plan.stages
        ]

    def _save(self, rows: list[Any], stopped: str | None, engine: LocalEngine) -> str:
        chosen = {
            "engine": "local",
            "model": self.subject.name,
            "rounds": self.rounds,
            "seed": self.seed,
            "budget": None,
            # As `tempering throb` keeps them; --resume goes on with them.
            "concurrency": engine_options.CONCURRENCY,
            "timeout": engine_options.TIMEOUT,
            "retries": engine_options.RETRIES,
            "batch": _BATCH,
            "policy": engine_options.POLICY,
            "models": None,
            "device": None,
            "dtype": str(self.subject.model.dtype).removeprefix("torch."),
        }
        record = Record.new(
            "throb",
            settings={
                "task": self.task,
                "plan": self.plan.to_json(),
                "run": chosen,
                **engine.describe(),
                "complete": stopped is None,
                "stopped": stopped,
                "tokens": spent(rows),
            },
            results={"stages": rows},
            model={**self.subject.stated, "name": Path(self.subject.name).name},
            seed=self.seed,
        )
        return keep(record, self.out)


class _Told(Memory):
    """A ledger whose finished rows go to the page."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job

    def put(self, name: str, value: Any) -> None:
        super().put(name, value)
        turn, stage, worker = name.split("/")
        where = {"round": int(turn), "stage": stage, "worker": int(worker)}
        self._job.send({"type": "row", **where, "row": value})
