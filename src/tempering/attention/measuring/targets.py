"""A pattern read as support: temperatures under which each layer keeps a stated number of keys.

    absolute:  N_target = N_own^(1 - amplitude) * pattern^amplitude      keys
    relative:  N_target = N_own * (pattern / geometric mean of pattern)^amplitude

N = exp(mean entropy over queries), per layer or per head. A layer's temperature changes what
later layers read, so the layers are solved in order of depth inside one forward pass: each is
set before its output is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.attention.control.handle import Tempering
from tempering.attention.examining.layout_of import layout
from tempering.attention.examining.stored import input_device
from tempering.attention.examining.subject import unwrapped
from tempering.attention.hooks.site import state_of
from tempering.attention.hooks.temperature_state import TemperatureState
from tempering.attention.layout import AttentionLayer, Layout
from tempering.attention.limits import COLDEST, HOTTEST
from tempering.attention.logits import sliced_logits
from tempering.attention.measuring.measure import Measurement, measure_tokens
from tempering.attention.measuring.statistics import posterior_statistics
from tempering.attention.modes import evaluation_mode
from tempering.attention.profiles.profile import Profile
from tempering.errors import ArchitectureError, InputError, RefusedError, SupportError
from tempering.schedules import Schedule, as_schedule

Reading = Literal["absolute", "relative"]
# Entries of logits kept while one layer is solved: 128 MB in float32.
_ENTRIES = 1 << 25
# Newton takes six steps or so. Bisection alone would narrow the range of log T, 2 log 1000 wide,
# to the precision of float64 in so many.
_STEPS = 60
# In nats: how near every head's entropy must come to its target; and the error below which a head
# keeps its T while others are solved on, a tenth of that.
_REACHED, _SETTLED = 1e-6, 1e-7
# Instead of a heat capacity of 0 as a divisor: the step is then far outside, and bisected.
_LEAST_CAPACITY = 1e-12


@dataclass(frozen=True, eq=False)
class SupportProfile:
    """A profile solved from supports, with what was asked and what was reached.

    own, target, reached: supports (keys) before, asked and after; one row a layer, one column
        a head (per="head") or a single column (per="layer").
    """

    profile: Profile
    own: Float[Tensor, "layers columns"]
    target: Float[Tensor, "layers columns"]
    reached: Float[Tensor, "layers columns"]


def profile_for_support(
    model: nn.Module,
    chunks: Int[Tensor, "chunks length"],
    pattern: str | Schedule,
    *,
    reading: Reading = "absolute",
    amplitude: float = 1.0,
    per: Literal["layer", "head"] = "layer",
    own: Measurement | None = None,
) -> SupportProfile:
    """Solve the temperatures under which support follows a pattern over depth.

    Parameters
    ----------
    model: a transformers decoder or encoder on the interface route.
    chunks: token ids of a sample text (see `chunks.token_chunks`); they run as one batch.
    pattern: values are supports in keys (absolute) or ratios of them (relative).
    reading, amplitude: see the module's formulas; amplitude 0 is the model's own support.
    per: one temperature a layer, or one a head.
    own: the untempered measurement on the same chunks, if it is at hand.

    Raises SupportError that names the layer (and head) whose target can't be reached, with the
    reachable range. T is searched in 1e-3..1e3, to 1e-6 in log support.
    """
    if reading not in ("absolute", "relative"):
        raise InputError(f"a pattern is read as 'absolute' or 'relative' support, not {reading!r}")
    if per not in ("layer", "head"):
        raise InputError(f"temperatures are solved per 'layer' or per 'head', not {per!r}")
    if not (amplitude >= 0 and math.isfinite(amplitude)):
        raise InputError(f"the amplitude of a support pattern is at least 0, not {amplitude}")
    model = unwrapped(model)
    model_layout = _solvable(model)
    schedule = as_schedule(pattern)
    measured = own if own is not None else measure_tokens(model, chunks)
    own_entropy = _columns(measured.entropy, per)
    target = _targets(model_layout, schedule, own_entropy, reading, amplitude)
    _check_bounds(model_layout, target, chunks.shape[1])
    solver = _Solver(model, model_layout, target, per)
    rows = solver.solve(chunks)
    profile = Profile._for(
        model_layout,
        rows,
        model,
        pattern=f"{schedule} as {reading} support, amplitude {amplitude:g}, per {per}",
    )
    after = measure_tokens(model, chunks, profile=profile)
    return SupportProfile(
        profile, own_entropy.exp(), target.exp(), _columns(after.entropy, per).exp()
    )


def profile_of_entropy(
    model: nn.Module,
    chunks: Int[Tensor, "chunks length"],
    entropy: Float[Tensor, "layers heads"],
    *,
    bounds: tuple[float, float],
) -> Profile:
    """Temperatures under which every head has a stated mean entropy, or T as near as bounds allow.

    Parameters
    ----------
    model, chunks: as for `profile_for_support`.
    entropy: mean over queries, nats; NaN leaves a head at its own temperature.
    bounds: lowest and highest T; a head that needs more stands at the bound.

    Raises InputError for another shape than the model's layers and heads.
    """
    model = unwrapped(model)
    model_layout = _solvable(model)
    shape = (len(model_layout.layers), max(model_layout.heads))
    if tuple(entropy.shape) != shape:
        raise InputError(
            f"entropies have shape [layers, heads] = {list(shape)}; these have "
            f"{list(entropy.shape)}"
        )
    solver = _Solver(model, model_layout, entropy.double(), "head", bounds)
    return Profile._for(model_layout, solver.solve(chunks), model, pattern=None)


def _solvable(model: nn.Module) -> Layout:
    """The layout; an error for a model whose supports can't be solved for in one pass."""
    model_layout = layout(model)
    for layer in model_layout.layers:
        if layer.route != "interface" or layer.stack == "cross":
            raise ArchitectureError(
                f"{layer.name}: solving for support needs attention of one stack on the interface "
                "route; give relative temperatures instead"
            )
        if state_of(model.get_submodule(layer.name)) is not None:
            raise RefusedError(
                "this model is tempered at the moment; solve for support on the untempered model "
                "(remove the handle first)"
            )
    return model_layout


def _columns(entropy: Tensor, per: str) -> Tensor:
    return entropy if per == "head" else entropy.nanmean(dim=1, keepdim=True)


def _targets(
    model_layout: Layout, schedule: Schedule, own: Tensor, reading: str, amplitude: float
) -> Tensor:
    """log N_target, [layers, columns]."""
    values = {part: schedule.sample(depth).log() for part, depth in model_layout.depths.items()}
    wanted = torch.stack([values[layer.part][layer.index] for layer in model_layout.layers])[
        :, None
    ]
    if reading == "absolute":
        return own * (1 - amplitude) + wanted * amplitude
    return own + (wanted - wanted.mean()) * amplitude


def _check_bounds(model_layout: Layout, target: Tensor, length: int) -> None:
    """SupportError for a support below 1 or above the mean number of keys: no T reaches it."""
    # Query i sees i + 1 keys in a decoder, all of them in an encoder.
    limits = {"decoder": math.lgamma(length + 1) / length, "encoder": math.log(length)}
    for index, layer in enumerate(model_layout.layers):
        row = target[index][~target[index].isnan()]
        high = limits[layer.stack]
        bad = (row < 0) | (row > high)
        if bool(bad.any()):
            value = float(row[bad][0].exp())
            raise SupportError(
                f"{layer.name}: a support of {value:.3g} keys is out of reach; on chunks of "
                f"{length} tokens the mean support lies within 1 and {math.exp(high):.4g}. "
                "Lower the amplitude, or change the pattern"
            )


class _Solver:
    """Solves for the temperature of each attention call before the call runs.

    target: entropies in nats, [layers, columns]. bounds: where targets out of reach are brought
    within reach instead of refused. rows: the temperatures found, by layer.
    """

    def __init__(
        self,
        model: nn.Module,
        model_layout: Layout,
        target: Tensor,
        per: str,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        self.model, self.model_layout, self.target, self.per = model, model_layout, target, per
        self.bounds = bounds
        self.modules = [model.get_submodule(layer.name) for layer in model_layout.layers]
        self.index = {id(module): i for i, module in enumerate(self.modules)}
        self.rows: dict[int, Tensor] = {}

    def solve(self, chunks: Tensor) -> list[Tensor]:
        """One forward pass over all chunks; Float[Tensor, "heads"] for each layer."""
        network: Any = self.model
        device = input_device(network)
        neutral = [Profile.neutral(self.model_layout)]
        # The solver is the rule of each layer; it is gone when the handle is.
        with (
            Tempering(self.model, self.model_layout, neutral, private=True) as handle,
            evaluation_mode(self.model),
        ):
            for state, module in zip(handle.states(), self.modules, strict=True):
                state.rule = self._rule(module)
            with torch.no_grad():
                body: Any = getattr(self.model, "base_model", self.model)
                body(input_ids=chunks.to(device), use_cache=False)
        return [self.rows[i] for i in range(len(self.modules))]

    def _rule(self, module: nn.Module) -> Any:
        def rule(
            state: TemperatureState, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
        ) -> Tensor:
            index = self.index[id(module)]
            layer = self.model_layout.layers[index]
            logits = _sample(module, query, key, mask, kwargs)
            temperature = self._temperature(layer, logits, self.target[index])
            self.rows[index] = temperature.cpu()
            return temperature.reciprocal()[None, :, None, None].to(query.device, torch.float32)

        return rule

    def _temperature(
        self, layer: AttentionLayer, logits: list[Tensor], target: Tensor
    ) -> Float[Tensor, "heads"]:
        """Bracketed Newton in log T on the mean entropy: d mean S / d log T = mean C."""
        heads = layer.heads
        device = logits[0].device
        ends = [math.log(end) for end in self.bounds or (COLDEST, HOTTEST)]
        low, high = (torch.full((heads,), end, dtype=torch.float64, device=device) for end in ends)
        log_t = torch.zeros(heads, dtype=torch.float64, device=device)
        if self.bounds is None:
            wanted = target[~target.isnan()].to(device).expand(heads)
        else:
            # Every target is brought within reach; a head without one keeps its own entropy.
            wanted = target[:heads].to(device)
            wanted = torch.where(wanted.isnan(), self._means(logits, log_t)[0], wanted)
            reach = [self._means(logits, end)[0] for end in (low, high)]
            wanted = torch.minimum(torch.maximum(wanted, reach[0]), reach[1])
        for _ in range(_STEPS):
            entropy, capacity = self._means(logits, log_t)
            error = entropy - wanted
            if bool((error.abs() < _REACHED).all()):
                return log_t.exp()
            low = torch.where(error < 0, log_t, low)
            high = torch.where(error > 0, log_t, high)
            newton = log_t - error / capacity.clamp(min=_LEAST_CAPACITY)
            inside = (newton > low) & (newton < high)
            step = torch.where(inside, newton, (low + high) / 2)
            log_t = torch.where(error.abs() < _SETTLED, log_t, step)
        bottom = self._means(logits, torch.full_like(log_t, math.log(COLDEST)))[0]
        top = self._means(logits, torch.full_like(log_t, math.log(HOTTEST)))[0]
        head = int(error.abs().argmax())
        where = layer.name if self.per == "layer" else f"{layer.name}, head {head}"
        raise SupportError(
            f"{where}: no temperature between {COLDEST:g} and {HOTTEST:g} gives a support of "
            f"{float(wanted[head].exp()):.4g} keys; the reachable range is "
            f"{float(bottom[head].exp()):.4g} to {float(top[head].exp()):.4g}. "
            "Lower the amplitude, or change the pattern"
        )

    def _means(self, logits: list[Tensor], log_t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean entropy and heat capacity per head; the same for all heads with per="layer"."""
        entropy = torch.zeros_like(log_t)
        capacity = torch.zeros_like(log_t)
        count = 0
        for part in logits:
            tempered = part * (-log_t).exp()[None, :, None, None].to(part.dtype)
            s, c, _, _ = posterior_statistics(tempered)
            entropy += s.sum(dim=(0, 2), dtype=torch.float64)
            capacity += c.sum(dim=(0, 2), dtype=torch.float64)
            count += part.shape[0] * part.shape[2]
        entropy, capacity = entropy / count, capacity / count
        if self.per == "layer":
            return entropy.mean().expand_as(entropy), capacity.mean().expand_as(capacity)
        return entropy, capacity


def _sample(
    module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
) -> list[Tensor]:
    """Logits of all queries, or of queries spread evenly when they would not fit in memory."""
    batch, heads, q_seq, _ = query.shape
    fits = max(16, _ENTRIES // (batch * heads * key.shape[2]))
    step = max(1, math.ceil(q_seq / fits))
    queries = torch.arange(0, q_seq, step, device=query.device)
    return list(sliced_logits(module, query, key, mask, kwargs, queries))
