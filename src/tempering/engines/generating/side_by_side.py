"""Continue one prompt under several profiles at once, a row of the batch for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tempering.attention.control.tempered import tempered
from tempering.attention.examining.stored import input_device
from tempering.attention.profiles.profile import Profile
from tempering.counts import whole_number
from tempering.engines.generating.drawing import draw_tokens
from tempering.errors import DataError, InputError
from tempering.files import check_utf8
from tempering.tokens import Policy, temper_logits
from tempering.tokens.end_tokens import end_tokens
from tempering.tokens.trace import TraceStep, trace_steps


class StreamedToken(NamedTuple):
    """One row's next token.

    text: what the token adds to the row's text ("" inside a character). known: what the policy
    knew before the token was drawn (phase, temperature, entropies, support). raw, tempered: log
    probability of the token at T = 1 and at its temperature, nats.
    """

    row: int
    token: int
    text: str
    known: TraceStep
    raw: float
    tempered: float


def prompt_ids(tokenizer: Any, prompt: str, *, chat: bool = True) -> Int[Tensor, "length"]:
    """Token ids of a prompt, as a chat turn when the tokenizer has a template and `chat` asks."""
    text, plain = prompt_text(tokenizer, prompt, chat=chat)
    found = tokenizer(text, add_special_tokens=plain, return_tensors="pt")
    return found.input_ids[0]


def prompt_text(tokenizer: Any, prompt: str, *, chat: bool = True) -> tuple[str, bool]:
    """A prompt as the model reads it, and whether the tokenizer is to add its BOS: no chat turn."""
    if not prompt.strip():
        raise DataError("the prompt is empty; give some text to continue")
    check_utf8(prompt, "the prompt")
    if chat and tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return str(text), False
    return prompt, True


def stream(
    model: Any,
    tokenizer: Any,
    prompt: Int[Tensor, "length"],
    profiles: Sequence[Profile],
    *,
    tokens: int,
    policy: Policy,
    seed: int = 0,
    revised: Callable[[], Sequence[Profile] | None] | None = None,
) -> Iterator[StreamedToken]:
    """Continue a prompt under each profile, token by token, all rows in one batch.

    Parameters
    ----------
    prompt: token ids. profiles: one for each row.
    tokens: new tokens of a row, at most.
    policy: gives the temperature of each token, e.g. parse_policy("constant(0.7)"); at 0 the
        likeliest token is drawn, and tied tokens share.
    seed: all rows draw the same uniform numbers, so rows differ by their temperatures alone. The
        token is the first whose cumulative probability exceeds the number.
    revised: asked before every step for the profiles of all rows from then on; None leaves them.
        Keys and values that are cached stay those of the old profiles.

    A row ends at the model's end token, which is not yielded.
    """
    if tokens < 1:
        raise InputError(f"ask for at least one new token, not {tokens}")
    if prompt.numel() == 0:
        raise InputError("the prompt has no tokens; give some text to continue")
    rows = len(profiles)
    device = input_device(model)
    generator = torch.Generator().manual_seed(whole_number(seed, "seed"))
    ends = end_tokens(model.generation_config)
    ids, past = prompt.to(device).expand(rows, -1), None
    states = [policy.state(prompt.tolist(), [], sample=row) for row in range(rows)]
    texts = [GrowingText(tokenizer) for _ in range(rows)]
    alive = [True] * rows
    with tempered(model, list(profiles)) as handle:
        for _ in range(tokens):
            changed = None if revised is None else revised()
            if changed is not None:
                if len(changed) != rows:
                    raise InputError(f"{rows} rows are written, {len(changed)} profiles were given")
                handle.update(changed)
            # Not around the loop, since the caller's code runs between two tokens.
            with torch.no_grad():
                out = model(input_ids=ids, past_key_values=past, use_cache=True)
                past = out.past_key_values
                logits = out.logits[:, -1]
                cooled, temperature = temper_logits(policy, logits, states)
                known = trace_steps(-logits.to(cooled.dtype), temperature, states)
                draw = torch.rand((), generator=generator, dtype=torch.float64).to(device)
                drawn = draw_tokens(cooled, draw.repeat(rows))
                ids = drawn.tokens[:, None]
                raw = torch.log_softmax(logits.float(), -1).gather(1, ids)[:, 0].tolist()
                own = drawn.logprobs.tolist()
            for row, token in enumerate(ids[:, 0].tolist()):
                if not alive[row]:
                    continue
                if token in ends:
                    alive[row] = False
                    continue
                states[row] = policy.advance(states[row], token)
                text = texts[row].add(token)
                yield StreamedToken(row, token, text, known[row], raw[row], own[row])
            if not any(alive):
                return


class GrowingText:
    """The text of a growing row, handed out in whole characters."""

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
