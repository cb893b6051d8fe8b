"""Honest timing: rivals interleaved in one run, ratios with their spread, the machine on record."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
_STARTED = time.perf_counter()
PACKAGES = ("tempering", "torch", "transformers", "scikit-learn", "numpy")


def interleave(
    fns: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each function, `repeats` times, in turns: a, b, a, b, ... after `warmup` turns.

    Turns, so that a slow spell of the machine falls on all of them alike. clock: what counts as
    time, e.g. time.process_time for the processor's.
    """
    times: dict[str, list[float]] = {name: [] for name in fns}
    for turn in range(warmup + repeats):
        for name, function in fns.items():
            start = clock()
            function()
            seconds = clock() - start
            if turn >= warmup:
                times[name].append(seconds)
    return times


def ratios(times: Mapping[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Time relative to `base`, turn by turn: median, quartiles, fastest over fastest."""
    report = {}
    for name, seconds in times.items():
        each = sorted(own / other for own, other in zip(seconds, times[base], strict=True))
        low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else (each * 3)
        report[name] = {
            "median": statistics.median(each),
            "q25": low,
            "q75": high,
            "best": min(seconds) / min(times[base]),
            "seconds": statistics.median(seconds),
        }
    return report


def show(report: Mapping[str, Mapping[str, float]], base: str) -> None:
    """Print a table of `ratios`."""
    print(f"{'':28s} {'x ' + base:>12s} {'quartiles':>17s} {'median':>12s}")
    for name, row in report.items():
        print(
            f"{name:28s} {row['median']:12.3f} {row['q25']:8.3f}-{row['q75']:<8.3f} "
            f"{row['seconds'] * 1e3:9.2f} ms"
        )


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's intra-op threads set to `count`, and back."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> dict[str, object]:
    """What a reader needs to judge the numbers: processor, memory, load, versions."""
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "ram_gib": round(_memory_bytes() / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": platform.system(),
        "versions": versions,
    }


def write(name: str, payload: Mapping[str, object], model: str | None = None) -> Path:
    """Save `payload` as results/NAME.json, with the machine, the date, and how to run it again.

    model: a name of `tempering models`, or what else tells records apart. The file then holds one
    for each, and those of others stay: {"benchmark": NAME, "models": {MODEL: record}}. A record
    that was written without is that of smollm2.
    """
    from tempering.files import write_atomic

    path = RESULTS / f"{name}.json"
    record: dict[str, object] = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "arguments": sys.argv[1:],
        "run_seconds": round(time.perf_counter() - _STARTED, 1),
        "machine": machine(),
        **payload,
    }
    if model is not None:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"models": {}}
        if "models" not in kept:
            kept = {"models": {"smollm2": {k: v for k, v in kept.items() if k != "benchmark"}}}
        record = {"models": {**kept["models"], model: record}}
    return write_atomic(path, json.dumps({"benchmark": name, **record}, indent=2) + "\n")


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
