"""Loops: a policy that warms while the text repeats itself, and cools again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Float64
from torch import Tensor

from tempering.calls import call_text, number_text
from tempering.errors import InputError, TemperatureError
from tempering.tokens.policy import ConstantPolicy, PolicyOperation
from tempering.tokens.settings import RequestSettings
from tempering.tokens.temper import one_per_row
from tempering.tokens.token_state import NOTHING_GIVEN, TokenState
from tempering.tokens.truncation import Cut

_WIDEST = 4096  # tokens that a state keeps; a state is copied at every token


@dataclass(frozen=True, repr=False)
class LoopsPolicy(PolicyOperation):
    """T of x, times heat while the last tokens repeat.

    They repeat when the last `ngram` generated tokens stand in the last `window` generated tokens
    once more, earlier; the two places may overlap. The prompt doesn't count: to quote it is no
    loop. T = 0 stays 0.

    Loops at low temperature: Qwen3 issue 1887; arXiv 2512.12895.
    """

    name, signature = "loops", "x|loops(heat=1.4, ngram=8, window=256)"
    summary = "T times heat while the last ngram tokens repeat some of the last window tokens"
    example = "constant(0.6)|loops(heat=1.4, ngram=8, window=256)"

    heat: float | int = 1.4
    ngram: int = 8
    window: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.heat < math.inf:
            raise TemperatureError(f"loops takes heat >= 1, finite; got {number_text(self.heat)}")
        object.__setattr__(self, "heat", float(self.heat))
        if not 2 <= self.window <= _WIDEST:
            raise InputError(f"loops takes a window of 2 to {_WIDEST} tokens, got {self.window}")
        if not 1 <= self.ngram < self.window:
            raise InputError(
                f"loops takes ngram from 1 to window - 1 = {self.window - 1}, got {self.ngram}: a "
                "longer one can't stand in the window twice"
            )
        if isinstance(self.inner, ConstantPolicy) and self.inner.T in (0, math.inf):
            raise TemperatureError(
                f"loops multiplies the temperature, and {number_text(self.inner.T)} stays "
                f"{number_text(self.inner.T)}; give x a finite temperature above 0"
            )

    def start(
        self, prompt: Sequence[int], *, sample: int = 0, given: RequestSettings = NOTHING_GIVEN
    ) -> TokenState:
        return self.inner.start(prompt, sample=sample, given=given).within()

    def advance(self, state: TokenState, token: int) -> TokenState:
        recent = (*state.ids, token)[-self.window :]
        return self.inner.advance(state.inner[0], token).within(ids=recent)

    @property
    def reads_tokens(self) -> bool:
        return True

    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        own = self.inner.temperatures(energies, [state.inner[0] for state in states])
        heats = [self.heat if self.repeats(state.ids) else 1.0 for state in states]
        return own if all(heat == 1 for heat in heats) else own * one_per_row(heats, energies)

    def repeats(self, recent: Sequence[int]) -> bool:
        """Whether the last `ngram` of these tokens stand among them once more."""
        last = len(recent) - 1
        tail = recent[-self.ngram :]
        end = self.ngram - 1  # where an earlier copy may end
        while end < last:
            try:
                end = recent.index(recent[last], end, last)
            except ValueError:
                return False
            if recent[end - self.ngram + 1 : end + 1] == tail:
                return True
            end += 1
        return False

    def cut(self, state: TokenState) -> Cut:
        return self.inner.cut(state.inner[0])

    def forced(self, state: TokenState) -> int | None:
        return self.inner.forced(state.inner[0])

    def __str__(self) -> str:
        own = call_text(self.name, heat=self.heat, ngram=self.ngram, window=self.window)
        return f"{self.inner}|{own}"
