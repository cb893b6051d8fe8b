"""Calibration metrics before and after a temperature, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from numbers import Real
from statistics import NormalDist
from typing import Any, NamedTuple, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Float, Integer
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from tempering.counts import whole_number
from tempering.errors import InputError
from tempering.estimators.calibration.check import check_label_logits, check_reach
from tempering.estimators.calibration.labels import (
    check_weights,
    encode_labels,
    groups_of,
    row_tensor,
)
from tempering.estimators.calibration.scores import (
    METRICS,
    Rounding,
    Scores,
    equal_mass,
    row_sums,
)
from tempering.estimators.calibration.source import Logits, agree_on_rows, one_threaded
from tempering.ranks import here

# Up to this many rows are resampled one by one. More rows are put into this many random bundles,
# and bundles are resampled: the intervals are the same, and the work no longer grows with the rows.
_UNITS = 4096


class Estimate(NamedTuple):
    """A value with its bootstrap interval; NaN ends where there is only one unit to resample."""

    value: float
    low: float
    high: float


class Metric(NamedTuple):
    """One metric before and after, and the paired difference after - before."""

    name: str
    before: Estimate
    after: Estimate
    difference: Estimate


@dataclass(frozen=True)
class Bin:
    """Rows of similar confidence: mean confidence, and accuracy with Wilson's interval."""

    confidence: float
    accuracy: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class CalibrationReport:
    """The result of `calibration_report`.

    n: rows. units: what the bootstrap resampled (rows, bundles of rows, or clusters). metrics:
    nll (nats), brier, ece_equal_mass, ece_equal_width. before, after: bins of equal mass for a
    reliability diagram. groups: (rows, metrics) of each value of `by`. level, resamples, seed: of
    the intervals.
    """

    n: int
    units: int
    metrics: tuple[Metric, ...]
    before: tuple[Bin, ...]
    after: tuple[Bin, ...]
    groups: dict[str, tuple[int, tuple[Metric, ...]]]
    level: float
    resamples: int
    seed: int

    def __getitem__(self, name: str) -> Metric:
        """The metric of that name."""
        return {metric.name: metric for metric in self.metrics}[name]

    def __str__(self) -> str:
        lines = [
            f"{self.n} rows; intervals hold {self.level:.0%}",
            _table_line("", "before", "after", ""),
        ]
        for metric in self.metrics:
            lines.append(_table_line(metric.name, *map(_estimate_text, metric[1:])))
        for group, (n, metrics) in self.groups.items():
            for metric in metrics:
                lines.append(
                    _table_line(f"{group} ({n}): {metric.name}", *map(_estimate_text, metric[1:]))
                )
        return "\n".join(lines)

    def results(self) -> dict[str, Any]:
        """Sections of a `tempering.reports.Record`: reliability, and groups if there are any."""
        reliability = {
            "before": [asdict(b) for b in self.before],
            "after": [asdict(b) for b in self.after],
            "metrics": [_record_row(metric) for metric in self.metrics],
        }
        sections: dict[str, Any] = {"reliability": reliability}
        if self.groups:
            sections["groups"] = [
                {"group": group, "n": n, **_record_row(metric)}
                for group, (n, metrics) in self.groups.items()
                for metric in metrics
            ]
        return sections


@runtime_checkable
class FittedScaler(Protocol):
    """The part of a fitted `TemperatureScaler` that a report uses."""

    classes_: np.ndarray
    inputs: str

    def _open_logits(self, X: Any, *, reset: bool) -> Logits: ...

    def _tempered_chunks(
        self, logits: Logits, groups: Any, own: bool = False
    ) -> Iterator[tuple[slice, Float[Tensor, "rows columns"], Float[Tensor, "rows 1"]]]: ...


@one_threaded
def calibration_report(
    scaler: FittedScaler,
    X: Any,
    y: Any,
    *,
    groups: Any = None,
    by: Any = None,
    sample_weight: Any = None,
    clusters: Any = None,
    bins: SupportsIndex = 15,
    resamples: SupportsIndex = 1000,
    level: float = 0.95,
    seed: SupportsIndex = 0,
) -> CalibrationReport:
    """NLL, Brier score and ECE of held-out rows at T = 1 and at the fitted temperature.

        ECE = sum_b |sum_{i in b} w_i (hit_i - confidence_i)| / sum_i w_i

    over bins b of the top class's confidence, of equal mass or of equal width. Confidences that
    are equal but for the rounding of the logits share their bin. Intervals are the
    basic bootstrap's, [2 v - q_high, 2 v - q_low]: resampling biases ECE upwards about as
    much as sampling does, and this interval corrects most of both biases. So an ECE can lie above
    its own interval: most of it is then noise of the bins. Its interval is cut at 0.

    Parameters
    ----------
    scaler: a fitted TemperatureScaler.
    X, y, groups, sample_weight: as in `TemperatureScaler.fit`; best rows that it has not seen.
    by: [rows], for a report on the rows of each of its values too.
    clusters: [rows]; rows of one value are resampled together, as tokens of one text must be.
    bins: of the ECE. resamples, level, seed: of the bootstrap.

    Returns
    -------
    CalibrationReport.

    Raises
    ------
    As `TemperatureScaler.predict_proba` and `fit` do; InputError for an option out of its range.

    Source: Naeini, Cooper, Hauskrecht 2015 (ECE); Davison and Hinkley 1997 (basic bootstrap).
    """
    check_is_fitted(scaler)
    options = _options(bins, resamples, level, seed)
    logits = scaler._open_logits(X, reset=False)
    codes, _ = encode_labels(y, logits.n_rows, logits.n_columns, scaler.classes_)
    weights, _ = check_weights(sample_weight, logits.n_rows)
    agree_on_rows(logits, labels=codes, weights=weights, groups=groups, clusters=clusters, by=by)
    labels = row_tensor(codes, logits.device)
    scores = Scores.empty(logits.n_rows)
    rounding = Rounding(logits.resolution(), float(scaler.inputs == "probabilities"))
    with here().together():
        for span, z, log_temperature in scaler._tempered_chunks(logits, groups, own=True):
            at = labels[span].long()
            own = z.gather(1, at[:, None]).squeeze(1)
            places = logits.places(range(span.start, span.stop))
            check_label_logits(own, at, places)
            check_reach(z.double(), places, logits.name)
            scores.put(span, z, at, log_temperature, rounding)
    scores = scores.of_all(here())
    w = np.ones(logits.n_rows) if weights is None else weights.astype(np.float64)
    cluster = None if clusters is None else groups_of(clusters, "clusters", logits.n_rows)[1]
    metrics, units = _measure(scores, w, cluster, *options)
    parts: dict[str, tuple[int, tuple[Metric, ...]]] = {}
    if by is not None:
        names, of = groups_of(by, "by", logits.n_rows)
        for i, name in enumerate(names):
            rows = np.flatnonzero((of == i) & (w > 0))
            if len(rows):
                own_cluster = None if cluster is None else cluster[rows]
                own_metrics, _ = _measure(scores.of(rows), w[rows], own_cluster, *options)
                parts[str(name)] = (len(rows), own_metrics)
    before, after = (_bins(scores, w, column, options.bins, options.level) for column in (0, 1))
    _, resamples, level, seed = options
    return CalibrationReport(
        logits.n_rows,
        units,
        metrics,
        before,
        after,
        parts,
        options.level,
        options.resamples,
        options.seed,
    )


# Each resample adds up the bins of each cluster; published reports have 10 to 100 bins.
_MOST_BINS = 10_000


class _Options(NamedTuple):
    bins: int
    resamples: int
    level: float
    seed: int


def _options(bins: Any, resamples: Any, level: Any, seed: Any) -> _Options:
    if (
        isinstance(level, bool | np.bool_)
        or not isinstance(level, Real)
        or not 0 < float(level) < 1
    ):
        raise InputError(f"level = {level!r}; expected a share between 0 and 1, such as 0.95")
    count = whole_number(bins, "bins", 1)
    if count > _MOST_BINS:
        raise InputError(f"bins = {count}; expected at most {_MOST_BINS}, since a few tell as much")
    return _Options(
        count,
        whole_number(resamples, "resamples", 2),
        float(level),
        whole_number(seed, "seed", 0),
    )


def _measure(
    scores: Scores,
    weights: Float[np.ndarray, "rows"],
    clusters: Integer[np.ndarray, "rows"] | None,
    bins: int,
    resamples: int,
    level: float,
    seed: int,
) -> tuple[tuple[Metric, ...], int]:
    """Every metric with its intervals, and the number of units that were resampled."""
    generator = np.random.default_rng(seed)
    unit = _resampling_units(len(weights), clusters, generator)
    count = int(unit.max()) + 1
    fixed, binned = row_sums(scores, weights, bins)
    columns = [np.bincount(unit, column, count) for column in fixed.T]
    for i in range(4):
        place = unit * bins + binned[:, i, 0].astype(np.int64)
        table = np.bincount(place, binned[:, i, 1], count * bins)
        columns.extend(table.reshape(count, bins).T)
    sums = np.stack(columns, 1)
    value = _metric_values(sums.sum(0), bins)
    drawn = np.empty((resamples, 4, 2))
    for i in range(resamples):
        times = np.bincount(generator.integers(count, size=count), minlength=count)
        drawn[i] = _metric_values(times @ sums, bins)
    return tuple(
        Metric(
            name,
            _interval(value[i, 0], drawn[:, i, 0], level, count, 0.0),
            _interval(value[i, 1], drawn[:, i, 1], level, count, 0.0),
            _interval(
                value[i, 1] - value[i, 0],
                drawn[:, i, 1] - drawn[:, i, 0],
                level,
                count,
                -math.inf,
            ),
        )
        for i, name in enumerate(METRICS)
    ), count


def _resampling_units(
    rows: int, clusters: Integer[np.ndarray, "rows"] | None, generator: np.random.Generator
) -> Integer[np.ndarray, "rows"]:
    """The unit of resampling of each row: itself, its bundle of rows, or its cluster."""
    if clusters is not None:
        clusters = np.unique(clusters, return_inverse=True)[1]
        own = generator.permutation(int(clusters.max()) + 1) % _UNITS
        return own[clusters]
    return generator.permutation(rows) % _UNITS


def _metric_values(sums: Float[np.ndarray, "sums"], bins: int) -> Float[np.ndarray, "4 2"]:
    """The metrics, before and after, from their sums; NaN where the weights sum to 0."""
    if not sums[0] > 0:
        return np.full((4, 2), math.nan)
    means = sums[1:5].reshape(2, 2)
    ece = np.abs(sums[5:].reshape(2, 2, bins)).sum(2)
    return np.concatenate([means, ece]) / sums[0]


def _interval(
    value: float, drawn: Float[np.ndarray, "resamples"], level: float, units: int, least: float
) -> Estimate:
    """The basic bootstrap interval, cut at `least`."""
    if units < 2:
        return Estimate(float(value), math.nan, math.nan)
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    ends = (max(least, 2 * value - high), max(least, 2 * value - low))
    return Estimate(float(value), float(ends[0]), float(ends[1]))


def _bins(
    scores: Scores, weights: Float[np.ndarray, "rows"], column: int, bins: int, level: float
) -> tuple[Bin, ...]:
    """Bins of equal mass; those without weight are left out."""
    confidence = scores.confidence[:, column]
    place = equal_mass(confidence, weights, bins, scores.slack[:, column])
    mass = np.bincount(place, weights, bins)
    square = np.bincount(place, weights**2, bins)
    hits = np.bincount(place, weights * scores.hit, bins)
    sure = np.bincount(place, weights * confidence, bins)
    count = np.bincount(place[weights > 0], minlength=bins)
    return tuple(
        Bin(
            float(sure[b] / mass[b]),
            float(hits[b] / mass[b]),
            int(count[b]),
            *_wilson(float(hits[b] / mass[b]), float(mass[b] ** 2 / square[b]), level),
        )
        for b in np.flatnonzero(mass > 0)
    )


def _wilson(share: float, n: float, level: float) -> tuple[float, float]:
    """Wilson's interval of a share among n (effective) trials."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def _record_row(metric: Metric) -> dict[str, Any]:
    """A metric as a row of a record's section."""
    return {
        "metric": metric.name,
        "before": metric.before.value,
        "before_low": metric.before.low,
        "before_high": metric.before.high,
        "after": metric.after.value,
        "low": metric.after.low,
        "high": metric.after.high,
        "difference": metric.difference.value,
        "difference_low": metric.difference.low,
        "difference_high": metric.difference.high,
    }


def _estimate_text(estimate: Estimate) -> str:
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"


def _table_line(name: str, before: str, after: str, difference: str) -> str:
    return f"{name:32s} {before:26s} {after:26s} {difference or 'after - before'}"
