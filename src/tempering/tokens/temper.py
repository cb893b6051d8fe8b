"""Logits and a temperature per row -> tempered logits. Exact at both limits, in every dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor

from tempering.errors import EnergyError, TemperatureError


def token_energies(logits: Shaped[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
    """Logits as energies of the competing tokens, d_v = max_w l_w - l_v.

    Parameters
    ----------
    logits: a row per request. -inf means "masked", and so does the lowest finite number of the
        dtype (or of bfloat16), which some libraries write instead.

    Returns
    -------
    Energies >= 0, at least float32: 0 at the maximisers, +inf for masked tokens.

    Raises
    ------
    EnergyError: NaN, +inf, or a row whose every token is masked; names row and token.
    """
    if not logits.is_floating_point():
        raise EnergyError(f"logits must be floating point, got {logits.dtype}; call logits.float()")
    rows = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = rows.amax(-1, keepdim=True)  # NaN, +inf, or lowest in bad rows
    lowest = max(torch.finfo(logits.dtype).min, torch.finfo(torch.bfloat16).min)
    if not bool((torch.isfinite(top) & (top > lowest)).all()):
        raise _bad_row(rows, top.squeeze(-1), lowest)
    energies = top - rows
    if bool((rows.amin(-1) <= lowest).any()):
        energies = torch.where(rows <= lowest, math.inf, energies)
    return energies


# exp(-104) is 0 in float32, whose least number is 2^-149 = exp(-103.3). Engines force a token by a
# logit far above that: vLLM's thinking budget by 1e9.
CERTAIN = 104.0


def certain(energies: Float[Tensor, "batch vocab"]) -> Bool[Tensor, " batch"]:
    """Which rows have one token at p = 1: all others lie more than 104 nats below it."""
    if energies.shape[-1] > 1 and bool((energies.amax(-1) <= CERTAIN).all()):
        return torch.zeros(len(energies), dtype=torch.bool, device=energies.device)
    return count(torch.le, energies, CERTAIN) == 1


def count(
    compare: Callable[..., Tensor], energies: Float[Tensor, "batch vocab"], bound: float
) -> Float[Tensor, " batch"]:
    """How many energies of each row compare so with a bound; exact up to 2^24 of them.

    As numbers of the energies' own dtype, because a sum of truth values takes five times as long.
    """
    return compare(energies, bound, out=torch.empty_like(energies)).sum(-1)


def live(energies: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
    """How many tokens of each row are unmasked."""
    if bool((energies.amax(-1) < math.inf).all()):
        return energies.new_full((len(energies),), energies.shape[-1])
    return count(torch.lt, energies, math.inf)


def one_per_row(values: Iterable[float], like: Tensor) -> Float64[Tensor, " batch"]:
    """One number for each row, as a float64 tensor on the device of another."""
    return torch.tensor(list(values), dtype=torch.float64, device=like.device)


def held_by(
    temperature: Float[Tensor, " batch"], energies: Float[Tensor, "batch vocab"]
) -> Float[Tensor, " batch"]:
    """Temperatures in the dtype of the energies; beyond its normal range they are 0 or inf."""
    kind = torch.finfo(energies.dtype)
    result = temperature.to(energies.dtype)  # above its largest number: inf
    return torch.where((result > 0) & (result < kind.smallest_normal), 0.0, result)


def logits_at_temperature(
    logits: Shaped[Tensor, "batch vocab"],
    energies: Float[Tensor, "batch vocab"],
    temperature: Float[Tensor, " batch"],
) -> Float[Tensor, "batch vocab"]:
    """Tempered logits, -d/T, so that their softmax is the tempered posterior over tokens.

    Parameters
    ----------
    logits: as the engine gave them.
    energies: `token_energies(logits)`.
    temperature: T of each row, 0..inf.

    Returns
    -------
    At least float32. A row with T = 1 is the given row, bit for bit; every other row has its
    maximum at 0. T = 0: 0 for each maximiser (ties share), -inf for the others. T = inf: 0 for
    each unmasked token. Masked tokens are -inf.

    Raises
    ------
    TemperatureError: negative or NaN; names the row.
    """
    given = logits.to(energies.dtype)
    values = temperature.tolist()
    if all(T == 1 for T in values):
        return given
    for row, T in enumerate(values):
        if not T >= 0:
            raise TemperatureError(f"row {row}: the temperature is {T}; it must be 0..inf")
    column = temperature.unsqueeze(-1)
    result = energies / -column
    if 0 in values:
        result = torch.where(column == 0, _zero_where(energies == 0, energies), result)
    if math.inf in values:
        result = torch.where(column == math.inf, _zero_where(energies < math.inf, energies), result)
    if 1 in values:
        result = torch.where(column == 1, given, result)
    return result


def _zero_where(mask: Tensor, like: Tensor) -> Tensor:
    """0 where the mask is True, else -inf."""
    return torch.zeros_like(like).masked_fill(~mask, -math.inf)


def _bad_row(rows: Tensor, top: Tensor, lowest: float) -> EnergyError:
    row = int((~(torch.isfinite(top) & (top > lowest))).nonzero()[0])
    value = top[row].item()
    if value <= lowest:
        return EnergyError(
            f"row {row}: all {rows.shape[-1]} tokens are masked, so none can be sampled; "
            "loosen the constraint that masks them"
        )
    token = int((rows[row].isnan() | (rows[row] == math.inf)).nonzero()[0])
    return EnergyError(
        f"row {row}: the logit of token {token} is {rows[row, token].item()}; logits are finite, "
        "or -inf where masked: the model overflowed, try float32 or bfloat16 weights"
    )
