"""Pairs of prompt and answer, read from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tempering.errors import DataError
from tempering.files import read_json, read_text


def read_pairs(path: str | Path, tokenizer: Any = None) -> list[tuple[str, str]]:
    """(prompt, answer) pairs from a file of JSON lines.

    A line is {"prompt": ..., "answer": ...}, or a conversation {"messages": [{"role": ...,
    "content": ...}, ...]}: then every message of the assistant is an answer to what comes before,
    both as the tokenizer's chat template writes them.

    tokenizer: with a chat template, for conversations.
    Raises DataError naming the line that isn't one, or whose answer is empty.
    """
    pairs = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        item = read_json(line, where)
        if isinstance(item, dict) and "messages" in item:
            found = _conversation(item["messages"], tokenizer, where)
        else:
            given = [item.get(key) if isinstance(item, dict) else None for key in _PAIR]
            if not all(isinstance(text, str) for text in given):
                raise DataError(
                    f'{where}: expected {{"prompt": "...", "answer": "..."}} or '
                    f'{{"messages": [...]}}, got {line.strip()[:60]}'
                )
            found = [(str(given[0]), str(given[1]))]
        for prompt, answer in found:
            if not answer.strip():
                raise DataError(
                    f"{where}: the answer {answer!r} has no tokens; give each prompt an answer"
                )
            pairs.append((prompt, answer))
    return pairs


_PAIR = ("prompt", "answer")


def _conversation(messages: Any, tokenizer: Any, where: str) -> list[tuple[str, str]]:
    """What the assistant is to write, and everything before it, for each of its messages."""
    if not isinstance(messages, list) or not all(
        isinstance(item, dict) and isinstance(item.get("role"), str) and item.get("content")
        for item in messages
    ):
        raise DataError(
            f'{where}: "messages" is a list of {{"role": "user" or "assistant" or "system", '
            '"content": "..."}'
        )
    places = [i for i, item in enumerate(messages) if item["role"] == "assistant"]
    if not places:
        raise DataError(f"{where}: no message is the assistant's, so there is nothing to learn")
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where}: this model's tokenizer has no chat template, so a conversation can't be "
            'written as the model reads it; give {"prompt": ..., "answer": ...}'
        )
    found = []
    for place in places:
        try:
            prompt = tokenizer.apply_chat_template(
                messages[:place], tokenize=False, add_generation_prompt=True
            )
            whole = tokenizer.apply_chat_template(messages[: place + 1], tokenize=False)
        except Exception as error:  # templates raise what they please
            raise DataError(f"{where}: the model's chat template refuses it: {error}") from error
        if not whole.startswith(prompt):
            raise DataError(
                f"{where}: the model's chat template writes message {place + 1} otherwise than "
                'after its own prompt; give {"prompt": ..., "answer": ...}'
            )
        found.append((prompt, whole[len(prompt) :]))
    return found
