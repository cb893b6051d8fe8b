"""Pairs of prompt and answer, read from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tempering.errors import DataError
from tempering.files import read_json, read_text


class Pair(NamedTuple):
    """A prompt and the answer that is right; image, sound: files that belong to the prompt."""

    prompt: str
    answer: str
    image: Path | None
    sound: Path | None
    where: str


def read_media_pairs(path: str | Path, tokenizer: Any = None) -> list[Pair]:
    """Pairs from a file of JSON lines, as `read_pairs` reads them, and with images or sound.

    A line may name a file: {"image": "cat.png", "prompt": ..., "answer": ...} or {"audio":
    "a.wav", "answer": ...}; the path counts from the folder of the pairs. Beside one the prompt
    may be left out.
    """
    path = Path(path)
    pairs = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        item = read_json(line, where)
        media = [item.get(name) if isinstance(item, dict) else None for name in _MEDIA]
        if any(name is not None and not isinstance(name, str) for name in media):
            raise DataError(f'{where}: "image" and "audio" are names of files')
        if isinstance(item, dict) and any(media):
            if all(media) or "messages" in item:
                raise DataError(
                    f"{where}: beside an image or a sound, of which a line names one, it holds "
                    '"prompt" and "answer"'
                )
            item = {"prompt": "", **item}
        image, sound = (None if name is None else path.parent / name for name in media)
        pairs += [
            Pair(prompt, answer, image, sound, where)
            for prompt, answer in _pairs_of(item, line, tokenizer, where)
        ]
    return pairs


def read_pairs(path: str | Path, tokenizer: Any = None) -> list[tuple[str, str]]:
    """(prompt, answer) pairs from a file of JSON lines.

    A line is {"prompt": ..., "answer": ...}, or a conversation {"messages": [{"role": ...,
    "content": ...}, ...]}: then every message of the assistant is an answer to what comes before,
    both as the tokenizer's chat template writes them.

    tokenizer: with a chat template, for conversations.
    Raises DataError naming the line that isn't one, or whose answer is empty.
    """
    pairs = read_media_pairs(path, tokenizer)
    for pair in pairs:
        if pair.image or pair.sound:
            raise DataError(
                f"{pair.where}: names {pair.image or pair.sound}, and a text is expected here; "
                "give pairs with images or sound as --pairs, for a model that takes them"
            )
    return [(pair.prompt, pair.answer) for pair in pairs]


_MEDIA = ("image", "audio")
_EXAMPLE = '{"prompt": "...", "answer": "..."}'


def _pairs_of(item: Any, line: str, tokenizer: Any, where: str) -> list[tuple[str, str]]:
    """The pairs of one line."""
    if isinstance(item, dict) and "messages" in item:
        found = _conversation(item["messages"], tokenizer, where)
    else:
        given = [item.get(key) if isinstance(item, dict) else None for key in _PAIR]
        if not all(isinstance(text, str) for text in given):
            raise DataError(
                f'{where}: expected {_EXAMPLE} or {{"messages": [...]}}, got {line.strip()[:60]}'
            )
        found = [(str(given[0]), str(given[1]))]
    for _, answer in found:
        if not answer.strip():
            raise DataError(
                f"{where}: the answer {answer!r} has no tokens; give each prompt an answer"
            )
    return found


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
