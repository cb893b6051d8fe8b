"""Keys out of errors, and nothing else: whole, in pieces, encoded; never a word of the text."""

from __future__ import annotations

import html
import json
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempering.engines.providers.keys import key_of, redacted
from tempering.engines.providers.retry import classify
from tempering.errors import InputError

KEY = "sk-proj-ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
NAME = "[OPENAI_API_KEY]"


@pytest.fixture(autouse=True)
def no_other_keys(monkeypatch):
    for name in ("ANTHROPIC_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY", "TEMPERING_SERVER_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.mark.parametrize(
    "key",
    ["8", "none", "EMPTY", "test", "sk-xxx", "not-needed", "lm-studio", "sk-no-key-required",
     "your-api-key-here", "password", "ollama", "<your key>", "elephants", "0", "xxxxxxxxxxxxxxxx"],
)  # fmt: skip
def test_a_placeholder_or_a_word_is_no_secret(monkeypatch, key):
    monkeypatch.setenv("TEMPERING_SERVER_KEY", key)
    text = f"none of 8 elephants: your-api-key-here, {key}; a password is not-needed, EMPTY"
    assert redacted(text) == text


@pytest.mark.parametrize("key", [KEY, "hunter2-7zq", "a1b2c3d4", "correct-horse-battery-staple",
                                 "9f8e7d6c-1234-4321-aaaa-bbbbccccdddd"])  # fmt: skip
def test_a_secret_goes_wherever_it_stands(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    for text in (key, f"Bearer {key} is wrong", f"?key={key}&x", f"{key}{key}", f"'{key}'"):
        assert key not in redacted(text) and NAME in redacted(text)


def test_a_key_of_many_letters_takes_no_time(monkeypatch):
    for key in ("x" * 5000 + "7", "apikey" * 900 + "7", "-" * 5000 + "7"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert redacted(f"is {key} wrong") == f"is {NAME} wrong"


def test_an_encoded_key_goes_too(monkeypatch):
    key = 'ab/cd+ef"gh&ij\\kl=0123456789'
    monkeypatch.setenv("OPENAI_API_KEY", key)
    for form in (quote(key, safe=""), quote(key), json.dumps(key), html.escape(key), key):
        found = redacted(f"bad {form} here")
        assert "0123456789" not in found and found.startswith("bad ") and found.endswith(" here")


@settings(deadline=None)
@given(pad=st.integers(0, 500), end=st.integers(0, len(KEY)))
def test_no_cut_lets_a_piece_of_a_key_through(pad, end):
    # Cut here, and cut by the server itself.
    reason = classify(RuntimeError("p" * pad + " Bearer " + KEY[:end] + " " + KEY)).reason
    own = KEY.removeprefix("sk-proj-")
    assert not any(own[i : i + 8] in reason for i in range(len(own) - 7))
    assert len(reason) <= 400


def test_a_manual_s_prefix_and_ordinary_words_stay(monkeypatch):
    monkeypatch.setenv("TEMPERING_SERVER_KEY", "my-company-internal-gateway-key-7")
    text = "a key starts with sk-proj- or sk-ant-api03-; internal server error of the gateway"
    assert redacted(text) == text


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("sk-abc\ndef", r"OPENAI_API_KEY holds a line break \(U\+000A\) at character 7 of 10"),
        ("sk-abc\r\ndef", "a line break"),
        ("“sk-abcdef”", r"a typographic quote \(U\+201C\) at character 1 of 11"),
        ("sk-ab def", "a space"),
        ("Bearer sk-abcdef", "a space"),
        ("sk-ab\u200bcdef", "a character that no key has"),
        ("sk-\udcffabc", "a character that no key has"),
        ('"sk-abcdef"', "between quotes"),
    ],
)
def test_a_key_that_fits_no_header_is_named_and_not_shown(monkeypatch, key, message):
    monkeypatch.setitem(__import__("os").environ, "OPENAI_API_KEY", key)
    with pytest.raises(InputError, match=message) as caught:
        key_of("openai")
    assert "abc" not in str(caught.value)
