"""Temperature scaling against packaged rivals: processor time, optimum reached, memory taken.

    python benchmarks/calibration.py                 the four shapes
    python benchmarks/calibration.py --scale 20      a twentieth of the rows, 20 a class at least

One thread, processor time, input validation included. The rivals are scikit-learn's public way
(CalibratedClassifierCV on a frozen classifier that hands over the logits), the private class under
it, and probmetrics (pip install probmetrics) where it is installed. Memory is what a fresh
process adds to its peak while it fits.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _bench import interleave, ratios, show, threads, write
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV, _TemperatureScaling
from sklearn.frozen import FrozenEstimator
from threadpoolctl import threadpool_limits

from tempering.estimators import TemperatureScaler

SHAPES = ((10_000, 10), (50_000, 100), (1_000_000, 10), (50_000, 1000))
TRUE_TEMPERATURE = 2.3
OURS = "tempering"


class HandsOver(ClassifierMixin, BaseEstimator):
    """A fitted classifier whose decision function is its input."""

    def __init__(self, n_classes: int = 2) -> None:
        self.n_classes = n_classes
        self.classes_ = np.arange(n_classes)

    def fit(self, X: np.ndarray, y: np.ndarray) -> HandsOver:
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        return X

    def predict(self, X: np.ndarray) -> np.ndarray:
        return X.argmax(1)


def tempering(z: np.ndarray, y: np.ndarray) -> float:
    return TemperatureScaler().fit(z, y).temperature_


def sklearn_public(z: np.ndarray, y: np.ndarray) -> float:
    frozen = FrozenEstimator(HandsOver(z.shape[1]))
    fitted = CalibratedClassifierCV(frozen, method="temperature").fit(z, y)
    return 1 / float(fitted.calibrated_classifiers_[0].calibrators[0].beta_)


def sklearn_private(z: np.ndarray, y: np.ndarray) -> float:
    return 1 / float(_TemperatureScaling().fit(z, y).beta_)


def probmetrics(z: np.ndarray, y: np.ndarray) -> float:
    from probmetrics.calibrators import TemperatureScalingCalibrator
    from probmetrics.distributions import CategoricalLogits

    fitted = TemperatureScalingCalibrator()
    fitted.fit_torch(CategoricalLogits(torch.from_numpy(z)), torch.from_numpy(y))
    return 1 / float(fitted.invtemp_)


def rivals() -> dict[str, Callable[[np.ndarray, np.ndarray], float]]:
    found = {
        OURS: tempering,
        "sklearn CalibratedClassifierCV": sklearn_public,
        "sklearn _TemperatureScaling": sklearn_private,
    }
    try:
        importlib.import_module("probmetrics.calibrators")
    except ImportError as error:
        print(f"probmetrics is left out: {error}", file=sys.stderr)
    else:
        found["probmetrics"] = probmetrics
    return found


def draw(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 logits and labels drawn from them at a known temperature."""
    rng = np.random.default_rng(0)
    z = (3 * rng.standard_normal((rows, columns))).astype(np.float32)
    y = np.empty(rows, np.int64)
    for first in range(0, rows, 10_000):
        part = z[first : first + 10_000]
        y[first : first + 10_000] = (part / TRUE_TEMPERATURE + rng.gumbel(size=part.shape)).argmax(
            1
        )
    return z, y


def loss(z: np.ndarray, y: np.ndarray, beta: float) -> tuple[float, float, float]:
    """Mean NLL and its first two derivatives in beta, in float64."""
    total = np.zeros(3)
    for first in range(0, len(z), 10_000):
        part = z[first : first + 10_000].astype(np.float64)
        part -= part.max(1, keepdims=True)
        own = part[np.arange(len(part)), y[first : first + 10_000]]
        r = np.exp(beta * part)
        partition = r.sum(1)
        r /= partition[:, None]
        mean = (r * part).sum(1)
        total += (
            (np.log(partition) - beta * own).sum(),
            (mean - own).sum(),
            ((r * part**2).sum(1) - mean**2).sum(),
        )
    value, slope, curvature = total / len(z)
    return float(value), float(slope), float(curvature)


def newton(z: np.ndarray, y: np.ndarray) -> float:
    """The float64 optimum, beta."""
    beta = 1 / TRUE_TEMPERATURE
    while True:
        _, slope, curvature = loss(z, y, beta)
        step = slope / curvature
        beta -= step
        if abs(step) < 1e-12:
            return beta


def memory(name: str, folder: Path) -> float:
    """MB that a fit adds to the memory of a fresh process that holds the logits (Linux)."""
    code = f"""
import re, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np, calibration
fit = calibration.rivals()[{name!r}]
fit(*calibration.draw(200, 10))
z, y = np.load({str(folder / "z.npy")!r}), np.load({str(folder / "y.npy")!r})
def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
before = status("VmRSS")
fit(z, y)
print((status("VmHWM") - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure(rows: int, columns: int, repeats: int) -> dict[str, object]:
    z, y = draw(rows, columns)
    megabytes = z.nbytes / 2**20
    print(f"\n{rows} x {columns}, {megabytes:.1f} MB")
    fits = rivals()
    optimum = newton(z, y)
    best = loss(z, y, optimum)[0]
    above = {name: loss(z, y, 1 / fit(z, y))[0] - best for name, fit in fits.items()}
    times = interleave(
        {name: lambda fit=fit: fit(z, y) for name, fit in fits.items()},
        repeats,
        clock=time.process_time,
    )
    table = ratios(times, OURS)
    show(table, OURS)
    by_label = np.argsort(y, kind="stable")
    z_sorted, y_sorted = z[by_label], y[by_label]
    order = interleave(
        {"shuffled": lambda: tempering(z, y), "sorted": lambda: tempering(z_sorted, y_sorted)},
        repeats,
        clock=time.process_time,
    )
    sorted_ratio = ratios(order, "shuffled")["sorted"]
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "z.npy", z)
        np.save(Path(folder) / "y.npy", y)
        extra = {name: memory(name, Path(folder)) for name in fits}
    for name in fits:
        print(f"{name:32s} NLL above the optimum {above[name]:9.2e}   extra {extra[name]:7.1f} MB")
    print(f"sorted by label: {sorted_ratio['median']:.2f} x shuffled")
    return {
        "rows": rows,
        "columns": columns,
        "logits_mb": megabytes,
        "relative_time": table,
        "nll_above_float64_optimum": above,
        "extra_mb": extra,
        "sorted_by_label": sorted_ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--scale", type=int, default=1, help="divide the rows by this")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with threads(1), threadpool_limits(1):
        results = [measure(max(n // options.scale, 20 * k), k, options.repeats) for n, k in SHAPES]
    if options.scale == 1:
        print(write("calibration", {"true_temperature": TRUE_TEMPERATURE, "shapes": results}))
    else:
        print(json.dumps(results, indent=2)[:200], "...")


if __name__ == "__main__":
    main()
