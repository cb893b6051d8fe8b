"""What the reference gives: samples, lessons, scores and entropies."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempering.attention.measuring.measure import measure_tokens
from tempering.attention.profiles.fingerprint import fingerprint
from tempering.attention.tuning import Objective, from_batches
from tempering.attention.tuning.batches import text_batches
from tempering.attention.tuning.repair import check_pair
from tempering.attention.tuning.teacher import teach
from tempering.cli.shared import common
from tempering.cli.shared.repairing.material import Material, RepairOptions, support_chunks
from tempering.engines.generating.samples import write_samples
from tempering.errors import ModelError
from tempering.evaluation.journal import Journal
from tempering.evaluation.returned import PieceScores, score


def ask(
    request: RepairOptions,
    config: Any,
    tokenizer: Any,
    material: Material,
    lessons: Path,
    journal: Journal,
    report: Any,
) -> tuple[tuple[Objective, ...], dict[str, PieceScores], Tensor | None]:
    """Lessons, scores and (by support) entropies of the reference, which is let go afterwards."""
    reference, its_tokenizer = common.open_model(
        request.reference or "", request.device, request.dtype
    )
    check_pair(config, reference.config)
    check_tokenizers(tokenizer, its_tokenizer)
    # By its weights, not its name: a resumed run must not go on with another model's scores.
    label = f"reference {fingerprint(reference)}"
    known = score(reference, material.tests, label=label, journal=journal, progress=report)
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


def _samples(
    reference: Any, tokenizer: Any, request: RepairOptions, lessons: Path, report: Any
) -> Tensor:
    """Chunks that the reference writes, kept beside its lessons."""
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
