"""The sets of Gaussians that mixtures are asked to find, and what counts as found."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Clusters(NamedTuple):
    """Rows and the centres they were drawn around."""

    rows: np.ndarray
    centres: np.ndarray


def planar(count: int, seed: int, per_cluster: int = 150) -> Clusters:
    """Gaussians in a square, centres at least 4.5 apart, axes of ratio up to sqrt(2).

    The area grows with their number, so that all sets are about as dense as S1 and A1 to A3 of
    Franti and Sieranoja 2018.
    """
    random = np.random.default_rng([count, seed])
    centres = _apart(random, count, side=7.0 * np.sqrt(count), gap=4.5)
    return _draw(random, centres, np.full(count, 1 / count), per_cluster * count, spread=2.0)


def grid(count: int, seed: int, per_cluster: int = 150) -> Clusters:
    """Round Gaussians on a square grid 5.66 standard deviations wide, as in Birch1."""
    random = np.random.default_rng([count, seed])
    line = 5.66 * np.arange(round(np.sqrt(count)))
    centres = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    return _draw(random, centres, np.full(count, 1 / count), per_cluster * count, spread=1.0)


def overlapping(count: int, seed: int, per_cluster: int = 500, features: int = 16) -> Clusters:
    """Gaussians of unequal mass and shape around normal centres: nearest neighbours overlap.

    Centres have deviation 0.8 in every column, a component about 1 (volume 1, axes with a ratio
    of up to 2). Half as many rows, or closer centres, and the likeliest mixture is no longer the
    one that drew the rows: even EM from the truth then leaves it.
    """
    random = np.random.default_rng([count, features, seed])
    centres = 0.8 * random.standard_normal((count, features))
    mass = random.dirichlet(np.full(count, 10.0))
    return _draw(random, centres, mass, per_cluster * count, spread=4.0)


SETS: dict[str, Callable[[int], Clusters]] = {
    "15": lambda seed: planar(15, seed),
    "35": lambda seed: planar(35, seed),
    "50": lambda seed: planar(50, seed),
    "100": lambda seed: planar(100, seed),
    "100-grid": lambda seed: grid(100, seed),
    "16d": lambda seed: overlapping(20, seed),
}


def centroid_index(found: np.ndarray, true: np.ndarray) -> int:
    """Centres without a partner, either way; 0 when all are found (Franti et al. 2014)."""
    distances = ((found[:, None] - true[None]) ** 2).sum(-1)
    lonely_true = len(true) - len(np.unique(distances.argmin(1)))
    lonely_found = len(found) - len(np.unique(distances.argmin(0)))
    return max(lonely_true, lonely_found)


def _apart(random: np.random.Generator, count: int, side: float, gap: float) -> np.ndarray:
    centres = np.empty((0, 2))
    tries = 0
    while len(centres) < count:
        tries += 1
        if tries > 20_000:
            centres, tries = np.empty((0, 2)), 0
        place = random.uniform(0, side, 2)
        if not len(centres) or np.linalg.norm(centres - place, axis=1).min() >= gap:
            centres = np.vstack([centres, place])
    return centres


def _draw(
    random: np.random.Generator, centres: np.ndarray, mass: np.ndarray, rows: int, spread: float
) -> Clusters:
    count, features = centres.shape
    labels = random.choice(count, size=rows, p=mass)
    roots = np.stack([_root(random, features, spread) for _ in range(count)])
    noise = random.standard_normal((rows, features))
    return Clusters(centres[labels] + np.einsum("nij,nj->ni", roots[labels], noise), centres)


def _root(random: np.random.Generator, features: int, spread: float) -> np.ndarray:
    """The root of a covariance of determinant 1 whose eigenvalues have a ratio up to `spread`."""
    axes, _ = np.linalg.qr(random.standard_normal((features, features)))
    log = random.uniform(-0.5, 0.5, features) * np.log(spread)
    return np.linalg.cholesky((axes * np.exp(log - log.mean())) @ axes.T)
