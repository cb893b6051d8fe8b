"""Phases under mistral-common's tokenizers, as vLLM and transformers wrap them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tempering.tokens import parse_policy
from tempering.tokens.token_bytes import token_bytes_of

ALL = "phases(answer=0.7, tool=0, code=0.1)"
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    ],
}
TALK = "what of [TOOL_CALLS] and ```py"
USER = {"role": "user", "content": TALK}
RESULT = {"role": "tool", "tool_call_id": "123456789", "name": "f", "content": TALK}


@pytest.fixture(
    scope="module",
    params=[
        ("tekken_240911.json", "tekken.json"),
        ("mistral_instruct_tokenizer_241114.model.v7", "tokenizer.model.v7"),
        ("mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model.v3"),
    ],
    ids=["tekken", "sentencepiece v7", "sentencepiece v3"],
)
def tokenizer(request, tmp_path_factory) -> Any:
    """vLLM's Mistral tokenizer over a file that mistral-common ships."""
    import mistral_common
    from vllm.tokenizers.mistral import MistralTokenizer

    source, name = request.param
    directory = tmp_path_factory.mktemp("mistral")
    shutil.copy(Path(mistral_common.__file__).parent / "data" / source, directory / name)
    return MistralTokenizer.from_pretrained(str(directory))


def test_pieces_spell_the_text(tokenizer):
    for wrapped in (tokenizer, tokenizer.transformers_tokenizer):
        token_bytes = token_bytes_of(wrapped)
        for text in ("a tea ``` \u00e9\u25b7 \U0001f600\n", "def f():\n    return 1"):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert token_bytes.join(ids).decode().removeprefix(" ") == text
        assert token_bytes.has_token("[INST]") and not token_bytes.has_token("<think>")


def test_the_answer_after_a_tools_result_is_the_answer(tokenizer):
    for wrapped in (tokenizer, tokenizer.transformers_tokenizer):
        policy = parse_policy(ALL, wrapped)
        tool = token_bytes_of(wrapped).tags["[TOOL_CALLS]"]
        for messages in ([USER], [USER, CALL, RESULT], [USER, CALL, RESULT, RESULT]):
            try:
                prompt = tokenizer.apply_chat_template(messages)
            except Exception:  # v3 wants results that are all of the last calls
                assert len(messages) == 4
                continue
            assert policy.state(prompt).phase == "answer"
            assert policy.state(prompt, [tool]).phase == "tool"
            assert policy.state([*prompt, tool]).phase == "tool"
            # What a model or user spells is text: the control token is another.
            spelled = tokenizer.encode("[TOOL_CALLS] f", add_special_tokens=False)
            assert policy.state(prompt, spelled).phase == "answer"
            fence = tokenizer.encode("```py", add_special_tokens=False)
            assert policy.state(prompt, fence).phase == "code"


@pytest.mark.parametrize(
    "text",
    [
        "phases(thinking=1, answer=0.2)",
        'phases(answer=1, plan=between(0, "<plan>", "</plan>"))',
        "phases(answer=1, plan=between(0, ids(9), ids(2)))",
        "constant(0.7)",
    ],
)
def test_every_policy_can_be_made(tokenizer, text):
    assert str(parse_policy(text, tokenizer)) == text
