"""Distances of inputs from prototypes, and differences of their squares that keep their digits.

Far from all prototypes the squares round to one number, though their differences don't vanish:
||z - w_h||^2 - ||z - w_k||^2 grows with ||z||. There it is computed as a product,

    (w_k - w_h) . (2 (z - w_k) + (w_k - w_h)),

about the nearest prototype w_k.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# An input counts as far when it lies this many times further from its nearest prototype than that
# one lies from its neighbour. Nearer than that, subtracting squares loses at most a factor of
# this size in accuracy: one decimal digit.
_FAR = 16.0


def squared_distances(
    z: Float[Tensor, "*rows features"], vectors: Float[Tensor, "prototypes features"]
) -> Float[Tensor, "*rows prototypes"]:
    """||z - w_k||^2 in memory for the result alone."""
    return plain_distances(z, vectors).square()


def distances(
    z: Float[Tensor, "*rows features"], vectors: Float[Tensor, "prototypes features"]
) -> Float[Tensor, "*rows prototypes"]:
    """||z - w_k|| in memory for the result alone, also of lengths whose square overflows."""
    longest = torch.finfo(z.dtype).max ** 0.5 / 1e3
    long = z.detach().abs().amax(-1) > longest
    if bool((vectors.detach().abs() > longest).any()):
        long = torch.ones_like(long)
    if not bool(long.any()):
        return plain_distances(z, vectors)
    short = torch.where(long.unsqueeze(-1), 0.0, z)
    lengths = plain_distances(short, vectors.clamp(-longest, longest))
    apart = z[long].unsqueeze(-2) - vectors
    size = apart.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    scaled = size.squeeze(-1) * torch.linalg.vector_norm(apart / size, dim=-1)
    return lengths.index_put(long.nonzero(as_tuple=True), scaled)


def plain_distances(
    z: Float[Tensor, "*rows features"],
    vectors: Float[Tensor, "prototypes features"],
    norm: float = 2.0,
) -> Float[Tensor, "*rows prototypes"]:
    """||z - w_k||_norm, where no square overflows."""
    # Not by ||z||^2 - 2 z.w + ||w||^2: that loses near prototypes which lie far from the origin.
    flat = z.reshape(-1, z.shape[-1])
    mode = "donot_use_mm_for_euclid_dist"
    lengths = torch.cdist(flat, vectors, p=norm, compute_mode=mode)
    return lengths.reshape(*z.shape[:-1], len(vectors))


@torch.no_grad()
def far_inputs(lengths: Tensor, vectors: Tensor, norm: float = 2.0) -> Tensor:
    """Which rows lie so far from all prototypes that their energies can't be subtracted.

    lengths: distances of the rows from the prototypes, [*rows, K]. Returns bool, [*rows].
    """
    between = plain_distances(vectors, vectors, norm)
    spacing = between.fill_diagonal_(torch.inf).amin(-1)
    nearest, index = lengths.min(-1)
    return (nearest > _FAR * spacing[index]) | torch.isinf(nearest)


def squared_excess(
    z: Float[Tensor, "*rows features"], vectors: Float[Tensor, "prototypes features"]
) -> Float[Tensor, "*rows prototypes"]:
    """||z - w_h||^2 - ||z - w_k||^2 with w_k the prototype nearest to z."""
    lengths = plain_distances(z, vectors)
    far = far_inputs(lengths, vectors)
    if not bool(far.any()):
        return above_least(lengths.square())
    near = torch.where(far.unsqueeze(-1), vectors[0].detach(), z)  # no overflow enters the gradient
    squares = plain_distances(near, vectors).square()
    exact = far_squared_excess(z[far], vectors, lengths[far])
    return above_least(squares).index_put(far.nonzero(as_tuple=True), exact)


def far_squared_excess(
    z: Float[Tensor, "rows features"],
    vectors: Float[Tensor, "prototypes features"],
    lengths: Float[Tensor, "rows prototypes"],
    width: Tensor | None = None,
) -> Float[Tensor, "rows prototypes"]:
    """`squared_excess` of far inputs.

    lengths: distances, rounded. With `width`, [rows, 1], the excess is divided by
    width^2 + the squared distance from the nearest prototype, without overflow.
    """
    with torch.no_grad():
        # Rounded distances may tie; differences about one of the tied show which is nearest.
        first = lengths.argmin(-1)
        size = torch.ones_like(lengths[:, :1]) if width is None else _power_of_two(lengths, width)
        nearest = _excess_about(z, vectors, first, size).argmin(-1)
    excess = _excess_about(z, vectors, nearest, size)
    if width is None:
        return excess
    return excess * (size / torch.hypot(width, lengths.gather(-1, nearest.unsqueeze(-1)))).square()


def _power_of_two(lengths: Tensor, width: Tensor) -> Tensor:
    """The greatest power of 2 below the lengths: dividing by it rounds nothing."""
    size = torch.hypot(width, lengths.amin(-1, keepdim=True))
    return size / (2 * torch.frexp(size).mantissa)


def _excess_about(z: Tensor, vectors: Tensor, nearest: Tensor, size: Tensor) -> Tensor:
    """||z - w_h||^2 - ||z - w_k||^2 for the given k of each row, over size^2."""
    # Rows that share their nearest prototype go together: one matrix product for each of them.
    order = nearest.argsort()
    owners, counts = nearest[order].unique_consecutive(return_counts=True)
    sizes = counts.tolist()
    blocks = []
    for owner, rows, scale in zip(owners.tolist(), z[order].split(sizes), size[order].split(sizes)):
        apart = (vectors[owner] - vectors) / scale.amax()
        ratio = scale.amax() / scale
        deviation = (rows - vectors[owner]) / scale
        blocks.append(ratio * (2 * (deviation @ apart.mT) + ratio * apart.square().sum(-1)))
    return torch.cat(blocks)[order.argsort()]


def above_least(energies: Float[Tensor, "*rows hypotheses"]) -> Float[Tensor, "*rows hypotheses"]:
    """Energies less that of the row's first minimiser."""
    index = energies.detach().argmin(-1, keepdim=True)
    return energies - energies.gather(-1, index)
