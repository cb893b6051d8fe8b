"""The tempered posterior: energies and a temperature in, responsibilities and thermodynamics out.

Hypotheses h = 1..H compete with energies d_h (lower is better) at temperature T:

    r_h = exp(-d_h/T) / sum_k exp(-d_k/T)

Every function takes energies of any shape and real dtype, works in float32 at least (float64
stays, integers become float64), and is differentiable in energies and temperature, repeatedly.
Energies, temperatures and weights may be arrays or lists of numbers too, which are converted:
arrays keep their dtype, lists become float64. The result is always a tensor.
All are exact at T = 0 (uniform over the minimisers) and T = inf (uniform over the hypotheses of
finite energy), where gradients are finite; energy +inf gives responsibility exactly 0.

Source: the Gibbs distribution in the role of a posterior, as in deterministic annealing
(Rose 1998, Proc. IEEE 86:2210).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.errors import InputError, TemperatureError
from tempering.posterior.competition import Number, compete, one_per_row, temperature_error
from tempering.tensors import TensorLike, as_tensor

__all__ = [
    "Canonical",
    "Thermodynamics",
    "canonical",
    "entropy",
    "free_energy",
    "heat_capacity",
    "information",
    "log_partition",
    "mean_energy",
    "peak",
    "responsibilities",
    "support",
    "susceptibility",
    "temperature_from_variance",
    "thermodynamics",
    "variance_from_temperature",
]

PerRow = Float[Tensor, "..."]


class Thermodynamics(NamedTuple):
    """All quantities of one posterior; only `responsibilities` keeps the hypothesis axis."""

    responsibilities: Tensor
    log_partition: Tensor
    free_energy: Tensor
    mean_energy: Tensor
    entropy: Tensor
    support: Tensor
    heat_capacity: Tensor
    peak: Tensor


class Canonical(NamedTuple):
    """Energies in the canonical gauge: the given energies are shift + spread * energies."""

    energies: Tensor
    shift: Tensor
    spread: Tensor


def responsibilities(
    energies: TensorLike, temperature: TensorLike = 1.0, *, dim: int = -1
) -> Float[Tensor, "..."]:
    """The posterior over hypotheses, r_h = exp(-d_h/T) / sum_k exp(-d_k/T).

    Parameters
    ----------
    energies: any shape and real dtype, in any unit; +inf rules a hypothesis out. A tensor, an
        array or a list.
    temperature: in the energies' unit, 0..inf; a number, or a tensor, array or list that
        broadcasts to the energies' shape without `dim`.
    dim: the hypothesis axis.

    Returns
    -------
    A tensor of the energies' shape, 0..1, summing to 1 over `dim`.

    Raises
    ------
    EnergyError: NaN, -inf, or a row without finite energy; names the position.
    TemperatureError: negative or NaN (names the position), or a shape that doesn't broadcast
        (names both shapes).
    """
    return compete(energies, temperature, dim).responsibilities()


def log_partition(energies: TensorLike, temperature: TensorLike = 1.0, *, dim: int = -1) -> PerRow:
    """The log partition function, log Z = logsumexp(-d/T), in nats.

    At T = 0 it is -inf where min d > 0, +inf where min d < 0, and log of the ties where min d = 0.
    Parameters and errors as for `responsibilities`; returns the energies' shape without `dim`.
    """
    return compete(energies, temperature, dim).log_partition().squeeze(dim)


def free_energy(energies: TensorLike, temperature: TensorLike = 1.0, *, dim: int = -1) -> PerRow:
    """The free energy, F = -T log Z, in the energies' unit; dF/dd_h = r_h and dF/dT = -S.

    F = min d at T = 0; at T = inf it is -inf, unless a single hypothesis has finite energy.
    Parameters and errors as for `responsibilities`; returns the energies' shape without `dim`.
    """
    return compete(energies, temperature, dim).free_energy().squeeze(dim)


def mean_energy(energies: TensorLike, temperature: TensorLike = 1.0, *, dim: int = -1) -> PerRow:
    """The mean energy, U = sum_h r_h d_h, in the energies' unit; dU/dT = C.

    Parameters and errors as for `responsibilities`; returns the energies' shape without `dim`.
    """
    state = compete(energies, temperature, dim)
    return (state.minimum + state.mean_excess()).squeeze(dim)


def entropy(energies: TensorLike, temperature: TensorLike = 1.0, *, dim: int = -1) -> PerRow:
    """The entropy, S = -sum_h r_h log r_h, in nats, 0..log H; dS/dT = C/T.

    Accurate relative to its own size, however small: it is summed from terms of one sign.
    Parameters and errors as for `responsibilities`; returns the energies' shape without `dim`.
    """
    return compete(energies, temperature, dim).entropy().squeeze(dim)


def support(energies: TensorLike, temperature: TensorLike = 1.0, *, dim: int = -1) -> PerRow:
    """The support, N = exp(S): the effective number of live hypotheses, 1..H.

    Parameters and errors as for `responsibilities`; returns the energies' shape without `dim`.
    Source: the Hill number of order 1 (Hill 1973, Ecology 54:427).
    """
    return compete(energies, temperature, dim).support().squeeze(dim)


def heat_capacity(energies: TensorLike, temperature: TensorLike = 1.0, *, dim: int = -1) -> PerRow:
    """The heat capacity, C = Var_r(d)/T^2 = dU/dT, in nats; 0 at T = 0 and at T = inf.

    Parameters and errors as for `responsibilities`; returns the energies' shape without `dim`.
    """
    return compete(energies, temperature, dim).heat_capacity().squeeze(dim)


def peak(energies: TensorLike, temperature: TensorLike = 1.0, *, dim: int = -1) -> PerRow:
    """The peak, max_h r_h: the responsibility of the likeliest hypothesis, 1/H..1.

    Parameters and errors as for `responsibilities`; returns the energies' shape without `dim`.
    """
    return compete(energies, temperature, dim).peak().squeeze(dim)


def thermodynamics(
    energies: TensorLike, temperature: TensorLike = 1.0, *, dim: int = -1
) -> Thermodynamics:
    """All quantities at once, from one pass over the exponentials.

    Parameters and errors as for `responsibilities`; returns what the eight functions return.
    """
    state = compete(energies, temperature, dim)
    quantities = (
        state.log_partition(),
        state.free_energy(),
        state.minimum + state.mean_excess(),
        state.entropy(),
        state.support(),
        state.heat_capacity(),
        state.peak(),
    )
    return Thermodynamics(state.responsibilities(), *(each.squeeze(dim) for each in quantities))


def susceptibility(
    energies: TensorLike, temperature: TensorLike = 1.0
) -> Float[Tensor, "*rows hypotheses hypotheses"]:
    """How responsibilities answer energies: dr_h/dd_k = -r_h (delta_hk - r_k)/T, in 1/energy.

    At T = 0 it is the limit: 0, but among tied minimisers, where it is infinite.
    Parameters and errors as for `responsibilities`, with the hypothesis axis last.
    Returns [..., h, k]: symmetric, each row summing to 0.
    """
    state = compete(energies, temperature, -1)
    r = state.responsibilities()
    same = torch.eye(r.shape[-1], dtype=torch.bool, device=r.device)
    apart = torch.where(same, 0.0, r.unsqueeze(-1) * r.unsqueeze(-2))
    # r_h (1 - r_h) as a sum over the other hypotheses: it keeps its digits where r_h is nearly 1.
    covariance = torch.where(same, -apart.sum(-1, keepdim=True), apart)
    limit = torch.where(covariance == 0, 0.0, torch.sign(covariance.detach()) * math.inf)
    cold = (state.temperature == 0).unsqueeze(-1)
    return torch.where(cold, limit, covariance / state.heat.unsqueeze(-1))


def information(
    energies: TensorLike,
    temperature: TensorLike = 1.0,
    *,
    dim: int = -1,
    weights: TensorLike | None = None,
) -> Float[Tensor, ""]:
    """What the posterior keeps of the input: I = S(mean of r) - mean of S(r), in nats.

    The means run over inputs, that is over all dimensions but `dim`: equally, or in proportion
    to `weights` (finite, not negative, broadcasting to the energies' shape without `dim`).

    Parameters and errors as for `responsibilities`, and InputError for no inputs or wrong
    weights. Returns a scalar, 0..log H.
    """
    state = compete(energies, temperature, dim)
    r = state.responsibilities()
    share = _shares(r, weights, state.dim)
    mixture = (share * r).movedim(state.dim, -1).reshape(-1, r.shape[state.dim]).sum(0)
    # For a hypothesis that no input uses, 0 log 0 = 0, with gradient 0.
    used = torch.where(mixture > 0, mixture, 1.0)
    kept = -(used * used.log()).sum() - (share * state.entropy()).sum()
    # I >= 0 by Jensen's inequality; only rounding takes it below 0.
    return kept.clamp(min=0.0)


def canonical(energies: TensorLike, *, dim: int = -1) -> Canonical:
    """Energies without shift and scale: least 0, and mean 1 over the finite ones.

    energies = shift + spread * canonical, with shift = min d = U(T=0) and
    spread = mean of the finite d - min d = U(T=inf) - U(T=0). What the energies do at T the
    canonical ones do at T/spread. A row whose finite energies tie has no scale of its own: its
    spread is 1 and its canonical energies are 0. Energy +inf stays +inf.

    Parameters and errors as for `responsibilities`. Returns the canonical energies in the given
    shape, and shift and spread without `dim`.
    """
    state = compete(energies, math.inf, dim)
    mean = state.mean_excess()
    spread = torch.where(mean > 0, mean, 1.0)
    gauge = torch.where(state.finite, state.excess / spread, math.inf)
    return Canonical(gauge, state.minimum.squeeze(dim), spread.squeeze(dim))


def temperature_from_variance(sigma2: TensorLike) -> Number:
    """The temperature that is equivalent to a variance: T = sigma^2.

    Energies d~/sigma^2 at T = 1 have the responsibilities of d~ at T = sigma^2: variance and
    temperature are one control. Takes a number or tensor in 0..inf and returns it as a temperature
    in the unit of d~. Raises TemperatureError when it is negative or NaN.
    """
    return _checked_control(sigma2, "sigma2")


def variance_from_temperature(temperature: TensorLike) -> Number:
    """The variance that is equivalent to a temperature: sigma^2 = T.

    The inverse of `temperature_from_variance`, with the same range and errors.
    """
    return _checked_control(temperature, "temperature")


def _checked_control(value: TensorLike, name: str) -> Number:
    given = as_tensor(value, name, TemperatureError)
    if not bool((given >= 0).all()):
        raise temperature_error(given, name)
    return value if isinstance(value, float | int | Tensor) else given


def _shares(r: Tensor, weights: TensorLike | None, dim: int) -> Tensor:
    """Weights of the inputs, with the hypothesis axis kept and a sum of 1."""
    inputs = r.numel() // r.shape[dim]
    if inputs == 0:
        raise InputError(f"energies of shape {tuple(r.shape)} hold no inputs to average over")
    if weights is None:
        return r.new_full([1] * r.dim(), 1.0 / inputs).expand_as(r.narrow(dim, 0, 1))
    given = as_tensor(weights, "weights", InputError)
    most = (
        float(given.detach().abs().amax()) if given.is_floating_point() and given.numel() else 0.0
    )
    if 0 < most < math.inf:
        # Only ratios matter. Scaled to about 1 by a power of 2, the weights survive in every dtype.
        half = 2.0 ** -(math.frexp(most)[1] // 2)
        given = given * half * half
    given = one_per_row(given, r, dim, InputError, "weights").unsqueeze(dim)
    total = given.sum()
    if not bool((given >= 0).all() & (total > 0) & torch.isfinite(total)):
        raise InputError("weights must be finite, not negative, and not all 0")
    return given / total
