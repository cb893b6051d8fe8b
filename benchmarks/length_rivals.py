"""Temperatures beside their rivals on retrieval over length: scales of outputs, biases of the sink.

    python benchmarks/length_rivals.py [--samples 50] [--lengths 1024 2048 4096 8192] [--keep FILE]

Learned from line retrieval at about 1k tokens ("line tidy-crab: REGISTER_CONTENT is <2417>"), each
by Adam, once through the same contexts, judged by the same held-out ones (`fit_alternative`):

    temperatures                                 T, one number a head
    output scale of heads                        SEAL-H
    output scale of channels                     SEAL-C
    sink bias of heads                           ZeroTuning (arXiv 2505.11739)
    output scale of heads and temperatures
    sink bias of heads and temperatures
    law of length                                T(n) = T (n / n0)^b, two numbers a head

Tested at 1k to 8k tokens on lines of other names, on 16 wordings of recall that nothing is learned
from, and on text: loss, and the share of questions with every token of the answer likeliest.
Changes are paired by context with the untempered model and, between rivals, with each other; 95%
intervals by bootstrap over contexts. A finished cell is kept: Ctrl-C, and the same command goes on;
more contexts (--contexts) may be asked for later. Writes benchmarks/results/length_rivals.json.
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import _bench
import torch
from _lengths import Cells, opened, spread
from _measuring import recall_tests, text_tests
from _recall import Packed, answer_loss, answered, pack
from _rivals import RATES, WAYS, WITH, ways
from _texts import token_ids, token_losses
from context_fit import made

from tempering.attention.tuning import from_functions
from tempering.attention.tuning.alternatives import Opened, fit_alternative
from tempering.attention.tuning.problem import make_problem
from tempering.evaluation.recall import Recall

# Of the lines that are tested on: none is among those of context_fit, which are learned from.
KINDS = (
    "amber brisk coarse dense early faint gentle hollow icy jolly knotty lucid mellow narrow odd "
    "plain quiet rapid shiny tall urban vivid warm young"
).split()
NAMES = (
    "anvil basket candle dolphin engine falcon garden hammer island jacket kettle ladder mirror "
    "needle orchid parcel quiver ribbon saddle tunnel umbrella valley window yard"
).split()
PLAIN = "untempered"
FOLDS = {
    "temperatures": "into q",
    "output scale of heads": "into o",
    "output scale of channels": "into o",
    "sink bias of heads": "not: it belongs to one position",
    f"output scale of heads{WITH}": "into q and o",
    f"sink bias of heads{WITH}": "T into q; the bias not",
    "law of length": "not: it depends on the length",
}


def lines_of(
    tokenizer: Any, seed: str, tokens: int, questions: int, kinds: Any = (), names: Any = ()
) -> Packed:
    """A context of about so many tokens, and questions for some of its lines."""
    rng = random.Random(seed)
    pools = (kinds, names) if kinds else ()
    each = len(token_ids(tokenizer, made(random.Random(0), 50, *pools)[0])) / 50
    text, rows = made(rng, int(tokens / each), *pools)
    asked = rng.sample(rows, questions)
    return pack(
        tokenizer,
        Recall(
            text,
            tuple((f"The REGISTER_CONTENT in line {name} is <", n) for name, n in asked),
            "line",
            "digits",
        ),
    )


def tests_of(tokenizer: Any, options: Any) -> dict[str, list[Any]]:
    """{test: contexts, or chunks of text}, the short ones first."""
    counts = dict(zip(options.lengths, options.contexts, strict=True))

    def lines(length: int) -> list[Packed]:
        # A question with its answer takes some 40 tokens, which the length includes.
        return [
            lines_of(tokenizer, f"test {options.seed} {length} {i}", length - 40, 6, KINDS, NAMES)
            for i in range(counts[length])
        ]

    wordings = recall_tests(tokenizer, options.recall, 0, seed=options.seed)
    chunks = text_tests(tokenizer, 512, options.chunks)
    found = {f"lines, {n} tokens": lines(n) for n in options.lengths}
    first = next(iter(found))
    return {
        first: found.pop(first),
        "recall": [item for own in wordings.values() for item in own],
        "text": [ids for own in chunks.values() for ids in own],
        **found,
    }


@torch.no_grad()
def seen(model: Any, item: Any) -> dict[str, float]:
    """Loss, and accuracy where there are questions."""
    if isinstance(item, Packed):
        return dict(zip(("loss", "accuracy"), answered(model, item), strict=True))
    return {"loss": float(token_losses(model, item).double().mean())}


@contextlib.contextmanager
def under(way: Opened | None, theta: Sequence[float] | None) -> Iterator[None]:
    if way is None:
        yield
        return
    with way() as tunable:
        tunable.set(torch.tensor(theta, dtype=torch.float64))
        yield


def learned(model: Any, tokenizer: Any, label: str, options: Any) -> dict[str, Any]:
    """theta and how it was found; the first contexts are held out to choose the rate by."""
    items = [
        lines_of(tokenizer, f"learn {options.seed} {i}", options.tokens, 8)
        for i in range(options.samples + options.held)
    ]
    goals = [
        from_functions(
            f"lines {part}",
            [partial(answer_loss, item=x) for x in own],
            counts=[len(x.goals) for x in own],
        )
        for part, own in (("learned", items[options.held :]), ("held", items[: options.held]))
    ]
    problem = make_problem(goals[0], None, [goals[1]], options.seed)
    open_way = ways(model, max(x.ids.shape[1] for x in items))[label]
    fits = [
        fit_alternative(
            label, open_way, problem, 1, RATES[label.removesuffix(WITH)] * share, options.seed
        )
        for share in options.rates
    ]
    best = min(fits, key=lambda fit: fit.after)
    return {
        "numbers": best.numbers, "rate": best.rate, "before": best.before, "after": best.after,
        "each rate": {f"{fit.rate:g}": fit.after for fit in fits}, "kept": best.passes > 0,
        "seconds": sum(fit.seconds for fit in fits), "theta": best.theta.tolist(),
        "tokens": sum(x.ids.shape[1] for x in items[options.held :]),
        "longest": max(x.ids.shape[1] for x in items),
    }  # fmt: skip


def changes(
    cells: Mapping[str, Any], label: str, other: str, test: str, count: int
) -> dict[str, list[float]]:
    """{metric: mean change and its interval} of one way against another on the same contexts."""
    a, b = ([cells[f"{name} | {test} | {i}"] for i in range(count)] for name in (label, other))
    return {
        metric: spread([x[metric] - y[metric] for x, y in zip(a, b, strict=True)], range(count))
        for metric in a[0]
    }


def winner(
    cells: Mapping[str, Any], labels: Sequence[str], test: str, count: int
) -> dict[str, str | None]:
    """For each metric the way that beats each other by more than the interval of the difference."""
    found: dict[str, str | None] = {}
    for metric, sign in {"loss": 1, "accuracy": -1}.items():
        if metric not in cells[f"{PLAIN} | {test} | 0"]:
            continue
        found[metric] = next(
            (
                label
                for label in labels
                if all(
                    max(sign * end for end in changes(cells, label, other, test, count)[metric][1:])
                    < 0
                    for other in labels
                    if other != label
                )
            ),
            None,
        )
    return found


def report(cells: Mapping[str, Any], labels: Sequence[str], tests: Mapping[str, int]) -> Any:
    """Rows of the table, printed and returned; tests: contexts of each that are finished."""
    table = []
    for test, count in tests.items():
        if count < 2:  # no interval
            continue
        plain = [cells[f"{PLAIN} | {test} | {i}"] for i in range(count)]
        base = {m: sum(x[m] for x in plain) / count for m in plain[0]}
        print(f"\n{test}, {count} contexts: " + ", ".join(f"{m} {v:.3f}" for m, v in base.items()))
        for label in labels:
            change = changes(cells, label, PLAIN, test, count)
            against = (
                changes(cells, label, WAYS[0], test, count)
                if WAYS[0] in labels and label != WAYS[0]
                else None
            )
            table.append({"label": label, "test": test, "n": count, "untempered": base,
                          "change": change, "against temperatures": against})  # fmt: skip
            told = (
                f"{m} {v:+.3f} [{low:+.3f}, {high:+.3f}]" for m, (v, low, high) in change.items()
            )
            print(f"  {label:42}" + "  ".join(told))
        table.append({"test": test, "n": count, "wins": winner(cells, labels, test, count)})
        print(f"  wins by more than every interval: {table[-1]['wins']}")
    return table


def markdown(record: Mapping[str, Any]) -> str:
    """The table of docs/length.md: change of the loss with its interval, and the accuracy."""
    tests = [row["test"] for row in record["table"] if "wins" in row]
    plain = {row["test"]: row["untempered"] for row in record["table"] if "label" in row}
    cells = {(row["label"], row["test"]): row for row in record["table"] if "label" in row}

    def shown(base: Mapping[str, float], change: Mapping[str, Any] | None) -> str:
        loss = f"{base['loss']:.3f}"
        if change is not None:
            value, low, high = change["loss"]
            loss = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
        if "accuracy" not in base:
            return loss
        right = base["accuracy"] + (change["accuracy"][0] if change else 0)
        return f"{loss}, {right:.2f}"

    lines = [
        "| learned | numbers | " + " | ".join(tests) + " | folds |",
        "|---" * (len(tests) + 3) + "|",
    ]
    lines.append("| nothing | 0 | " + " | ".join(shown(plain[t], None) for t in tests) + " | |")
    for label, fit in record["learned"].items():
        own = " | ".join(shown(plain[t], cells[label, t]["change"]) for t in tests)
        lines.append(f"| {label} | {fit['numbers']:,} | {own} | {fit['folds']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=50, help="contexts to learn from")
    parser.add_argument("--held", type=int, default=4, help="contexts to judge by")
    parser.add_argument("--tokens", type=int, default=900, help="of a context to learn from")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0], help="times RATES")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--contexts", type=int, nargs="+", default=[12, 8, 4, 2])
    parser.add_argument("--recall", type=int, default=1, help="contexts of each of 16 wordings")
    parser.add_argument("--chunks", type=int, default=4, help="of each of 4 kinds of text")
    parser.add_argument("--which", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("runs/length_rivals.json"))
    parser.add_argument("--quick", action="store_true", help="three layers, a few contexts")
    options = parser.parse_args()
    if options.quick:
        options.samples, options.held, options.tokens = 4, 2, 200
        options.lengths, options.contexts = [256, 512], [2, 2]
        options.chunks = 1
        options.keep = options.keep.with_suffix(".quick.json")
    options.which.sort(key=WAYS.index)
    model, tokenizer = opened(options.quick)
    model = model.to(getattr(torch, options.dtype))
    names = ("samples", "held", "tokens", "rates", "dtype", "seed", "quick")
    settings = {name: getattr(options, name) for name in names}
    options.keep.parent.mkdir(parents=True, exist_ok=True)
    cells = Cells(options.keep, settings)
    tests = tests_of(tokenizer, options)
    try:
        for label in options.which:
            cells.get(f"learned {label}", partial(learned, model, tokenizer, label, options))
        for test, items in tests.items():
            for label in (PLAIN, *options.which):
                fit = cells.found.get(f"learned {label}")
                way = None if fit is None else ways(model, fit["longest"])[label]
                with under(way, fit and fit["theta"]):
                    for i, item in enumerate(items):
                        cells.get(f"{label} | {test} | {i}", partial(seen, model, item))
    except KeyboardInterrupt:
        print("stopped; what is finished:")
    rivals = [label for label in options.which if f"learned {label}" in cells.found]
    done = {
        test: min(
            sum(f"{label} | {test} | {i}" in cells.found for i in range(len(items)))
            for label in (PLAIN, *rivals)
        )
        for test, items in tests.items()
    }
    table = report(cells.found, rivals, done)
    fits = {
        label: {k: v for k, v in cells.found[f"learned {label}"].items() if k != "theta"}
        | {"folds": FOLDS[label]}
        for label in rivals
    }
    record = {"settings": settings, "contexts": done, "learned": fits, "table": table}
    print(f"\n{markdown(record)}")
    if not options.quick:
        print(_bench.write("length_rivals", record))


if __name__ == "__main__":
    main()
