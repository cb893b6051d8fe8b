"""Token policies in decoding by llama.cpp: what a token costs, part by part. One thread.

    python benchmarks/llamacpp_policies.py [--tokens 60] [--turns 5]

Needs cyllama: pip install 'tempering[llamacpp]'. Processor time of one step on the embedded model:

    decode     llama.cpp alone
    list       the logits as cyllama hands them out: a list of 49,152 Python floats
    copy       that list as float32, by each way of copying it
    policy     a whole token of `tempering serve`, by policy (`tempering generate` traces it too)

cyllama 0.2.18 has no other way to the logits: no buffer, no address, no exported function of
llama.cpp, and the state that it saves holds none. Writes benchmarks/results/llamacpp_policies.json.
"""

from __future__ import annotations

import argparse
import array
import statistics
import struct
import time
from collections.abc import Callable
from typing import Any

import _bench
import numpy as np
import torch

from tempering.engines.llamacpp.model import LlamaCpp
from tempering.engines.llamacpp.writing import SampledToken, write
from tempering.engines.loading.gguf_files import embedded_gguf
from tempering.tokens import parse_policy

POLICIES = ("constant(1)", "constant(0.7)", "schedule(linear(1.2,0.3), length=60)",
            "entropy(T0=1.2, theta=0.5)", "support(8)")  # fmt: skip
PROMPT = "Once upon a time there was"


def parts(engine: LlamaCpp, turns: int) -> dict[str, float]:
    """Milliseconds of a step: decoding, the list, and each way of copying it."""
    ids = engine.ids(PROMPT)
    engine.read(0, ids)
    context, batch, words = engine._context, engine._batch, engine.words
    places = iter(range(len(ids), engine.length))

    def decode() -> None:
        batch.clear()
        batch.add(ids[0], next(places), [0], True)
        context.decode(batch)

    decode()
    row = context.get_logits_ith(0)
    packed = struct.Struct(f"{words}f")
    ways: dict[str, Callable[[], object]] = {
        "decode": decode,
        "list": lambda: context.get_logits_ith(0),
        "copy by numpy.fromiter": lambda: np.fromiter(row, np.float32, words),
        "copy by numpy.array": lambda: np.array(row, np.float32),
        "copy by array.array": lambda: array.array("f", row),
        "copy by torch.tensor": lambda: torch.tensor(row),
        "copy by struct.pack": lambda: np.frombuffer(packed.pack(*row), np.float32),
    }
    times = _bench.interleave(ways, 10 * turns, clock=time.process_time)
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}


def policies(engine: LlamaCpp, tokens: int, turns: int) -> dict[str, float]:
    """Milliseconds a token, the policies in turns: medians."""
    prompt = engine.ids(PROMPT)
    times: dict[str, list[float]] = {text: [] for text in POLICIES}
    for turn in range(turns):
        for text in POLICIES:
            sample = SampledToken(parse_policy(text, engine.tokenizer), turn)
            start = time.process_time()
            count = sum(1 for _ in write(engine, prompt, [sample], tokens=tokens, traced=False))
            times[text].append((time.process_time() - start) / max(count, 1))
    return {text: 1e3 * statistics.median(found) for text, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with LlamaCpp(embedded_gguf("smollm2"), length=512, threads=1) as engine:
        step = parts(engine, options.turns)
        whole = policies(engine, options.tokens, options.turns)
    report: dict[str, Any] = {"a step, ms": step, "a token, ms": whole}
    base = whole["constant(1)"]
    report["over constant(1)"] = {name: value / base - 1 for name, value in whole.items()}
    report["over decoding"] = {name: value / step["decode"] - 1 for name, value in whole.items()}
    for title, rows in report.items():
        print(title)
        for name, value in rows.items():
            print(f"    {name:42s} {value:8.3f}")
    _bench.write("llamacpp_policies", report)


if __name__ == "__main__":
    main()
