"""What one pass of tuning costs beside a plain forward, in time and in memory.

    python benchmarks/tune_pass.py [--model smollm2] [--chunk 512] [--chunks 4] [--device cuda]

A pass is the loss of every chunk and its gradient in one temperature a head, weights frozen; the
plain forward is the untempered model on the same chunks, with its next-token loss; draws are for
the curvature, in the first pass of Newton's method; the rule `power` has two numbers a head.
Interleaved; time is that of the processor on a CPU, which other work on the machine changes little,
and that of the clock on CUDA.
Memory is the peak above the loaded model: allocated by CUDA, or of the process on a CPU (Linux).
Writes benchmarks/results/tune_pass.json.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from functools import partial
from pathlib import Path

import _bench
import torch

from tempering import layout, load_model, sample_text
from tempering.attention.tuning import from_text, make_basis
from tempering.attention.tuning.batches import target_losses
from tempering.attention.tuning.live_law import LawRange
from tempering.attention.tuning.live_temperatures import live_temperatures
from tempering.attention.tuning.passes import gradient_pass, loss_pass

LIMITS = {"gradients": 2.8, "gradients, checkpointed": 3.8, "gradients, one draw": 3.5}


def peak_above(run, device: str) -> float:
    """GiB at the peak of `run` above what is in use before it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    run()
    return (_resident("VmHWM") - before) / 2**20


def _resident(field: str) -> int:
    """A field of the process's status, KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise SystemExit(f"no {field} in /proc/self/status; memory is measured on Linux or CUDA")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1, help="chunks side by side")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, device=options.device)
    pieces = from_text(
        tokenizer, sample_text("fiction"), chunk=options.chunk, limit=options.chunks
    ).pieces
    basis = make_basis(model, layout(model), "head")
    theta = torch.zeros(basis.matrix.shape[1], dtype=torch.float64)
    two = torch.zeros(2 * basis.matrix.shape[1], dtype=torch.float64)
    range_of_law = LawRange(max(2, round(options.chunk / math.e)), options.chunk - 1)
    rows = options.rows

    def wait():
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()

    def plain():
        with torch.no_grad():
            for piece in pieces:
                target_losses(model, piece.source).mean()
        wait()

    def under(work, checkpoint=False, law=None):
        def run():
            with live_temperatures(
                model, basis, (0.2, 5.0), checkpoint=checkpoint, law=law
            ) as tempering:
                work(tempering, theta if law is None else two, pieces, rows=rows)
            wait()

        return run

    fns = {
        "plain forward": plain,
        "tempered forward": under(loss_pass),
        "gradients": under(gradient_pass),
        "gradients, rule power": under(gradient_pass, law=range_of_law),
        "gradients, checkpointed": under(gradient_pass, checkpoint=True),
        "gradients, one draw": under(partial(gradient_pass, draws=1)),
        "gradients, two draws": under(partial(gradient_pass, draws=2)),
    }
    clock = time.perf_counter if options.device.startswith("cuda") else time.process_time
    report = _bench.ratios(_bench.interleave(fns, options.repeats, clock=clock), "plain forward")
    _bench.show(report, "plain forward")
    memory = {}
    with contextlib.suppress(SystemExit):
        memory = {name: peak_above(run, options.device) for name, run in fns.items()}
    for name, gib in memory.items():
        print(f"{name:28s} {gib:8.3f} GiB above the model")
    share = report["gradients, rule power"]["median"] / report["gradients"]["median"]
    print(f"rule power: {share:.2f} times gradients of constants; the claim is at most 1.3")
    for name, limit in LIMITS.items():
        print(f"{name}: {report[name]['median']:.2f} plain forwards; the claim is at most {limit}")
    _bench.write(
        "tune_pass",
        {
            "model": options.model,
            "device": options.device,
            "chunk": options.chunk,
            "chunks": options.chunks,
            "rows": rows,
            "repeats": options.repeats,
            "clock": clock.__name__,
            "ratios": report,
            "peak_gib_above_model": memory,
        },
    )


if __name__ == "__main__":
    main()
