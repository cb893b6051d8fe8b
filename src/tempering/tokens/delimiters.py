"""Where phases begin and end: known delimiters, those of a tokenizer, and whether it makes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tempering.errors import InputError
from tempering.tokens.pieces import Pieces

# A delimiter: text, or token ids.
Mark = str | tuple[int, ...]

# phase -> (opener, closer) pairs that models are trained on; closer None: open to the turn's end.
# The first pair of a phase is what a tokenizer that knows none of them is matched on, as text.
KNOWN: dict[str, tuple[tuple[str, str | None], ...]] = {
    "thinking": (
        ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM, SmolLM3, Nemotron
        ("<thinking>", "</thinking>"),
        ("[THINK]", "[/THINK]"),  # Magistral
        ("<seed:think>", "</seed:think>"),  # Seed-OSS
        ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
        ("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1, OpenThinker
        ("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi-VL-Thinking
        ("<|channel|>analysis<|message|>", "<|end|>"),  # gpt-oss
    ),
    "tool": (
        ("<tool_call>", "</tool_call>"),  # Qwen, Hermes, SmolLM3, GLM
        ("[TOOL_CALLS]", None),  # Mistral
        ("<|python_tag|>", None),  # Llama 3
        ("<|tool_call_start|>", "<|tool_call_end|>"),  # LFM2
        ("<|START_ACTION|>", "<|END_ACTION|>"),  # Command A
        ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>"),
    ),
    "code": (("```", "```"),),
}


def default_marks(phase: str, pieces: Pieces) -> tuple[tuple[Mark, ...], tuple[Mark, ...]]:
    """(openers, closers) of a known phase that this tokenizer or its chat template names.

    Where it names none, the first known pair is used, matched as text over several tokens.
    """
    pairs = KNOWN[phase]
    template = str(getattr(pieces.tokenizer, "chat_template", None) or "")
    named = [pair for pair in pairs if pair[0] in template or pieces.has_token(pair[0])]
    chosen = named or pairs[:1]
    return tuple(o for o, _ in chosen), tuple(c for _, c in chosen if c is not None)


def check_producible(mark: Mark, pieces: Pieces) -> None:
    """Refuse a delimiter that this tokenizer can't produce."""
    if isinstance(mark, str):
        ids = pieces.tokenizer.encode(mark, add_special_tokens=False)
        made = pieces.join(ids)
        if mark.encode() not in made:
            raise InputError(
                f"this tokenizer can't produce the delimiter {mark!r}: encoding it gives "
                f"{made.decode(errors='replace')!r}; give the delimiter as the model writes it, "
                "or as ids(...)"
            )
        return
    for token in mark:
        if not 0 <= token < pieces.size:
            raise InputError(
                f"this tokenizer can't produce the delimiter ids{mark}: it has ids "
                f"0..{pieces.size - 1}, not {token}; ids differ between model versions, so "
                "prefer the text"
            )


def turn_marks(tokenizer: Any, openers: Sequence[Mark], closers: Sequence[Mark]) -> tuple[str, ...]:
    """Texts after which an assistant turn begins, so that phases of earlier turns are over.

    The chat template's own words between a user's message and the reply, without the delimiters
    in them; without a usable template, the tokenizer's tokens for the end and the beginning.
    """
    text = _reply_opener(tokenizer)
    text = _split(text, openers)[0]  # a template may open a phase in the reply: that one counts
    parts = [part.strip() for part in _split(text, closers) if part.strip()]
    words = parts[-1:] or [str(t) for t in (tokenizer.eos_token, tokenizer.bos_token) if t]
    marks = [mark for mark in (*openers, *closers) if isinstance(mark, str)]
    return tuple(
        word for word in dict.fromkeys(words) if not any(word in m or m in word for m in marks)
    )


def _split(text: str, marks: Sequence[Mark]) -> list[str]:
    words = [re.escape(mark) for mark in marks if isinstance(mark, str)]
    return re.split("|".join(words), text) if words else [text]


def _reply_opener(tokenizer: Any) -> str:
    """What the chat template writes between a user's message and the reply; "" without one."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    said, reply = "tempering-said", "tempering-reply"
    user = {"role": "user", "content": said}
    for messages, settings in (
        ([user], {"add_generation_prompt": True}),
        ([user, {"role": "assistant", "content": reply}], {}),
    ):
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
        except Exception:  # a template is a program of its own and may raise anything
            continue
        between = text.rpartition(said)[2].partition(reply)[0]
        if between.strip():
            return between
    return ""
