"""EM of a mixture at a temperature, from the formulas, in plain float64 numpy."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln, logsumexp


class Step(NamedTuple):
    """One pass of EM: E-step at the given components, then the components it makes."""

    responsibilities: np.ndarray
    objective: float
    mass: np.ndarray
    means: np.ndarray
    covariances: np.ndarray


def full(covariances: np.ndarray, kind: str, components: int, features: int) -> np.ndarray:
    """Covariances of any kind as matrices [K, D, D]."""
    if kind == "full":
        return covariances
    if kind == "tied":
        return np.stack([covariances] * components)
    if kind == "diag":
        return np.stack([np.diag(row) for row in covariances])
    return np.stack([np.eye(features) * number for number in covariances])


def squared_distances(x: np.ndarray, means: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """(x - mu)' Sigma^-1 (x - mu), [N, K]."""
    gaps = x[:, None] - means
    return np.einsum("nki,kij,nkj->nk", gaps, np.linalg.inv(matrices), gaps)


def log_density(x, means, matrices, kernel: str, nu: float = 4.0) -> np.ndarray:
    """log p_k(x), [N, K]."""
    features = x.shape[1]
    squared = squared_distances(x, means, matrices)
    half_log_det = np.linalg.slogdet(matrices)[1] / 2
    if kernel == "gaussian":
        return -squared / 2 - features / 2 * math.log(2 * math.pi) - half_log_det
    if kernel == "laplace":
        surface = math.log(2) + features / 2 * math.log(math.pi) - gammaln(features / 2)
        return -np.sqrt(squared) - surface - gammaln(features) - half_log_det
    constant = (
        gammaln((nu + features) / 2) - gammaln(nu / 2) - features / 2 * math.log(nu * math.pi)
    )
    return constant - half_log_det - (nu + features) / 2 * np.log1p(squared / nu)


def pull(squared: np.ndarray, kernel: str, features: int, nu: float = 4.0) -> np.ndarray:
    """Weight of a row in mean and scatter: 2 d energy / d squared distance."""
    if kernel == "gaussian":
        return np.ones_like(squared)
    if kernel == "laplace":
        return 1 / np.sqrt(squared)
    return (nu + features) / (nu + squared)


def em_step(x, weights, mass, means, covariances, kind, kernel, temperature) -> Step:
    """r = mass p^(1/T) normalised; then weighted means and scatters about the new means."""
    components, features = means.shape
    matrices = full(covariances, kind, components, features)
    logits = np.log(mass) + log_density(x, means, matrices, kernel) / temperature
    log_sum = logsumexp(logits, axis=1)
    r = np.exp(logits - log_sum[:, None])
    rows = weights[:, None] * r
    pulls = rows * pull(squared_distances(x, means, matrices), kernel, features)
    new_mass = rows.sum(0)
    new_means = pulls.T @ x / pulls.sum(0)[:, None]
    gaps = x[:, None] - new_means
    scatter = np.einsum("nk,nki,nkj->kij", pulls, gaps, gaps)
    if kind == "tied":
        made = scatter.sum(0) / new_mass.sum()
    else:
        made = scatter / new_mass[:, None, None]
        if kind == "diag":
            made = np.stack([np.diag(matrix) for matrix in made])
        elif kind == "spherical":
            made = np.array([np.trace(matrix) / features for matrix in made])
    objective = temperature * float(weights @ log_sum)
    return Step(r, objective, new_mass / new_mass.sum(), new_means, made)


def clusters(seed: int = 0, rows: int = 60, components: int = 3, features: int = 3, gap=2.0):
    """Rows around normal centres, and the centres."""
    random = np.random.default_rng(seed)
    centres = gap * random.standard_normal((components, features))
    labels = np.arange(rows) % components
    return centres[labels] + random.standard_normal((rows, features)), centres


def mixture(seed: int, kind: str, components: int = 3, features: int = 3):
    """(mass, means, covariances) at random."""
    random = np.random.default_rng(seed)
    roots = random.standard_normal((components, features, features)) / 2
    matrices = roots @ roots.transpose(0, 2, 1) + np.eye(features)
    covariances = {
        "full": matrices,
        "tied": matrices[0],
        "diag": np.stack([np.diag(matrix) for matrix in matrices]),
        "spherical": matrices[:, 0, 0],
    }[kind]
    return (
        random.dirichlet(np.ones(components)),
        random.standard_normal((components, features)),
        covariances,
    )
