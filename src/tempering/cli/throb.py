"""tempering throb: twelve explore hot, three consolidate, one executes cold; and again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tempering.cli.shared import common
from tempering.cli.shared import engine_options as engines

if TYPE_CHECKING:
    from tempering.agents.plan import Plan
    from tempering.reports import Record

EPILOG = """Examples:

  tempering throb "Name a bookshop by the sea."

  tempering throb --save-plan plan.yaml --pattern 'throb(6,2,1,6)'

  tempering throb "Plan a picnic." --plan plan.yaml --rounds 2 --budget-tokens 20000

  tempering throb "Plan a picnic." --engine anthropic --model claude-haiku-4-5

  tempering throb --resume runs/throb-20261122T101500.json

  tempering throb --resume runs/throb-20261122T101500.json --tokens 512 --timeout 300
"""

# Options that change no finished row: parameter -> its name in the record.
CARRIED = {
    "rounds": "rounds",
    "budget_tokens": "budget",
    "concurrency": "concurrency",
    "timeout": "timeout",
    "retries": "retries",
    "batch": "batch",
}
# Further options that may change when a run goes on; they act on the missing rows.
MENDING = ("engine", "model", "policy", "models", "tokens", "device", "dtype")
RESUMED = ("resume", "out", "as_json")


def throb(
    context: common.Context,
    task: Annotated[
        str | None, typer.Argument(help="What is to be done; - reads standard input.")
    ] = None,
    file: common.FromFile = None,
    pattern: Annotated[
        str, typer.Option(help="Widths of the stages; their temperatures follow.")
    ] = "throb(12,3,1,12)",
    plan: Annotated[Path | None, typer.Option(help="YAML plan, instead of a pattern.")] = None,
    save_plan: Annotated[
        Path | None, typer.Option(help="Write the plan to edit, and leave.")
    ] = None,
    save_profiles: engines.SaveProfiles = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds; 1 by default.", min=1)] = None,
    budget_tokens: Annotated[
        int | None, typer.Option(help="Tokens in and out, at most.", min=1)
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this record.")] = None,
    engine: engines.EngineName = "local",
    model: common.Model = "smollm2",
    amplitude: Annotated[
        float | None,
        typer.Option(
            help="Of the hottest workers' attention; 1.2 by default where the engine tempers it, "
            "else 1."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="New tokens of a worker, at most.", min=1)] = 128,
    policy: engines.Policy = engines.POLICY,
    models: engines.Models = None,
    concurrency: engines.Concurrency = engines.CONCURRENCY,
    timeout: engines.Timeout = engines.TIMEOUT,
    retries: engines.Retries = engines.RETRIES,
    batch: engines.Batch = 32,
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = "float32",
    out: common.Out = common.RUNS,
    as_json: common.Json = False,
) -> None:
    """Run stages of agents: explore, consolidate, execute.

    Finished workers are kept when another one fails, and after Ctrl-C. --resume RECORD goes on;
    the missing workers may then have another --model, --engine, --policy, --models, --tokens or
    --timeout.
    """
    from tempering.errors import InputError

    task = common.text_argument(task, file, "task")
    chosen: dict[str, Any] = {
        **engines.engine_options(context),
        "seed": seed,
        "rounds": rounds,
        "budget": budget_tokens,
    }
    if resume is not None:
        if task is not None:
            raise InputError("--resume takes the task from the record; leave it out")
        given = common.given(context)
        fixed = given.difference(RESUMED, CARRIED, MENDING)
        common.unread(context, fixed, "--resume takes plan and seed from the record")
        chosen["tokens"] = tokens
        may = given.intersection({*CARRIED, *MENDING})
        _resume(
            context, resume, {name: chosen[CARRIED.get(name, name)] for name in may}, out, as_json
        )
        return
    if plan is not None:
        common.unread(context, ("pattern", "amplitude", "tokens"), "--plan says it all; edit it")
    if save_plan is None and save_profiles is None:
        engines.unread_by_engine(context, engine)
    steps = _plan(plan, pattern, amplitude, tokens, engine)
    if save_plan is not None:
        common.note(f"plan: {steps.save(save_plan)}")
        return
    if save_profiles is not None:
        patterns = [pattern for stage in steps.stages for pattern in steps.patterns(stage)]
        engines.write_profiles(patterns, chosen, save_profiles)
        return
    if task is None:
        raise InputError('say what is to be done: tempering throb "task"')
    chosen["rounds"] = rounds or 1
    _run(steps, task, chosen, out, as_json)


def _plan(
    path: Path | None, pattern: str, amplitude: float | None, tokens: int, engine: str
) -> Plan:
    from tempering.agents.plan import Plan

    if path is not None:
        return Plan.load(path)
    if amplitude is None:
        # 1.2, where the engine tempers attention, costs 0.02 nats per token on the embedded model.
        amplitude = 1.2 if engine == "local" or engine.startswith("vllm:") else 1.0
    return Plan.from_pattern(pattern, amplitude=amplitude, tokens=tokens)


def _resume(
    context: common.Context, path: Path, given: dict[str, Any], out: Path, as_json: bool
) -> None:
    """Go on with a record: its plan, task and rows, and its engine where `given` has no other."""
    from tempering.agents.plan import Plan
    from tempering.agents.run import rows_of
    from tempering.errors import DataError
    from tempering.reports import Record

    record = Record.load(path)
    settings = record.settings
    if record.kind != "throb" or not {"plan", "run", "task"} <= settings.keys():
        raise DataError(
            f"{path} is no whole record of throb but of '{record.kind}'; it can't go on"
        )
    plan = Plan.from_data(settings["plan"], f"the plan in {path}")
    if "tokens" in given:
        most = given.pop("tokens")
        stages = tuple(replace(stage, tokens=most) for stage in plan.stages)
        plan = replace(plan, stages=stages)
    chosen = {**settings["run"], **{CARRIED.get(name, name): given[name] for name in given}}
    engines.unread_by_engine(context, chosen["engine"])
    kept = dict(rows_of(record.results.get("stages", [])))
    before = _Before(record, kept, {"engine", "model", "device", "dtype"}.isdisjoint(given))
    _run(plan, settings["task"], chosen, out, as_json, before)


@dataclass(frozen=True)
class _Before:
    """The record that a run goes on with, and its rows. same: whether with the same model."""

    record: Record
    rows: dict[str, Any]
    same: bool

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The settings under which its rows were made."""
        settings = self.record.settings
        if "parts" in settings:
            return list(settings["parts"])
        return [{"recorded before parts were": settings["run"]}]


def _run(
    plan: Plan,
    task: str,
    chosen: dict[str, Any],
    out: Path,
    as_json: bool,
    before: _Before | None = None,
) -> None:
    """Run a plan, or what is missing of one."""
    from tempering.agents.contract import StageError
    from tempering.agents.run import Outcome, collect, run_plan, spent
    from tempering.cli.shared.keeping import JournalLedger, finish, interruptible
    from tempering.cli.shared.live import LiveStages
    from tempering.errors import InputError
    from tempering.evaluation.journal import Journal
    from tempering.reports import Record

    common.check_out(out)
    worker, section = engines.build_engine(chosen)
    key: dict[str, Any]
    if before is None:
        key = {"task": task, "plan": plan.to_json(), **chosen, **dict.fromkeys(CARRIED.values())}
        key["fingerprint"] = section.get("fingerprint")
    else:
        model = before.record.model or {}
        if before.same and model.get("fingerprint") != section.get("fingerprint"):
            raise InputError(
                f"the model {chosen['model']} is not the one that the record began with; its "
                "weights or its shape have changed (to go on with it all the same, name it with "
                "--model)"
            )
        # Without the options that may change: the next attempt finds the rows of one that was
        # killed, under whatever settings.
        run = {**before.record.settings, **dict.fromkeys(CARRIED.values())}
        key = {"goes on": before.record.created, "run": run, "rows": sorted(before.rows)}
    with Journal(out, "throb", key) as journal:
        setting = {
            **worker.describe(),
            "model": chosen["model"],
            "tokens": {stage.name: stage.tokens for stage in plan.stages},
        }
        ledger = JournalLedger(journal, setting, [] if before is None else before.parts)
        for name, row in ({} if before is None else before.rows).items():
            journal.entries.setdefault(name, row)
        done = sum(row["error"] is None for row in journal.entries.values())
        if done:
            common.note(f"resuming: {done} workers are done")
        failed: StageError | None = None
        rounds = int(chosen["rounds"])
        with interruptible() as asked, LiveStages(plan, rounds) as live:
            try:
                outcome = run_plan(
                    plan,
                    task,
                    worker,
                    rounds=rounds,
                    seed=chosen["seed"],
                    budget=chosen["budget"],
                    ledger=ledger,
                    watch=live.watch,
                    stop=lambda: asked() or ledger.failed is not None,
                )
            except StageError as error:
                failed = error
                stages = collect(plan, ledger, rounds)
                outcome = Outcome(stages, None, spent(stages), "failed")
            except KeyboardInterrupt:
                stages = collect(plan, ledger, rounds)
                outcome = Outcome(stages, None, spent(stages), "interrupted")
        record = Record.new(
            "throb",
            settings={
                "task": task,
                "plan": plan.to_json(),
                "run": chosen,
                **worker.describe(),
                "parts": ledger.parts,
                "complete": outcome.stopped is None,
                "stopped": outcome.stopped,
                "tokens": outcome.tokens,
            },
            results={"stages": outcome.stages},
            model=section,
            seed=chosen["seed"],
            device=chosen["device"] or "cpu",
        )
        finish(record, out, as_json, journal)
    if ledger.failed is not None:
        raise ledger.failed
    if failed is not None:
        common.note(
            "--resume RECORD goes on; what is missing may be made with another --model, --engine, "
            "--policy, --models, --tokens or --timeout"
        )
        raise failed
    if outcome.stopped == "budget":
        common.note(
            "stopped: the budget has no room for another stage; --resume RECORD "
            "--budget-tokens N goes on"
        )
    if outcome.stopped == "interrupted":
        common.note("interrupted; --resume RECORD goes on")
        raise typer.Exit(130)
