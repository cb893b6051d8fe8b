"""`tempering tune --tokens`: a policy by token learned from tasks, its file, record and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tempering.cli.shared import checking, common
from tempering.cli.shared import engine_options as engines

if TYPE_CHECKING:
    from tempering.evaluation.paired import IntervalEstimate
    from tempering.evaluation.policy_tuning import PolicyTrial, PolicyTuning


def tune_tokens(context: common.Context) -> None:
    """Learn the policy that the options of the command describe; see `tempering tune --help`."""
    from tempering.agents.tasks import load_tasks
    from tempering.cli.shared.keeping import JournalLedger, finish, interruptible
    from tempering.errors import InputError
    from tempering.evaluation.journal import Journal
    from tempering.evaluation.policy_search import HELD_OUT, learn_policy, split_tasks
    from tempering.files import write_atomic
    from tempering.reports import Record
    from tempering.tokens.unknowns import read_open_policy

    given = context.params
    text, seed, tokens = given["tokens"], given["seed"], given["max_tokens"]
    out = Path("policy.txt") if given["out"] is None else given["out"]
    held_out = HELD_OUT if given["held_out"] is None else given["held_out"]
    if given["tasks"] is None:
        raise InputError("--tokens learns from tasks: give --tasks FILE, JSON lines with id, "
                         "prompt and answer")  # fmt: skip
    engines.unread_by_engine(context, given["engine"])
    common.check_file(out, "--out", ".txt")
    read_open_policy(text)  # before a model is opened, which takes longer
    tasks, broken = load_tasks(given["tasks"], keep_going=given["keep_going"])
    for line in broken:
        common.note(f"left out: {line}")
    checkers = checking.checkers_of(tasks, given["checker"])
    split_tasks(tasks, held_out, seed)
    setup = engines.engine_options(context)
    worker, section = engines.build_engine(setup)
    settings: dict[str, Any] = {
        "open policy": text,
        "against": given["against"],
        "samples": given["samples"],
        "tokens": tokens,
        "held_out": held_out,
        "checker": given["checker"],
    }
    # Options that change no sample, or may change for the samples that are missing.
    same = ("checker", "batch", "concurrency", "timeout", "retries", "policy", "models")
    key = {**settings, **setup, "seed": seed, "tasks": tasks, **dict.fromkeys(same)}
    key |= {"engine": worker.name, "fingerprint": section.get("fingerprint")}
    journal = Journal(out.parent, "tune", key)
    context.call_on_close(journal.close)
    ledger = JournalLedger(journal, {**worker.describe(), "model": given["model"]})
    if journal.entries:
        common.note(f"resuming: {len(journal.entries)} finished samples in {journal.path}")
    with interruptible() as asked, common.staged() as report:
        found = learn_policy(
            worker,
            text,
            tasks,
            checkers,
            against=given["against"],
            trials=given["trials"],
            samples=given["samples"],
            tokens=tokens,
            held_out=held_out,
            seed=seed,
            ledger=ledger,
            on_trial=_say_trial,
            report=report,
            stop=lambda: asked() or ledger.failed is not None,
        )
    record = Record.new(
        "tune",
        settings={
            **settings,
            "tasks": given["tasks"].name,
            "broken lines": len(broken),
            "trials": given["trials"],
            "complete": found.complete,
            **worker.describe(),
            "parts": ledger.parts,
        },
        results=policy_sections(found),
        model=section,
        seed=seed,
        device=given["device"] or "cpu",
    )
    if not found.complete and ledger.failed is None:
        common.finish(record, out.parent, given["as_json"])
        why = "interrupted" if asked() else "given up, since nothing but failures came back"
        common.note(f"{why}; every sample is kept in {journal.path}. Run it again to go on")
        raise typer.Exit(130)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows)
    kept = None if found.failed else journal
    finish(record, out.parent, given["as_json"], kept, (".samples.jsonl", lines))
    for warning in found.warnings:
        common.note(f"warning: {warning}")
    if found.failed:
        common.note(
            f"{found.failed} samples failed and count as wrong; the same command tries them again"
        )
    if ledger.failed is not None:
        raise ledger.failed
    write_atomic(out, found.policy + "\n")
    common.note(f'policy: {out}, for tempering generate --tokens "$(cat {out})"')


def _say_trial(number: int, trial: PolicyTrial, best: float) -> None:
    """One line a trial on stderr."""
    left = f", left after {len(trial.scores)} tasks" if trial.left else ""
    common.note(f"trial {number}: {trial.score:.3f}{left}, best {best:.3f}: {trial.text}")


def policy_sections(found: PolicyTuning) -> dict[str, Any]:
    """The answer, the numbers, the shares of right samples, the trials, the cost, and warnings."""
    searched, held = found.tasks
    answer: dict[str, Any] = {"policy": found.policy, "against": found.against}
    if not found.complete:
        answer["stopped"] = "before the search was complete"
    sections: dict[str, Any] = {"learned_policy": answer}
    gains = [(f"{searched} tasks of the search", found.searched)]
    if found.held_out is not None:
        gains.append((f"{held} held-out tasks", found.held_out.gain))
        answer |= {
            "gain on held-out tasks": found.held_out.gain.value,
            "its interval": [found.held_out.gain.low, found.held_out.gain.high],
        }
        metric = f"right samples, {held} held-out tasks"
        sections["benefit"] = [
            {"label": label, "metric": metric, **_interval("value", estimate)}
            for label, estimate in (
                (found.against, found.held_out.untuned),
                (found.policy, found.held_out.learned),
            )
        ]
    if found.numbers:
        sections["numbers"] = [
            {
                "number": number.label,
                "value": number.value,
                "low": number.low,
                "high": number.high,
                "searched from": number.range[0],
                "to": number.range[1],
            }
            for number in found.numbers
        ]
    differences = [
        {"on": where, "against": found.against, **_interval("gain", estimate)}
        for where, estimate in gains
        if estimate is not None
    ]
    if differences:
        sections["paired_differences"] = differences
    sections["trials"] = _trials(found)
    sections["spent"] = {
        "samples": found.samples,
        "tokens read": found.tokens_in,
        "tokens written": found.tokens_out,
        "samples that failed": found.failed,
        "trials": len(found.trials),
        "trials left early": sum(trial.left for trial in found.trials),
    }
    if found.warnings:
        sections["warnings"] = [{"warning": text} for text in found.warnings]
    return sections


def _trials(found: PolicyTuning) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"trial": 0, "policy": found.against, "score": found.untuned, "tasks": found.tasks[0]}
    ]
    for i, trial in enumerate(found.trials, 1):
        row = {"trial": i, "policy": trial.text, "score": trial.score, "tasks": len(trial.scores)}
        row |= {"left": trial.left, "chosen": trial.text == found.policy}
        labels = [number.label for number in found.numbers]
        rows.append(row | dict(zip(labels, trial.values, strict=False)))
    return rows


def _interval(name: str, found: IntervalEstimate) -> dict[str, Any]:
    """A value with its interval; nulls where one task gives none."""
    ends = {"low": found.low, "high": found.high}
    plain = {key: None if value != value else value for key, value in ends.items()}
    return {name: found.value, **plain, "n": found.n, "level": 0.95}
