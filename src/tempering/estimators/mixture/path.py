"""The annealing path as data and as figures: rate against distortion, and the phase diagram."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tempering.estimators.mixture.snapshot import Snapshot

FIELDS = [
    ("temperature", "f8"),
    ("n_components", "i8"),
    ("effective_components", "f8"),
    ("information", "f8"),
    ("distortion", "f8"),
    ("heat_capacity", "f8"),
]


class MixtureSplit(NamedTuple):
    """A component that split while the temperature fell.

    temperature: T_c, where two copies of the component stopped staying together. component,
    child: numbers for life of the two; the first of all is 0. mean: where it was [D].
    eigenvector: the direction [D] in which they parted, of length 1. eigenvalue: the largest of
    the component's responsibility-weighted covariance at T_c, in squared units of the data: T_c
    times the kernel's variance at T = 1. For the first split it is lambda_max(cov) of the rows;
    later ones are interpolated between the temperatures passed through.
    """

    temperature: float
    component: int
    child: int
    mean: np.ndarray
    eigenvector: np.ndarray
    eigenvalue: float


def record(
    temperatures: Sequence[float], snapshots: Sequence[Snapshot], square: float
) -> np.ndarray:
    """One row a temperature, with the names of FIELDS; `square` is the square of the unit."""
    rows = [
        (
            t,
            len(seen.mass),
            seen.effective,
            seen.information,
            seen.distortion * square,
            seen.heat_capacity,
        )
        for t, seen in zip(temperatures, snapshots)
    ]
    return np.array(rows, dtype=FIELDS)


def plot(path: np.ndarray, positions: Sequence[np.ndarray], feature: int, axes: Any) -> Any:
    """Draw three panels on three matplotlib axes (None makes a figure); returns the figure.

    Information against distortion; the components' positions in one column against T, with the
    effective number of components; heat capacity against T.
    """
    if axes is None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10.5, 3.4), layout="constrained")
        axes = figure.subplots(1, 3)
    curve, phases, capacity = axes
    temperature = path["temperature"]
    curve.plot(path["distortion"], path["information"], marker=".", color="tab:blue")
    curve.set(
        title="Rate against distortion",
        xlabel="distortion: mean squared distance",
        ylabel="information (nats)",
    )
    for t, means in zip(temperature, positions):
        phases.plot([t] * len(means), means[:, feature], ".", color="tab:orange", markersize=3)
    phases.set(
        title="Where the components are",
        xlabel="temperature",
        ylabel=f"column {feature}",
        xscale="log",
    )
    capacity.plot(temperature, path["heat_capacity"], marker=".", color="tab:red")
    capacity.set(
        title="Phase diagram", xlabel="temperature", ylabel="heat capacity (nats)", xscale="log"
    )
    number = capacity.twinx()
    number.plot(temperature, path["effective_components"], color="tab:gray")
    number.set(ylabel="effective components", yscale="log")
    return curve.figure
