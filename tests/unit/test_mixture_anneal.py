"""Where components split, and what the path says: critical temperatures, rate and distortion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tempering import posterior
from tempering.errors import InputError, ScheduleError
from tempering.estimators import AnnealedMixture
from tempering.estimators.mixture.anneal import ANNEALED, anneal
from tempering.estimators.mixture.em import Components, expect, maximise
from tempering.estimators.mixture.reading import framed
from tempering.estimators.mixture.rows import Rows
from tempering.estimators.mixture.snapshot import snapshot
from tempering.schedules import schedule
from tests.unit import mixture_oracle as oracle


def two_pairs(seed: int = 0, rows: int = 400) -> np.ndarray:
    """Two pairs of clusters: the pairs 20 apart along x, partners 6 apart along y."""
    random = np.random.default_rng(seed)
    centres = np.array([[-10, -3], [-10, 3], [10, -3.5], [10, 3.5]])
    return centres[np.arange(rows) % 4] + random.standard_normal((rows, 2))


@pytest.fixture(scope="module")
def fitted() -> AnnealedMixture:
    return AnnealedMixture(4, random_state=0).fit(two_pairs())


@pytest.mark.parametrize(("heat", "grows"), [(1.01, False), (0.99, True)])
def test_copies_part_below_the_first_critical_temperature_only(heat, grows):
    x, _ = oracle.clusters(1, rows=300)
    rows = Rows(torch.tensor(x))
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    step = 1e-6 * torch.tensor(vectors[:, -1])
    half = torch.full((2,), math.log(0.5), dtype=torch.float64)
    variance = torch.full((2,), heat * values[-1], dtype=torch.float64)
    state = Components(half, torch.stack([step, -step]), variance)
    sums = expect(rows, state, ANNEALED)
    moved = maximise(sums, state, ANNEALED).means
    gap = float(torch.linalg.vector_norm(moved[0] - moved[1]) / 2e-6)
    assert (gap > 1) == grows
    # To first order a gap along the eigenvector is multiplied by lambda / v.
    assert gap == pytest.approx(1 / heat, rel=1e-4)


def test_the_first_split_is_at_lambda_max_along_its_eigenvector(fitted):
    x = two_pairs()
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    first = fitted.splits_[0]
    # T_c = lambda_max for energies |x - mu|^2 / 2, so 2 lambda_max for |x - mu|^2.
    assert first.eigenvalue == pytest.approx(values[-1], rel=1e-9)
    assert first.temperature == pytest.approx(values[-1] / fitted.kernel_variance_, rel=1e-9)
    assert first.temperature == pytest.approx(fitted.temperature_path_[0], rel=1e-9)
    assert abs(first.eigenvector @ vectors[:, -1]) == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(first.mean, x.mean(0), atol=1e-9)
    assert (first.component, first.child) == (0, 1)


def test_later_splits_are_reported_where_and_along_what_they_happen(fitted):
    x = two_pairs()
    assert len(fitted.splits_) == 3
    temperatures = [split.temperature for split in fitted.splits_]
    assert temperatures == sorted(temperatures, reverse=True)
    for split in fitted.splits_[1:]:
        side = x[np.sign(x[:, 0]) == np.sign(split.mean[0])]
        critical = np.linalg.eigvalsh(np.cov(side.T, bias=True))[-1]
        assert split.eigenvalue == pytest.approx(critical, rel=1e-3)
        assert abs(split.eigenvector[1]) > 0.99
        np.testing.assert_allclose(split.mean, side.mean(0), atol=0.05)
    # Numbers are for life, and no component is born twice.
    assert sorted(split.child for split in fitted.splits_) == [1, 2, 3]


@pytest.mark.parametrize("few", [1, 3])
@pytest.mark.parametrize("far", [30.0, 1e3, 1e9])
@pytest.mark.parametrize("features", [1, 2])
def test_annealing_goes_on_until_a_few_rows_far_away_are_told_apart(features, far, few):
    x = np.random.default_rng(0).standard_normal((100, features))
    x[:few] += far
    rows = framed(torch.tensor(x), None, None)
    *_, last = anneal(rows, 2)
    assert sorted(last.snapshot.mass.tolist()) == pytest.approx([few, 100 - few], rel=1e-9)
    within = (few * x[:few].var(0) + (100 - few) * x[few:].var(0)).mean() / 100
    assert last.variance * rows.unit**2 == pytest.approx(within, rel=0.02)


def test_two_components_on_one_cluster_end_at_the_variance_within_them():
    x = np.random.default_rng(1).standard_normal((400, 2)) * [2, 1]
    model = AnnealedMixture(2, covariance_type="spherical", n_init=1, random_state=0).fit(x)
    end = model.path_[model.path_["n_components"] == 2]
    end = end[end["temperature"] == 1][0]
    assert model.kernel_variance_ == pytest.approx(end["distortion"] / 2, rel=0.02)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_thermodynamics_of_the_path_are_the_posteriors(temperature):
    x, _ = oracle.clusters(2)
    weights = np.random.default_rng(0).uniform(0.5, 2, len(x))
    mass, means, variances = oracle.mixture(3, "spherical")
    rows = Rows(torch.tensor(x), torch.tensor(weights))
    state = Components(
        torch.tensor(np.log(mass)), torch.tensor(means) - rows.pivot, torch.tensor(variances)
    )
    seen = snapshot(rows, state, ANNEALED, temperature)
    density = oracle.log_density(x, means, oracle.full(variances, "spherical", 3, 3), "gaussian")
    energies = torch.tensor(-temperature * np.log(mass) - density)
    w = torch.tensor(weights)
    info = posterior.information(energies, temperature, weights=w)
    assert seen.information == pytest.approx(float(info), rel=1e-10)
    capacity = posterior.heat_capacity(energies, temperature)
    assert seen.heat_capacity == pytest.approx(float(capacity @ w / w.sum()), rel=1e-10)
    r = posterior.responsibilities(energies, temperature).numpy()
    squared = ((x[:, None] - means) ** 2).sum(-1)
    distortion = weights @ (r * squared).sum(1) / weights.sum()
    assert seen.distortion == pytest.approx(distortion, rel=1e-10)
    share = (weights[:, None] * r).sum(0)
    np.testing.assert_allclose(seen.mass, share, rtol=1e-10)
    share = share / share.sum()
    assert seen.effective == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-10)
    own = (weights[:, None] * r)[:, :, None, None]
    centre = np.einsum("nk,ni->ki", weights[:, None] * r, x) / own.sum(0)[:, :, 0]
    gaps = x[:, None] - centre
    scatter = (own * gaps[..., :, None] * gaps[..., None, :]).sum(0) / own.sum(0)
    np.testing.assert_allclose(seen.scatter, scatter, atol=1e-10)


def test_the_path_goes_from_one_hypothesis_to_all(fitted):
    x = two_pairs()
    path = fitted.path_
    assert path["n_components"][0] == 1
    assert path["information"][0] == pytest.approx(0, abs=1e-12)
    assert path["distortion"][0] == pytest.approx(x.var(0).sum(), rel=1e-9)
    assert path["temperature"][-1] == 1
    assert path["n_components"][-1] == 4
    np.testing.assert_array_equal(path["temperature"], fitted.temperature_path_)
    annealed = path[: -3 or None]  # while one variance is shared
    assert (np.diff(annealed["temperature"]) < 0).all()
    assert (np.diff(annealed["information"]) > -1e-3).all()
    assert (np.diff(annealed["distortion"]) < 1e-3).all()
    # A rate-distortion curve is convex: its slope is -1/(2 v).
    slopes = np.diff(annealed["information"]) / np.diff(annealed["distortion"])
    steep = -1 / (2 * annealed["temperature"] * fitted.kernel_variance_)
    assert (slopes[1:] >= steep[2:] * 1.05).all()
    assert (slopes[1:] <= steep[1:-1] * 0.95).all()
    # Four equal clusters: their number, and log 4 nats.
    assert path["effective_components"][-1] == pytest.approx(4, abs=0.05)
    assert path["information"][-1] == pytest.approx(math.log(4), abs=0.05)
    assert len(fitted.positions_) == len(path)
    assert [len(means) for means in fitted.positions_] == path["n_components"].tolist()


def test_heat_capacity_peaks_where_components_part(fitted):
    path = fitted.path_[:-3]
    at, capacity = path["temperature"], path["heat_capacity"]
    first, second = fitted.splits_[0].temperature, fitted.splits_[1].temperature
    between = (at < first * 0.3) & (at > second * 1.2)
    near = (at > first * 0.5) & (path["n_components"] > 1)
    assert capacity[near].max() > 5 * capacity[between].min()


def test_gauge_units_of_the_data_change_nothing_but_units():
    x = two_pairs(1)
    one = AnnealedMixture(4, random_state=0, reg_covar=0.0).fit(x)
    other = AnnealedMixture(4, random_state=0, reg_covar=0.0).fit(1000 * x + 5)
    np.testing.assert_allclose(one.temperature_path_, other.temperature_path_, rtol=1e-8)
    np.testing.assert_allclose(1000 * one.means_ + 5, other.means_, atol=1e-5)
    np.testing.assert_allclose(one.responsibilities_, other.responsibilities_, atol=1e-8)


@pytest.mark.parametrize(
    "given", ["geometric(60,1)", schedule("linear(60,1)"), "throb(12,3,1)", "steps(60,8,1)"]
)
def test_schedules_of_the_project(given, fitted):
    x, adaptive = two_pairs(), fitted
    fitted = AnnealedMixture(4, schedule=given, random_state=0).fit(x)
    pattern = schedule(given) if isinstance(given, str) else given
    assert fitted.temperature_path_[0] == pytest.approx(float(pattern(0.0)))
    eigenvalue = np.linalg.eigvalsh(np.cov(x.T, bias=True))[-1]
    assert fitted.kernel_variance_ == pytest.approx(eigenvalue / float(pattern(0.0)))
    assert fitted.temperature_path_[-1] == 1
    assert fitted.n_components_ == 4
    assert fitted.lower_bound_ == pytest.approx(adaptive.lower_bound_, abs=1e-4)


def test_a_schedule_has_to_end_at_one():
    x = two_pairs()
    with pytest.raises(ScheduleError, match="ends at 2; annealing ends at T = 1"):
        AnnealedMixture(4, schedule="geometric(50,2)").fit(x)
    with pytest.raises(ScheduleError):
        AnnealedMixture(4, schedule="geometric(50,").fit(x)


def test_plot_of_the_path(fitted):
    figure = fitted.plot_path(feature=1)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == ["Rate against distortion", "Where the components are", "Phase diagram"]
    curve = figure.axes[0].lines[0]
    np.testing.assert_array_equal(curve.get_ydata(), fitted.path_["information"])
    np.testing.assert_array_equal(curve.get_xdata(), fitted.path_["distortion"])
    for feature in (2, -1):
        with pytest.raises(InputError, match=r"feature = .*; expected a column, 0\.\.1"):
            fitted.plot_path(feature=feature)
