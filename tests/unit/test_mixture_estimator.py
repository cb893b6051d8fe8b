"""AnnealedMixture in use: scikit-learn's contract, weights, chunks, starts, growth, errors."""

from __future__ import annotations

import pickle
import signal
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils.estimator_checks import check_estimator

from tempering.errors import ConvergenceWarning as OwnConvergenceWarning
from tempering.errors import DataError, TemperingWarning
from tempering.estimators import AnnealedMixture, MixtureConvergenceWarning
from tempering.estimators.mixture.rows import Rows
from tests.unit import mixture_oracle as oracle

KINDS = ("full", "tied", "diag", "spherical")


def four(seed: int = 0, rows: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Rows of four clusters, well apart, and which."""
    random = np.random.default_rng(seed)
    centres = np.array([[0, 0], [9, 0], [0, 9], [9, 10.0]])
    labels = np.arange(rows) % 4
    return centres[labels] + random.standard_normal((rows, 2)), labels


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    return len(set(zip(one.tolist(), other.tolist()))) == len(set(one.tolist()))


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        pytest.param(
            {"n_components": 3, "criterion": "bic", "covariance_type": "tied", "kernel": "laplace"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "n_components": 2,
                "criterion": "held-out",
                "covariance_type": "diag",
                "kernel": "student_t",
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_check_estimator(parameters):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MixtureConvergenceWarning)
        warnings.filterwarnings("ignore", r"X has \d+ distinct row", TemperingWarning)
        results = check_estimator(AnnealedMixture(**parameters), on_skip=None, on_fail=None)
    status = {result["check_name"]: result["status"] for result in results}
    # The array API is checked by scikit-learn only where SCIPY_ARRAY_API is set.
    assert {name for name, found in status.items() if found != "passed"} <= {
        "check_array_api_input"
    }
    assert "failed" not in status.values()
    assert len(status) > 40


@pytest.mark.parametrize("kernel", ["gaussian", "laplace", "student_t"])
@pytest.mark.parametrize("kind", KINDS)
def test_finds_clusters_with_every_kernel_and_covariance(kind, kernel):
    x, labels = four()
    fitted = AnnealedMixture(4, covariance_type=kind, kernel=kernel, random_state=0).fit(x)
    assert fitted.converged_
    assert same_partition(labels, fitted.predict(x))
    np.testing.assert_allclose(fitted.weights_, 0.25, atol=0.01)
    r = fitted.responsibilities_
    np.testing.assert_array_equal(r, fitted.predict_proba(x))
    np.testing.assert_allclose(r.sum(1), 1)
    assert fitted.lower_bound_ == pytest.approx(fitted.score(x), abs=1e-12)
    matrices = oracle.full(fitted.covariances_, kind, 4, 2)
    density = oracle.log_density(x, fitted.means_, matrices, kernel)
    expected = np.logaddexp.reduce(density + np.log(fitted.weights_), axis=1)
    np.testing.assert_allclose(fitted.score_samples(x), expected, atol=1e-10)


def test_heavy_tails_are_students():
    random = np.random.default_rng(0)
    centres = np.array([[0.0, 0], [12, 0], [0, 12]])
    x = centres[np.arange(900) % 3] + random.standard_t(2.0, (900, 2))
    student = AnnealedMixture(3, kernel="student_t", nu=2.0, random_state=0).fit(x)
    nearest = ((student.means_[:, None] - centres) ** 2).sum(-1)
    assert sorted(nearest.argmin(1)) == [0, 1, 2]
    assert nearest.min(1).max() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_numbers_of_rows(kind):
    x, _ = oracle.clusters(0, rows=90)
    times = np.random.default_rng(1).integers(0, 4, len(x))
    model = AnnealedMixture(3, covariance_type=kind, random_state=0, tol=1e-9)
    weighted = clone(model).fit(x, sample_weight=times)
    repeated = clone(model).fit(np.repeat(x, times, 0))
    np.testing.assert_allclose(weighted.means_, repeated.means_, atol=1e-6)
    np.testing.assert_allclose(weighted.covariances_, repeated.covariances_, atol=1e-6)
    np.testing.assert_allclose(weighted.weights_, repeated.weights_, atol=1e-6)
    assert weighted.lower_bound_ == pytest.approx(repeated.lower_bound_, abs=1e-9)
    np.testing.assert_allclose(weighted.temperature_path_, repeated.temperature_path_, rtol=1e-6)
    assert weighted.responsibilities_.shape == ((times > 0).sum(), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_is_one_pass_of_em_over_all_rows_so_far(kind):
    x, _ = oracle.clusters(2, rows=400)
    first, second, third = x[:200], x[200:320], x[320:]
    fitted = AnnealedMixture(3, covariance_type=kind, random_state=0).partial_fit(first)
    before = (fitted.weights_, fitted.means_, fitted.covariances_)
    fitted.partial_fit(second)
    seen = np.vstack([first, second])
    step = oracle.em_step(seen, np.ones(len(seen)), *before, kind, "gaussian", 1.0)
    np.testing.assert_allclose(fitted.weights_, step.mass, atol=1e-12)
    np.testing.assert_allclose(fitted.means_, step.means, atol=1e-10)
    ridge = oracle.full(step.covariances, kind, 3, 3) + 1e-6 * np.eye(3)
    np.testing.assert_allclose(oracle.full(fitted.covariances_, kind, 3, 3), ridge, atol=1e-10)
    assert fitted.n_samples_seen_ == 320
    fitted.partial_fit(third)
    whole = AnnealedMixture(3, covariance_type=kind, random_state=0).fit(x)
    assert fitted.score(x) == pytest.approx(whole.score(x), abs=0.03)
    assert fitted.responsibilities_.shape == (80, 3)
    fitted.fit(x)
    assert not hasattr(fitted, "n_samples_seen_")


def test_responsibilities_to_start_from():
    x, labels = oracle.clusters(3, rows=200), None
    x, centres = x
    labels = ((x[:, None] - centres) ** 2).sum(-1).argmin(1)
    fitted = AnnealedMixture(3, tol=1e-8).fit(x, responsibilities=np.eye(3)[labels])
    # Components keep their columns, and none was split for.
    np.testing.assert_array_equal(
        ((fitted.means_[:, None] - centres) ** 2).sum(-1).argmin(1), [0, 1, 2]
    )
    assert fitted.splits_ == []
    assert fitted.temperature_path_.tolist() == [1.0]
    assert fitted.converged_
    again = AnnealedMixture(3, tol=1e-8).fit(x, responsibilities=fitted.responsibilities_)
    np.testing.assert_allclose(again.means_, fitted.means_, atol=1e-2)


def test_means_to_start_from_may_be_heated():
    x, labels = four()
    centres = np.stack([x[labels == k].mean(0) for k in range(4)])
    fitted = AnnealedMixture(4, means_init=centres, schedule="geometric(2,1)").fit(x)
    path = fitted.temperature_path_
    assert path[0] == 2
    assert path[-1] == 1
    assert (np.diff(path) < 0).all()
    np.testing.assert_allclose(fitted.means_, centres, atol=0.01)


@pytest.mark.parametrize("criterion", ["bic", "held-out"])
def test_grows_until_the_criterion_stops_rising(criterion):
    x, labels = four()
    fitted = AnnealedMixture(8, criterion=criterion, random_state=0).fit(x)
    assert fitted.n_components_ == len(fitted.means_) == 4
    assert same_partition(labels, fitted.predict(x))
    assert {3, 4, 5} <= set(fitted.criteria_)
    if criterion == "bic":
        assert max(fitted.criteria_, key=fitted.criteria_.get) == 4
        assert fitted.criteria_[4] == pytest.approx(-fitted.bic(x) / (2 * len(x)), abs=1e-5)


def test_a_fit_that_stops_early_says_what_to_try():
    x, _ = oracle.clusters(4, rows=300, gap=0.7)
    with pytest.warns(MixtureConvergenceWarning, match=r"max_iter = 2 passes.*raise max_iter, or"):
        fitted = AnnealedMixture(3, max_iter=2, tol=1e-12, random_state=0).fit(x)
    assert not fitted.converged_
    assert fitted.lower_bound_ == pytest.approx(fitted.score(x), abs=1e-12)
    assert issubclass(MixtureConvergenceWarning, ConvergenceWarning)
    assert issubclass(MixtureConvergenceWarning, OwnConvergenceWarning)


@pytest.fixture
def heeds_ctrl_c():
    """As in a terminal: what a shell starts in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.parametrize("passes", [10, 60, 150])
def test_ctrl_c_keeps_the_best_so_far(monkeypatch, passes):
    x, _ = oracle.clusters(5, rows=300, gap=0.7)
    chunks, seen = Rows.chunks, []

    def counted(self, size, dtype):
        seen.append(size)
        if len(seen) == passes:
            signal.raise_signal(signal.SIGINT)
        return chunks(self, size, dtype)

    monkeypatch.setattr(Rows, "chunks", counted)
    with pytest.warns(MixtureConvergenceWarning, match="interrupted: this is the best mixture"):
        fitted = AnnealedMixture(6, random_state=0).fit(x)
    assert len(seen) > passes
    assert fitted.converged_ is False
    assert np.isfinite(fitted.lower_bound_)
    assert fitted.score(x) == pytest.approx(fitted.lower_bound_, abs=1e-9)
    assert len(fitted.temperature_path_) == len(fitted.path_) >= 1


def test_tensors_in_tensors_out():
    x, _ = four()
    array = AnnealedMixture(4, random_state=0).fit(x)
    tensor = AnnealedMixture(4, random_state=0).fit(torch.tensor(x))
    for name in ("weights_", "means_", "covariances_", "responsibilities_"):
        assert torch.is_tensor(getattr(tensor, name))
        np.testing.assert_array_equal(getattr(tensor, name).numpy(), getattr(array, name))
    assert torch.is_tensor(tensor.predict(torch.tensor(x)))
    assert isinstance(tensor.predict_proba(x), np.ndarray)
    assert torch.is_tensor(tensor.splits_[0].eigenvector)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_tensors_stay_there(kind):
    x, _ = four()
    model = AnnealedMixture(4, covariance_type=kind, random_state=0, tol=1e-8)
    cpu, gpu = clone(model).fit(torch.tensor(x)), clone(model).fit(torch.tensor(x).cuda())
    for name in ("weights_", "means_", "covariances_", "responsibilities_"):
        assert getattr(gpu, name).is_cuda
    np.testing.assert_allclose(gpu.means_.cpu(), cpu.means_, atol=1e-6)
    assert gpu.partial_fit(torch.tensor(x).cuda()).means_.is_cuda


def test_a_pickle_holds_the_mixture_but_not_the_rows():
    x, _ = four()
    fitted = AnnealedMixture(4, random_state=0).fit(x)
    with pytest.raises(NotFittedError):
        AnnealedMixture().responsibilities_  # noqa: B018
    loaded = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(loaded.predict_proba(x), fitted.predict_proba(x))
    with pytest.raises(NotFittedError, match=r"use predict_proba\(X\)"):
        loaded.responsibilities_  # noqa: B018
    assert len(pickle.dumps(fitted)) < 40_000


def test_the_same_seed_gives_the_same_fit():
    x, _ = oracle.clusters(6, rows=100, gap=1.0)
    one, other = (AnnealedMixture(4, random_state=7) for _ in range(2))
    np.testing.assert_array_equal(one.fit_predict(x), other.fit(x).predict(x))
    np.testing.assert_array_equal(one.means_, other.means_)


def test_parameters_are_kept_as_given():
    model = AnnealedMixture(3, covariance_type="diag", means_init=[[1, 2]], nu=3)
    assert clone(model).get_params() == model.get_params()
    shown = repr(AnnealedMixture(n_components=3, kernel="laplace"))
    assert shown == "AnnealedMixture(kernel='laplace', n_components=3)"


@pytest.mark.parametrize("criterion", ["bic", "held-out"])
def test_a_size_that_collapses_doesnt_end_the_choice(criterion):
    rng = np.random.default_rng(1)
    x = np.r_[rng.normal(size=(40, 2)), rng.normal(size=(40, 2)) + 8]
    fitted = AnnealedMixture(6, criterion=criterion, reg_covar=0, random_state=0).fit(x)
    assert fitted.n_components_ == 2 and 1 in fitted.criteria_


def test_a_fit_that_fails_leaves_the_one_before_whole():
    rng = np.random.default_rng(0)
    x, bad = rng.normal(size=(60, 3)), rng.normal(size=(60, 2))
    bad[3, 1] = np.nan
    fitted = AnnealedMixture(2, random_state=0).fit(x)
    before = fitted.predict_proba(x)
    with pytest.raises(DataError, match="row 3, column 1"):
        fitted.fit(bad)
    assert fitted.n_features_in_ == 3
    np.testing.assert_array_equal(fitted.predict_proba(x), before)
    chunks = AnnealedMixture(2, random_state=0).partial_fit(x)
    before = chunks.predict_proba(x)
    with pytest.raises(DataError, match="sum|add"):
        chunks.partial_fit(x, sample_weight=np.full(60, 1e307))
    assert chunks.n_samples_seen_ == 60
    np.testing.assert_array_equal(chunks.predict_proba(x), before)
