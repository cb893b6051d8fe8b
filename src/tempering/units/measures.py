"""What an activation does to its inputs: saturation, sensitivity, robustness, information kept."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor, nn

from tempering.counts import whole_number
from tempering.errors import InputError
from tempering.kernels import Kernel, as_kernel
from tempering.tensors import TensorLike, as_tensor
from tempering.units.family import (
    STATISTICS,
    activation,
    check_input,
    check_statistic,
    checked_temperature,
)

# Temperatures of the trade-off curve, eight to a decade, in units of the energies' mean spread:
# without such a scale T means nothing. At 1/100 one hypothesis is left, at 100 all are alive.
RELATIVE_TEMPERATURES = tuple(10 ** (k / 8) for k in range(-16, 17))
# A slope under this part of the steepest one counts as saturated: a convention.
SATURATED_SLOPE = 0.01
# Statistics are read at this resolution: 8 bits over their range at most, and on average at least
# 32 inputs to a level, because levels with few inputs tell inputs apart by chance.
LEVELS = 256
INPUTS_PER_LEVEL = 32


class TradeOff(NamedTuple):
    """Robustness against decisiveness over T; one entry for each temperature.

    temperature: from 1/100 to 100 times the mean spread of the energies.
    decisiveness: 1 - mean S(r)/log H, 0 (all hypotheses alive) to 1 (a single one).
    robustness: 1 - rms over inputs of the total variation between the posteriors of z and of
    z + noise, 0..1. Rms, because a few decisions that flip are worse than many that shift a little.
    noise_gain: rms change of the activation under noise over the rms of the noise.
    """

    temperature: tuple[float, ...]
    decisiveness: tuple[float, ...]
    robustness: tuple[float, ...]
    noise_gain: tuple[float, ...]


@dataclass(frozen=True)
class ActivationReport:
    """An activation on a sample of inputs.

    saturation: share of inputs where the slope is under 1 % of the steepest on the sample; 1 where
    every slope is 0. sensitivity: mean slope, the norm of da/dz; steepest: the greatest.
    decisiveness, robustness, noise_gain: at the stated temperature, as in TradeOff.
    information: nats about the hypothesis that each statistic keeps of the same posterior.
    noise: standard deviation, unit of z. n: inputs. seed: of the noise.
    """

    kernel: str
    statistic: str
    temperature: float
    n: int
    noise: float
    seed: int
    saturation: float
    sensitivity: float
    steepest: float
    decisiveness: float
    robustness: float
    noise_gain: float
    information: dict[str, float]
    trade_off: TradeOff

    def as_dict(self) -> dict[str, object]:
        """All fields as plain values, for JSON."""
        return {**asdict(self), "trade_off": self.trade_off._asdict()}


def report(
    kernel: Kernel | str | nn.Module | type,
    statistic: str,
    temperature: float | int,
    inputs: TensorLike,
    *,
    noise: float | int | None = None,
    seed: SupportsIndex = 0,
) -> ActivationReport:
    """Measure an activation on a sample of inputs.

    Parameters
    ----------
    kernel, statistic: as `tempering.activation`.
    temperature: T >= 0, a number.
    inputs: z, at least 2 values (vectors, where the hypotheses are vectors); a tensor, an array
        or a list.
    noise: standard deviation of the Gaussian noise of the robustness, unit of z, > 0; a tenth of
        the inputs' own if None.
    seed: of that noise.

    Raises InputError for inputs without spread, or noise that is not positive; and as
    `tempering.activation`.
    """
    kernel = as_kernel(kernel)
    check_statistic(statistic)
    temperature = float(checked_temperature(temperature))
    seed = whole_number(seed, "seed", 0)
    inputs = as_tensor(inputs, "inputs", InputError)
    check_input(inputs)
    z = inputs.detach().double()
    z = z.reshape(-1, z.shape[-1]) if kernel.takes_vectors and z.ndim else z.reshape(-1)
    if len(z) < 2 or not bool(z.std(0).max() > 0):
        raise InputError(
            f"a report needs at least 2 inputs that differ; got {len(z)} of shape "
            f"{list(inputs.shape)}"
        )
    noise = 0.1 * float(z.var(0).mean().sqrt()) if noise is None else float(noise)
    if not 0 < noise < math.inf:
        raise InputError(f"noise is {noise:g}; expected a positive standard deviation")
    generator = torch.Generator().manual_seed(seed)
    shaken = z + noise * torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
    spread = float(kernel.excess(z).detach().mean())  # U(T = inf) - U(T = 0)
    curve = tuple(spread * relative for relative in RELATIVE_TEMPERATURES)
    here = _trade_off(kernel, statistic, (float(temperature),), z, shaken)
    slopes = _slopes(kernel, statistic, float(temperature), z)
    steepest = float(slopes.max())
    return ActivationReport(
        kernel=type(kernel).__name__,
        statistic=statistic,
        temperature=float(temperature),
        n=len(z),
        noise=noise,
        seed=seed,
        saturation=float((slopes <= SATURATED_SLOPE * steepest).double().mean()),
        sensitivity=float(slopes.mean()),
        steepest=steepest,
        decisiveness=here.decisiveness[0],
        robustness=here.robustness[0],
        noise_gain=here.noise_gain[0],
        information=information_kept(kernel, float(temperature), z),
        trade_off=_trade_off(kernel, statistic, curve, z, shaken),
    )


@torch.no_grad()
def _trade_off(
    kernel: Kernel, statistic: str, temperatures: tuple[float, ...], z: Tensor, shaken: Tensor
) -> TradeOff:
    rows = []
    noise = (shaken - z).square().mean().sqrt()
    for temperature in temperatures:
        calm = activation(z, kernel, "full", temperature)
        moved = activation(shaken, kernel, "full", temperature)
        entropy = activation(z, kernel, "entropy", temperature)
        change = activation(shaken, kernel, statistic, temperature) - activation(
            z, kernel, statistic, temperature
        )
        rows.append(
            (
                temperature,
                1 - float(entropy.mean()) / math.log(calm.shape[-1]),
                1 - float((moved - calm).abs().sum(-1).square().mean().sqrt()) / 2,
                float(change.square().mean().sqrt() / noise),
            )
        )
    return TradeOff(*zip(*rows, strict=True))


def _slopes(kernel: Kernel, statistic: str, temperature: float, z: Tensor) -> Tensor:
    """The norm of da/dz at each input."""
    z = z.clone().requires_grad_()
    outputs = activation(z, kernel, statistic, temperature).reshape(len(z), -1)
    total = torch.zeros(len(z), dtype=z.dtype, device=z.device)
    if not outputs.requires_grad:  # a mode: constant but for its jumps
        return total
    for output in outputs.unbind(-1):
        (grad,) = torch.autograd.grad(output.sum(), z, retain_graph=True)
        total += grad.reshape(len(z), -1).square().sum(-1)
    return total.sqrt()


@torch.no_grad()
def information_kept(
    kernel: Kernel | str | nn.Module | type,
    temperature: float | int,
    inputs: TensorLike,
    *,
    levels: SupportsIndex | None = None,
) -> dict[str, float]:
    """Nats about the hypothesis that each statistic of the same posterior keeps.

    I(h; a) = S(mean of r) - mean over values a of S(mean of r where the statistic is a)

    The full posterior keeps I = S(mean of r) - mean of S(r); no statistic of it keeps more (data
    processing). The others are read at a finite resolution: without one, a single real number
    could name every input of a finite sample.

    Parameters
    ----------
    kernel, temperature, inputs: as `report`.
    levels: how many values of a statistic, or of each of its components, are told apart over its
        range, >= 2; if None 256, but no more than one for every 32 inputs.

    Returns a value for each of STATISTICS, 0..log H.
    """
    kernel = as_kernel(kernel)
    most = None if levels is None else whole_number(levels, "levels", 2)
    inputs = as_tensor(inputs, "inputs", InputError)
    r = activation(inputs, kernel, "full", temperature)
    r = r.reshape(-1, r.shape[-1])
    most = max(2, min(LEVELS, len(r) // INPUTS_PER_LEVEL)) if most is None else most
    marginal = torch.special.entr(r.mean(0)).sum()
    kept: dict[str, float] = {}
    for statistic in STATISTICS:
        left = torch.special.entr(r).sum(-1).mean()
        if statistic != "full":
            values = activation(inputs, kernel, statistic, temperature).reshape(len(r), -1)
            left = _entropy_within(r, _levels_of(values, most))
        kept[statistic] = float((marginal - left).clamp(min=0))
    return kept


def _entropy_within(r: Tensor, values: Tensor) -> Tensor:
    """Mean entropy of the responsibilities pooled over inputs of equal value."""
    _, group, size = torch.unique(values, dim=0, return_inverse=True, return_counts=True)
    pooled = r.new_zeros(len(size), r.shape[-1]).index_add_(0, group, r) / size.unsqueeze(-1)
    return (torch.special.entr(pooled).sum(-1) * size).sum() / len(r)


def _levels_of(values: Tensor, levels: int) -> Tensor:
    """Each column as one of `levels` equal steps over its range."""
    low, high = values.amin(0), values.amax(0)
    step = torch.where(high > low, high - low, 1.0) / levels
    # Values that are equal but for rounding must share a level, also on an edge between two levels,
    # as 0 is between -1 and 1. So edges are moved down by a few roundings.
    edge = 16 * levels * torch.finfo(values.dtype).eps
    return ((values - low) / step + edge).floor().clamp(max=levels - 1)
