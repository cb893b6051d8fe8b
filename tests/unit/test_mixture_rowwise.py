"""What a mixture says of a row is said of that row alone, to the last bit, and is right."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from tempering.estimators import AnnealedMixture
from tests.unit import mixture_oracle as oracle

KINDS = ("full", "tied", "diag", "spherical")
KERNELS = ("gaussian", "laplace", "student_t")


def fitted(kind: str, kernel: str = "gaussian", features: int = 3) -> AnnealedMixture:
    """A mixture with the parameters of the oracle: nothing is fitted."""
    model = AnnealedMixture(3, covariance_type=kind, kernel=kernel)
    model.weights_, model.means_, model.covariances_ = oracle.mixture(1, kind, features=features)
    model.n_features_in_ = features
    return model


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_is_that_row_in_any_company(kind, kernel, dtype):
    model = fitted(kind, kernel)
    x = oracle.clusters(2, rows=70)[0].astype(dtype)
    asked = (model.predict_proba, model.score_samples)
    whole = [ask(x) for ask in asked]
    order = np.random.default_rng(0).permutation(len(x))
    far = np.array([[1e10] * 3, [np.finfo(dtype).max] * 3, [-np.finfo(dtype).max, 0, 1]], dtype)
    for ask, expected in zip(asked, whole):
        np.testing.assert_array_equal(ask(x[order]), expected[order])
        np.testing.assert_array_equal(ask(np.vstack([far, x]))[3:], expected)
        np.testing.assert_array_equal(ask(x[5:6]), expected[5:6])
        for size in (7, 64):
            parts = np.concatenate([ask(x[i : i + size]) for i in range(0, len(x), size)])
            np.testing.assert_array_equal(parts, expected)
        tensor = ask(torch.tensor(x))
        np.testing.assert_array_equal(tensor.numpy(), expected)
        alone = ask(torch.tensor(x[17:18]))
        np.testing.assert_array_equal(alone.numpy(), expected[17:18])


@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_and_threads_leave_no_trace(threads):
    model = fitted("full", features=2)
    x = np.random.default_rng(3).standard_normal((60_000, 2))  # several chunks
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = model.predict_proba(x)
        part = model.predict_proba(x[21_001:45_001])
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(whole[21_001:45_001], part)
    np.testing.assert_array_equal(whole[30_000], model.predict_proba(x[30_000:30_001])[0])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_are_the_formula(kind, kernel):
    model = fitted(kind, kernel)
    x, _ = oracle.clusters(4)
    matrices = oracle.full(model.covariances_, kind, 3, 3)
    joint = np.log(model.weights_) + oracle.log_density(x, model.means_, matrices, kernel)
    expected = np.logaddexp.reduce(joint, axis=1)
    np.testing.assert_allclose(model.score_samples(x), expected, rtol=1e-13)
    np.testing.assert_allclose(
        model.predict_proba(x), np.exp(joint - expected[:, None]), atol=1e-14
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_odd_row_changes_no_label(kind):
    random = np.random.default_rng(0)
    x = np.r_[random.normal(0, 1, (200, 1)), random.normal(6, 1, (200, 1))]
    model = AnnealedMixture(2, covariance_type=kind, random_state=0).fit(x)
    theirs = GaussianMixture(2, covariance_type=kind)
    theirs.weights_, theirs.means_ = model.weights_, model.means_
    theirs.covariances_ = model.covariances_
    precision = np.linalg.cholesky(np.linalg.inv(oracle.full(model.covariances_, kind, 2, 1)))
    shapes = {"full": (2, 1, 1), "tied": (1, 1), "diag": (2, 1), "spherical": (2,)}
    one = precision[:1] if kind == "tied" else precision
    theirs.precisions_cholesky_ = one.reshape(shapes[kind])
    asked = np.array([[2.9], [3.3]])
    for far in (1e8, 1e10, -3.4028235e38):
        found = model.predict_proba(np.r_[asked, [[far]]])[:2]
        np.testing.assert_allclose(found, theirs.predict_proba(asked), atol=1e-12)
    raster = x.astype(np.float32)
    model.fit(raster)
    labels = model.predict(raster)
    raster[7] = np.finfo(np.float32).min
    np.testing.assert_array_equal(np.delete(model.predict(raster), 7), np.delete(labels, 7))


def test_rows_at_the_end_of_float64_have_their_limit():
    model = fitted("spherical", features=1)
    model.weights_ = np.array([0.5, 0.3, 0.2])
    model.means_ = np.array([[-1e190], [1e190], [0.0]])
    model.covariances_ = np.array([1.0, 1.0, 0.25])
    end = np.finfo(float).max / 1e110
    # The wider components win; of two as wide, the nearer one.
    np.testing.assert_array_equal(
        model.predict_proba([[end], [-end], [1e200]]), [[0, 1, 0], [1, 0, 0], [0, 1, 0]]
    )
    assert model.score_samples([[end]])[0] == -np.inf
    model.means_ /= 1e190
    # 1e150 is beyond any sum of squares in float32, and well inside float64.
    assert model.score_samples([[1e150]])[0] == pytest.approx(-(1e150**2) / 2, rel=1e-12)
    # Equal distances to the last bit: the masses decide.
    model.means_ = np.zeros((3, 1))
    np.testing.assert_allclose(model.predict_proba([[end]])[0], [0.625, 0.375, 0], rtol=1e-14)


def test_heavy_tails_far_out_are_a_ratio_of_powers():
    model = fitted("spherical", "student_t", features=1)
    model.nu, model.weights_ = 3.0, np.array([0.5, 0.25, 0.25])
    model.means_ = np.array([[-1.0], [1.0], [0.0]])
    model.covariances_ = np.array([1.0, 4.0, 1.0])
    for end in (1e160, 1e300, np.finfo(float).max):
        # p_k ~ sigma^nu |x|^-(nu + 1): masses times sigma^3, 0.5 : 2 : 0.25.
        np.testing.assert_allclose(
            model.predict_proba([[end]])[0], np.array([2, 8, 1]) / 11, rtol=1e-12
        )
        nats = np.log(0.5 + 2 + 0.25) + np.log(2 * 3**1.5 / np.pi) - 4 * np.log(end)
        assert model.score_samples([[end]])[0] == pytest.approx(nats - np.log(3**0), rel=1e-12)


def test_a_mixture_of_units_a_million_decades_apart_is_exact():
    model = fitted("full", features=2)
    scales = np.array([1e-150, 1e140])
    model.weights_ = np.array([0.25, 0.25, 0.5])
    model.means_ = np.array([[0.0, 0], [1, 2], [3, -1]]) * scales
    plain = np.array([[[2, 0.5], [0.5, 1]], [[1, 0], [0, 1]], [[1, -0.3], [-0.3, 3]]])
    model.covariances_ = plain * scales[:, None] * scales
    x = np.array([[0.5, 0.5], [2.0, 1.0], [30.0, -4.0]])
    joint = np.log(model.weights_) + oracle.log_density(
        x, np.array([[0.0, 0], [1, 2], [3, -1]]), plain, "gaussian"
    )
    expected = np.logaddexp.reduce(joint, axis=1)
    found = model.score_samples(x * scales) + np.log(scales).sum()
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(
        model.predict_proba(x * scales), np.exp(joint - expected[:, None]), atol=1e-12
    )


def test_a_cluster_far_from_the_origin_keeps_its_digits():
    model = fitted("diag", features=1)
    model.weights_ = np.full(3, 1 / 3)
    model.means_ = np.array([[0.0], [1e9], [1e9 + 3]])
    model.covariances_ = np.array([[1.0], [0.25], [0.25]])
    x = 1e9 + 1.4375
    nearer, other = Fraction(x) - 10**9, Fraction(x) - 10**9 - 3
    log_odds = float((other**2 - nearer**2) * 2)
    expected = 1 / (1 + np.exp(-log_odds))
    assert model.predict_proba([[x]])[0, 1] == pytest.approx(expected, rel=1e-13)
