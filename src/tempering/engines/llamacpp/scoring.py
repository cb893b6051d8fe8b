"""Costs of profiles in llama.cpp: each is folded into a copy of the file, which is run and deleted.

llama.cpp has no temperature of its own for each layer, so that a profile reaches it through the
weights (`bake_gguf`, in place: types and size stay).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from tempering.engines.checkpoints.gguf import bake_gguf
from tempering.engines.llamacpp.model import LlamaCpp
from tempering.errors import InputError
from tempering.evaluation.cost import Cost, Variant, check_labels, mean_loss, summarised


def losses(path: Path, chunks: Int[Tensor, "chunks length"]) -> list[float]:
    """Mean -log q of the tokens after the first of each chunk, nats per token."""
    with LlamaCpp(path, length=chunks.shape[1]) as model:
        return [mean_loss(row) for row in model.logprobs(chunks.tolist())]


def costs(
    path: Path,
    chunks: Int[Tensor, "chunks length"],
    variants: Sequence[Variant],
    progress: Callable[[int, int], None] | None = None,
) -> list[Cost]:
    """The cost of each variant against the file as it is, paired over chunks; no KL.

    Raises InputError for a variant with a sampling temperature, BakeError for a profile that can't
    be folded into the file.
    """
    check_labels(variants)
    for variant in variants:
        if variant.temperature != 1 or variant.profile is None:
            raise InputError(
                f"{variant.label}: llama.cpp is scored at the sampling temperature 1 alone; leave "
                "it out, or use the engine in process"
            )
    rows: list[dict[str, list[float]]] = [{} for _ in range(len(chunks))]
    with tempfile.TemporaryDirectory(prefix="tempering-") as folder:
        runs = [("", None), *((item.label, item.profile) for item in variants)]
        for done, (label, profile) in enumerate(runs):
            file = path
            if profile is not None:
                file = Path(folder) / "folded.gguf"
                bake_gguf(path, profile, file, in_place=True)
            for row, loss in zip(rows, losses(file, chunks), strict=True):
                row[label] = [loss, math.nan]
            if file != path:
                file.unlink()
            if progress is not None:
                progress(done + 1, len(variants) + 1)
    return summarised(rows, variants, [chunks.shape[1] - 1] * len(rows))
