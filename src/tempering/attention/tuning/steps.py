"""How the numbers move: damped Newton steps with a Gauss-Newton or Fisher matrix, and Adam.

Few numbers (hundreds) and many tokens make second order cheap: with G the Float[Tensor,
"batches numbers"] of gradients, one a batch, the empirical Fisher matrix of the mean loss is

    F = sum_b n_b g_b g_b^T / sum_b n_b        (n_b targets, g_b the gradient of the batch mean)

times the number of independent targets in a batch. A step solves

    (F + damping diag(F) + prior I) delta = -(gradient + prior theta)

and is kept within a trust region |delta| <= radius, entry by entry.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def newton_step(
    gradients: Float[Tensor, "batches numbers"],
    counts: Float[Tensor, "batches"],
    theta: Float[Tensor, "numbers"],
    *,
    prior: float,
    damping: float,
    radius: float,
) -> Float[Tensor, "numbers"]:
    """The step of theta for the mean loss plus prior/2 |theta|^2.

    gradients: of each batch's mean loss. counts: targets in each batch. prior: 1/sd^2 of log T
    per target. damping: share of the curvature's diagonal that is added to it. radius: largest
    change of any number.
    """
    weights = counts / counts.sum()
    gradient = (gradients * weights[:, None]).sum(0)
    # The variance of a batch mean is that of one target over n: times n gives the Fisher matrix.
    centred = gradients - gradient
    fisher = torch.einsum("b,bi,bj->ij", weights * counts, centred, centred)
    matrix = fisher + torch.diag(damping * fisher.diagonal() + prior)
    scale = matrix.diagonal().sqrt().clamp(min=1e-12)
    solved = torch.linalg.solve(matrix / scale / scale[:, None], (gradient + prior * theta) / scale)
    return (-solved / scale).clamp(-radius, radius)
