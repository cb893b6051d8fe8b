"""Lessons from another model: its distributions over a text, made once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tempering.attention.profiles.fingerprint import fingerprint
from tempering.attention.tuning.batches import target_logits
from tempering.attention.tuning.lessons import Lesson, distributions
from tempering.attention.tuning.objectives import Objective, Piece
from tempering.attention.tuning.tunable import frozen
from tempering.errors import InputError

# Tokens of each distribution that a lesson keeps by default.
TOP = 128
_FORMAT = "tempering-lesson-1"


def teach(
    reference: nn.Module,
    objective: Objective,
    directory: str | Path,
    *,
    top: int | None = TOP,
    progress: Callable[[int, int], None] | None = None,
) -> Objective:
    """The same objective with the distributions of `reference` in place of the next tokens.

    Parameters
    ----------
    reference: the teacher.
    objective: text or answers.
    directory: where lessons are kept, a file each; those that are there already are not made again.
    top: how many tokens of each distribution are kept; None for the whole vocabulary.
    progress: (done, total).

    Raises InputError for Python functions as objectives, or a top below 1; OutputError when a
    lesson can't be written.
    """
    if top is not None and top < 1:
        raise InputError(f"a lesson keeps at least 1 token of each distribution, not {top}")
    if objective.kind == "function":
        raise InputError(f"'{objective.name}' is a Python function, which a teacher can't answer")
    directory = Path(directory)
    teacher = fingerprint(reference)
    pieces = []
    with frozen(reference), torch.no_grad():
        for done, piece in enumerate(objective.pieces, 1):
            pieces.append(_taught(reference, teacher, piece, directory, top))
            if progress is not None:
                progress(done, len(objective.pieces))
    return objective.having(pieces)


def _taught(
    reference: nn.Module, teacher: str, piece: Piece, directory: Path, top: int | None
) -> Piece:
    batch: Any = piece.source
    identity = json.dumps([_FORMAT, teacher, piece.digest, top])
    name = hashlib.sha256(identity.encode()).hexdigest()[:24]
    lesson = Lesson(directory / f"{name}.safetensors", identity)
    if not lesson.path.exists():
        lesson.write(distributions(target_logits(reference, batch)[0], top))
    return replace(piece, source=replace(batch, lessons=(lesson,)))
