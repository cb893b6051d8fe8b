"""Applying a policy to logits: the whole contract between policies and engines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from tempering.errors import EnergyError, InputError
from tempering.tokens.policy import Policy
from tempering.tokens.temper import certain, held_by, logits_at_temperature, token_energies
from tempering.tokens.token_state import TokenState
from tempering.tokens.truncation import truncated


class Applied(NamedTuple):
    """What an engine samples from, and the temperature of each row."""

    logits: Float[Tensor, "batch vocab"]
    temperature: Float[Tensor, " batch"]


def temper_logits(
    policy: Policy, logits: Shaped[Tensor, "batch vocab"], states: Sequence[TokenState]
) -> Applied:
    """Temper one row of logits for each request: the whole contract between policy and engine.

    Parameters
    ----------
    policy: e.g. `parse_policy("support(12)")`.
    logits: raw, -inf where masked; any floating dtype.
    states: `policy.state(prompt_ids, generated_ids)` of each row; with `given=` where the policy
        `truncates`, because then the engine's own truncation is left to it.

    Returns
    -------
    (tempered logits, temperatures), at least float32. See `logits_at_temperature` for the limits; a
    row with T = 1 comes back bit for bit. Tokens that the policy cuts are -inf. A token that it
    forces (`budget`) has p = 1, and its row T = 1.

    Raises
    ------
    EnergyError: NaN, +inf or an all-masked row; a forced token that is masked.
    InputError: not one state for each row.
    """
    if len(states) != len(logits):
        raise InputError(f"{len(logits)} rows of logits but {len(states)} states; give one a row")
    return apply_policy(policy, logits, token_energies(logits), states)


def apply_policy(
    policy: Policy,
    logits: Shaped[Tensor, "batch vocab"],
    energies: Float[Tensor, "batch vocab"],
    states: Sequence[TokenState],
) -> Applied:
    """`temper_logits` where the energies, `token_energies(logits)`, are known already."""
    applied = _tempered(policy, logits, energies, states)
    forced = [policy.forced(state) for state in states] if policy.forces else []
    if all(token is None for token in forced):
        return applied
    result, temperature = applied.logits.clone(), applied.temperature.clone()
    for row, token in enumerate(forced):
        if token is not None:
            if not (token < energies.shape[-1] and bool(energies[row, token] < math.inf)):
                raise EnergyError(
                    f"row {row}: {policy} has to write token {token}, which the engine masks; "
                    "loosen the constraint that masks it, or drop the budget"
                )
            result[row] = -math.inf
            result[row, token], temperature[row] = 0.0, 1.0
    return Applied(result, temperature)


def _tempered(
    policy: Policy,
    logits: Shaped[Tensor, "batch vocab"],
    energies: Float[Tensor, "batch vocab"],
    states: Sequence[TokenState],
) -> Applied:
    """Logits tempered and truncated."""
    if not policy.truncates:
        temperature = token_temperatures(policy, energies, states)
        return Applied(logits_at_temperature(logits, energies, temperature), temperature)
    cuts = [policy.cut(state) for state in states]
    kept = truncated(energies, None, cuts)
    temperature = token_temperatures(policy, kept, states)
    kept = truncated(kept, temperature, cuts)
    if kept is not energies:
        logits = torch.where(kept < math.inf, logits.to(kept.dtype), -math.inf)
    return Applied(logits_at_temperature(logits, kept, temperature), temperature)


def token_temperatures(
    policy: Policy, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
) -> Float[Tensor, " batch"]:
    """T of each row, as engines apply it: the policy's, but 1 where one token has p = 1.

    So a token that an engine forces, by a logit more than 104 nats above all others, keeps p = 1
    under every policy, also under `support`, which would heat until N tokens are alive. A
    temperature beyond the range of the energies' dtype becomes the limit, 0 or inf.
    """
    forced = certain(energies)
    if not bool(forced.any()):
        return held_by(_checked_temperatures(policy, energies, states), energies)
    result = energies.new_ones(len(energies))
    free = (~forced).nonzero().squeeze(-1)
    if len(free):
        rows = energies[free]
        result[free] = held_by(
            _checked_temperatures(policy, rows, [states[i] for i in free.tolist()]), rows
        )
    return result


def _checked_temperatures(policy: Policy, energies: Tensor, states: Sequence[TokenState]) -> Tensor:
    temperature = policy.temperatures(energies, states)
    if temperature.shape != (len(states),):
        raise InputError(
            f"{policy} gives temperatures of shape {list(temperature.shape)} for {len(states)} "
            "rows; give one for each"
        )
    return temperature
