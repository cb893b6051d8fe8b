"""What two ranks save: tuning and measuring 64 chunks on one rank and on two, one thread each.

    python benchmarks/ranks.py [--length 128] [--chunks 64] [--turns 3] [--name ranks]

Each run is started by torchrun. It loads the embedded model, meets the other rank, and then takes
the time of one tuning step with its evaluations (Newton, one T per head) and of one measurement:
wall time, and the CPU time of the busiest rank, which is what counts where other work runs beside
it. Runs on one and two ranks take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from typing import Any

from _bench import ratios, write


def work(what: str, chunks: int, length: int) -> dict[str, float]:
    """Seconds of one run on this process's ranks."""
    import torch

    from tempering import measure
    from tempering.attention.tuning import from_text, tune
    from tempering.data import sample_text
    from tempering.engines.loading.hub import load_model
    from tempering.ranks import here

    model, tokenizer = load_model("smollm2")
    text = " ".join(sample_text(name) for name in ("fiction", "code", "play"))
    ranks = here()
    ranks.each(torch.get_num_threads())  # all are ready
    wall, cpu = time.perf_counter(), time.process_time()
    if what == "tune":
        warnings.simplefilter("ignore")
        tune(model, from_text(tokenizer, text, chunk=length, limit=chunks), steps=1)
    else:
        measure(model, tokenizer, text, chunk=length, limit=chunks)
    busiest = max(ranks.each(time.process_time() - cpu))
    return {"wall": time.perf_counter() - wall, "cpu": busiest}


def run(what: str, ranks: int, arguments: argparse.Namespace) -> dict[str, float]:
    """One run under torchrun, on so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), __file__, "--work", what]
    command += ["--chunks", str(arguments.chunks), "--length", str(arguments.length)]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=3600,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--name", default="ranks")
    parser.add_argument("--work", choices=("tune", "measure"))
    arguments = parser.parse_args()
    if arguments.work:
        from tempering import ranks

        if ranks.started():
            with ranks.joined() as group:
                found = work(arguments.work, arguments.chunks, arguments.length)
                if group.first:
                    print(json.dumps(found))
        else:
            print(json.dumps(work(arguments.work, arguments.chunks, arguments.length)))
        return
    results: dict[str, Any] = {"chunks": arguments.chunks, "length": arguments.length}
    for what in ("measure", "tune"):
        times: dict[str, list[float]] = {}
        for _ in range(arguments.turns):
            for count in (1, 2):
                for kind, seconds in run(what, count, arguments).items():
                    times.setdefault(f"{kind}, {count} ranks", []).append(seconds)
        results[what] = {"seconds": times}
        for kind in ("wall", "cpu"):
            pair = {str(n): times[f"{kind}, {n} ranks"] for n in (1, 2)}
            results[what][f"{kind}, two ranks to one"] = ratios(pair, "1")["2"]
        print(what, json.dumps(results[what], indent=1))
    write(arguments.name, results)


if __name__ == "__main__":
    main()
