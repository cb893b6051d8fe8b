"""Recall by depth: facts strewn over a long text, and a question for each at its end."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from _lengths import Cells, spread
from _recall import Packed, each_answered, pack
from torch import Tensor

from tempering import Profile, tempered
from tempering.evaluation.recall import Recall
from tempering.evaluation.recall_pools import KEYS

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the text before a fact


def needles(tokenizer: Any, ids: Tensor, seed: str) -> Packed:
    """A text that ends with a question for each of five facts at DEPTHS, as long as ids at most."""
    rng = random.Random(seed)
    keys = rng.sample(KEYS["places"], len(DEPTHS))
    values = rng.sample(range(1000, 10000), len(DEPTHS))
    # A fact takes some 14 tokens; a question, all at the same places, some 16.
    body = ids[: len(ids) - 30 * len(DEPTHS)]
    cuts = [0, *(round(depth * len(body)) for depth in DEPTHS), len(body)]
    pieces = [tokenizer.decode(body[a:b]) for a, b in itertools.pairwise(cuts)]
    facts = [f"\nThe secret code for {k} is {v}.\n" for k, v in zip(keys, values, strict=True)]
    text = "".join(piece + fact for piece, fact in zip(pieces, [*facts, ""], strict=True))
    asked = tuple(
        (f"The secret code for {k} is", f" {v}") for k, v in zip(keys, values, strict=True)
    )
    return pack(tokenizer, Recall(text, asked, "secret code", "digits"))


def recall_by_depth(
    cells: Cells,
    prefix: str,
    model: Any,
    tokenizer: Any,
    chosen: Mapping[str, Profile | None],
    chunks: Sequence[tuple[str, int, Tensor]],
) -> list[dict[str, Any]]:
    """Loss and accuracy of answers by depth, with paired intervals against the plain model."""
    rows: dict[str, list[Any]] = {}
    for label, profile in chosen.items():
        for name, place, ids in chunks:

            def run(profile: Profile | None = profile, ids: Any = ids, seed: str = name) -> Any:
                item = needles(tokenizer, ids, seed)
                with nullcontext() if profile is None else tempered(model, profile):
                    return [part.tolist() for part in each_answered(model, item)]

            key = f"needles, {prefix} | {label} | {name} {place}"
            rows.setdefault(label, []).append(cells.get(key, run))
    table = []
    for label, own in rows.items():
        for i, depth in enumerate(DEPTHS):
            line: dict[str, Any] = {"label": label, "depth": depth, "n": len(own)}
            for metric, name in enumerate(("loss", "accuracy")):
                line[name] = sum(row[metric][i] for row in own) / len(own)
                if label != "plain" and len(own) > 1:
                    pairs = zip(own, rows["plain"], strict=True)
                    line[f"{name} against plain"] = spread(
                        [x[metric][i] - y[metric][i] for x, y in pairs], range(len(own))
                    )
            table.append(line)
        losses = " ".join(f"{line['loss']:.3f}" for line in table[-len(DEPTHS) :])
        print(f"needles, {prefix}: {label:22s} loss by depth {losses}", flush=True)
    return table
