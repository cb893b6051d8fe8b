"""What a repair says and writes: the damage, the profile with its evidence, the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tempering.attention.profiles.profile import Profile
from tempering.attention.tuning import Objective, Tuned
from tempering.cli.shared import common
from tempering.cli.shared.repairing.material import Material, RepairOptions
from tempering.errors import ModelError
from tempering.evaluation.returned import PieceScores, returned


def say_damage(
    tests: Sequence[Objective], known: dict[str, PieceScores], before: dict[str, PieceScores]
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
    request: RepairOptions,
    network: Any,
    material: Material,
    profile: Profile,
    tuned: Tuned | None,
    known: dict[str, PieceScores] | None,
    before: dict[str, PieceScores],
    found: dict[str, dict[str, PieceScores]],
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
    known: dict[str, PieceScores] | None,
    before: dict[str, PieceScores],
    found: dict[str, dict[str, PieceScores]],
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
