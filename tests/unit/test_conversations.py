"""Conversations as data for tuning: every message of the assistant, as the template writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tempering.attention.tuning import read_pairs
from tempering.errors import DataError


class Templated:
    """A tokenizer whose template writes <role>text<end>."""

    chat_template = "own"

    def apply_chat_template(
        self, messages: Any, tokenize: bool = True, add_generation_prompt: bool = False
    ) -> str:
        assert not tokenize
        if messages and messages[0]["role"] == "assistant":
            raise ValueError("conversations begin with a user")
        text = "".join(f"<{m['role']}>{m['content']}<end>" for m in messages)
        return text + ("<assistant>" if add_generation_prompt else "")


def file_of(tmp_path: Path, *items: Any) -> Path:
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    return path


def turns(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    }


def test_every_answer_of_a_conversation_is_learned(tmp_path: Path) -> None:
    path = file_of(tmp_path, turns("Hi", "Hello", "Bye", "So long"), {"prompt": "a", "answer": "b"})
    assert read_pairs(path, Templated()) == [
        ("<user>Hi<end><assistant>", "Hello<end>"),
        ("<user>Hi<end><assistant>Hello<end><user>Bye<end><assistant>", "So long<end>"),
        ("a", "b"),
    ]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"messages": []}, "line 1: no message is the assistant's"),
        (turns("Hi"), "line 1: no message is the assistant's"),
        ({"messages": "Hi"}, 'line 1: "messages" is a list'),
        ({"messages": [{"role": "user"}]}, 'line 1: "messages" is a list'),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "begin with a user"),
        ({"question": "Hi"}, 'or {"messages": '),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path: Path, item: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        read_pairs(file_of(tmp_path, item), Templated())
    assert message in str(error.value)


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no chat template"):
        read_pairs(file_of(tmp_path, turns("Hi", "Hello")), object())


def test_a_template_that_rewrites_what_came_before_is_refused(tmp_path: Path) -> None:
    class Rewriting(Templated):
        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            return f"{len(messages)}" + super().apply_chat_template(messages, **options)

    with pytest.raises(DataError, match="writes message 2 otherwise"):
        read_pairs(file_of(tmp_path, turns("Hi", "Hello")), Rewriting())
