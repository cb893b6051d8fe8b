"""Continue one prompt under several profiles at once, a row of the batch for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tempering.attention.control import tempered
from tempering.attention.profile import Profile
from tempering.errors import DataError, TemperatureError
from tempering.posterior import responsibilities


class Step(NamedTuple):
    """One row's next token. text: what it adds to the row's text ("" inside a character)."""

    row: int
    token: int
    text: str


def prompt_ids(tokenizer: Any, prompt: str, *, chat: bool = True) -> Int[Tensor, "length"]:
    """Token ids of a prompt, as a chat turn when the tokenizer has a template and `chat` asks."""
    if not prompt.strip():
        raise DataError("the prompt is empty; give some text to continue")
    if chat and tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    return tokenizer(prompt, return_tensors="pt").input_ids[0]


def stream(
    model: Any,
    tokenizer: Any,
    prompt: Int[Tensor, "length"],
    profiles: Sequence[Profile],
    *,
    tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    processors: Any = None,
) -> Iterator[Step]:
    """Continue a prompt under each profile, token by token, all rows in one batch.

    Parameters
    ----------
    prompt: token ids. profiles: one for each row.
    tokens: at most so many new tokens a row.
    temperature: of sampling; 0 is the limit (the most likely token, ties share).
    seed: each row draws the same uniform numbers, so rows differ by their temperatures alone:
        token = the first whose cumulative probability exceeds the number.
    processors: a transformers LogitsProcessorList applied before the temperature.

    A row ends at the model's end token, which is not yielded.
    """
    if not temperature >= 0 or temperature == float("inf"):
        raise TemperatureError(f"a sampling temperature is 0 or more and finite, not {temperature}")
    rows = len(profiles)
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(seed)
    ends = _ends(model)
    history = prompt.to(device).expand(rows, -1)
    ids, past = history, None
    texts = [_Text(tokenizer) for _ in range(rows)]
    alive = [True] * rows
    with tempered(model, list(profiles)) as _, torch.no_grad():
        for _ in range(tokens):
            out = model(input_ids=ids, past_key_values=past, use_cache=True)
            past = out.past_key_values
            logits = out.logits[:, -1].float()
            if processors is not None:
                logits = processors(history, logits)
            weights = responsibilities(-logits, temperature)
            # Ties at T = 0 share the probability; the draw decides among them.
            draw = torch.rand((), generator=generator, dtype=torch.float64)
            cumulative = weights.double().cumsum(-1)
            numbers = draw.to(device).repeat(rows, 1)
            index = torch.searchsorted(cumulative, numbers, right=True)
            ids = index.clamp(max=logits.shape[-1] - 1)
            history = torch.cat([history, ids], dim=1)
            for row, token in enumerate(ids[:, 0].tolist()):
                if not alive[row]:
                    continue
                if token in ends:
                    alive[row] = False
                    continue
                yield Step(row, token, texts[row].add(token))
            if not any(alive):
                return


class _Text:
    """Text of a growing row, given out in whole characters."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.shown = 0

    def add(self, token: int) -> str:
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if text.endswith("�"):
            return ""
        new, self.shown = text[self.shown :], len(text)
        return new


def _ends(model: Any) -> set[int]:
    end = model.generation_config.eos_token_id
    if end is None:
        return set()
    return set(end) if isinstance(end, list) else {end}
