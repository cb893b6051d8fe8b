"""The profile that repairs a model, and its scores beside those of its controls."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from tempering.attention.control.tempered import tempered
from tempering.attention.profiles.profile import Profile
from tempering.attention.tuning import Constraint, Tuned, tune
from tempering.attention.tuning.repair import learning, repair_by_support
from tempering.cli.shared.repairing.material import Material, RepairOptions, short, support_chunks
from tempering.cli.shared.tuning_runs import say_step
from tempering.evaluation.journal import Journal
from tempering.evaluation.returned import PieceScores, score


def learn(
    request: RepairOptions,
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
        held_out=settings["held_out"],
        **learning(network, material.goals, settings["passes"], settings["rows"]),
        output_scales=settings["output scales"],
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
    request: RepairOptions,
    network: Any,
    material: Material,
    profile: Profile,
    journal: Journal,
    report: Any,
) -> dict[str, dict[str, PieceScores]]:
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
