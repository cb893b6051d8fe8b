"""activation = kernel x statistic: any kernel with any statistic, at any temperature."""

from __future__ import annotations

from numbers import Real
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.errors import EnergyError, InputError, TemperatureError
from tempering.kernels import Hypotheses, Kernel, Prototypes, Signed, StudentT, as_kernel
from tempering.tensors import TensorLike, as_tensor
from tempering.units import odds, prior
from tempering.units.closed import closed_form
from tempering.units.odds import SATURATED

Statistic = Literal["mean", "mode", "full", "variance", "entropy", "gate-mean", "gate-mode"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)


def activation(
    z: TensorLike,
    kernel: Kernel | str | nn.Module | type,
    statistic: str,
    temperature: TensorLike = 1.0,
) -> Float[Tensor, "..."]:
    """What the chosen statistic says of the posterior that the kernel induces at z.

    The posterior is r_h = pi_h exp(-d_h(z)/T) / sum_k pi_k exp(-d_k(z)/T), and with v_h the value
    of a hypothesis (its sign, its centre or its vector):

        mean       sum_h r_h v_h
        mode       the v_h of greatest r_h; tied ones share
        full       r
        variance   sum_h r_h (v_h - mean)^2
        entropy    -sum_h r_h log r_h, nats
        gate-mean  z times the responsibility of the positive hypotheses
        gate-mode  the same for the mode's posterior, which is 1 on the modes

    Gaussian x mean is tanh(m z/(sigma^2 T)); tempering.units.closed lists all closed forms, which
    replace the general path by themselves. T = 0 and T = inf are exact limits.

    Parameters
    ----------
    z: [..., units], any unit of length; [..., features] where the hypotheses are vectors. A
        tensor, an array or a list; the last two are converted.
    kernel: a Kernel, or the name of one.
    statistic: one of STATISTICS.
    temperature: T, energy, 0..inf; a number, or a tensor, array or list that broadcasts to the
        rows: to z, or to z without its features.

    Returns
    -------
    In the dtype of z (the work is float32 at least), of shape [..., units], for "full"
    [..., units, H]. For prototypes: mean, mode and variance [..., features], full [..., K],
    entropy [...], gates [..., K, features]: what each hypothesis lets through.

    Raises
    ------
    RefusedError: a linear layer or the identity, which induce no posterior.
    InputError, TemperatureError, EnergyError: what can't be used, and where. Closed forms pass
    NaN on instead, as PyTorch's activations do.

    Source: the posterior of a mixture in the E-step of EM (Dempster, Laird, Rubin 1977), tempered.
    """
    kernel = as_kernel(kernel)
    check_statistic(statistic)
    z = as_tensor(z, "z", InputError)
    temperature = checked_temperature(temperature)
    curve = closed_form(kernel, statistic, temperature) if z.is_floating_point() else None
    if curve is not None:
        return curve(z)
    check_input(z)
    if isinstance(kernel.hypotheses, Signed):
        result = _of_odds(z, kernel, kernel.hypotheses, statistic, temperature)
    else:
        result = _of_energies(z, kernel, statistic, temperature)
    return result.to(z.dtype)


def check_statistic(statistic: str) -> None:
    """Refuse a name that is not in STATISTICS."""
    if statistic not in STATISTICS:
        raise InputError(f"no statistic {statistic!r}; expected one of: {', '.join(STATISTICS)}")


def checked_temperature(temperature: TensorLike) -> float | Tensor:
    """A temperature as a number or a tensor; TemperatureError where it is negative or NaN."""
    if isinstance(temperature, Real) and not isinstance(temperature, bool):
        level = float(temperature)
        if not level >= 0:
            raise TemperatureError(
                f"temperature is {level:g}; it must lie in 0..inf, both limits included"
            )
        return level
    temperature = as_tensor(temperature, "temperature", TemperatureError)
    bad = (~(temperature.detach() >= 0)).nonzero()
    if len(bad):
        where = tuple(bad[0].tolist())
        raise TemperatureError(
            f"temperature{list(where)} is {temperature[where].item():g} ({len(bad)} in all); "
            "it must lie in 0..inf, both limits included"
        )
    return temperature


def check_input(z: Tensor) -> None:
    """Refuse an input that isn't finite floating point, and name the first bad position."""
    if not z.is_floating_point():
        raise InputError(f"z must be floating point; got {z.dtype}. Use z.float()")
    bad = (~torch.isfinite(z.detach())).nonzero()
    if len(bad):
        where = tuple(bad[0].tolist())
        raise EnergyError(
            f"z{list(where)} is {z[where].item()} ({len(bad)} in all): its energies are not "
            "finite. Find where it arises"
        )


def row_temperatures(temperature: float | int | Tensor, rows: torch.Size, work: Tensor) -> Tensor:
    """The temperature as one value for each row, in the dtype of the work."""
    level = torch.as_tensor(temperature, dtype=work.dtype, device=work.device)
    try:
        fits = torch.broadcast_shapes(level.shape, rows) == rows
    except RuntimeError:
        fits = False
    if not fits:
        raise TemperatureError(
            f"temperature of shape {list(level.shape)} doesn't broadcast to the rows of z, "
            f"{list(rows)}; give a number, or one value for each unit"
        )
    return level.expand(rows)


def _of_odds(
    z: Tensor,
    kernel: Kernel,
    hypotheses: Signed,
    statistic: str,
    temperature: float | int | Tensor,
) -> Tensor:
    if isinstance(kernel, StudentT) and z.device.type != "mps":  # which has no float64
        # Far out its log odds fall as 1/z while a gate grows as z. Float32 holds their product, but
        # not the factors of the product's gradient.
        z = z.double()
    plain = kernel.log_odds(z)
    log_prior = hypotheses.log_prior(plain)
    bias = None if log_prior is None else log_prior[1] - log_prior[0]
    level = odds.tempered_odds(plain, row_temperatures(temperature, plain.shape, plain), bias)
    if statistic in ("gate-mean", "gate-mode"):
        on = torch.sigmoid(level) if statistic == "gate-mean" else (1 + odds.sign_mode(level)) / 2
        return z * (on.unsqueeze(-1) if kernel.takes_vectors else on)
    return {
        "mean": odds.sign_mean,
        "mode": odds.sign_mode,
        "full": odds.sign_full,
        "variance": odds.sign_variance,
        "entropy": odds.sign_entropy,
    }[statistic](level)


def _of_energies(
    z: Tensor, kernel: Kernel, statistic: str, temperature: float | int | Tensor
) -> Tensor:
    energies = kernel.excess(z)
    level = row_temperatures(temperature, energies.shape[:-1], energies)
    # A difference that overflowed is +inf, which makes the hypothesis dead. That is right unless
    # T is of the same size.
    hot = level > torch.finfo(energies.dtype).max / SATURATED
    alive = (torch.isinf(energies.detach()) & hot.unsqueeze(-1)).nonzero()
    if len(alive):
        raise EnergyError(
            f"the energy at {alive[0].tolist()} overflows {energies.dtype}, and the temperature "
            "there is too high to leave it out; give z in float64, or in another unit"
        )
    log_prior = kernel.hypotheses.log_prior(energies)
    if statistic == "entropy":
        return prior.entropy_with_prior(energies, level, log_prior)
    shared = (
        prior.mode_weights
        if statistic in ("mode", "gate-mode")
        else prior.responsibilities_with_prior
    )
    r = shared(energies, level, log_prior)
    return r if statistic == "full" else posterior_summary(z, kernel.hypotheses, r, statistic)


def posterior_summary(
    z: Tensor, hypotheses: Hypotheses, r: Float[Tensor, "*rows hypotheses"], statistic: str
) -> Tensor:
    """Mean, variance or gate of given responsibilities."""
    values = hypotheses.values(r)
    vectors = isinstance(hypotheses, Prototypes)
    if statistic in ("gate-mean", "gate-mode"):
        if vectors:
            return r.unsqueeze(-1) * z.unsqueeze(-2)
        return z * (r * (values > 0)).sum(-1)
    mean = r @ values if vectors else (r * values).sum(-1)
    if statistic != "variance":
        return mean
    if vectors:
        return (r.unsqueeze(-1) * (values - mean.unsqueeze(-2)).square()).sum(-2)
    return (r * (values - mean.unsqueeze(-1)).square()).sum(-1)
