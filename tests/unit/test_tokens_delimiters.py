"""The table of known delimiters: each entry is followed, and the page on tokens shows it."""

from pathlib import Path

import pytest
from tokenizers import AddedToken

from tempering.errors import TemperingWarning
from tempering.tokens import parse_policy
from tempering.tokens.known_delimiters import KNOWN_DELIMITERS, TURNS, Header
from tests.unit.test_tokens_phases import CHATML, byte_level

DOCS = Path(__file__).parents[2] / "docs" / "tokens.md"
ENTRIES = [(phase, known) for phase, entries in KNOWN_DELIMITERS.items() for known in entries]
# What a model fills into a header, between its parts.
FILLED = {
    ("<|channel|>", " to=", "<|message|>"): "<|channel|>commentary to=f json<|message|>",
    (" to=", "<|channel|>", "<|message|>"): " to=f<|channel|>commentary<|message|>",
}


def opened_by(opener):
    if isinstance(opener, str):
        return opener
    parts = tuple(part for part in opener.parts if part != "<|constrain|>")
    text = FILLED[parts]
    return (
        text.replace("<|message|>", "<|constrain|>json<|message|>")
        if (parts != opener.parts)
        else text
    )


def tokenizer_of(known, *, as_tokens):
    """One that names this entry: by added tokens, or by its template."""
    tokenizer = byte_level(CHATML)
    texts = [*(text for group in known.named_by for text in group), *known.closes]
    texts += [o for o in known.opens if isinstance(o, str)]
    tags = [t for t in dict.fromkeys(texts) if not any(c.isspace() for c in t) and t != "```"]
    if as_tokens:
        tokenizer.add_tokens([AddedToken(tag, special=True) for tag in tags])
    else:
        tokenizer.chat_template = CHATML + "{#" + " ".join(texts) + "#}"
    return tokenizer


@pytest.mark.parametrize("as_tokens", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize(
    ("phase", "known"), ENTRIES, ids=[f"{phase} {known.models}" for phase, known in ENTRIES]
)
def test_each_known_pair_opens_and_closes_its_phase(phase, known, as_tokens):
    if as_tokens and (phase == "code" or str(known.opens[0]).count(" ")):
        pytest.skip("no tag")
    tokenizer = tokenizer_of(known, as_tokens=as_tokens)
    policy = parse_policy(f"phases({phase}=1, answer=0.2)", tokenizer)
    prompt = tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")

    def after(text):
        return policy.state(prompt, tokenizer.encode(text, add_special_tokens=False)).phase

    for opener in map(opened_by, known.opens):
        assert after("a " + opener) == phase
        assert after("a " + opener + "b\nc") == phase
        for closer in known.closes:
            assert after("a " + opener + "b" + closer) == "answer"
            assert after("a " + opener + "b" + closer + "c " + opener) == phase
        assert after("a " + opener + "b<|im_end|>") == "answer"
        state = policy.state(prompt + tokenizer.encode(opener + "b<|im_end|>\n<|im_start|>user\n"))
        assert state.phase == "answer"
    assert after("a") == "answer"


@pytest.mark.parametrize(("phase", "known"), ENTRIES)
def test_each_entry_says_where_it_is_from(phase, known):
    assert known.models and "," in known.source
    for mark in known.opens:
        if isinstance(mark, Header):
            assert all(mark.parts) and known.signs
    assert all(known.closes) and all(all(group) for group in known.named_by)


def test_no_turn_is_a_delimiter():
    texts = {t for _, known in ENTRIES for t in (*map(str, known.opens), *known.closes)}
    assert not texts & set(TURNS) and len(set(TURNS)) == len(TURNS)


def test_what_nobody_names_is_assumed_with_a_warning():
    tokenizer = byte_level(CHATML)
    for phase, pair in (("thinking", "'<think>' and '</think>'"), ("tool", "'<tool_call>' and")):
        with pytest.warns(TemperingWarning, match=rf"names delimiters of {phase}: {pair}"):
            parse_policy(f"phases({phase}=1, answer=0.2)", tokenizer)
    # Nothing is assumed here: fences are the same for all, and these are stated.
    parse_policy("phases(code=1, answer=0.2)", tokenizer)
    parse_policy('phases(thinking=between(1, "<think>", "</think>"), answer=0.2)', tokenizer)


def test_gemma_4_and_solar_do_not_take_each_others_tag():
    # Gemma 4 has <|think|> as a switch in its system prompt, which opens nothing.
    tokenizer = byte_level(CHATML)
    tokenizer.add_tokens(["<|think|>", "<|channel>", "<channel|>"], special_tokens=True)
    policy = parse_policy("phases(thinking=1, answer=0.2)", tokenizer)
    assert policy.state([], tokenizer.encode("<|think|>a")).phase == "answer"
    assert policy.state([], tokenizer.encode("<|channel>thought\n")).phase == "thinking"


def test_a_call_ends_thinking_only_where_the_tokenizer_names_calls():
    text = "<think>so <tool_call>"
    plain = byte_level(CHATML + "{# <think> #}")
    policy = parse_policy("phases(thinking=1, answer=0.2)", plain)
    assert policy.state([], plain.encode(text)).phase == "thinking"
    calls = byte_level(CHATML + "{# <think> <tool_call> #}")
    policy = parse_policy("phases(thinking=1, answer=0.2)", calls)
    assert policy.state([], calls.encode(text)).phase == "answer"
    # Delimiters that the user gives nest, as they say.
    policy = parse_policy('phases(thinking=between(1, "<think>"), tool=0, answer=0.2)', calls)
    assert policy.state([], calls.encode(text)).opened == ("thinking", "tool")


def table():
    """The table of the docs, made from the code's."""

    def shown(marks):
        return "<br>".join(f"`{mark}`" for mark in marks) or "the turn's end"

    lines = ["| phase | opens | closes | models | source |", "|---|---|---|---|---|"]
    for phase, known in ENTRIES:
        # A fence in one backtick would end it.
        cells = [shown(known.opens), shown(known.closes)]
        if phase == "code":
            cells = ["three backticks"] * 2
        cells = [cell.replace("|", "\\|") for cell in [*cells, known.models, known.source]]
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_page_on_tokens_shows_the_table():
    assert table() in DOCS.read_text(encoding="utf-8"), (
        "print(tests.unit.test_tokens_delimiters.table()) into docs/tokens.md, Delimiters"
    )
