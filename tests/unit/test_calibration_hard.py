"""Tables that float32, torch's memory or a sum of weights can't hold as they are."""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from tempering.errors import CollapseWarning, DataError, InputError
from tempering.estimators import TemperatureScaler, calibration_report
from tempering.estimators.calibration.scores import ties
from tests.calibration_draws import check, draw


@pytest.mark.parametrize("seed", range(60))
def test_drawn_tables(seed):
    """The short form of benchmarks/calibration_fuzz.py."""
    check(draw(seed))


def table(n=300, k=4, seed=0):
    rng = np.random.default_rng(seed)
    z = 2 * rng.standard_normal((n, k))
    y = (z / 1.7 + rng.gumbel(size=(n, k))).argmax(1)
    y[:k] = np.arange(k)
    return z, y


def exact(z, y, weights=None, prior=None):
    """T by minimising the float64 loss over log T."""

    def loss(log_t):
        rows = -log_softmax(z / np.exp(log_t), axis=1)[np.arange(len(y)), y]
        pull = 0 if prior is None else ((log_t - prior[0]) / prior[1]) ** 2 / 2
        return np.sum(rows if weights is None else rows * weights) + pull

    return np.exp(
        minimize_scalar(loss, bounds=(-5, 5), method="bounded", options={"xatol": 1e-9}).x
    )


# Equal confidences -------------------------------------------------------------------------------


def tied(first, second, dtype, inputs):
    """Rows of one confidence, .6, of which 600 in 1000 are right: an ECE of 0."""
    p = np.repeat([first, second], 500, axis=0).astype(dtype)
    x = p if inputs == "probabilities" else np.log(p)
    y = np.where(np.arange(1000) < 500, 0, np.where(np.arange(1000) < 600, 0, 1))
    return x, y


@pytest.mark.parametrize("inputs", ["probabilities", "logits"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([0.6, 0.05, 0.35], [0.6, 0.2, 0.2]),
        ([0.6, 0.05, 0.35], [0.6, 0.35, 0.05]),
        ([0.6, 0.3, 0.1], [0.6, 0.1, 0.3]),
    ],
)
@pytest.mark.parametrize("bins", [10, 15])
def test_equal_confidences_share_a_bin(inputs, dtype, first, second, bins):
    x, y = tied(first, second, dtype, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scaler = TemperatureScaler(inputs=inputs).fit(x, y)
    report = scaler.report(x, y, bins=bins, resamples=2)
    eps = np.finfo(dtype).eps
    for name in ("ece_equal_mass", "ece_equal_width"):
        assert report[name].before.value < 2 * eps
    assert len(report.before) == 1


@pytest.mark.parametrize("shift", [0.0, 1e3, -7.7])
def test_shifts_and_permutations_leave_an_ece_alone(shift):
    rng = np.random.default_rng(0)
    rows = np.log(rng.dirichlet(np.ones(4), 5)).astype(np.float32)
    z = np.repeat(rows, 200, axis=0)
    y = rng.integers(0, 4, len(z))
    scaler = TemperatureScaler(prior=(0.0, 0.5)).fit(z, y)
    before = scaler.report(z, y, resamples=2)
    # Another order of the columns and another constant in each row: the same posteriors.
    order = np.array([rng.permutation(4) for _ in z])
    moved = np.take_along_axis(z, order, 1) + rng.choice([0, shift], size=(len(z), 1))
    labels = np.argsort(order, 1)[np.arange(len(z)), y]
    after = scaler.report(moved.astype(np.float32), labels, resamples=2)
    for name in ("ece_equal_mass", "ece_equal_width"):
        assert after[name].before.value == pytest.approx(before[name].before.value, abs=2e-4)
    assert len(after.before) == len(before.before) <= 5


def test_ties_are_runs_of_neighbours_and_no_more():
    values = np.array([0.3, 0.3 + 1e-9, 0.7, 0.7 - 1e-9, 0.5])
    assert ties(values, np.full(5, 1e-8)).tolist() == [0, 0, 2, 2, 1]
    assert ties(values, np.zeros(5)).tolist() == [0, 1, 4, 3, 2]
    # A dense stretch is cut: otherwise a million rows would be one bin.
    dense = np.linspace(0, 1, 100_001)
    assert len(set(ties(dense, np.full(len(dense), 1e-3)))) == pytest.approx(1000, abs=2)
    assert (np.diff(ties(dense, np.full(len(dense), 1e-3))) >= 0).all()


# Memory ------------------------------------------------------------------------------------------


def record_field(a):
    record = np.zeros(len(a), dtype=[("flag", "i1"), ("value", a.dtype, a.shape[1:])])
    record["value"] = a
    return record["value"]


VIEWS = {
    "reversed": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "every other": lambda a: np.repeat(a, 2, axis=0)[::2],
    "field of a record": record_field,
    "other byte order": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "reversed memory map": None,
    "reversed npz": None,
}


def view(name, a, folder):
    if name == "reversed memory map":
        np.save(folder / "a.npy", a[::-1])
        return np.load(folder / "a.npy", mmap_mode="r")[::-1]
    if name == "reversed npz":
        stream = io.BytesIO()
        np.savez(stream, a=a[::-1])
        stream.seek(0)
        return np.load(stream)["a"][::-1]
    return VIEWS[name](a)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("what", ["logits", "labels", "weights", "groups"])
def test_views_that_torch_cannot_share(name, what, tmp_path):
    z, y = table()
    data = {
        "logits": z,
        "labels": y.astype(np.int32),
        "weights": np.random.default_rng(1).uniform(0.5, 2, 300),
        "groups": np.arange(300) % 2,
    }

    def fit(given):
        scaler = TemperatureScaler(per="group")
        scaler.fit(given["logits"], given["labels"], given["weights"], given["groups"])
        report = scaler.report(
            given["logits"],
            given["labels"],
            groups=given["groups"],
            sample_weight=given["weights"],
            clusters=given["groups"],
            resamples=2,
        )
        return scaler.temperature_, report["nll"].after.value

    expected = fit(data)
    data[what] = view(name, data[what], tmp_path)
    found = fit(data)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    assert found[1] == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize("dtype", ["u2", "u4", "u8", "i1", "f2", "longdouble"])
def test_dtypes_of_labels_and_weights(dtype):
    z, y = table()
    weights = np.arange(300) % 3
    expected = TemperatureScaler().fit(z, y, sample_weight=weights).temperature_
    scaler = TemperatureScaler().fit(z, y.astype(dtype), sample_weight=weights.astype(dtype))
    assert scaler.temperature_ == pytest.approx(expected, rel=1e-9)


# Weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["global", "class", "input"])
@pytest.mark.parametrize("factor", [1e308, 1e200, 1e-200, 1e-310])
def test_weights_near_the_ends_of_float64(per, factor):
    """T depends on the ratios of weights only, and their sum stands in the error."""
    z, y = table()
    weights = np.random.default_rng(1).uniform(0.3, 1, 300)
    plain = TemperatureScaler(per=per).fit(z, y, sample_weight=weights)
    scaler = TemperatureScaler(per=per).fit(z, y, sample_weight=weights * factor)
    np.testing.assert_allclose(scaler.temperature_, plain.temperature_, rtol=1e-6)
    np.testing.assert_allclose(
        scaler.standard_error_, plain.standard_error_ / np.sqrt(factor), rtol=1e-5
    )
    report = scaler.report(z, y, sample_weight=weights * factor, resamples=20)
    expected = plain.report(z, y, sample_weight=weights, resamples=20)
    assert report["nll"].after == pytest.approx(expected["nll"].after, rel=1e-6)
    assert all(bin.low <= bin.accuracy <= bin.high for bin in report.before)
    if per == "global":
        assert plain.temperature_ == pytest.approx(exact(z, y, weights), rel=1e-6)


@pytest.mark.parametrize("factor", [1e300, 1e5, 1.0, 1e-300])
def test_weights_against_a_prior_are_numbers_of_rows(factor):
    z, y = table()
    scaler = TemperatureScaler(prior=(1.0, 0.1)).fit(z, y, sample_weight=np.full(300, factor))
    expected = exact(z, y, np.full(300, min(factor, 1e12)), (1.0, 0.1))
    assert scaler.temperature_ == pytest.approx(expected, rel=1e-6)


def test_weights_that_would_vanish_are_refused():
    z, y = table()
    weights = np.where(np.arange(300) == 3, 1e-200, 1.0)
    with pytest.raises(DataError, match=r"sample_weight\[3\] = 1e-200 would vanish beside"):
        TemperatureScaler().fit(z, y, sample_weight=weights)
    weights[3] = 0
    assert np.isfinite(TemperatureScaler().fit(z, y, sample_weight=weights).temperature_)


# Units of the logits -----------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["global", "class"])
@pytest.mark.parametrize("unit", [1e-150, 1e-30, 1e30, 1e150])
def test_the_temperature_scales_with_the_logits(per, unit):
    z, y = table()
    bounds = (1e-200, 1e200)
    scaler = TemperatureScaler(per=per, bounds=bounds).fit(z * unit, y)
    plain = TemperatureScaler(per=per, bounds=bounds).fit(z, y)
    assert scaler.converged_ and scaler.n_iter_ <= plain.n_iter_ + 1
    np.testing.assert_allclose(scaler.temperature_ / unit, plain.temperature_, rtol=1e-9)
    np.testing.assert_allclose(scaler.predict_proba(z * unit), plain.predict_proba(z), rtol=1e-7)
    if per == "global":
        assert plain.temperature_ == pytest.approx(exact(z, y), rel=1e-6)


def test_differences_that_float32_cannot_hold():
    """-3e38 and 3e38 lie 6e38 apart: at T = 3e38 that is 2, and no class is ruled out."""
    z = np.where(np.eye(2, dtype=bool)[[0, 1] * 150], 3e38, -3e38).astype(np.float32)
    y = np.array([0, 1] * 150)
    y[:60] = 1 - y[:60]  # 240 right: log odds of log 4 at the optimum
    scaler = TemperatureScaler(bounds=(1e-3, 1e39)).fit(z, y)
    assert scaler.temperature_ == pytest.approx(6e38 / np.log(4), rel=1e-5)
    p = scaler.predict_proba(z)
    np.testing.assert_allclose(p[0], [0.8, 0.2], rtol=1e-5)
    assert scaler.report(z, y, resamples=2)["ece_equal_mass"].after.value < 1e-5
    with pytest.raises(DataError, match=r"row 0 of X runs from -1.5e\+308 to 1.5e\+308, furt"):
        TemperatureScaler(bounds=(1e-3, 1e300)).fit(z.astype(float) * 5e269, y)


def test_a_row_has_the_probabilities_that_it_has_alone():
    """A row whose differences overflow float32 changes no bit of its neighbours."""
    z, y = table()
    scaler = TemperatureScaler().fit(z, y)
    rows = np.concatenate([z[:9].astype(np.float32), np.array([[3e38, -3e38, 1, 2]], np.float32)])
    together = scaler.predict_proba(rows)
    for i in range(10):
        assert (scaler.predict_proba(rows[i : i + 1])[0] == together[i]).all()
    tiny = TemperatureScaler(bounds=(1e-60, 1e60)).fit(z * 1e-40, y)
    p = tiny.predict_proba((z * 1e-40).astype(np.float32))  # 1/T is beyond float32
    np.testing.assert_allclose(p, softmax(z / (tiny.temperature_ * 1e40), axis=1), atol=1e-3)


def test_a_per_input_temperature_stays_within_its_bounds():
    z, y = table(60)
    with pytest.warns(CollapseWarning):
        scaler = TemperatureScaler(per="input").fit(z, z.argmin(1))
    assert scaler.temperature_ == 1e3 == pytest.approx(scaler.temperatures(z).max())


# Groups, counts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [None, float("nan"), np.datetime64("NaT"), "pandas"])
@pytest.mark.parametrize("how", ["list", "objects"])
def test_a_missing_group_is_named(missing, how):
    if missing == "pandas":
        missing = pytest.importorskip("pandas").NA
    z, y = table(60)
    groups = ["a"] * 60
    groups[7] = missing
    if how == "objects":
        groups = np.array(groups, dtype=object)
    scaler = TemperatureScaler().fit(z, y)
    with pytest.raises(DataError, match=r"groups\[7\] is missing .*give each row its value"):
        TemperatureScaler(per="group").fit(z, y, groups=groups)
    for name in ("by", "clusters"):
        with pytest.raises(DataError, match=rf"{name}\[7\] is missing"):
            scaler.report(z, y, resamples=2, **{name: groups})


def test_missing_values_of_every_kind():
    z, y = table(60)
    gone = np.where(np.arange(60) == 4, np.nan, 1.0)
    with pytest.raises(DataError, match=r"groups\[4\] is missing \(nan\)"):
        TemperatureScaler(per="group").fit(z, y, groups=gone)
    with pytest.raises(DataError, match=r"y\[4\] is missing \(None\)"):
        TemperatureScaler().fit(z, np.where(np.arange(60) == 4, None, y))
    with pytest.raises(DataError, match=r"sample_weight\[4\] is missing \(None\)"):
        TemperatureScaler().fit(z, y, sample_weight=np.where(np.arange(60) == 4, None, 1.0))
    fitted = TemperatureScaler(per="group").fit(z, y, groups=["a"] * 60)
    with pytest.raises(DataError, match=r"groups\[1\] is missing"):
        fitted.predict_proba(z[:2], groups=["a", None])
    with pytest.raises(DataError, match=r"groups mixes values.*\(int, str\)"):
        TemperatureScaler(per="group").fit(z, y, groups=[1] + ["1"] * 59)
    with pytest.raises(DataError, match="groups has dtype int64, the groups of the fit have <U1"):
        fitted.predict_proba(z[:2], groups=[1, 2])


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint16, np.int32])
def test_counts_are_whole_numbers_of_any_library(kind):
    z, y = table()
    scaler = TemperatureScaler(max_iter=kind(50)).fit(z, y)
    found = scaler.report(z, y, bins=kind(5), resamples=kind(20), seed=kind(3))
    assert found == scaler.report(z, y, bins=5, resamples=20, seed=3)
    assert type(found.seed) is int and type(found.resamples) is int


@pytest.mark.parametrize("name", ["bins", "resamples", "seed"])
@pytest.mark.parametrize("value", [True, np.True_, 5.0, np.float64(5), "5", None])
def test_flags_and_fractions_are_no_counts(name, value):
    z, y = table(50)
    scaler = TemperatureScaler().fit(z, y)
    with pytest.raises(ValueError, match=f"{name} = .*; expected a whole number"):
        # past the annotations, which the suite checks
        calibration_report.__wrapped__.__wrapped__(scaler, z, y, **{name: value})


def test_tensors_of_half_precision_as_labels_and_weights():
    z, y = table()
    scaler = TemperatureScaler().fit(
        torch.from_numpy(z), torch.from_numpy(y), torch.ones(300, dtype=torch.bfloat16)
    )
    assert scaler.temperature_ == pytest.approx(TemperatureScaler().fit(z, y).temperature_)


@pytest.mark.parametrize(("mean", "rows"), [(0.0, 40), (6.0, 40), (9.0, 100), (10.0, 100)])
def test_standard_errors_are_of_the_minimum_that_was_kept(mean, rows):
    # nll is flat far out, so the loss has two minima, and the second start may win.
    rng = np.random.default_rng(0)
    z = 2 * rng.standard_normal((rows, 2))
    y = (z + rng.gumbel(size=z.shape)).argmax(1)
    fitted = TemperatureScaler(prior=(mean, 1.0), bounds=(1e-6, 1e6)).fit(z, y)

    def loss(log_t):
        u = z * math.exp(-log_t)
        nll = np.logaddexp(u[:, 0], u[:, 1]) - u[np.arange(rows), y]
        return nll.sum() + (log_t - mean) ** 2 / 2

    at, h = math.log(fitted.temperature_), 1e-3
    second = (loss(at + h) - 2 * loss(at) + loss(at - h)) / h**2
    assert fitted.standard_error_ == pytest.approx(second**-0.5, rel=1e-3)


@pytest.mark.parametrize("bounds", [(0.05, 0.5), (1.5, 10.0)])
def test_bounds_on_one_side_of_one_are_told_apart(bounds):
    rng = np.random.default_rng(0)
    z = 2 * rng.standard_normal((400, 3))
    y = (z + rng.gumbel(size=z.shape)).argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = TemperatureScaler(per="input", bounds=bounds).fit(z, y)
    assert fitted.temperature_ == pytest.approx(float(np.median(fitted.temperatures(z))))
    nearest = bounds[1] if bounds[1] < 1 else bounds[0]
    assert fitted.temperature_ == pytest.approx(nearest)


def test_a_prior_too_narrow_for_float64_is_refused():
    with pytest.raises(InputError, match="sd = 1e-200"):
        TemperatureScaler(prior=(0.0, 1e-200)).fit(np.eye(3), [0, 1, 2])
