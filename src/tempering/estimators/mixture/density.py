"""What a fitted mixture answers: responsibilities, labels, densities, samples, criteria."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_n_features, check_is_fitted, validate_data
from torch import Tensor

from tempering.errors import DataError
from tempering.estimators.mixture.covariance import SHAPES
from tempering.estimators.mixture.em import Components, Family, as_measured
from tempering.estimators.mixture.radial import radial
from tempering.estimators.mixture.ranks import process_group
from tempering.estimators.mixture.reading import array_rows, check_tensor
from tempering.estimators.mixture.rows import Rows
from tempering.estimators.mixture.rowwise import evaluate
from tempering.estimators.mixture.settings import whole
from tempering.tensors import refuse_masked


class FittedMixture(DensityMixin, BaseEstimator):
    """A mixture with `weights_`, `means_` and `covariances_`; everything is computed from these.

    What is said of a row depends on that row alone, to the last bit.
    """

    def predict_proba(self, X: Any) -> Any:
        """Responsibilities [rows, components] at T = 1; a tensor when X is one."""
        return self._evaluate(X)[0]

    def predict(self, X: Any) -> Any:
        """The most responsible component of each row."""
        found = self._evaluate(X)[0]
        return found.argmax(1)

    def score_samples(self, X: Any) -> Any:
        """Log-likelihood of each row, nats; -inf where it is below the range of the rows' dtype."""
        return self._evaluate(X)[1]

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log-likelihood of a row, nats; y is ignored."""
        return float(self._evaluate(X)[1].mean())

    def bic(self, X: Any) -> float:
        """Bayesian information criterion on X; the lower the better."""
        return self._deviance(X) + self._free() * math.log(len(X))

    def aic(self, X: Any) -> float:
        """Akaike information criterion on X; the lower the better."""
        return self._deviance(X) + 2 * self._free()

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """`fit`, then the most responsible component of each row."""
        return self.fit(X, sample_weight=sample_weight).predict(X)

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Draw rows from the mixture.

        Returns
        -------
        (rows [n_samples, features], the component of each [n_samples]), ordered by component.
        """
        count = whole(n_samples, "n_samples", "rows to draw")
        check_is_fitted(self)
        random, family = check_random_state(self.random_state), self._family()
        log_mass, means, covariances = (part.cpu() for part in self._parameters())
        full = family.shape.to_full(covariances, *means.shape).numpy()
        mass = np.exp(log_mass.numpy())
        labels = np.repeat(np.arange(len(mass)), random.multinomial(count, mass / mass.sum()))
        normal = random.standard_normal((count, means.shape[1]))
        normal *= family.kernel.mixing(normal, random)
        roots = np.linalg.cholesky(full)
        rows = means.numpy()[labels] + np.einsum("nij,nj->ni", roots[labels], normal)
        return rows, labels

    @property
    def responsibilities_(self) -> Any:
        """Responsibilities of the fitted rows at T = 1; computed when asked for."""
        check_is_fitted(self)
        rows = getattr(self, "_fitted_rows", None)
        if rows is None:
            raise NotFittedError(
                "responsibilities_ are those of the rows that were fitted, which a pickle does "
                "not hold; use predict_proba(X)"
            )
        found = self._evaluate_rows(rows.values)[0]
        return found if torch.is_tensor(self.means_) else found.cpu().numpy()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_fitted_rows"}

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "means_")

    def _family(self) -> Family:
        shape = SHAPES[self.covariance_type]()
        return Family(shape, radial(self.kernel, self.nu), float(self.reg_covar))

    def _group(self) -> Any:
        return process_group(self.distributed)

    def _values(self, X: Any, *, reset: bool, least: int = 1) -> Tensor:
        """Rows as a checked tensor; an array is not copied."""
        if isinstance(X, Tensor):
            values = check_tensor(X, least)
            _check_n_features(self, X, reset=reset)
            return values
        refuse_masked(X, "X", DataError)
        if isinstance(X, np.ndarray) and not X.dtype.isnative:
            X = X.astype(X.dtype.newbyteorder("="))  # else scikit-learn makes float64 of float32
        array = validate_data(
            self,
            X,
            reset=reset,
            dtype=[np.float64, np.float32],
            ensure_all_finite=False,
            ensure_min_samples=least,
        )
        return array_rows(array)

    def _parameters(self) -> Components:
        """The public attributes as tensors; means from the origin."""

        def tensor(value: Any) -> Tensor:
            return torch.as_tensor(value, dtype=torch.float64)

        weights = tensor(self.weights_)
        return Components(weights.log(), tensor(self.means_), tensor(self.covariances_))

    def _components(self, rows: Rows) -> Components:
        """The mixture as the rows are measured, on their device."""
        parts = Components(*(part.to(rows.device) for part in self._parameters()))
        return as_measured(parts, rows)

    def _evaluate(self, X: Any) -> tuple[Any, Any]:
        check_is_fitted(self)
        r, scores = self._evaluate_rows(self._values(X, reset=False))
        public = like(X)
        return public(r), public(scores)

    def _evaluate_rows(self, values: Tensor) -> tuple[Tensor, Tensor]:
        parts = Components(*(part.to(values.device) for part in self._parameters()))
        return evaluate(values, parts, self._family())

    def _mixture(self, components: Components, X: Any) -> None:
        """Set the public attributes to components in the data's units."""
        public = like(X)
        self.weights_ = public(components.log_mass.exp())
        self.means_ = public(components.means)
        self.covariances_ = public(components.covariances)

    def _deviance(self, X: Any) -> float:
        return -2 * float(self._evaluate(X)[1].sum())

    def _free(self) -> int:
        return self._family().parameters(*self.means_.shape)


def like(X: Any) -> Callable[[Tensor], Any]:
    """How results are handed back: as tensors when the data are one, else as arrays."""
    if isinstance(X, Tensor):
        return lambda part: part
    return lambda part: part.cpu().numpy()
