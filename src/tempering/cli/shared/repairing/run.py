"""What `tempering repair` does: ask the reference, learn, and say what came back."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from tempering.cli.shared import common
from tempering.cli.shared.repairing.learning import after, learn
from tempering.cli.shared.repairing.material import Material, RepairOptions, gather_material
from tempering.cli.shared.repairing.reference import ask
from tempering.cli.shared.repairing.results import save, say_damage
from tempering.cli.shared.tuning_runs import state_of
from tempering.evaluation.journal import Journal
from tempering.evaluation.returned import score
from tempering.evaluation.run_lock import RunLock


def run_repair(request: RepairOptions) -> None:
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


def prepare(request: RepairOptions) -> tuple[Any, Any, Material, dict[str, Any]]:
    """Configuration and tokenizer of the compressed model, the texts, and what names the run.

    The model is opened again once the reference is gone: they need not fit in memory together.
    """
    network, tokenizer = common.open_model(request.compressed, request.device, request.dtype)
    material = gather_material(request, tokenizer)
    return network.config, tokenizer, material, _key(request, network, material)


def _repair(
    request: RepairOptions,
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


def _key(request: RepairOptions, network: Any, material: Material) -> dict[str, Any]:
    from tempering.attention.profiles.fingerprint import fingerprint

    return {
        "model": fingerprint(network),
        "reference": request.reference,
        "tests": [test.digest for test in material.tests],
        "seed": request.seed,
    }
