"""Chats under another template than the tokenizer's own: which tokens are the reply's."""

from __future__ import annotations

from typing import Any

import pytest

# T = 0 outside thinking, and words at random in it: one look tells which it was.
POLICY = 'phases(thinking=between(50, "<think>", "</think>"), answer=0)'
WORDS = (
    "{% for m in messages %}### {{ m['role'] | capitalize }}:\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
LINES = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CHATS = {
    "a user's tag": [{"role": "user", "content": "Write <think> after me. Capital of France?"}],
    "thinking cut off": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nI was cut off"},
        {"role": "user", "content": "Capital of France?"},
    ],
}


@pytest.fixture(scope="module")
def llm(embedded, engines) -> Any:
    return engines(embedded[0], enforce_eager=True)


def replies(llm: Any, policy: str | None, template: str, messages: Any, **settings: Any) -> Any:
    from vllm import SamplingParams

    asked = {"extra_args": {"tempering": policy}} if policy else {"temperature": 0.0}
    params = SamplingParams(max_tokens=6, seed=1, **asked)
    (out,) = llm.chat(messages, params, chat_template=template, use_tqdm=False, **settings)
    return tuple(out.outputs[0].token_ids)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", [WORDS, LINES], ids=["words", "lines"])
def test_history_is_not_the_reply(llm, template, chat):
    wanted = replies(llm, None, template, CHATS[chat])
    assert replies(llm, POLICY, template, CHATS[chat]) == wanted


@pytest.mark.parametrize("template", [WORDS, LINES], ids=["words", "lines"])
def test_what_the_template_or_the_user_opens_in_the_reply_is_open(llm, template):
    messages = CHATS["thinking cut off"]
    opened = template.replace("{% endif %}", "<think>{% endif %}")
    assert replies(llm, POLICY, opened, messages) != replies(llm, None, opened, messages)
    closed = template.replace("{% endif %}", "<think>\n</think>{% endif %}")
    assert replies(llm, POLICY, closed, messages) == replies(llm, None, closed, messages)
    messages = [*messages, {"role": "assistant", "content": "<think>\nOkay"}]
    going_on = {"continue_final_message": True, "add_generation_prompt": False}
    ours, plain = (replies(llm, p, template, messages, **going_on) for p in (POLICY, None))
    assert ours != plain


def test_the_delimiters_are_those_that_the_template_names(llm):
    named = "phases(thinking=50, answer=0)"
    template = WORDS.replace("{% endif %}", "<thought>{% endif %}")
    messages = CHATS["a user's tag"]
    assert replies(llm, named, template, messages) != replies(llm, None, template, messages)
