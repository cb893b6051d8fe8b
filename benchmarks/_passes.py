"""Gradients of text at T = 1, one for each chunk: taken once, and kept in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _texts import as_objective, calibration, mixed_lengths

from tempering.attention.tuning.passes import Pass, gradient_pass


def text_pass(live: Any, tokenizer: Any, keep: Path | None) -> tuple[list[str], Pass]:
    """The kind of each chunk of the calibration text, and the pass over all of them."""
    pieces = mixed_lengths(calibration(tokenizer))
    kinds = [kind for kind, _ in pieces]
    objective = as_objective("calibration", [ids for _, ids in pieces])
    key = {"data": objective.digest, "numbers": live.size}
    if keep is not None and keep.exists():
        found = torch.load(keep)
        if found["key"] == key:
            return kinds, Pass(found["losses"], found["counts"], found["gradients"])
    done = [0]

    def say(more: int) -> None:
        done[0] += more
        print(f"text gradient {done[0]} of {len(pieces)}", flush=True)

    theta = torch.zeros(live.size, dtype=torch.float64)
    run = gradient_pass(live, theta, objective.pieces, report=say)
    if keep is not None:
        torch.save({"key": key, **run._asdict()}, keep)
    return kinds, run
