"""What a repair learns from and is tested on: its options, and texts in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempering.attention.tuning import Objective, from_pairs, from_text, refuse_overlap
from tempering.cli.shared.tune_results import objective
from tempering.data import sample_text, texts
from tempering.errors import DataError, InputError
from tempering.evaluation.recall import recall

# Texts of the package that are learned from by default, and chunks on which support is restored.
LEARNED, SUPPORT_CHUNKS = ("fiction", "code"), 4
LONG = 2048
RECALL_CONTEXTS, QUESTIONS = 3, 8


@dataclass(frozen=True)
class RepairOptions:
    """The options of the command; `settings` are those that the result depends on."""

    compressed: str
    reference: str | None
    data: Sequence[Path]
    tests: Sequence[Path]
    constraint: Path | None
    elsewhere: int
    shuffles: int
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


def gather_material(request: RepairOptions, tokenizer: Any) -> Material:
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


def short(tests: Sequence[Objective]) -> list[Objective]:
    """Texts in chunks of less than the long length."""
    return [test for test in tests if test.kind == "text" and test.pieces[0].count + 1 < LONG]
