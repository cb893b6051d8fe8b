"""Solving for temperature: the T at which a stated number of hypotheses stays alive.

S rises with log T, with slope C, between log(ties) at T = 0 and log(finite energies) at T = inf.
Newton on log T works on the log odds of where the entropy lies between those ends,

    g = log (S - S_cold) / (S_hot - S),    dg/dlog T = C (1/(S - S_cold) + 1/(S_hot - S)),

which is straight where S is not: S_hot - S falls as T^-2 above, S - S_cold exponentially below.

The start lies inside a bracket that two inequalities prove (`_bracket`). Random energies then
take three or four evaluations of S and C; rows with ties and 500 decades of spread took at most
twenty. A Newton step that leaves the bracket is replaced by a bisection in log T. So is a step
that is not half as long as the one before it, once a row has had more turns than usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tempering.errors import SupportError
from tempering.posterior.competition import (
    check_energy_rows,
    compete,
    in_working_dtype,
    one_per_row,
)
from tempering.tensors import TensorLike

# Elements worked on at a time. On a CPU three such blocks of float32 stay in a core's cache; other
# devices are fast with few, large kernels.
_BLOCK = {"cpu": 1 << 20}
_BLOCK_ELSEWHERE = 1 << 25
# Newton's method converges within _PATIENCE turns on all but adversarial rows. From there on each
# step must be at most half of the one before, and the last half of _TURNS only bisects: log T spans
# about 1400 over float64, and log2(1400/2^-52) = 63 bisections resolve that to the last bit.
_PATIENCE = 8
_TURNS = 140
# A row has converged when the error of S is under this share of S's distance from the nearer end.
# One more Newton step follows, which squares that error.
_NEAR = 1e-7


def temperature_for(energies: TensorLike, support: TensorLike, *, dim: int = -1) -> Tensor:
    """The temperature at which N hypotheses stay alive: the T with exp(S(T)) = N, row by row.

    Parameters
    ----------
    energies: any shape and real dtype; +inf rules a hypothesis out. A tensor, an array or a list.
    support: the wanted N; a number, or a tensor, array or list that broadcasts to the energies'
        shape without `dim`. From the number of tied minimisers (gives T = 0) to the number of
        finite energies (gives T = inf).
    dim: the hypothesis axis.

    Returns
    -------
    T in the energies' unit, of their shape without `dim`; float32 at least. N is met to 1e-6
    relative in float64 and to 1e-5 in float32. The gradient is that of the implicit function,
    dT/dN = T/(C N) and dT/dd_h = r_h (log(1/r_h) - S)/C; it is 0 at both limits, and where C
    underflows to 0 (a plateau, on which T is arbitrary). It can be differentiated again.

    Raises
    ------
    EnergyError: NaN, -inf, or a row without finite energy; names the position.
    SupportError: no temperature gives N, or every one does (all finite energies tie), or it lies
        beyond the dtype; names the row and the reachable range.

    Source: bracketed Newton (Press et al., Numerical Recipes, 9.4) with dS/dlog T = C.
    """
    whole, dim = in_working_dtype(energies, dim)
    target = one_per_row(support, whole, dim, SupportError, "support")
    minimum = whole.detach().amin(dim, keepdim=True)
    check_energy_rows(whole, minimum, dim)
    rows = whole.movedim(dim, -1).reshape(-1, whole.shape[dim])
    solved = _Solve.apply(rows, target.reshape(-1), minimum.reshape(-1), target.shape)
    return solved.reshape(target.shape)


class _Solve(torch.autograd.Function):
    """Rows [row, hypothesis], their targets and minima [row], to temperatures [row]."""

    @staticmethod
    def forward(rows: Tensor, target: Tensor, minimum: Tensor, shape: torch.Size) -> Tensor:
        size = block_rows(rows)
        result = torch.empty_like(target, memory_format=torch.contiguous_format)
        space = rows.new_empty(3, min(size, len(rows)), rows.shape[1])
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            excess = torch.sub(
                rows[part], minimum[part].unsqueeze(-1), out=space[0, : len(rows[part])]
            )
            result[part] = _solve_block(excess, target[part], space[1:], start, shape)
        return result

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        rows, target, _, _ = inputs
        ctx.save_for_backward(rows, target, output)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        # The saved temperature is this function's own output, so autograd differentiates these
        # lines by calling `backward` again: second derivatives need no code of their own.
        rows = ctx.saved_tensors[0]
        blocks = zip(*(each.split(block_rows(rows)) for each in (*ctx.saved_tensors, grad)))
        to_rows, to_target = zip(*(_pull_back(*block) for block in blocks))
        return torch.cat(to_rows), torch.cat(to_target), None, None


def _pull_back(
    rows: Tensor, target: Tensor, temperature: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """grad . dT/drows and grad . dT/dtarget by the implicit function theorem on S(d, T)."""
    state = compete(rows, temperature, -1)
    capacity = state.heat_capacity()
    flat = (capacity == 0) | ~torch.isfinite(state.temperature)
    pull = torch.where(flat, 0.0, grad.unsqueeze(-1)) / torch.where(flat, 1.0, capacity)
    lean = state.reduced - state.mean_reduced()
    level = torch.where(flat, 0.0, state.temperature)
    return pull * state.responsibilities() * lean, (pull * level).squeeze(-1) / target


class _Active(NamedTuple):
    """The rows of a block that are still being solved; all but `excess` are [row], S in bits."""

    number: Tensor  # of the row within its block
    excess: Tensor  # [row, hypothesis], energy - minimum; may be +inf
    cold: Tensor  # S at T = 0
    hot: Tensor  # S at T = inf
    wanted: Tensor  # S
    odds: Tensor  # log (wanted - cold)/(hot - wanted)
    slack: Tensor  # |S - wanted| that counts as solved
    low: Tensor  # the bracket of T
    high: Tensor
    temperature: Tensor
    stride: Tensor  # the size of the last step in log T
    done: Tensor  # 1 or 0

    def keep(self, where: Tensor) -> _Active:
        index = where.nonzero().squeeze(-1)
        return _Active(*(field.index_select(0, index) for field in self))


def _solve_block(
    excess: Tensor, target: Tensor, space: Tensor, start: int, shape: torch.Size
) -> Tensor:
    tied = torch.eq(excess, 0, out=space[0, : len(excess)])
    ties = tied.sum(-1)
    # Least positive excess: what is 0 is moved out of the way.
    least = torch.add(excess, tied, alpha=torch.finfo(excess.dtype).max, out=tied).amin(-1)
    most = excess.amax(-1)
    reach = torch.full_like(target, excess.shape[1])
    if bool((most == math.inf).any()):
        finite = torch.isfinite(excess)
        reach = finite.sum(-1).to(target)
        most = torch.where(finite, excess, 0.0).amax(-1)
    _check_reach(target, ties, reach, start, shape)
    result = torch.where(target == ties, 0.0, torch.full_like(target, math.inf))
    active = _bracket(excess, target, ties, reach, least, most)
    inner = (target > ties) & (target < reach)
    if not bool(inner.all()):
        active = active.keep(inner)
    for turn in range(_TURNS):
        if len(active.number) == 0:
            return result
        active = _step(active, space, turn)
        if 2 * int(active.done.sum()) >= len(active.done):
            solved = active.done.bool()
            result[active.number[solved]] = active.temperature[solved]
            active = active.keep(~solved)
    raise _beyond_dtype(active, target, start, shape)


def _bracket(
    excess: Tensor, target: Tensor, ties: Tensor, reach: Tensor, least: Tensor, most: Tensor
) -> _Active:
    """Temperatures that enclose the solution, from two inequalities.

    With x = least positive excess / T >= 1, S - S_cold <= (reach - ties)/ties (1 + x) exp(-x),
    and (1 + x) exp(-x/2) < 1.22. With y = greatest finite excess / T, S_hot - S <= y^2/8, since
    a variance is at most a quarter of the squared range (Popoviciu) and S_hot - S is its
    integral over beta.
    """
    rise = torch.log1p((target - ties) / ties)
    fall = torch.log1p((reach - target) / target)
    odds = torch.log2(rise / fall)
    kind = torch.finfo(target.dtype)
    low = least / (2 * torch.log(1.22 * (reach - ties) / (ties * rise))).clamp(min=1.0)
    high = most / (8 * fall).sqrt()
    # A temperature that the dtype can't hold is refused after the loop; here it must not be 0.
    low = low.clamp(min=kind.smallest_normal)
    high = torch.maximum(high.clamp(max=kind.max), low)
    # Fitted to where solutions lay between the bounds, on eight kinds of random energies, 64 to a
    # row (normal, exponential, uniform, Gumbel, Cauchy, log-normal, ...): to 0.1 of the bracket.
    share = torch.sigmoid(0.25 * odds + 0.3)
    start = torch.exp2(torch.lerp(low.log2(), high.log2(), share))
    return _Active(
        number=torch.arange(len(target), device=target.device),
        excess=excess,
        cold=torch.log2(ties),
        hot=torch.log2(reach),
        wanted=torch.log2(target),
        odds=odds,
        slack=entropy_slack(rise, fall, excess.shape[1]),
        low=low,
        high=high,
        temperature=start.clamp(low, high),
        stride=torch.full_like(target, math.inf),
        done=torch.zeros_like(target),
    )


def _step(rows: _Active, space: Tensor, turn: int) -> _Active:
    """Evaluate S and C at the rows' temperatures, and move those towards their targets.

    Choices are products with 1 or 0: torch's `where` takes 4 ns a number on a CPU when the
    choice is unpredictable, thirty times as long as arithmetic.
    """
    temperature = rows.temperature
    entropy, slope = entropy_and_slope(rows.excess, temperature, space)
    error = entropy - rows.wanted
    above = _truth(torch.gt, error, 0.0)
    low = torch.maximum(rows.low, temperature * (1 - above))
    high = torch.minimum(rows.high, temperature / above)
    rise = entropy - rows.cold
    fall = rows.hot - entropy
    # d odds/d log T = slope (1/rise + 1/fall); NaN where a row is flat or S rounds to an end.
    change = (rows.odds - torch.log2(rise / fall)) / (slope / rise + slope / fall)
    change = change.nan_to_num_(math.inf, math.inf, -math.inf)
    newton = (temperature * torch.exp2(change)).clamp_(low, high)
    inside = _truth(torch.gt, newton, low) * _truth(torch.lt, newton, high)
    met = _truth(torch.le, error.abs(), rows.slack)
    size, stride = change.abs_(), rows.stride
    if turn >= _PATIENCE:
        inside *= _truth(torch.lt, size, stride / 2) if turn < _TURNS // 2 else 0.0
        narrow = _truth(torch.le, high, low * (1 + 4 * torch.finfo(low.dtype).eps))
        met = torch.maximum(
            met, narrow * _truth(torch.le, error.abs(), _support_accuracy(low.dtype))
        )
    proposal = torch.lerp(low.sqrt() * high.sqrt(), newton, inside)
    # The last Newton step needs no further evaluation, and squares the error. Where it would move
    # S further than that error, the step is rounding noise, and T stays.
    trusted = _truth(torch.lt, size, 1e-3) * _truth(torch.le, size * slope, 2 * rows.slack)
    stay = met * (1 - inside * trusted)
    moved = torch.lerp(temperature, proposal, (1 - rows.done) * (1 - stay))
    if turn >= _PATIENCE - 1:
        stride = (moved.log2() - temperature.log2()).abs()
    return rows._replace(
        low=low,
        high=high,
        temperature=moved,
        stride=stride,
        done=torch.maximum(rows.done, met),
    )


def entropy_slack(rise: Tensor, fall: Tensor, hypotheses: int) -> Tensor:
    """|S - wanted| in bits that counts as solved, from the distances of S to its ends in nats."""
    noise = 5 * torch.finfo(rise.dtype).eps * (1 + math.log2(hypotheses))
    return (_NEAR * torch.minimum(rise, fall)).clamp(min=noise)


def _truth(compare: Callable[..., Tensor], left: Tensor, right: Tensor | float) -> Tensor:
    """1 where the comparison holds, else 0."""
    return compare(left, right, out=torch.empty_like(left))


def entropy_and_slope(excess: Tensor, temperature: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
    """S in bits and its slope dS/dlog T.

    Bits, because torch's exp2 takes a quarter of the time of its exp on CPUs with AVX-512.
    """
    reduced, weights = space[0, : len(excess)], space[1, : len(excess)]
    kind = torch.finfo(excess.dtype)
    torch.div(excess, (temperature * -math.log(2)).unsqueeze(-1), out=reduced)
    # 2^-horizon is exactly 0: nothing is lost, and +inf never meets that 0 in a product.
    horizon = 8 - math.log2(kind.smallest_normal * kind.eps)
    torch.exp2(reduced.clamp_(min=-horizon), out=weights)
    total = weights.sum(-1)
    first = weights.mul_(reduced).sum(-1).div_(total)
    second = weights.mul_(reduced).sum(-1).div_(total)
    slope = second.addcmul_(first, first, value=-1.0).mul_(math.log(2))
    return total.log2_().sub_(first), slope


def _support_accuracy(dtype: torch.dtype) -> float:
    """The promised relative accuracy of N."""
    return 1e-6 if dtype == torch.float64 else 1e-5


def block_rows(rows: Tensor) -> int:
    """How many rows are worked on at a time."""
    return max(1, _BLOCK.get(rows.device.type, _BLOCK_ELSEWHERE) // rows.shape[1])


def _check_reach(
    target: Tensor, ties: Tensor, reach: Tensor, start: int, shape: torch.Size
) -> None:
    bad = ~((target >= ties) & (target <= reach)) | (ties == reach)
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0])
    where, given = _row_name(start + row, shape), f"{target[row].item():.10g}"
    low, high = int(ties[row]), int(reach[row])
    if low == high:
        raise SupportError(
            f"{where}: all {low} finite energies tie, so the support is {low} at every "
            f"temperature and support {given} fixes none; leave such rows out"
        )
    raise SupportError(
        f"{where}: support {given} is out of reach; these energies allow {low} (tied minimisers, "
        f"at T = 0) to {high} (finite energies, at T = inf)"
    )


def _beyond_dtype(rows: _Active, target: Tensor, start: int, shape: torch.Size) -> SupportError:
    row = int(rows.number[rows.done == 0][0])
    mend = "" if target.dtype == torch.float64 else "float64, or "
    return SupportError(
        f"{_row_name(start + row, shape)}: support {target[row].item():.10g} needs a temperature "
        f"that {target.dtype} can't hold; give {mend}energies in another unit"
    )


def _row_name(row: int, shape: torch.Size) -> str:
    index = []
    for size in reversed(shape):
        row, position = divmod(row, size)
        index.append(position)
    return f"row{index[::-1]}" if shape else "the row"
