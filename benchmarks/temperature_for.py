"""What solving for temperature costs, in units of one softmax over the same energies.

The claim: 1,000,000 rows of 64 float32 energies within 12 softmaxes.

    python benchmarks/temperature_for.py            # about a minute on two cores
    python benchmarks/temperature_for.py --rows 20000 --repeats 2   # does it run?
"""

from __future__ import annotations

import argparse
import math

import _bench
import torch

from tempering import support, temperature_for

HYPOTHESES = 64
CLAIMED_ROWS = 1_000_000
KINDS = {
    "normal": lambda rows, g: torch.randn(rows, HYPOTHESES, generator=g),
    "attention-like (normal x 8)": lambda rows, g: 8 * torch.randn(rows, HYPOTHESES, generator=g),
    "heavy-tailed (exp of normal x 3)": lambda rows, g: torch.exp(
        3 * torch.randn(rows, HYPOTHESES, generator=g)
    ),
}


def targets(rows: int, generator: torch.Generator) -> dict[str, float | torch.Tensor]:
    """Supports asked for: the stages of throb that are within reach inside, and one per row."""
    anywhere = 1.01 + (HYPOTHESES - 1.02) * torch.rand(rows, generator=generator)
    return {"12": 12.0, "3": 3.0, "1.1": 1.1, "random per row": anywhere}


def measure(energies: torch.Tensor, wanted: dict, repeats: int) -> tuple[dict, dict]:
    """Time ratios against softmax, and the largest relative error of N for each target."""
    jobs = {"softmax": lambda: torch.softmax(energies, -1)}
    for name, value in wanted.items():
        jobs[f"support {name}"] = lambda value=value: temperature_for(energies, value)
    report = _bench.ratios(_bench.interleave(jobs, repeats), "softmax")
    errors = {}
    for name, value in wanted.items():
        sample = slice(0, 20_000)
        goal = value[sample] if isinstance(value, torch.Tensor) else value
        met = support(energies[sample].double(), temperature_for(energies[sample], goal).double())
        errors[f"support {name}"] = float((met / goal - 1).abs().max())
    return report, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=CLAIMED_ROWS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()})
    )
    options = parser.parse_args()
    runs, worst = [], -math.inf
    for count in options.threads:
        with _bench.threads(count):
            for kind, make in KINDS.items():
                generator = torch.Generator().manual_seed(0)
                energies = make(options.rows, generator)
                wanted = targets(options.rows, generator)
                report, errors = measure(energies, wanted, options.repeats)
                print(f"\n{options.rows} x {HYPOTHESES} float32, {kind}, {count} thread(s)")
                _bench.show(report, "softmax")
                print(f"largest relative error of N: {max(errors.values()):.1e}")
                worst = max(worst, *(row["median"] for row in report.values()))
                runs.append(
                    {"kind": kind, "threads": count, "ratios": report, "relative_error": errors}
                )
    if options.rows < CLAIMED_ROWS:
        print(f"\nnothing is claimed or written below {CLAIMED_ROWS} rows")
        return
    print(f"\nworst median: {worst:.2f} softmaxes (claim: at most 12)")
    payload = {
        "rows": options.rows,
        "hypotheses": HYPOTHESES,
        "repeats": options.repeats,
        "seed": 0,
        "worst_median": worst,
        "runs": runs,
    }
    print(_bench.write("temperature_for", payload))


if __name__ == "__main__":
    main()
