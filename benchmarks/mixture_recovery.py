"""Does annealing find the clusters? Paired seeds, true K given, rivals with as much CPU time.

    python benchmarks/mixture_recovery.py --sets 15,35,50,100,100-grid,16d --seeds 20 --jobs 16

Each fit and its rivals run in one process on one thread, on the same rows. A rival stops at the
first restart that ends after the annealed fit's CPU seconds, and hands in its best:

    kmeans      KMeans (k-means++) restarts, the least inertia, then one GaussianMixture from it
    mixture     GaussianMixture restarts (each from its own KMeans), the likeliest
    default     one GaussianMixture as it comes, for the record: no more time than it takes

The best of each rival runs on to tol 1e-7 a pass. Found means centroid index 0.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import warnings

import numpy as np
import torch
from _bench import RESULTS, write
from mixture_sets import SETS, centroid_index
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

from tempering.estimators import AnnealedMixture


def annealed(rows: np.ndarray, count: int, seed: int, _: float) -> object:
    return AnnealedMixture(count, random_state=seed).fit(rows)


def kmeans(rows: np.ndarray, count: int, seed: int, seconds: float) -> object:
    def restart(random: np.random.RandomState) -> tuple[float, KMeans]:
        fitted = KMeans(count, n_init=1, random_state=random).fit(rows)
        return -fitted.inertia_, fitted

    best = _best(restart, seed, seconds)
    return _from_labels(rows, best.labels_, count)


def mixture(rows: np.ndarray, count: int, seed: int, seconds: float) -> object:
    def restart(random: np.random.RandomState) -> tuple[float, GaussianMixture]:
        fitted = GaussianMixture(count, random_state=random, max_iter=1000).fit(rows)
        return fitted.score(rows), fitted

    best = _best(restart, seed, seconds)
    return _converged(rows, best.weights_, best.means_, best.covariances_)


def default(rows: np.ndarray, count: int, seed: int, _: float) -> object:
    return GaussianMixture(count, random_state=seed).fit(rows)


METHODS = {"annealed": annealed, "kmeans": kmeans, "mixture": mixture, "default": default}


def one(task: tuple[str, int]) -> dict[str, object]:
    """All methods on one set and seed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name, seed = task
    clusters = SETS[name](seed)
    count = len(clusters.centres)
    found: dict[str, object] = {"set": name, "seed": seed, "rows": len(clusters.rows)}
    seconds = 0.0
    for method, fit in METHODS.items():
        start = time.process_time()
        fitted = fit(clusters.rows, count, seed, seconds)
        spent = time.process_time() - start
        seconds = seconds or spent
        found[method] = {
            "centroid_index": centroid_index(fitted.means_, clusters.centres),
            "log_likelihood": float(fitted.score(clusters.rows)),
            "cpu_seconds": spent,
        }
    return found


def summary(results: list[dict], name: str) -> dict[str, object]:
    """Success rates on one set, and how far the likelihood falls behind the best rival's."""
    mine = [result for result in results if result["set"] == name]
    rates = {
        method: sum(result[method]["centroid_index"] == 0 for result in mine) for method in METHODS
    }
    behind = [
        max(result[m]["log_likelihood"] for m in METHODS if m != "annealed")
        - result["annealed"]["log_likelihood"]
        for result in mine
    ]
    seconds = [result["annealed"]["cpu_seconds"] for result in mine]
    return {
        "set": name,
        "measured": time.strftime("%Y-%m-%d"),
        "fits": len(mine),
        "found": rates,
        "worst_shortfall_nats": max(behind),
        "median_cpu_seconds": float(np.median(seconds)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", default=",".join(SETS), help="of " + ", ".join(SETS))
    parser.add_argument("--seeds", type=int, default=20, help="seeds 0..N-1 of each set")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    arguments = parser.parse_args()
    names = arguments.sets.split(",")
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    tasks = [(name, seed) for seed in seeds for name in names]
    results = []
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # for the processes that are started, before numpy looks
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for result in pool.imap_unordered(one, tasks):
            results.append(result)
            row = " ".join(
                f"{method} {result[method]['centroid_index']:d} "
                f"{result[method]['log_likelihood']:.5f} {result[method]['cpu_seconds']:.1f}s"
                for method in METHODS
            )
            print(f"{result['set']:9s} seed {result['seed']:2d}  {row}", flush=True)
    summaries = [summary(results, name) for name in names]
    print()
    for row in summaries:
        rates = ", ".join(f"{m} {n}/{row['fits']}" for m, n in row["found"].items())
        print(
            f"{row['set']:9s} found: {rates}; behind the best rival by at most "
            f"{row['worst_shortfall_nats']:.5f} nats a row; {row['median_cpu_seconds']:.1f} s"
        )
    kept = _others(names)
    summaries, results = summaries + kept["summary"], results + kept["fits"]
    order = list(SETS)
    results.sort(key=lambda result: (order.index(result["set"]), result["seed"]))
    summaries.sort(key=lambda row: order.index(row["set"]))
    path = write("mixture_recovery", {"summary": summaries, "fits": results})
    print(f"written to {path}")


def _others(names: list[str]) -> dict[str, list[dict]]:
    """What the last record holds of sets that this run leaves out."""
    path = RESULTS / "mixture_recovery.json"
    record = json.loads(path.read_text()) if path.exists() else {"summary": [], "fits": []}
    return {
        part: [row for row in record[part] if row["set"] not in names]
        for part in ("summary", "fits")
    }


def _best(restart: object, seed: int, seconds: float) -> object:
    random = np.random.RandomState(seed)
    start, best = time.process_time(), None
    while best is None or time.process_time() - start < seconds:
        value, fitted = restart(random)
        if best is None or value > best[0]:
            best = (value, fitted)
    return best[1]


def _from_labels(rows: np.ndarray, labels: np.ndarray, count: int) -> GaussianMixture:
    """A GaussianMixture from hard labels: what KMeans gives GaussianMixture inside."""
    r = np.eye(count)[labels]
    mass = r.sum(0)
    means = r.T @ rows / mass[:, None]
    covariances = [
        np.cov(rows[labels == k].T, bias=True) + 1e-6 * np.eye(rows.shape[1]) for k in range(count)
    ]
    return _converged(rows, mass / mass.sum(), means, np.array(covariances))


def _converged(
    rows: np.ndarray, weights: np.ndarray, means: np.ndarray, covariances: np.ndarray
) -> GaussianMixture:
    """EM from these components to its limit."""
    start = GaussianMixture(
        len(means),
        weights_init=weights,
        means_init=means,
        precisions_init=np.linalg.inv(covariances),
        max_iter=2000,
        tol=1e-7,
    )
    return start.fit(rows)


if __name__ == "__main__":
    main()
