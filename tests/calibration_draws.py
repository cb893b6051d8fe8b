"""Tables of logits drawn to break a calibrator, and what must hold of each.

A draw is fixed by its seed. The short form runs in the suite, the long one as
benchmarks/calibration_fuzz.py.
"""

from __future__ import annotations

import time
import warnings
from typing import NamedTuple

import numpy as np
import torch

from tempering.errors import TemperingError, TemperingWarning
from tempering.estimators import TemperatureScaler

# A fit of a few hundred rows takes some 20 ms; this catches one that does not end.
SECONDS = 20.0


class Draw(NamedTuple):
    """A table, its labels, and how it is to be fitted."""

    text: str
    X: object
    y: np.ndarray
    weights: np.ndarray | None
    groups: np.ndarray | None
    parameters: dict[str, object]


def draw(seed: int) -> Draw:
    """The table of this seed."""
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(2, 200)), int(rng.integers(2, 8))
    kind = rng.choice(
        ["plain", "ties", "separable", "constant", "few", "mixed", "outlier", "worse"]
    )
    exponent = float(rng.choice([0, 0, rng.uniform(-5, 5), rng.uniform(-150, 150)]))
    z = rng.standard_normal((n, k)) * 2
    if kind == "ties":
        z = np.rint(z)
    if kind == "constant":
        z = np.full((n, k), rng.standard_normal())
    y = (z / 1.7 + rng.gumbel(size=z.shape)).argmax(1)
    if kind == "separable":
        y = z.argmax(1)
    if kind == "worse":
        y = z.argmin(1)
    if kind == "few":
        z, y = z[:2], y[:2]
    if kind == "mixed":
        z *= 10.0 ** rng.uniform(-20, 20, size=(len(z), 1))
    if kind == "outlier":
        z[rng.integers(len(z))] *= 1e9
    z = z * 10.0**exponent
    if rng.random() < 0.15:
        ruled_out = rng.random(z.shape) < 0.2
        ruled_out[np.arange(len(z)), y] = False
        z = np.where(ruled_out, -np.inf, z)
    n = len(z)
    X, form = _form(rng, z)
    weights = _weights(rng, n)
    per = str(rng.choice(["global", "global", "class", "group", "input"]))
    groups = _groups(rng, n) if per == "group" else None
    reach = 10.0 ** float(rng.choice([3, 160, 300]))
    prior = (float(rng.normal()), 0.5) if rng.random() < 0.3 else None
    parameters = {"per": per, "bounds": (1 / reach, reach), "prior": prior}
    text = f"seed {seed}: {kind}, {n} x {k}, 1e{exponent:.0f}, {form}, {parameters}"
    stride = int(rng.choice([1, 1, -1]))
    y = np.ascontiguousarray(y[::stride])[::stride].astype(rng.choice(["i8", "i2", "u4", "f8"]))
    return Draw(text, X, y, weights, groups, parameters)


def _form(rng: np.random.Generator, z: np.ndarray) -> tuple[object, str]:
    form = str(
        rng.choice(["f8", "f8", "f4", ">f8", "reversed", "by column", "tensor", "record", "f2"])
    )
    with np.errstate(over="ignore", under="ignore"):
        if form in ("f4", ">f8", "f2"):
            return z.astype(form), form
    if form == "reversed":
        return np.ascontiguousarray(z[::-1, ::-1])[::-1, ::-1], form
    if form == "by column":
        return np.asfortranarray(z), form
    if form == "tensor":
        return torch.from_numpy(z.copy()), form
    if form == "record":
        record = np.zeros(len(z), dtype=[("flag", "i1"), ("logits", "f8", z.shape[1])])
        record["logits"] = z
        return record["logits"], form
    return z, form


def _weights(rng: np.random.Generator, n: int) -> np.ndarray | None:
    kind = rng.choice(["none", "none", "plain", "counts", "zeros", "huge", "tiny", "wide"])
    if kind == "none":
        return None
    w = rng.uniform(0.5, 2, n)
    w = {
        "plain": w,
        "counts": rng.integers(0, 3, n),
        "zeros": np.where(rng.random(n) < 0.5, 0.0, w),
        "huge": w * 5e307,
        "tiny": w * 1e-318,
        "wide": 10.0 ** rng.uniform(-300, 300, n),
    }[str(kind)]
    return w[::-1] if rng.random() < 0.3 else w


def _groups(rng: np.random.Generator, n: int) -> np.ndarray:
    groups = rng.integers(0, 3, n)
    if rng.random() < 0.5:
        groups = np.array(["a", "b", "c"])[groups]
    return groups[::-1]


def check(given: Draw) -> str:
    """What became of a draw: "fitted", or the reason of a refusal; AssertionError for a fault."""
    start = time.perf_counter()
    scaler = TemperatureScaler(**given.parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", TemperingWarning)
        try:
            scaler.fit(given.X, given.y, sample_weight=given.weights, groups=given.groups)
        except TemperingError as error:
            _check_reason(given, str(error))
            return str(error)
        temperature = np.atleast_1d(scaler.temperature_)
        known = temperature[~np.isnan(temperature)]
        low, high = given.parameters["bounds"]
        assert len(known), given.text
        assert ((known >= low * (1 - 1e-12)) & (known <= high * (1 + 1e-12))).all(), given.text
        _check_optimum(given, scaler)
        _check_rows(given, scaler)
    assert time.perf_counter() - start < SECONDS, given.text
    return "fitted"


def _check_optimum(given: Draw, scaler: TemperatureScaler) -> None:
    """No temperature nearby, within the bounds, has a smaller loss by its formula in float64."""
    if given.parameters["per"] != "global" or not scaler.converged_:
        return
    z = np.asarray(given.X, dtype=np.float64)
    z = z - z.max(1, keepdims=True)
    own = z[np.arange(len(z)), given.y.astype(int)]
    weights = np.ones(len(z)) if given.weights is None else np.asarray(given.weights, float)
    unit = weights.max()
    prior = given.parameters["prior"]

    def loss(log_t: float) -> float:
        rows = np.log(np.exp(z / np.exp(log_t)).sum(1)) - own / np.exp(log_t)
        with np.errstate(over="ignore"):
            pull = 0.0 if prior is None else ((log_t - prior[0]) / prior[1]) ** 2 / 2 / unit
        return float(rows[weights > 0] @ (weights[weights > 0] / unit)) + pull

    low, high = np.log(given.parameters["bounds"])
    at = np.log(scaler.temperature_)
    here = loss(at)
    for step in (-0.05, 0.05):
        there = loss(min(max(at + step, low), high))
        assert here <= there + 1e-5 * (abs(there) + 1e-3), (given.text, at, here, there)


def _check_rows(given: Draw, scaler: TemperatureScaler) -> None:
    groups = given.groups
    try:
        p = np.asarray(scaler.predict_proba(given.X, groups=groups))
    except TemperingError as error:  # a class or group that nothing is known of
        assert "is not known" in str(error), (given.text, error)
        return
    assert np.isfinite(p).all() and (p >= 0).all(), given.text
    assert np.allclose(p.sum(1), 1, atol=1e-5), given.text
    top = np.take_along_axis(p, np.asarray(scaler.predict(given.X))[:, None], 1)
    assert (top[:, 0] == p.max(1)).all(), given.text
    for row in {0, len(p) // 2, len(p) - 1}:
        own = None if groups is None else groups[row : row + 1]
        alone = np.asarray(scaler.predict_proba(given.X[row : row + 1], groups=own))
        assert (alone[0] == p[row]).all(), (given.text, row)


def _check_reason(given: Draw, reason: str) -> None:
    """The reason must be one, and true of the table."""
    z = np.asarray(given.X, dtype=np.float64)
    finite = np.where(np.isneginf(z), np.nan, z)
    weights = np.ones(len(z)) if given.weights is None else np.asarray(given.weights, float)
    if "weights sum to zero" in reason:
        true = not weights.any()
    elif "would vanish beside" in reason:
        positive = weights[weights > 0]
        true = np.log10(positive.max()) - np.log10(positive.min()) > 150
    elif "every row of logits is constant" in reason:
        spread = np.nanmax(finite, 1) - np.nanmin(finite, 1)
        true = bool((spread[weights > 0] == 0).all()) and given.parameters["prior"] is None
    elif "contains inf" in reason:
        true = bool(np.isposinf(z).any())
    elif "-inf in every column" in reason:
        true = bool(np.isneginf(z).all(1).any())
    elif "rules out its own label" in reason:
        label = given.y.astype(int)
        true = bool(np.isneginf(z[np.arange(len(z)), label]).any())
    elif "these are probabilities" in reason:
        true = bool((z >= 0).all() and (abs(z.sum(1) - 1) < 0.02).all())
    else:
        true = False
    assert true, (given.text, reason)
