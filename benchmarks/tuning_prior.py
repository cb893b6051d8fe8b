"""How wide the prior of tuning should be: text from few and many chunks, and recall.

    python benchmarks/tuning_prior.py [--keep DIR] [--only text]

The prior on each number is normal around 0, of standard deviation `prior_sd` in log T. *Text*: one
step of Newton's as `tune` takes it (damping 1, radius .15) from 6, 16, 40 and all 272 chunks of
512 tokens of seven texts, tested on other texts of four kinds, one of them never learned from.
*Recall*: three steps on the answers in 16 contexts of 34 wordings, as functions, four more contexts
to judge by; tested on 16 other wordings, and on text.

Changes against T = 1, nats per token, with 95% intervals over chunks or contexts. --keep DIR holds
the pass over the text, which recall_tuning.py keeps too, and every finished fit. Writes
benchmarks/results/tuning_prior.json.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path
from typing import Any

import _bench
import torch
from _constrained import Settings, _context
from _lengths import Cells, spread
from _measuring import recall_tests, text_tests
from _passes import DRAWS, _kept, _of
from _recall import answer_loss, answered, pack
from _texts import SHORT, as_objective, calibration, in_lengths, token_losses
from recall_tuning import LEARNED, TEMPERATURES, folder, opened

from tempering import load_model, tempered
from tempering.attention.tuning import from_functions, tune
from tempering.attention.tuning.steps import damped_step, quadratic
from tempering.chunks import start_ids

SIZES, REPEATS = (6, 16, 40), 2  # chunks learned from; and all of them, once
DEVIATIONS = (0.06, 0.12, 0.15, 0.2, 0.5)
CONTEXTS, WATCHED, STEPS = 16, 4, 3


@torch.no_grad()
def losses(model: Any, chunks: list[Any]) -> list[float]:
    return [float(token_losses(model, ids).double().mean()) for ids in chunks]


def text(model: Any, tokenizer: Any, chunks: list[Any], keep: Path, cells: Cells) -> None:
    """Cells "text, SIZE chunks, REPEAT, prior DEVIATION": losses of the tests."""
    cut = in_lengths(calibration(tokenizer), SHORT, start_ids(tokenizer))
    pieces = as_objective("calibration", [ids for _, ids in cut]).pieces
    with opened(model, TEMPERATURES)() as live:
        run = _kept(live, pieces, DRAWS, keep / f"text_{SHORT}.pt")
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()

        def after(places: list[int], deviation: float) -> list[float]:
            own = _of(run, places)
            near = quadratic(own.losses, own.gradients, own.counts, own.drawn)
            prior = 1 / (deviation**2 * float(own.counts.sum()))
            zero = torch.zeros_like(near.gradient)
            live.set(damped_step(near, zero, prior=prior, damping=1.0, radius=0.15))
            return losses(model, chunks)

        for size in (*SIZES, len(order)):
            for repeat in range(REPEATS if size < len(order) else 1):
                places = order[repeat * size : (repeat + 1) * size]
                for deviation in DEVIATIONS:
                    name = f"text, {size} chunks, {repeat}, prior {deviation:g}"
                    cells.get(name, partial(after, places, deviation))


def recall(model: Any, tokenizer: Any, chunks: list[Any], cells: Cells) -> None:
    """Cells "recall, prior DEVIATION": losses and accuracies of the contexts, losses of text."""
    order = list(LEARNED)
    random.Random(0).shuffle(order)
    settings = Settings(LEARNED)
    items = [
        pack(tokenizer, _context(settings, place, order[place % len(order)]))
        for place in range(CONTEXTS + WATCHED)
    ]
    goals = [
        from_functions(
            name,
            [partial(answer_loss, item=item) for item in own],
            counts=[len(item.goals) for item in own],
        )
        for name, own in (("watched", items[:WATCHED]), ("learned", items[WATCHED:]))
    ]
    tests = [item for own in recall_tests(tokenizer, 1, 0).values() for item in own]

    @torch.no_grad()
    def seen() -> dict[str, Any]:
        found = [answered(model, item) for item in tests]
        return {
            "loss": [loss for loss, _ in found],
            "accuracy": [right for _, right in found],
            "text": losses(model, chunks[::3]),
        }

    def after(deviation: float) -> dict[str, Any]:
        found = tune(model, goals[1], held_out=[goals[0]], steps=STEPS, prior_sd=deviation, seed=0)
        with tempered(model, found.profile):
            return seen() | {"watched": [found.before, found.after]}

    cells.get("recall, untempered", seen)
    for deviation in DEVIATIONS:
        cells.get(f"recall, prior {deviation:g}", partial(after, deviation))


def report(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of changes, printed and returned."""
    rows: list[dict[str, Any]] = []

    def add(name: str, metric: str, before: list[float], after: list[float]) -> None:
        own = spread([b - a for a, b in zip(before, after, strict=True)], range(len(after)))
        rows.append({"fit": name, "metric": metric, "change": own, "n": len(after)})
        print(f"{name:36} {metric:9} {own[0]:+.4f} [{own[1]:+.4f}, {own[2]:+.4f}]")

    for name, value in found.items():
        if name.startswith("text,") and not name.endswith("untempered"):
            add(name, "loss", found["text, untempered"], value)
        elif name.startswith("recall, prior"):
            for metric, before in found["recall, untempered"].items():
                add(name, metric, before, value[metric])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, default=Path("runs/recall"))
    parser.add_argument("--only", choices=("text", "recall"))
    options = parser.parse_args()
    keep = folder(options.keep, "smollm2", TEMPERATURES)
    model, tokenizer = load_model("smollm2", dtype=torch.bfloat16)
    chunks = [ids for own in text_tests(tokenizer, SHORT, 5).values() for ids in own]
    cells = Cells(keep / "tuning_prior.json", {"contexts": CONTEXTS})
    if options.only != "recall":
        cells.get("text, untempered", lambda: losses(model, chunks))
        text(model, tokenizer, chunks, keep, cells)
    if options.only != "text":
        recall(model, tokenizer, chunks, cells)
    rows = report(cells.found)
    print(_bench.write("tuning_prior", {"table": rows}))


if __name__ == "__main__":
    main()
