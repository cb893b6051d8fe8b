"""What `tempering tune` reads, measures afterwards, and writes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tempering.attention.profiles.profile import Profile
from tempering.attention.tuning import (
    Constraint,
    Objective,
    Tuned,
    from_lengths,
    from_pairs,
    from_text,
    read_pairs,
    refuse_overlap,
)
from tempering.attention.tuning.alternatives import fit_alternatives
from tempering.cli.shared import common
from tempering.cli.shared.keeping import opened_journal
from tempering.data import sample_text, texts
from tempering.errors import DataError, InputError
from tempering.evaluation.clusters import cluster_bootstrap
from tempering.evaluation.evidence import (
    EvidenceRow,
    contenders,
    measure_evidence,
    with_evidence,
)
from tempering.ranks import here


@dataclass(frozen=True)
class EvidenceSettings:
    """What to measure about a tuned profile; the fields are the command's options."""

    tests: Sequence[Objective]
    elsewhere: int
    shuffles: int
    alternatives: bool
    held_out: float
    chunk: int
    seed: int


def objective(
    tokenizer: Any, path: Path, weight: float, chunk: int, limit: int | None
) -> Objective:
    """What a file asks for: answers of a .jsonl file, else the next tokens of texts."""
    if path.suffix == ".jsonl":
        return from_pairs(tokenizer, read_pairs(path, tokenizer), weight=weight, name=path.name)
    text, name = common.source_of(path)
    return from_text(tokenizer, text, chunk=chunk, limit=limit, weight=weight, name=name)


class Cuts(NamedTuple):
    """How texts are cut: lengths of chunks, and a length that is held out, if any."""

    lengths: tuple[int, ...]
    held: int | None

    @property
    def of_several(self) -> bool:
        """Whether there is more than one length, to learn from or to test on."""
        return len(self.lengths) > 1 or self.held is not None


def cuts_of(lengths: str | None, held: int | None, chunk: int) -> Cuts:
    """From --lengths and --held-length; the one length of --chunk without them."""
    if lengths is None:
        return Cuts((chunk,), held)
    try:
        found = tuple(int(part) for part in lengths.split(","))
    except ValueError as error:
        raise InputError(
            f"--lengths are numbers of tokens, e.g. 512,2048; not '{lengths}'"
        ) from error
    if held in found:
        raise InputError(f"--held-length {held} is one of --lengths {lengths}; hold out another")
    return Cuts(found, held)


def objective_of_lengths(
    tokenizer: Any, path: Path, weight: float, cut: Cuts, limit: int | None
) -> tuple[Objective, Objective | None]:
    """`objective` on chunks of several lengths, and the test on the length held out, if any."""
    if not cut.of_several:
        return objective(tokenizer, path, weight, cut.lengths[0], limit), None
    if path.suffix == ".jsonl":
        raise InputError(
            f"{path.name} holds prompts with answers, which have lengths of their own; --lengths "
            "and --held-length cut plain text"
        )
    text, name = common.source_of(path)
    return from_lengths(
        tokenizer,
        text,
        cut.lengths,
        held_length=cut.held,
        limit=limit,
        weight=weight,
        name=name,
    )


def gather(
    model: Any,
    tokenizer: Any,
    tuned: Tuned,
    goals: Sequence[Objective],
    constraint: Constraint | None,
    plan: EvidenceSettings,
    out: Path,
) -> list[EvidenceRow]:
    """The evidence: held-out loss, tests with controls, other texts, alternatives."""
    rows = _held_out(tuned, plan.seed)
    learned = [*goals, *([constraint.objective] if constraint else [])]
    key = {
        "profile": tuned.profile.to_json(),
        "plan": [t.digest for t in plan.tests],
        "elsewhere": plan.elsewhere,
        "alternatives": [plan.alternatives, [g.digest for g in goals], plan.seed],
    }
    others = _others(tokenizer, learned, plan)
    with opened_journal(out.parent, "tune", key) or contextlib.nullcontext() as journal:
        with common.staged() as report:
            fitted = []
            if plan.alternatives:
                fitted = fit_alternatives(
                    model,
                    goals,
                    constraint=constraint,
                    held_out=plan.held_out,
                    passes=max(1, len(tuned.history) - 1),
                    seed=plan.seed,
                    progress=report,
                )
            rivals = contenders(
                model,
                tuned.profile,
                numbers=len(tuned.names),
                shuffles=plan.shuffles,
                alternatives=fitted,
            )
            if tuned.step == 0:  # T = 1 has no controls
                rivals = _without_controls(rivals)
            for tests, few in ((plan.tests, rivals), (others, _without_controls(rivals))):
                rows += measure_evidence(
                    model,
                    tests,
                    few,
                    learned=learned,
                    seed=plan.seed,
                    journal=journal,
                    progress=report,
                )
        if journal is not None:
            journal.finish()
    return rows


def _without_controls(rivals: Sequence[Any]) -> list[Any]:
    return [rival for rival in rivals if rival.family != "control"]


def _others(
    tokenizer: Any, learned: Sequence[Objective], plan: EvidenceSettings
) -> list[Objective]:
    """Texts of the package that were not learned from."""
    found = []
    for name, text in texts().items() if plan.elsewhere else ():
        label = f"{name} (package text)"
        try:
            item = from_text(
                tokenizer, sample_text(name), chunk=plan.chunk, limit=plan.elsewhere, name=label
            )
            refuse_overlap(learned, [item], "calibration and other texts")
            refuse_overlap(plan.tests, [item], "tests")
        except DataError as error:
            common.note(f"leaving out the {text.kind} text of the package: {error}")
            continue
        found.append(item)
    return found


def _held_out(tuned: Tuned, seed: int) -> list[EvidenceRow]:
    """The watched data, which the choice of the step has seen; no controls."""
    rows = []
    for item in tuned.held_out:
        places = torch.arange(len(item.counts))
        change = cluster_bootstrap(item.after - item.before, item.counts, places, seed=seed)
        total = item.counts.sum()
        rows.append(
            EvidenceRow(
                label="tuned",
                family="tuned",
                numbers=len(tuned.names),
                test=f"{item.name} ({tuned.watched}; chose the step)",
                metric="loss",
                untempered=float((item.before * item.counts).sum() / total),
                value=float((item.after * item.counts).sum() / total),
                change=change,
                targets=int(total),
                seed=seed,
            )
        )
    return rows


class Results:
    """Writes the profile, and the record with its report, beside each other."""

    def __init__(
        self,
        out: Path,
        settings: dict[str, Any],
        model: Any,
        name: str,
        goals: Sequence[Objective],
        constraint: Constraint | None,
        seed: int,
        device: str | None,
    ) -> None:
        self.out, self.settings, self.goals, self.constraint = out, settings, goals, constraint
        self.model = common.model_section(model, name)
        self.seed, self.device = seed, device

    def save(self, tuned: Tuned, rows: Sequence[EvidenceRow]) -> Profile:
        """Write the profile with what was measured so far."""
        profile = with_evidence(
            tuned, self.goals, rows, constraint=self.constraint, settings=self.settings
        )
        with here().together():
            if here().first:
                profile.save(self.out)
        return profile

    def finish(
        self,
        tuned: Tuned,
        rows: Sequence[EvidenceRow],
        as_json: bool,
        *,
        complete: bool = True,
        label: str = "tuned",
    ) -> None:
        """Write the record and its report, and print it."""
        from tempering.cli.shared.sections import pattern_section
        from tempering.reports import Record

        training = {
            "history": [
                {**step.row(), "change": step.held_out - tuned.before} for step in tuned.history
            ]
        }
        if tuned.trade_off:
            training["trade_off"] = [
                {**point._asdict(), "change": point.objective - tuned.before}
                for point in tuned.trade_off
            ]
        results: dict[str, Any] = {
            "pattern": pattern_section({label: tuned.profile}),
            "training": training,
        }
        losses = [row for row in rows if row.metric == "loss"]
        alone = all(piece.count == 1 for goal in self.goals for piece in goal.pieces)
        if losses:
            results["cost"] = [_cost(row, "answer" if alone else "token") for row in losses]
        gained = [row for row in rows if row.metric != "loss"]
        if gained:
            results["benefit"] = [_benefit(row) for row in gained]
        record = Record.new(
            "tune",
            settings={
                **self.settings,
                "numbers": len(tuned.names),
                "targets": tuned.targets,
                "step": tuned.step,
                "room": tuned.room,
                "met": tuned.met,
                "stopped because": tuned.stopped_because,
                "complete": complete,
            },
            results=results,
            model=self.model,
            seed=self.seed,
            device=self.device or "cpu",
        )
        common.finish(record, self.out.parent, as_json)


def _cost(row: EvidenceRow, target: str) -> dict[str, Any]:
    plain = row.to_json()
    return {
        "label": f"{row.label}: {row.test}",
        "cost": plain["change"],
        **{name: plain[name] for name in ("se", "low", "high", "n")},
        "untempered": row.untempered,
        "numbers": row.numbers,
        "unit": f"nats/{target}",
        "level": 0.95,
    }


def _benefit(row: EvidenceRow) -> dict[str, Any]:
    plain = row.to_json()
    return {
        "label": row.label,
        "metric": f"gain in {row.metric}, {row.test}",
        "value": plain["change"],
        **{name: plain[name] for name in ("low", "high", "n")},
        "untempered": row.untempered,
        "tuned": row.value,
        "level": 0.95,
    }
