"""One iteration of EM against scikit-learn's: processor time and extra memory.

    python benchmarks/mixture_speed.py                1M rows, 16 columns, 32 components
    python benchmarks/mixture_speed.py --rows 50000   a smaller table

One thread, processor time, the same rows, components and precision for both: an E-step over all
rows and the M-step that follows. Both have the rows checked before. Memory is what a fresh process
adds to its peak in one iteration.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _bench import interleave, ratios, show, threads, write
from sklearn.mixture import GaussianMixture
from sklearn.mixture._gaussian_mixture import _compute_precision_cholesky
from threadpoolctl import threadpool_limits

from tempering.estimators.mixture.covariance import SHAPES
from tempering.estimators.mixture.em import Components, Family, expect, maximise
from tempering.estimators.mixture.radial import RadialGaussian
from tempering.estimators.mixture.rows import Rows

KINDS = ("spherical", "diag", "full", "tied")
FEATURES, COMPONENTS = 16, 32


def table(count: int, dtype: str) -> np.ndarray:
    random = np.random.default_rng(0)
    centres = 2 * random.standard_normal((COMPONENTS, FEATURES), dtype=np.float32)
    rows = random.standard_normal((count, FEATURES), dtype=np.float32)
    rows += centres[random.integers(COMPONENTS, size=count)]
    return rows.astype(dtype, copy=False)


def start(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(weights, means, covariances) near the truth, so that responsibilities are not all 0 or 1."""
    random = np.random.default_rng(0)
    centres = 2 * random.standard_normal((COMPONENTS, FEATURES), dtype=np.float32)
    eye = 1.5 * np.eye(FEATURES)
    covariances = {
        "full": np.stack([eye] * COMPONENTS),
        "tied": eye,
        "diag": np.full((COMPONENTS, FEATURES), 1.5),
        "spherical": np.full(COMPONENTS, 1.5),
    }[kind]
    return np.full(COMPONENTS, 1 / COMPONENTS), centres.astype(float), covariances


def ours(x: np.ndarray, kind: str) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    weights, means, covariances = start(kind)
    rows = Rows(torch.from_numpy(x))
    family = Family(SHAPES[kind](), RadialGaussian(), 1e-6)
    state = Components(
        torch.tensor(weights).log(), torch.tensor(means) - rows.pivot, torch.tensor(covariances)
    )

    def iteration() -> tuple[np.ndarray, np.ndarray]:
        made = maximise(expect(rows, state, family), state, family)
        return (made.means + rows.pivot).numpy(), made.covariances.numpy()

    return iteration


def sklearn(x: np.ndarray, kind: str) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    def iteration() -> tuple[np.ndarray, np.ndarray]:
        weights, means, covariances = (part.astype(x.dtype) for part in start(kind))
        model = GaussianMixture(COMPONENTS, covariance_type=kind)
        model.weights_, model.means_, model.covariances_ = weights, means, covariances
        model.precisions_cholesky_ = _compute_precision_cholesky(covariances, kind)
        _, log_resp = model._e_step(x)
        model._m_step(x, log_resp)
        return model.means_, model.covariances_

    return iteration


RIVALS = {"tempering": ours, "scikit-learn": sklearn}


def extra_memory(rows: int, dtype: str, kind: str, name: str) -> float:
    """MB that a fresh process adds to its peak in one iteration."""
    command = [sys.executable, __file__, "--rows", str(rows), "--probe", name, kind, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def probe(rows: int, name: str, kind: str, dtype: str) -> None:
    """Print the MB that an iteration takes, after a small one has loaded what it needs."""
    RIVALS[name](table(1000, dtype), kind)()
    iteration = RIVALS[name](table(rows, dtype), kind)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = status("VmRSS")
    iteration()
    print((status("VmHWM") - before) / 1024)


def status(field: str) -> int:
    """kB of a field of this process (Linux)."""
    found = re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--probe", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with threads(1), threadpool_limits(1):
        if arguments.probe:
            probe(arguments.rows, *arguments.probe)
            return
        results = []
        for dtype in ("float32", "float64"):
            x = table(arguments.rows, dtype)
            for kind in KINDS:
                iterations = {name: make(x, kind) for name, make in RIVALS.items()}
                found = [iteration() for iteration in iterations.values()]
                apart = max(float(np.abs(a - b).max()) for a, b in zip(*found))
                times = interleave(iterations, arguments.repeats, warmup=0, clock=time.process_time)
                report = ratios(times, "tempering")
                memory = {name: extra_memory(arguments.rows, dtype, kind, name) for name in RIVALS}
                print(
                    f"\n{kind}, {dtype}; results differ by at most {apart:.1e}; extra MB {memory}"
                )
                show(report, "tempering")
                results.append(
                    {
                        "kind": kind,
                        "dtype": dtype,
                        "times": times,
                        "ratios": report,
                        "extra_mb": memory,
                        "largest_difference": apart,
                    }
                )
    settings = {"rows": arguments.rows, "features": FEATURES, "components": COMPONENTS}
    print(f"\nwritten to {write('mixture_speed', {'settings': settings, 'results': results})}")


if __name__ == "__main__":
    main()
