"""One pass of tempered EM against an independent float64 one; densities against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from sklearn.mixture import GaussianMixture

from tempering.estimators import AnnealedMixture
from tempering.estimators.mixture.covariance import SHAPES
from tempering.estimators.mixture.em import (
    Components,
    Family,
    as_measured,
    densities,
    expect,
    in_data_units,
    maximise,
    responsibilities_of,
    tempered_logits,
)
from tempering.estimators.mixture.expanded import suited
from tempering.estimators.mixture.radial import radial
from tempering.estimators.mixture.rows import Rows
from tests.unit import mixture_oracle as oracle

KINDS = ("full", "tied", "diag", "spherical")
KERNELS = ("gaussian", "laplace", "student_t")


def from_pivot(rows, mass, means, covariances):
    return Components(
        torch.tensor(np.log(mass)),
        torch.tensor(means) - rows.pivot,
        torch.tensor(covariances),
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_is_the_formula(kind, kernel, temperature):
    x, _ = oracle.clusters()
    weights = np.random.default_rng(1).uniform(0.5, 3, len(x))
    mass, means, covariances = oracle.mixture(2, kind)
    step = oracle.em_step(x, weights, mass, means, covariances, kind, kernel, temperature)
    rows = Rows(torch.tensor(x), torch.tensor(weights))
    family = Family(SHAPES[kind](), radial(kernel, 4.0), 0.0)
    start = from_pivot(rows, mass, means, covariances)

    sums = expect(rows, start, family, temperature)
    moved = maximise(sums, start, family)
    assert sums.objective == pytest.approx(step.objective, rel=1e-12)
    np.testing.assert_allclose(moved.log_mass.exp(), step.mass, rtol=1e-12)
    np.testing.assert_allclose(moved.means + rows.pivot, step.means, atol=1e-11)
    np.testing.assert_allclose(moved.covariances, step.covariances, atol=1e-11)

    parts = [
        responsibilities_of(tempered_logits(density, start.log_mass, temperature))[0]
        for _, _, density, _, _ in densities(rows, start, family, 7)
    ]
    np.testing.assert_allclose(torch.cat(parts, 1).T, step.responsibilities, atol=1e-13)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_em_raises_its_objective_at_any_temperature(kind, kernel):
    x, _ = oracle.clusters(3)
    rows = Rows(torch.tensor(x))
    family = Family(SHAPES[kind](), radial(kernel, 3.0), 0.0)
    for temperature in (1.0, 3.0):
        state = from_pivot(rows, *oracle.mixture(4, kind))
        values = []
        for _ in range(15):
            sums = expect(rows, state, family, temperature)
            values.append(sums.objective)
            state = maximise(sums, state, family)
        assert np.diff(values).min() > -1e-9
        assert values[-1] > values[0] + 1


def test_the_sums_do_not_depend_on_chunks_order_or_origin():
    x, _ = oracle.clusters(5, rows=500)
    mass, means, covariances = oracle.mixture(6, "full")
    family = Family(SHAPES["full"](), radial("gaussian", 4.0), 0.0)

    def moved(values, shift):
        rows = Rows(torch.tensor(values + shift))
        start = from_pivot(rows, mass, means + shift, covariances)
        after = maximise(expect(rows, start, family, 1.7), start, family)
        return after.means + rows.pivot - shift, after.covariances

    plain = moved(x, 0.0)
    for other in (moved(x[::-1].copy(), 0.0), moved(x, 1e6)):
        for mine, theirs in zip(plain, other):
            np.testing.assert_allclose(mine, theirs, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_rows_give_the_same_fit(kind):
    x, _ = oracle.clusters(7, rows=300)
    x32 = x.astype(np.float32)
    ours = [
        AnnealedMixture(3, covariance_type=kind, random_state=0, tol=1e-7).fit(rows)
        for rows in (x32.astype(np.float64), x32)
    ]
    assert ours[1].score_samples(x32).dtype == np.float32
    assert ours[0].lower_bound_ == pytest.approx(ours[1].lower_bound_, abs=1e-5)


def test_float32_far_from_the_origin_is_worked_on_in_float64():
    x, _ = oracle.clusters(8, rows=300)
    near = torch.tensor(x, dtype=torch.float32)
    assert Rows(near).working_dtype(torch.eye(3, dtype=torch.float64)) == torch.float32
    assert Rows(near).working_dtype(1e3 * torch.eye(3, dtype=torch.float64)) == torch.float64
    # A row on the mean of a Laplace component weighs 1e6, and so does its rounding.
    assert Rows(near).working_dtype(torch.eye(3, dtype=torch.float64), 1e6) == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_float32_rows_that_repeat_give_the_same_laplace_fit(kind):
    x = np.random.default_rng(0).integers(0, 12, (60, 1)).astype(np.float32)
    settings = {"covariance_type": kind, "kernel": "laplace", "random_state": 0, "reg_covar": 0.1}
    single = AnnealedMixture(3, **settings).fit(x)
    double = AnnealedMixture(3, **settings).fit(x.astype(np.float64))
    np.testing.assert_allclose(single.means_, double.means_, atol=1e-5)
    np.testing.assert_allclose(single.covariances_, double.covariances_, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_densities_are_those_of_scikit_learn(kind):
    x, _ = oracle.clusters(9, rows=200)
    theirs = GaussianMixture(3, covariance_type=kind, random_state=0).fit(x)
    ours = AnnealedMixture(3, covariance_type=kind, random_state=0).fit(x)
    for name in ("weights_", "means_", "covariances_"):
        assert getattr(ours, name).shape == getattr(theirs, name).shape
        setattr(ours, name, getattr(theirs, name))
    np.testing.assert_allclose(ours.score_samples(x), theirs.score_samples(x), atol=1e-8)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-8)
    assert ours.score(x) == pytest.approx(theirs.score(x), abs=1e-8)
    assert ours.bic(x) == pytest.approx(theirs.bic(x), abs=1e-6)
    assert ours.aic(x) == pytest.approx(theirs.aic(x), abs=1e-6)
    assert (ours.predict(x) == theirs.predict(x)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_fit_is_a_fixed_point_of_scikit_learns_em(kind):
    x, _ = oracle.clusters(10, rows=400, gap=3.0)
    ours = AnnealedMixture(3, covariance_type=kind, random_state=0, tol=1e-9).fit(x)
    matrices = oracle.full(ours.covariances_, kind, 3, 3)
    precisions = np.linalg.inv(matrices)
    precisions = {
        "full": precisions,
        "tied": precisions[0],
        "diag": np.diagonal(precisions, axis1=1, axis2=2),
        "spherical": precisions[:, 0, 0],
    }[kind]
    theirs = GaussianMixture(
        3,
        covariance_type=kind,
        weights_init=ours.weights_,
        means_init=ours.means_,
        precisions_init=precisions,
        tol=1e-9,
        max_iter=500,
    ).fit(x)
    np.testing.assert_allclose(theirs.means_, ours.means_, atol=1e-3)
    assert theirs.score(x) == pytest.approx(ours.score(x), abs=1e-6)


@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_densities(kernel, features):
    kind = radial(kernel, 3.0)

    def shell(radius: float) -> float:
        squared = torch.tensor(radius * radius, dtype=torch.float64)
        density = math.exp(-float(kind.energy(squared, features)) - kind.log_normaliser(features))
        surface = 2 * math.pi ** (features / 2) / math.gamma(features / 2)
        return surface * radius ** (features - 1) * density

    assert quad(shell, 0, math.inf)[0] == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("kernel", KERNELS)
def test_samples_have_the_density_that_is_scored(kernel):
    x, _ = oracle.clusters(11, rows=300)
    fitted = AnnealedMixture(2, kernel=kernel, nu=5.0, random_state=0).fit(x)
    rows, labels = fitted.sample(20_000)
    assert rows.shape == (20_000, 3)
    np.testing.assert_allclose(np.bincount(labels) / 20_000, fitted.weights_, atol=0.02)
    # E[f(x)/p(x)] over samples of p is the integral of f, for any density f.
    middle, spread = rows.mean(0), np.cov(rows.T) / 2
    f = oracle.log_density(rows, middle[None], spread[None], "gaussian")[:, 0]
    ratio = np.exp(f - fitted.score_samples(rows))
    assert ratio.mean() == pytest.approx(1.0, abs=5 * ratio.std() / math.sqrt(len(ratio)))


@pytest.mark.parametrize(("features", "components"), [(1, 3), (5, 3), (16, 32), (9, 4)])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_columns_give_what_whitened_rows_do(kind, kernel, features, components):
    random = np.random.default_rng(features)
    x = torch.tensor(random.normal(0, 3, (300, features)))
    means = torch.tensor(random.normal(0, 2, (components, features)))
    spread = random.normal(0, 0.3, (components, features, features)) + np.eye(features)
    mass = torch.full((components,), 1.0, dtype=torch.float64)
    own = SHAPES[kind]()
    covariances = own.from_full(torch.tensor(spread @ spread.transpose(0, 2, 1)), mass)
    factor = own.factor(covariances, means)
    pull = radial(kernel, 4.0)
    quick = suited(own, factor, float(x.abs().amax()) * math.sqrt(features), pull.strongest)
    # Laplace's weights of rows near a centre, up to 1e6, may ask for the slower class.
    wide = features > 2 * components
    assert kernel == "laplace" or type(quick).__name__.startswith(
        "Whitened" if kind == "full" and wide else "Expanded"
    )
    found = []
    for shape in (own, quick):
        squared, middle = shape.distances(x, means, factor)
        r = torch.softmax(-squared / 2, 0)
        pulls = r if pull.pull(squared, features) is None else r * pull.pull(squared, features)
        moments = shape.moments(middle, pulls)
        found.append((squared, *shape.update(moments, pulls.sum(1), r.sum(1), means, factor)))
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-9, atol=1e-9)


def test_a_row_far_from_narrow_components_is_measured_from_their_centres():
    means, covariances = torch.zeros(4, 2, dtype=torch.float64), torch.eye(2).expand(4, 2, 2)
    own = SHAPES["full"]()
    factor = own.factor(covariances.double(), means)
    kinds = [type(suited(own, factor, reach, 1.0)).__name__ for reach in (1e3, 1e7, 1e12)]
    assert kinds == ["ExpandedFull", "WhitenedFull", "Full"]


@pytest.mark.parametrize("far", [5.0, 20.0, 60.0])
def test_full_covariances_of_float32_rows_far_apart_keep_their_digits(far):
    random = np.random.default_rng(0)
    means = random.normal(0, 1, (6, 4))
    means *= far / np.linalg.norm(means, axis=1, keepdims=True)
    x = np.concatenate([random.normal(mean, 1, (2000, 4)) for mean in means]).astype(np.float32)
    found = []
    for dtype in (torch.float32, torch.float64):
        rows = Rows(torch.tensor(x).to(dtype))
        mass, wide = torch.full((6,), 1 / 6).double(), torch.eye(4).double().expand(6, 4, 4)
        start = as_measured(Components(mass.log(), torch.tensor(means) + 0.1, 1.1 * wide), rows)
        family = Family(SHAPES["full"](), radial("gaussian", 4.0), 0.0)
        reached = maximise(expect(rows, start, family), start, family)
        found.append(in_data_units(reached, rows).covariances)
        whitener = family.shape.factor(start.covariances, start.means).whitener
        assert rows.working_dtype(whitener) == dtype
    np.testing.assert_allclose(*found, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_responsibility_is_below_the_normal_numbers(dtype, monkeypatch):
    # Products of such numbers took Intel processors five times as long for the whole pass.
    x = torch.linspace(-60, 60, 4001, dtype=dtype).unsqueeze(1).expand(-1, 2).contiguous()
    mass, wide = torch.full((3,), 1 / 3).double(), torch.ones(3, 2).double()
    means = torch.tensor([[-50.0, -50.0], [0.0, 0.0], [50.0, 50.0]]).double()
    rows = Rows(x)
    start = as_measured(Components(mass.log(), means, wide), rows)
    family = Family(SHAPES["diag"](), radial("gaussian", 4.0), 0.0)
    shape, seen = type(suited(family.shape, family.shape.factor(wide, means), 60.0, 1.0)), []
    own = shape.moments

    def moments(self, middle, pulls):
        seen.append(pulls.clone())
        return own(self, middle, pulls)

    monkeypatch.setattr(shape, "moments", moments)
    expect(rows, start, family)
    r = torch.cat(seen, 1)
    assert r.dtype == dtype and bool((r == 0).any())
    assert not bool(((r > 0) & (r < torch.finfo(dtype).tiny)).any())
    torch.testing.assert_close(r.sum(0), torch.ones(4001, dtype=dtype))
