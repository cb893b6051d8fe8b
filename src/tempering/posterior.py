"""The tempered posterior: energies and a temperature in, responsibilities and thermodynamics out.

Hypotheses h = 1..H compete with energies d_h (lower is better) at temperature T:

    r_h = exp(-d_h/T) / sum_k exp(-d_k/T)

Everything here is exact at T = 0 (uniform over the minimisers) and at T = inf (uniform over the
hypotheses of finite energy), gives a hypothesis of energy +inf responsibility exactly 0, and is
differentiable in energies and temperature, twice and more. Responsibilities fix the energies only
up to d -> a d + c with T -> a T, so all work happens on the excess over the row's minimum.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tempering import solve
from tempering.errors import EnergyError, SupportError, TemperatureError

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
    "temperature_for",
    "temperature_from_variance",
    "thermodynamics",
    "variance_from_temperature",
]


class Thermodynamics(NamedTuple):
    """All quantities of one posterior; `responsibilities` keeps the hypothesis axis."""

    responsibilities: Tensor
    log_partition: Tensor
    free_energy: Tensor
    mean_energy: Tensor
    entropy: Tensor
    support: Tensor
    heat_capacity: Tensor
    peak: Tensor


class Canonical(NamedTuple):
    """Energies in the canonical gauge: original energies = shift + spread * energies."""

    energies: Tensor
    shift: Tensor
    spread: Tensor


def responsibilities(
    energies: Tensor, temperature: float | Tensor = 1.0, *, dim: int = -1
) -> Tensor:
    """The posterior over hypotheses, r_h = exp(-d_h/T) / sum_k exp(-d_k/T).

    Parameters
    ----------
    energies: any shape and real dtype, in any unit of energy; +inf rules a hypothesis out.
    temperature: in the energies' unit, 0..inf; a number, or a tensor that broadcasts to the
        energies' shape without `dim`.
    dim: the hypothesis axis.

    Returns
    -------
    Tensor of the energies' shape; sums to 1 over `dim`. At least float32; integers give float64.

    Raises
    ------
    EnergyError: NaN, -inf, or a row without finite energy; names the position.
    TemperatureError: negative, NaN, or of a shape that doesn't broadcast.

    Source: definitions of the implicit EM framework; Gibbs measure.
    """
    return _compete(energies, temperature, dim).responsibilities()


def log_partition(energies: Tensor, temperature: float | Tensor = 1.0, *, dim: int = -1) -> Tensor:
    """The log partition function, log Z = logsumexp(-d/T), in nats.

    At T = 0 it is +inf, log of the number of ties, or -inf, by the sign of the least energy.
    Parameters, raises: as `responsibilities`. Returns a tensor without `dim`.
    """
    return _compete(energies, temperature, dim).log_partition()


def free_energy(energies: Tensor, temperature: float | Tensor = 1.0, *, dim: int = -1) -> Tensor:
    """The free energy, F = -T log Z, in the energies' unit; dF/dd = r and dF/dT = -S.

    F = min d at T = 0; at T = inf it is -inf unless a single hypothesis has finite energy.
    Parameters, raises: as `responsibilities`. Returns a tensor without `dim`.
    """
    return _compete(energies, temperature, dim).free_energy()


def mean_energy(energies: Tensor, temperature: float | Tensor = 1.0, *, dim: int = -1) -> Tensor:
    """The mean energy, U = sum_h r_h d_h, in the energies' unit; dU/dT = C.

    Parameters, raises: as `responsibilities`. Returns a tensor without `dim`.
    """
    return _compete(energies, temperature, dim).mean_energy()


def entropy(energies: Tensor, temperature: float | Tensor = 1.0, *, dim: int = -1) -> Tensor:
    """The entropy, S = -sum_h r_h log r_h, in nats, 0..log H; dS/dT = C/T.

    Accurate relative to its own size also where it is tiny (cold rows), because it is summed
    from terms of one sign. Parameters, raises: as `responsibilities`. Returns without `dim`.
    """
    return _compete(energies, temperature, dim).entropy()


def support(energies: Tensor, temperature: float | Tensor = 1.0, *, dim: int = -1) -> Tensor:
    """The support, N = exp(S): the effective number of live hypotheses, 1..H.

    Parameters, raises: as `responsibilities`. Returns a tensor without `dim`.
    Source: the Hill number of order 1 (Hill 1973).
    """
    return _compete(energies, temperature, dim).support()


def heat_capacity(energies: Tensor, temperature: float | Tensor = 1.0, *, dim: int = -1) -> Tensor:
    """The heat capacity, C = Var_r(d)/T^2 = dU/dT, in nats; 0 at T = 0 and at T = inf.

    Parameters, raises: as `responsibilities`. Returns a tensor without `dim`.
    """
    return _compete(energies, temperature, dim).heat_capacity()


def peak(energies: Tensor, temperature: float | Tensor = 1.0, *, dim: int = -1) -> Tensor:
    """The peak, max_h r_h: the responsibility of the likeliest hypothesis, 1/H..1.

    Parameters, raises: as `responsibilities`. Returns a tensor without `dim`.
    """
    return _compete(energies, temperature, dim).peak()


def thermodynamics(
    energies: Tensor, temperature: float | Tensor = 1.0, *, dim: int = -1
) -> Thermodynamics:
    """All quantities at once, from one pass over the exponentials.

    Parameters, raises: as `responsibilities`. Returns a named tuple of the functions' values.
    """
    rows = _compete(energies, temperature, dim)
    return Thermodynamics(
        rows.responsibilities(),
        rows.log_partition(),
        rows.free_energy(),
        rows.mean_energy(),
        rows.entropy(),
        rows.support(),
        rows.heat_capacity(),
        rows.peak(),
    )


def susceptibility(
    energies: Float[Tensor, "*rows hypotheses"], temperature: float | Tensor = 1.0
) -> Float[Tensor, "*rows hypotheses hypotheses"]:
    """How responsibilities answer energies, dr_h/dd_k = -r_h (delta_hk - r_k)/T, in 1/energy.

    At T = 0 it is the limit: 0 but among tied minimisers, where it is infinite.
    Parameters, raises: as `responsibilities`, with the hypothesis axis last.
    Returns [..., h, k], symmetric, each row summing to 0.
    """
    rows = _compete(energies, temperature, -1)
    r = rows.responsibilities()
    pairs = r.unsqueeze(-1) * r.unsqueeze(-2)
    same = torch.eye(r.shape[-1], dtype=torch.bool, device=r.device)
    apart = torch.where(same, 0.0, pairs)
    # r_h (1 - r_h) as a sum over the others: no cancellation where one hypothesis has it all.
    covariance = torch.where(same, -apart.sum(-1, keepdim=True), apart)
    limit = torch.where(covariance == 0, 0.0, torch.sign(covariance.detach()) * math.inf)
    return torch.where(
        (rows.temperature == 0).unsqueeze(-1), limit, covariance / rows.heat.unsqueeze(-1)
    )


def information(
    energies: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    dim: int = -1,
    weights: Tensor | None = None,
) -> Float[Tensor, ""]:
    """What the posterior keeps of the input, I = S(mean of r) - mean of S(r), in nats.

    The mean is over inputs: all dimensions but `dim`, weighted by `weights` (of the energies'
    shape without `dim`, not negative; normalised here) or equally. 0..log H.

    Parameters, raises: as `responsibilities`; InputError (a ValueError) for wrong weights.
    """
    rows = _compete(energies, temperature, dim)
    r = rows.responsibilities().movedim(dim, -1)
    share = _shares(weights, r)
    mixture = (share.unsqueeze(-1) * r).flatten(0, -2).sum(0)
    # A hypothesis that no input uses has r = 0 exactly: 0 log 0 = 0, with gradient 0.
    used = torch.where(mixture > 0, mixture, 1.0)
    gap = -(used * used.log()).sum() - (share * rows.entropy()).sum()
    # Jensen: I >= 0; only rounding can push it below.
    return gap.clamp(min=0.0)


def canonical(energies: Tensor, *, dim: int = -1) -> Canonical:
    """Energies with shift and scale removed: minimum 0 and mean 1 over the finite ones.

    d = shift + spread * canonical, with shift = min d = U(T=0) and
    spread = mean of finite d - min d = U(T=inf) - U(T=0). Responsibilities at T become those of
    the canonical energies at T/spread. A row whose finite energies all tie has no scale of its
    own: its spread is 1, its canonical energies 0.

    Parameters, raises: as `responsibilities`. Returns energies in their shape, and shift and
    spread without `dim`.
    """
    rows = _compete(energies, math.inf, dim)
    spread = rows.mean_excess()
    spread = torch.where(spread > 0, spread, 1.0)
    whole = _working(energies)
    shift = rows.minimum
    gauge = torch.where(whole == math.inf, math.inf, rows.excess / spread)
    return Canonical(gauge, shift.squeeze(dim), spread.squeeze(dim))


def temperature_from_variance(sigma2: float | Tensor) -> float | Tensor:
    """The temperature that plays the part of a variance: T = sigma^2.

    d = d~/sigma^2 at T = 1 has the responsibilities of d~ at T = sigma^2: one control, two names.

    Parameters
    ----------
    sigma2: 0..inf, a number or tensor; d~ in units of T.

    Raises TemperatureError when negative or NaN.
    """
    return _same_control(sigma2, "variance")


def variance_from_temperature(temperature: float | Tensor) -> float | Tensor:
    """The variance that plays the part of a temperature: sigma^2 = T.

    Inverse of `temperature_from_variance`; raises TemperatureError when negative or NaN.
    """
    return _same_control(temperature, "temperature")


def temperature_for(energies: Tensor, support: float | Tensor, *, dim: int = -1) -> Tensor:
    """The temperature at which N hypotheses stay alive: the T with exp(S(T)) = N, row by row.

    Parameters
    ----------
    energies: any shape and real dtype; +inf rules a hypothesis out.
    support: the wanted N; a number, or a tensor that broadcasts to the energies' shape without
        `dim`. From the number of tied minimisers (T = 0) to the number of finite energies
        (T = inf), both included.
    dim: the hypothesis axis.

    Returns
    -------
    T in the energies' unit, of their shape without `dim`, N to 1e-6 relative in float64 and 1e-5
    in float32. Its gradient is that of the implicit function, dT/dN = T/(C N) and
    dT/dd_h = r_h (log(1/r_h) - S)/C, and 0 at both limits; there is no second derivative.

    Raises
    ------
    EnergyError: as `responsibilities`.
    SupportError: no temperature reaches N, or all do (a row that ties); names row and range.

    Method: bracketed Newton in log T, with dS/dlog T = C.
    """
    whole = _working(energies)
    dim = _axis(whole, dim)
    shape = whole.shape[:dim] + whole.shape[dim + 1 :]
    target = _per_row(support, shape, whole, SupportError, "support")
    flat = whole.movedim(dim, -1).reshape(-1, whole.shape[dim])
    result: Tensor = _TemperatureFor.apply(flat, target.reshape(-1), energies, dim)
    return result.reshape(shape)


class _TemperatureFor(torch.autograd.Function):
    """Solve rows of energies for temperatures; differentiate the solution implicitly."""

    @staticmethod
    def forward(ctx, rows, target, energies, dim):  # type: ignore[no-untyped-def]
        minimum = rows.amin(-1)
        if not bool(torch.isfinite(minimum).all()):
            raise _energy_error(energies, dim)
        temperature = solve.temperatures(rows, target)
        ctx.save_for_backward(rows, target, temperature)
        return temperature

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows, target, temperature = ctx.saved_tensors
        state = _compete(rows, temperature, -1)
        capacity = state.heat_capacity()
        interior = (capacity > 0) & torch.isfinite(temperature) & (temperature > 0)
        pull = torch.where(interior, grad / torch.where(interior, capacity, 1.0), 0.0)
        lean = state.reduced - state.mean_reduced()
        to_rows = pull.unsqueeze(-1) * state.responsibilities() * lean
        to_target = pull * torch.where(interior, temperature, 0.0) / target
        return to_rows, to_target, None, None


class _Rows(NamedTuple):
    """The competition in each row, relative to one minimiser (`first`), with dims kept.

    `heat` is T with 0 replaced by inf: at T = 0 only ties are alive, their excess is 0, and a
    division by inf gives the exact limit and a gradient of 0 in one stroke.
    """

    dim: int
    minimum: Tensor  # energy of `first`
    first: Bool[Tensor, "..."]  # one minimiser in each row
    excess: Tensor  # d - minimum; 0 where dead and at `first`
    temperature: Tensor
    heat: Tensor
    reduced: Tensor  # excess / heat
    weights: Tensor  # exp(-reduced); 0 where dead and at `first`, whose weight is 1
    others: Tensor  # sum of weights: Z exp(minimum/T) - 1

    def responsibilities(self) -> Tensor:
        return torch.where(self.first, 1.0, self.weights) / (1.0 + self.others)

    def mean_reduced(self) -> Tensor:
        return (self.weights * self.reduced).sum(self.dim, keepdim=True) / (1.0 + self.others)

    def mean_excess(self) -> Tensor:
        return (self.weights * self.excess).sum(self.dim, keepdim=True) / (1.0 + self.others)

    def log_partition(self) -> Tensor:
        cold = self.temperature == 0
        pole = torch.where(self.minimum == 0, 0.0, torch.sign(self.minimum.detach()) * math.inf)
        base = torch.where(cold, pole, self.minimum / self.heat)
        return (torch.log1p(self.others) - base).squeeze(self.dim)

    def free_energy(self) -> Tensor:
        hot = self.temperature == math.inf
        finite = torch.where(hot, 0.0, self.temperature)
        inside = self.minimum - finite * torch.log1p(self.others)
        # At the limits through U - T S, whose gradients are still r and -S there.
        entropy = torch.log1p(self.others) + self.mean_reduced()
        sink = torch.where(hot & (self.others > 0), math.inf, 0.0)
        limit = self.minimum + self.mean_excess() - finite * entropy - sink
        return torch.where(hot | (self.temperature == 0), limit, inside).squeeze(self.dim)

    def mean_energy(self) -> Tensor:
        return (self.minimum + self.mean_excess()).squeeze(self.dim)

    def entropy(self) -> Tensor:
        return (torch.log1p(self.others) + self.mean_reduced()).squeeze(self.dim)

    def support(self) -> Tensor:
        # exp(S) without the detour over logs, so that ties and limits count exactly.
        return ((1.0 + self.others) * torch.exp(self.mean_reduced())).squeeze(self.dim)

    def heat_capacity(self) -> Tensor:
        mean = self.mean_reduced()
        square = (self.weights * (self.reduced - mean).square()).sum(self.dim, keepdim=True)
        return ((square + mean.square()) / (1.0 + self.others)).squeeze(self.dim)

    def peak(self) -> Tensor:
        return (1.0 / (1.0 + self.others)).squeeze(self.dim)


def _compete(energies: Tensor, temperature: float | Tensor, dim: int) -> _Rows:
    whole = _working(energies)
    dim = _axis(whole, dim)
    shape = whole.shape[:dim] + whole.shape[dim + 1 :]
    level = _per_row(temperature, shape, whole, TemperatureError, "temperature").unsqueeze(dim)
    if not bool((level >= 0).all()):
        raise _temperature_error(level.squeeze(dim))
    # argmin, not amin: the minimiser's own excess must be 0 with gradient 0, also among ties.
    index = whole.detach().argmin(dim, keepdim=True)
    minimum = whole.gather(dim, index)
    if not bool(torch.isfinite(minimum).all()):
        raise _energy_error(whole, dim)
    first = torch.zeros_like(whole, dtype=torch.bool).scatter(dim, index, True)
    excess = whole - minimum
    finite = torch.isfinite(whole)
    if bool((torch.isinf(excess) & finite).any()):
        raise _range_error(whole, dim)
    # Beyond `horizon` temperatures exp underflows to exactly 0: leaving those out changes no
    # value, and keeps 0 * inf out of every gradient.
    tiny = torch.finfo(whole.dtype)
    horizon = -math.log(tiny.smallest_normal * tiny.eps)
    alive = finite & (excess <= horizon * level) & ~first
    heat = torch.where(level == 0, math.inf, level)
    excess = torch.where(alive, excess, 0.0)
    reduced = excess / heat
    weights = torch.where(alive, torch.exp(-reduced), 0.0)
    others = weights.sum(dim, keepdim=True)
    return _Rows(dim, minimum, first, excess, level, heat, reduced, weights, others)


def _working(energies: Tensor) -> Tensor:
    """Energies in the dtype of the work: float32 at least, integers exactly (float64)."""
    if not isinstance(energies, Tensor):
        raise EnergyError(
            f"energies must be a torch.Tensor, got {type(energies).__name__}; "
            "mend it with: torch.as_tensor(energies)"
        )
    if energies.is_complex() or energies.dtype == torch.bool:
        raise EnergyError(f"energies must be real numbers, got {energies.dtype}")
    if not energies.is_floating_point():
        return energies.to(torch.float64)
    return energies.to(torch.promote_types(energies.dtype, torch.float32))


def _axis(energies: Tensor, dim: int) -> int:
    if not -energies.dim() <= dim < energies.dim():
        raise EnergyError(
            f"energies of shape {tuple(energies.shape)} have no dimension {dim} to hold the "
            "hypotheses; give at least one dimension and name it with dim"
        )
    dim %= energies.dim()
    if energies.shape[dim] == 0:
        raise EnergyError(
            f"energies of shape {tuple(energies.shape)} have no hypotheses along dim {dim}; "
            "give at least one"
        )
    return dim


def _per_row(
    value: float | Tensor,
    shape: torch.Size,
    energies: Tensor,
    error: type[TemperatureError] | type[SupportError],
    name: str,
) -> Tensor:
    """A number or tensor as one value for each row, in the energies' dtype and device."""
    if isinstance(value, Tensor):
        given = value
    elif isinstance(value, (int, float)):
        # Straight into the dtype of the work: by way of float32, 1e300 would become inf.
        given = torch.tensor(float(value), dtype=energies.dtype)
    else:
        raise error(f"{name} must be a number or a torch.Tensor, got {type(value).__name__}")
    if given.is_complex() or given.dtype == torch.bool:
        raise error(f"{name} must be real, got {given.dtype}")
    given = given.to(energies)
    try:
        fits = torch.broadcast_shapes(given.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise error(
            f"{name} of shape {tuple(given.shape)} doesn't broadcast to {tuple(shape)}, the shape "
            f"of the energies {tuple(energies.shape)} without the hypothesis dimension"
        )
    return given.expand(shape)


def _shares(weights: Tensor | None, r: Tensor) -> Tensor:
    shape = r.shape[:-1]
    if r.numel() == 0:
        raise EnergyError(f"no inputs to average over: energies of shape {tuple(r.shape)}")
    if weights is None:
        return r.new_full(shape, 1.0 / max(1, math.prod(shape)))
    given = _per_row(weights, shape, r, SupportError, "weights")
    total = given.sum()
    if not bool((given >= 0).all() & (total > 0) & torch.isfinite(total)):
        raise EnergyError("weights must be finite, not negative, and not all zero")
    return given / total


def _same_control(value: float | Tensor, name: str) -> float | Tensor:
    if not bool((torch.as_tensor(value) >= 0).all()):
        raise _temperature_error(torch.as_tensor(value), name)
    return value


def _where(bad: Tensor) -> tuple[str, int]:
    """The first position that holds, as text, and how many do."""
    places = bad.nonzero()
    return "[" + ", ".join(str(int(i)) for i in places[0]) + "]", len(places)


def _energy_error(energies: Tensor, dim: int) -> EnergyError:
    for bad, what, mend in (
        (torch.isnan(energies), "NaN", "find where it arises"),
        (energies == -math.inf, "-inf", "energies count downwards: rule out with +inf"),
    ):
        if bool(bad.any()):
            place, count = _where(bad)
            return EnergyError(f"energies{place} is {what} ({count} in all); {mend}")
    place, count = _where((energies == math.inf).all(dim))
    return EnergyError(
        f"row {place} has no finite energy ({count} such rows; hypotheses along dim {dim}); "
        "leave at least one hypothesis possible"
    )


def _range_error(energies: Tensor, dim: int) -> EnergyError:
    excess = energies - energies.amin(dim, keepdim=True)
    place, _ = _where((torch.isinf(excess) & torch.isfinite(energies)).any(dim))
    return EnergyError(
        f"the energies of row {place} spread wider than {energies.dtype} can hold; "
        "give them as float64, or rule hypotheses out with +inf"
    )


def _temperature_error(temperature: Tensor, name: str = "temperature") -> TemperatureError:
    place, count = _where(~(temperature >= 0))
    value = temperature[~(temperature >= 0)][0].item()
    at = f"{name}{place}" if temperature.dim() else name
    return TemperatureError(
        f"{at} is {value:g} ({count} in all); it must lie in 0..inf, both limits included"
    )
