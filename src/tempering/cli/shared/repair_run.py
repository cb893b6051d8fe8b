"""What `tempering repair` does: ask the reference, learn, and say what came back."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import typer
from torch import Tensor

from tempering.attention.control.tempered import tempered
from tempering.attention.measuring.measure import measure_tokens
from tempering.attention.profiles.profile import Profile
from tempering.attention.tuning import (
    Constraint,
    Objective,
    Tuned,
    from_batches,
    from_pairs,
    from_text,
    refuse_overlap,
    tune,
)
from tempering.attention.tuning.objective import text_batches
from tempering.attention.tuning.repair import check_pair, repair_by_support
from tempering.attention.tuning.teacher import teach
from tempering.cli.shared import common
from tempering.cli.shared.tune_results import objective
from tempering.cli.shared.tuning_runs import say_step, state_of
from tempering.data import sample_text, texts
from tempering.engines.generating.samples import write_samples
from tempering.errors import DataError, InputError, ModelError
from tempering.evaluation.journal import Journal
from tempering.evaluation.recall import recall
from tempering.evaluation.returned import Scores, returned, score
from tempering.evaluation.run_lock import RunLock

# Texts of the package that are learned from by default, and chunks on which support is restored.
LEARNED, SUPPORT_CHUNKS = ("fiction", "code"), 4
LONG = 2048
RECALL_CONTEXTS, QUESTIONS = 3, 8


@dataclass(frozen=True)
class Request:
    """The options of the command; `settings` are those that the result depends on."""

    compressed: str
    reference: str | None
    data: Sequence[Path]
    tests: Sequence[Path]
    constraint: Path | None
    elsewhere: int
    shuffles: int
    rows: int
    checkpoint: bool
    resume: bool
    seed: int
    device: str | None
    dtype: str
    out: Path
    as_json: bool
    settings: dict[str, Any]


@dataclass(frozen=True)
class Material:
    """What is learned from, its constraint, and what is tested on."""

    goals: tuple[Objective, ...]
    limit: Objective | None
    tests: tuple[Objective, ...]


def run_repair(request: Request) -> None:
    """The whole command; its files stand beside `out`, and go once it is done."""
    with RunLock(request.out, "repair"):
        state = state_of(request.out, request.resume)
        lessons = request.out.with_name(request.out.name + ".lessons")
        if lessons.exists() and not request.resume:
            shutil.rmtree(lessons)
        config, tokenizer, material, key = prepare(request)
        with Journal(request.out.parent, "repair", key) as journal:
            try:
                _repair(request, config, tokenizer, material, lessons, state, journal)
            except KeyboardInterrupt:
                common.note("interrupted; what was done is kept. Add --resume to go on")
                raise typer.Exit(130) from None
            journal.finish()
        shutil.rmtree(lessons, ignore_errors=True)
        state.unlink(missing_ok=True)


def prepare(request: Request) -> tuple[Any, Any, Material, dict[str, Any]]:
    """Configuration and tokenizer of the compressed model, the texts, and what names the run.

    The model is opened again once the reference is gone: they need not fit in memory together.
    """
    network, tokenizer = common.open_model(request.compressed, request.device, request.dtype)
    material = gather(request, tokenizer)
    return network.config, tokenizer, material, _key(request, network, material)


def _repair(
    request: Request,
    config: Any,
    tokenizer: Any,
    material: Material,
    lessons: Path,
    state: Path,
    journal: Journal,
) -> None:
    """Ask the reference, learn, test, and write what was found."""
    with common.staged() as report:
        known, entropy = None, None
        if request.reference is not None:
            goals, known, entropy = ask(
                request, config, tokenizer, material, lessons, journal, report
            )
            material = replace(material, goals=goals)
        network, _ = common.open_model(request.compressed, request.device, request.dtype)
        before = score(
            network, material.tests, label="compressed", journal=journal, progress=report
        )
        if known is not None:
            say_damage(material.tests, known, before)
        profile, tuned = learn(request, network, material, entropy, state, report)
        found = after(request, network, material, profile, journal, report)
    save(request, network, material, profile, tuned, known, before, found)


def gather(request: Request, tokenizer: Any) -> Material:
    """Read the texts; DataError when tests overlap with what is learned from."""
    chunk, limit = request.settings["chunk"], request.settings["chunks"]
    goals = [objective(tokenizer, path, 1.0, chunk, limit) for path in request.data]
    if not request.data:
        goals = [
            from_text(tokenizer, sample_text(name), chunk=chunk, limit=limit, name=name)
            for name in LEARNED
        ]
    held = None
    if request.constraint is not None:
        held = objective(tokenizer, request.constraint, 1.0, chunk, limit)
    tests = [objective(tokenizer, path, 1.0, chunk, None) for path in request.tests]
    learned = [*goals, *([held] if held else [])]
    refuse_overlap(learned, tests, "calibration and test")
    tests += _package_tests(tokenizer, learned, chunk, request.elsewhere)
    if not tests:
        raise InputError(
            "there is nothing to test on, so nothing could be said of the repair; give --test, "
            "or --elsewhere 1 or more"
        )
    return Material(tuple(goals), held, tuple(tests))


def _package_tests(
    tokenizer: Any, learned: Sequence[Objective], chunk: int, count: int
) -> list[Objective]:
    """Texts of the package that share nothing with what is learned from, and recall of facts."""
    found: list[Objective] = []
    for name, text in texts().items() if count else ():
        for length, most in ((chunk, count), (LONG, max(1, count // 3))):
            label = f"{text.kind} ({name}), {length} tokens"
            try:
                item = from_text(tokenizer, sample_text(name), chunk=length, limit=most, name=label)
                refuse_overlap(learned, [item], "calibration and other texts")
            except DataError:
                continue
            found.append(item)
    if found:
        pairs = []
        for seed in range(RECALL_CONTEXTS):
            pairs += recall(seed, wording=0, value="digits", questions=QUESTIONS).pairs()
        found.append(from_pairs(tokenizer, pairs, name="recall of facts"))
    return found


def ask(
    request: Request,
    config: Any,
    tokenizer: Any,
    material: Material,
    lessons: Path,
    journal: Journal,
    report: Any,
) -> tuple[tuple[Objective, ...], dict[str, Scores], Tensor | None]:
    """Lessons, scores and (by support) entropies of the reference, which is let go afterwards."""
    reference, its_tokenizer = common.open_model(
        request.reference or "", request.device, request.dtype
    )
    check_pair(config, reference.config)
    check_tokenizers(tokenizer, its_tokenizer)
    known = score(reference, material.tests, label="reference", journal=journal, progress=report)
    goals, settings = list(material.goals), request.settings
    entropy = None
    if settings["by"] == "support":
        entropy = measure_tokens(reference, support_chunks(material)).entropy
        return tuple(goals), known, entropy
    if settings["samples"]:
        own = _samples(reference, tokenizer, request, lessons, report)
        goals.append(from_batches("samples of the reference", text_batches(own, "sample")))
    taught = []
    for goal in goals:
        stage = partial(report, f"reference, {goal.name}")
        taught.append(teach(reference, goal, lessons, top=settings["top"], progress=stage))
    return tuple(taught), known, entropy


def check_tokenizers(one: Any, other: Any) -> None:
    """ModelError unless both give the same ids to the same text."""
    if one.get_vocab() == other.get_vocab():
        return
    ours, theirs = one.get_vocab(), other.get_vocab()
    token = next(t for t in (ours.keys() | theirs.keys()) if ours.get(t) != theirs.get(t))
    raise ModelError(
        f"the reference has another tokenizer: {token!r} is {theirs.get(token)} there and "
        f"{ours.get(token)} in the compressed model; give the model that it was compressed from"
    )


def support_chunks(material: Material) -> Tensor:
    """A few chunks of equal length, on which support is restored."""
    rows: list[Tensor] = []
    for goal in material.goals:
        if goal.kind == "text":
            rows += [piece.source.ids for piece in goal.pieces[:SUPPORT_CHUNKS]]  # type: ignore[union-attr]
    if not rows:
        raise InputError("support is restored on text; give a text as --data")
    places = torch.linspace(0, len(rows) - 1, min(SUPPORT_CHUNKS, len(rows))).round().int()
    return torch.cat([rows[place] for place in places.tolist()])


def _samples(
    reference: Any, tokenizer: Any, request: Request, lessons: Path, report: Any
) -> Tensor:
    """Chunks that the reference writes, kept beside its lessons."""
    from tempering.attention.profiles.fingerprint import fingerprint
    from tempering.files import replace_atomic

    count, length = request.settings["samples"], request.settings["chunk"]
    key = json.dumps([fingerprint(reference), count, length, request.seed])
    path = lessons / f"samples-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    if path.exists():
        kept: Tensor = torch.load(path, weights_only=True)
        return kept
    ids = write_samples(
        reference,
        tokenizer,
        count,
        length,
        seed=request.seed,
        progress=lambda done, total: report("reference, writing samples", done, total),
    )
    replace_atomic(path, lambda file: torch.save(ids, file))
    return ids


def learn(
    request: Request,
    network: Any,
    material: Material,
    entropy: Tensor | None,
    state: Path,
    report: Any,
) -> tuple[Profile, Tuned | None]:
    """The profile: learned, or solved from support."""
    settings = request.settings
    if settings["by"] == "support":
        report("support restored", 0, 1)
        profile = repair_by_support(network, cast(Tensor, entropy), support_chunks(material))
        report("support restored", 1, 1)
        return profile, None
    limit = None if material.limit is None else Constraint(material.limit, settings["within"])
    tuned = tune(
        network,
        material.goals,
        per=settings["per"],
        constraint=limit,
        steps=settings["steps"],
        radius=settings["radius"],
        held_out=settings["held_out"],
        rows=request.rows,
        checkpoint=request.checkpoint,
        seed=request.seed,
        state=state,
        on_step=say_step,
        progress=report,
    )
    if tuned.stopped_because == "interrupted":
        tuned.profile.save(request.out)
        raise KeyboardInterrupt
    return tuned.profile, tuned


def after(
    request: Request,
    network: Any,
    material: Material,
    profile: Profile,
    journal: Journal,
    report: Any,
) -> dict[str, dict[str, Scores]]:
    """Scores under the profile and under its controls, by label."""
    rivals = {"repaired": profile, "negated": profile.scaled(-1.0)}
    rivals |= {f"shuffled, seed {seed}": profile.shuffled(seed) for seed in range(request.shuffles)}
    digest = hashlib.sha256(json.dumps(profile.to_json()).encode()).hexdigest()[:12]
    found = {}
    for label, rival in rivals.items():
        # Controls only need the short texts, where their interval is narrow enough.
        tests = material.tests if label == "repaired" else short(material.tests)
        with tempered(network, rival):
            scores = score(
                network, tests, label=f"{label} {digest}", journal=journal, progress=report
            )
        found[label] = scores
    return found


def short(tests: Sequence[Objective]) -> list[Objective]:
    """Texts in chunks of less than the long length."""
    return [test for test in tests if test.kind == "text" and test.pieces[0].count + 1 < LONG]


def say_damage(
    tests: Sequence[Objective], known: dict[str, Scores], before: dict[str, Scores]
) -> None:
    """One line for every test; ModelError where compression took nothing on the whole."""
    total = 0.0
    for test in tests:
        row = returned(test, known[test.name], before[test.name], before[test.name])
        total += row.damage.value
        common.note(
            f"{test.name}: {row.reference:.4f} -> {row.compressed:.4f} nats per token, "
            f"lost {row.damage.value:+.4f} [{row.damage.low:+.4f}, {row.damage.high:+.4f}]"
        )
    if total <= 0:
        raise ModelError(
            f"the compressed model loses nothing against its reference ({total / len(tests):+.4f} "
            "nats per token over the tests), so there is nothing to repair; are the two in the "
            "right order?"
        )


def save(
    request: Request,
    network: Any,
    material: Material,
    profile: Profile,
    tuned: Tuned | None,
    known: dict[str, Scores] | None,
    before: dict[str, Scores],
    found: dict[str, dict[str, Scores]],
) -> None:
    """Write the profile with its evidence, and the record with its report."""
    from tempering.cli.shared.sections import pattern_section
    from tempering.reports import Record

    rows = compared(material.tests, known, before, found, request.seed)
    evidence = {
        "made by": "tempering repair",
        "repairs": Path(request.compressed).name,
        "reference": request.reference and Path(request.reference).name,
        "settings": request.settings,
        "learned from": [goal.name for goal in material.goals],
        "repair": rows,
    }
    replace(profile, evidence=evidence).save(request.out)
    results: dict[str, Any] = {"pattern": pattern_section({"repaired": profile}), "repair": rows}
    if tuned is not None:
        results["training"] = {"history": [step.row() for step in tuned.history]}
    record = Record.new(
        "repair",
        settings={
            "compressed": Path(request.compressed).name,
            "reference": request.reference and Path(request.reference).name,
            **request.settings,
        },
        results=results,
        model=common.model_section(network, request.compressed),
        seed=request.seed,
        device=request.device or "cpu",
    )
    common.finish(record, request.out.parent, request.as_json)
    common.note(f"profile: {request.out}")


def compared(
    tests: Sequence[Objective],
    known: dict[str, Scores] | None,
    before: dict[str, Scores],
    found: dict[str, dict[str, Scores]],
    seed: int,
) -> list[dict[str, Any]]:
    """A row for every contender and test; without a reference, changes alone."""
    rows = []
    for label, scores in found.items():
        for test in tests:
            if test.name in scores:
                base = (known or before)[test.name]
                item = returned(test, base, before[test.name], scores[test.name], seed=seed)
                row = {"label": label, **item.row()}
                if known is None:
                    for name in ("reference", "damage", "share", "low", "high"):
                        del row[name]
                rows.append(row)
    return rows


def _key(request: Request, network: Any, material: Material) -> dict[str, Any]:
    from tempering.attention.profiles.fingerprint import fingerprint

    return {
        "model": fingerprint(network),
        "reference": request.reference,
        "tests": [test.digest for test in material.tests],
        "seed": request.seed,
    }
