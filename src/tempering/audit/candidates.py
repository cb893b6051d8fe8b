"""Hypotheses about an engine, with likelihoods: right, mistaken, or at other temperatures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tempering.attention.tuning.basis import Basis
from tempering.audit.likelihood import (
    SMALLEST,
    Contest,
    Fitted,
    blocks_of,
    contest,
    fit,
    half_width,
    log_likelihoods,
    scale_of,
)
from tempering.audit.mistakes.base import MistakeCase
from tempering.audit.reference import Reference, gains
from tempering.audit.scores import Scored
from tempering.intervals import t_quantile

# What many numbers are fitted to: log probabilities of the first prompts, so many or more.
_FEW = 512
# Engines round constants themselves (1/sqrt(d) to bfloat16: .2%); less is no mistake.
MARGIN = 0.002
# A hypothesis agrees where it leaves 3 times what the engine's rounding does, or .001 nats.
_TIMES, ALIKE = 3.0, 1e-3
# A right engine is called wrong once in so many audits.
_ALARM = 1e-4


@dataclass(frozen=True)
class TemperatureEstimate:
    """A fitted temperature with a 95% interval. said: what it should be (1, or the profile's)."""

    name: str
    value: float
    low: float
    high: float
    said: float = 1.0
    significant: bool = False

    def text(self) -> str:
        """ "T = 1.000 [0.998, 1.002]"; 4 digits where the interval is worth them."""
        width = self.high - self.low
        digits = 3 if width > 2e-3 else 4
        return f"T = {self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True)
class Candidate:
    """A hypothesis and how well it explains the engine's log probabilities.

    kind: "right", "mistake", or what was fitted: "model", "type", "layer", "position".
    scale: of what it leaves unexplained, nats. gain: of log likelihood over "right", nats, less
    log(tokens)/2 for each fitted number; z: gain over its standard error.
    """

    name: str
    kind: str
    scale: float
    gain: float
    z: float
    numbers: int = 0
    temperatures: tuple[TemperatureEstimate, ...] = ()
    residuals: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False, compare=False)

    @property
    def stands_out(self) -> bool:
        """Whether it explains the engine better than "right" does, beyond chance."""
        if self.numbers and not any(item.significant for item in self.temperatures):
            return False
        return self.z >= 4 and self.gain >= 10


class Court:
    """The engine's log probabilities, the reference's, and what rounding does to them."""

    def __init__(
        self, reference: Reference, prompts: Sequence[Scored], own: Tensor, null: Tensor
    ) -> None:
        self.reference, self.prompts = reference, list(prompts)
        self.y = torch.tensor([v for item in prompts for v in item.values], dtype=torch.float64)
        self.own = own
        self.null = null - own  # what the engine's precision does alone
        self.blocks = blocks_of([len(item.places) for item in prompts])
        self.null_scale = scale_of(self.null)
        # Fitting better than the engine's own rounding allows is chance.
        self.least = max(SMALLEST, self.null_scale / 2)
        self.right = self.judged("it runs as the reference does", "right", self.y - own)

    def judged(
        self,
        name: str,
        kind: str,
        residuals: Tensor,
        numbers: int = 0,
        temperatures: Sequence[TemperatureEstimate] = (),
    ) -> Candidate:
        """A candidate of what it leaves unexplained."""
        scale = scale_of(residuals, self.least)
        found = log_likelihoods(residuals, scale)
        if kind == "right":
            self._base = found
            against = Contest(0.0, 0.0)
        else:
            against = contest(found, self._base, self.blocks)
        penalty = numbers / 2 * math.log(len(residuals))
        return Candidate(
            name, kind, scale, against.gain - penalty, against.z, numbers, tuple(temperatures),
            residuals,
        )  # fmt: skip

    def agrees(self, candidate: Candidate) -> bool:
        """Whether the engine's precision explains what a candidate leaves."""
        return candidate.scale <= max(_TIMES * self.null_scale, ALIKE)

    def case(self, case: MistakeCase) -> Candidate | None:
        """A known mistake; None where these prompts can't show it."""
        if max(len(item.tokens) for item in self.prompts) < case.least:
            return None
        with case.change():
            found = self.reference.scores(self.prompts)
        if not bool(found.isfinite().all()) or bool((found == self.own).all()):
            return None
        return self.judged(case.name, "mistake", self.y - found)

    def ordered(self, found: Sequence[Candidate], whole: Candidate) -> list[Candidate]:
        """The likeliest first; but before fitted numbers the mistakes that say the same.

        Where a mistake is nothing but another temperature (YaRN's factor twice), the fit is the
        likelier one by what the engine rounds its constants. So a mistake comes first where its
        log probabilities differ from the fit's by no more than MARGIN in log T would make.

        whole: the fit of one temperature, for what log T does to the log probabilities.
        """
        ranked = sorted(found, key=lambda item: -item.gain)
        first, estimate = ranked[0], whole.temperatures[0]
        away = math.log(estimate.value / estimate.said)
        if not (first.numbers and first.stands_out) or abs(away) < MARGIN:
            return ranked
        moved = scale_of(self.right.residuals - whole.residuals) / abs(away)
        same = [
            item
            for item in ranked
            if item.kind == "mistake"
            and item.stands_out
            and scale_of(item.residuals - first.residuals) <= MARGIN * moved
        ]
        return [*same, *(item for item in ranked if item not in same)]

    def temperatures(
        self, per: str, basis: Basis, said: Sequence[float], start: float = 0.0
    ) -> Candidate:
        """Temperatures fitted; said: what each should be; start: log T to begin with, if it is
        likelier than 0."""
        few = self._few() if basis.matrix.shape[1] > 4 else self.prompts
        with self.reference.live(basis, few) as run:
            found = self._fitted(run, basis.matrix.shape[1], few, start)
        residuals = found.residuals
        if few is not self.prompts:
            with self.reference.live(basis, self.prompts) as run:
                residuals = self.y - run(found.theta[None])[0]
        names = basis.names
        rows = self._rows(found, names, said)
        label = {"model": "another temperature", "type": "a temperature for each kind of layer"}
        return self.judged(
            label.get(per, "a temperature for each layer"), per, residuals, len(names), rows
        )

    def slope(self) -> Candidate:
        """A temperature that changes with position."""
        with self.reference.sloped(self.prompts) as run:
            found = self._fitted(run, 2, self.prompts)
        half = max(len(item.tokens) for item in self.prompts) // 2
        rows = self._rows(found, (f"at {half} keys", "at e times as many, over that"), (1.0, 1.0))
        # The level alone is another hypothesis: here the slope has to count.
        if not rows[1].significant:
            rows = [rows[1]]
        return self.judged(
            "a temperature that changes with position", "position", found.residuals, 2, rows
        )

    def _few(self, least: int = _FEW) -> list[Scored]:
        chosen: list[Scored] = []
        for item in self.prompts:
            if sum(len(one.places) for one in chosen) >= least:
                break
            chosen.append(item)
        return chosen

    def _fitted(
        self,
        run: Callable[[Tensor], Tensor],
        numbers: int,
        prompts: Sequence[Scored],
        start: float = 0.0,
    ) -> Fitted:
        count = sum(len(item.places) for item in prompts)
        y, many = self.y[:count], numbers > 4
        begin = torch.zeros(numbers, dtype=torch.float64)
        if start:
            level = torch.full((1, numbers), start, dtype=torch.float64)
            if scale_of(y - run(level)[0]) < scale_of(y - self.own[:count]):
                begin = level[0]
        return fit(y, run, begin, self.blocks[:count], least=self.least, frozen=many)

    def _rows(
        self, found: Fitted, names: Sequence[str], said: Sequence[float]
    ) -> list[TemperatureEstimate]:
        count = found.projection.shape[1]
        bias = found.projection @ self.null[:count]
        blocks = len(self.blocks[:count].unique())
        alarm = t_quantile(max(blocks - 1, 1), 1 - _ALARM / (2 * len(names)))
        rows = []
        for i, name in enumerate(names):
            variance, own = float(found.variance[i, i]), float(bias[i])
            level = float(found.theta[i])
            half = half_width(variance, own, blocks)
            rows.append(
                TemperatureEstimate(
                    name,
                    said[i] * math.exp(level),
                    said[i] * math.exp(level - half),
                    said[i] * math.exp(level + half),
                    said[i],
                    abs(level) > max(MARGIN, alarm * math.sqrt(variance + own**2)),
                )
            )
        return rows

    def culprit(self) -> str:
        """The layer whose own change explains most of what "right" leaves unexplained.

        To first order: its temperature, what its attention adds, and what it adds in all.
        """
        prompts = self._few(_FEW // 2)
        count = sum(len(item.places) for item in prompts)
        y, own = self.y[:count], self.own[:count]
        plan, model = self.reference.plan, self.reference.model
        best, first = -math.inf, plan.layers[0].name
        for place, layer in enumerate(plan.layers):
            columns = self._columns(model, place, layer.name, prompts, own)
            left = _explained(y - own, columns)
            value = float(log_likelihoods(left, scale_of(left)).sum())
            if value > best + 1e-9:
                best, first = value, layer.name
        return first

    def _columns(
        self, model: Any, place: int, name: str, prompts: Sequence[Scored], own: Tensor
    ) -> Tensor:
        step = 0.02
        heads = self.reference.plan.heads
        matrix = torch.zeros(sum(heads), 1, dtype=torch.float64)
        start = sum(heads[:place])
        matrix[start : start + heads[place]] = 1.0
        basis = Basis(matrix, (name,), heads, "layer")
        with self.reference.live(basis, prompts) as run:
            found = [run(torch.tensor([[step]], dtype=torch.float64))[0]]
        around = name.rpartition(".")[0]
        for target in dict.fromkeys((name, around)):
            if not target:
                continue
            with gains(model, [target]) as put:
                put({target: torch.tensor([1 + step])})
                found.append(self.reference.scores(prompts))
        return torch.stack([(item - own) / step for item in found], 1)


def _explained(residuals: Tensor, columns: Tensor) -> Tensor:
    """What is left after the columns' best combination, by weighted least squares."""
    left = residuals
    for _ in range(10):
        weights = 6.0 / (5.0 + (left / scale_of(left)).square())
        weighted = columns.T * weights
        ridge = 1e-9 * torch.eye(columns.shape[1], dtype=columns.dtype)
        factors = torch.linalg.solve(weighted @ columns + ridge, weighted @ residuals)
        left = residuals - columns @ factors
    return left
