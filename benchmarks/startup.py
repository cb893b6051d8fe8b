"""How long tempering takes to start: import beside torch's, and `tempering --help`.

    python benchmarks/startup.py

Every sample is a process of its own; the three are interleaved. Prints seconds and writes
benchmarks/results/startup.json.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import _bench

EVERY_NAME = "import torch, tempering; [getattr(tempering, n) for n in ('responsibilities',)]"


def run(*arguments: str):
    """A function that runs a command to its end."""
    return lambda: subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    python = sys.executable
    times = _bench.interleave(
        {
            "import torch": run(python, "-c", "import torch"),
            "import torch, tempering": run(python, "-c", "import torch, tempering"),
            "... and the posterior": run(python, "-c", EVERY_NAME),
            "tempering --help": run(str(Path(python).with_name("tempering")), "--help"),
        },
        repeats=7,
    )
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in medians.items():
        spread = f"{min(times[name]):.3f} to {max(times[name]):.3f}"
        print(f"{name:28} {seconds:6.3f} s  ({spread})")
    more = medians["... and the posterior"] - medians["import torch"]
    print(f"tempering adds {more:.3f} s to import torch (bar: 1.0 s)")
    print(f"tempering --help takes {medians['tempering --help']:.3f} s (bar: 0.3 s)")
    _bench.write("startup", {"seconds": times, "median": medians})


if __name__ == "__main__":
    main()
