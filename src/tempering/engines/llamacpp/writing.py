"""Samples of one prompt side by side in llama.cpp, each with a policy and a seed of its own.

The logits are llama.cpp's own; the policy's temperature divides them in this process, and tokens
are drawn as `tempering generate` draws them: the same logits and seed give the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.engines.generating.drawing import draw_tokens
from tempering.engines.generating.side_by_side import GrowingText, StreamedToken
from tempering.engines.llamacpp.model import LlamaCpp
from tempering.errors import InputError
from tempering.tokens.applying import temper_logits
from tempering.tokens.policy import Policy
from tempering.tokens.settings import RequestSettings
from tempering.tokens.token_state import NOTHING_GIVEN
from tempering.tokens.trace import TraceStep, trace_steps


@dataclass(frozen=True)
class SampledToken:
    """One sample of a prompt. number: which of a ladder's it is. seed: of its draws. given: the
    settings that its policy takes over from its request."""

    policy: Policy
    seed: int
    number: int = 0
    given: RequestSettings = NOTHING_GIVEN


class WritingRows:
    """The samples that are being written: policies' states, and the numbers that tokens are drawn
    by."""

    def __init__(self, prompt: Sequence[int], samples: Sequence[SampledToken]) -> None:
        self.samples = list(samples)
        self.states = [
            item.policy.start(prompt, sample=item.number, given=item.given) for item in samples
        ]
        self.generators = [torch.Generator().manual_seed(item.seed) for item in samples]

    def temper(
        self, rows: Sequence[int], logits: Float[Tensor, "rows vocab"]
    ) -> tuple[Float[Tensor, "rows vocab"], Float[Tensor, "rows"]]:
        """Logits of some rows under their policies, and the temperatures."""
        groups: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(id(self.samples[row].policy), []).append(place)
        cooled, temperature = torch.empty_like(logits), logits.new_empty(len(rows))
        for places in groups.values():
            policy = self.samples[rows[places[0]]].policy
            states = [self.states[rows[place]] for place in places]
            cooled[places], temperature[places] = temper_logits(policy, logits[places], states)
        return cooled, temperature

    def numbers(self, rows: Sequence[int]) -> Tensor:
        """The next random number of some rows."""
        draws = [
            torch.rand((), generator=self.generators[row], dtype=torch.float64) for row in rows
        ]
        return torch.stack(draws)

    def took(self, row: int, token: int) -> None:
        """Follow a token that a row was given."""
        self.states[row] = self.samples[row].policy.advance(self.states[row], token)


def write(
    model: LlamaCpp,
    prompt: Sequence[int],
    samples: Sequence[SampledToken],
    *,
    tokens: int,
    traced: bool = True,
    between: Callable[[], None] | None = None,
) -> Iterator[StreamedToken]:
    """Continue a prompt once for each sample, token by token, all in one batch.

    A row ends at a token that ends texts, which is not yielded. traced: also the entropies and the
    support before each token, which take longer than its draw; else they are NaN. between: called
    before each step; what it raises ends all of the samples. Raises InputError where the prompt
    and the new tokens don't fit, or there are more samples than rows.
    """
    if not 1 <= len(samples) <= model.rows:
        raise InputError(
            f"{len(samples)} samples, and this engine was started for 1 to {model.rows}"
        )
    if tokens < 1:
        raise InputError(f"ask for at least one new token, not {tokens}")
    if len(prompt) + tokens > model.length:
        raise InputError(
            f"a prompt of {len(prompt)} tokens and {tokens} new ones don't fit the "
            f"{model.length} that this engine was started for"
        )
    rows, ends = WritingRows(prompt, samples), model.ends()
    texts = [GrowingText(model.tokenizer) for _ in samples]
    alive = list(range(len(samples)))
    try:
        logits = model.read(0, prompt, between).expand(len(samples), -1)
        for row in range(1, len(samples)):
            model.copy(0, row)
        for step in range(tokens):
            cooled, temperature = rows.temper(alive, logits)
            states = [rows.states[row] for row in alive]
            if traced:
                known = trace_steps(-logits.to(cooled.dtype), temperature, states)
            else:
                at = zip(states, temperature.tolist(), strict=True)
                known = [TraceStep(state.phase, T, *[math.nan] * 3) for state, T in at]
            drawn = draw_tokens(cooled, rows.numbers(alive))
            raw = logits.log_softmax(-1).gather(1, drawn.tokens[:, None])[:, 0]
            going: list[tuple[int, int, int]] = []
            for place, row in enumerate(alive):
                token = int(drawn.tokens[place])
                if token in ends:
                    continue
                rows.took(row, token)
                going.append((row, token, len(prompt) + step))
                yield StreamedToken(
                    row,
                    token,
                    texts[row].add(token),
                    known[place],
                    float(raw[place]),
                    float(drawn.logprobs[place]),
                )
            alive = [row for row, _, _ in going]
            if not alive or step + 1 == tokens:
                return
            if between is not None:
                between()
            logits = model.step(going)
    finally:
        for row in range(len(samples)):
            model.forget(row)
