"""What ladders of temperature buy a small model on tasks with known answers.

    python benchmarks/explore.py [--model gemma3-270m] [--k 12]
        [--mix KIND:LEVELS:TASKS,...] [--journal DIR]

Single temperatures (five, from the coldest to the hottest of the ladder), a ladder of sampling
temperatures, a ladder of attention temperatures at the middle one, and both at once, at the same
number of samples, with the same seeds: pass@k without bias, the accuracy of each aggregator,
tokens, and paired bootstrap intervals against each single temperature. Sampled text depends on the
seed alone. A run that was killed goes on from its journal. Prints tables and writes
benchmarks/results/explore.json, a record for each model.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
from _bench import write

from tempering import load_model
from tempering.agents.checkers import checker
from tempering.agents.ladder import Rung, Strategy, strategies
from tempering.agents.tasks import KINDS, generate_tasks
from tempering.engines.generating.local import LocalEngine
from tempering.evaluation.explore import explore
from tempering.evaluation.journal import Journal
from tempering.evaluation.passk import compared, pass_at_k

# Where smollm2 solves some tasks and not all, with prompts of 30 to 150 tokens.
MIX = "arithmetic:1/2/3/4:204,recall:1:76,words:1/2:24"


def chosen(options) -> list[Strategy]:
    """All strategies; the first singles are what the others are compared with."""
    low, high = options.ladder
    middle = round((low * high) ** 0.5, 2)
    common = {"temperature": middle, "ladder": (low, high), "amplitude": options.amplitude}
    single, *ladders = strategies(options.k, attention=options.attention, **common)
    steps = [low, round((low * middle) ** 0.5, 2), round((middle * high) ** 0.5, 2), high]
    others = [Strategy(f"single T {t:g}", (Rung(t),) * options.k) for t in steps]
    return [single, *others, *ladders]


def made(options) -> list[dict]:
    """Tasks by kind, levels and number, well mixed, so that any beginning has all of them."""
    placed = []
    for part in options.mix.split(","):
        kind, levels, count = part.split(":")
        own = [level for level in KINDS[kind].levels if str(level) in levels.split("/")]
        tasks = generate_tasks(int(count), seed=options.seed, kinds=[kind], levels=own)
        placed += [((i + 0.5) / len(tasks), task) for i, task in enumerate(tasks)]
    return [task for _, task in sorted(placed, key=lambda item: item[0])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--k", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--ladder", type=float, nargs=2, default=[0.4, 1.2])
    parser.add_argument("--amplitude", type=float, default=1.2)
    parser.add_argument("--attention", default="uniform")
    parser.add_argument("--mix", default=MIX)
    parser.add_argument("--batch", type=int, default=1152)
    parser.add_argument("--journal", default=tempfile.gettempdir())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    model, tokenizer = load_model(
        options.model, device=options.device, dtype=getattr(torch, options.dtype)
    )
    engine = LocalEngine(model, tokenizer, name=options.model, batch=options.batch, score=True)
    tasks = made(options)
    checkers = {kind: checker(KINDS[kind].checker) for kind in KINDS}
    start = time.perf_counter()
    plans = chosen(options)
    journal = Journal(options.journal, "explore-benchmark", vars(options))
    resumed = len(journal.entries)
    # A third at a time, so that a run that has to end early leaves whole, well mixed tasks.
    for part in (1, 2, 3):
        some = tasks[: len(tasks) * part // 3]
        found = explore(
            engine,
            some,
            [checkers[task["kind"]] for task in some],
            plans,
            tokens=options.tokens,
            seed=options.seed,
            ledger=journal,
            report=lambda what, done, total: print(f"{what}: {done}/{total}", end="\r", flush=True),
        )
        print(f"{len(some)} tasks after {time.perf_counter() - start:.0f} s", flush=True)
    seconds = time.perf_counter() - start
    journal.close()
    print(f"{len(found.rows)} samples in {seconds:.0f} s on {options.device}" + " " * 20)
    rows = [
        {"metric": row.metric, "strategy": row.label, **_plain(row.estimate, row.difference)}
        for row in found.compared
    ]
    _show(rows)
    for row in found.by_kind:
        print(row)
    write(
        "explore",
        {
            "settings": {k: v for k, v in vars(options).items() if k != "journal"},
            "model": options.model,
            "device": options.device,
            "seconds": seconds,
            "resumed_samples": resumed,  # made earlier, not in these seconds
            "samples": len(found.rows),
            "n_tasks": len(found.tasks),
            "strategies": {
                plan.name: [(rung.temperature, rung.attention) for rung in plan.rungs]
                for plan in plans
            },
            "compared": rows,
            "against_each_single": _against_singles(found, plans, options),
            "by_kind": found.by_kind,
        },
        options.model,
    )


def _plain(estimate, difference):
    plain = {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}
    if difference is not None:
        plain |= {
            "difference": difference.value,
            "difference_low": difference.low,
            "difference_high": difference.high,
        }
    return plain


def _show(rows) -> None:
    print(f"{'metric':30}{'strategy':28}{'mean':>8}  {'95% interval':18}{'difference':>10}  95%")
    for row in rows:
        line = (
            f"{row['metric']:30}{row['strategy']:28}{row['value']:8.3f}  "
            f"[{row['low']:.3f}, {row['high']:.3f}]  "
        )
        if "difference" in row:
            line += (
                f"{row['difference']:+10.3f}  "
                f"[{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"
            )
        print(line)


def _against_singles(found, plans, options):
    """pass@k of every strategy minus that of each single temperature, paired by task."""
    right: dict[str, dict[str, int]] = {plan.name: {} for plan in plans}
    for row in found.rows:
        counts = right[row["strategy"]]
        counts[row["task"]] = counts.get(row["task"], 0) + row["correct"]
    table = []
    singles = [plan.name for plan in plans if plan.name.startswith("single")]
    for size in sorted({1, options.k // 3, options.k}):
        values = {
            name: [pass_at_k(options.k, c, size) for c in counts.values()]
            for name, counts in right.items()
        }
        for single in singles:
            ordered = {single: values[single]} | values
            for row in compared(ordered, f"pass@{size}", seed=options.seed)[1:]:
                table.append({"against": single, "metric": row.metric, "strategy": row.label,
                              **_plain(row.estimate, row.difference)})  # fmt: skip
    return table


if __name__ == "__main__":
    main()
