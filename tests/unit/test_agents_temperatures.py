"""The table of temperatures: what is asked, what is sent, and what each policy does."""

from __future__ import annotations

import math
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempering.agents.temperatures import (
    POLICIES,
    ProviderRule,
    known_rules,
    parse_rules,
    rule_for,
    user_rules,
)
from tempering.errors import InputError, TemperatureError

BASE = {"provider": "p", "match": "m", "date": "2026-11-22", "source": "s"}


def rule(low: float = 0.0, high: float = 1.0, **more: object) -> ProviderRule:
    limits = (low, high)
    return ProviderRule(**{**BASE, "range": limits, "scale": limits, **more})  # type: ignore[arg-type]


def test_every_row_of_the_package_is_dated_sourced_and_reachable():
    rules = known_rules()
    assert len(rules) > 20
    for index, row in enumerate(rules):
        assert date.fromisoformat(row.date) <= date.today()
        assert row.source.startswith("https://") or row.source == "docs/agents.md"
        assert row.range[0] <= row.scale[0] <= row.scale[1] <= row.range[1]
        example = row.match.replace("[78]", "7").replace("[156]", "5").replace("[56]", "5")
        example = example.replace("[124]", "4").replace("[134]", "3").replace("[6789]", "6")
        found = rule_for(row.provider, example.replace("*", ""))
        assert rules.index(found) <= index, f"{row.match} is hidden or doesn't fit itself"


@pytest.mark.parametrize(
    ("provider", "model", "kind"),
    [
        ("anthropic", "claude-haiku-4-5-20251001", "exclusive"),
        ("anthropic", "claude-opus-4-6", "exclusive"),
        ("anthropic", "claude-opus-4-7", "forbidden"),
        ("anthropic", "claude-sonnet-5-5", "forbidden"),
        ("openai", "gpt-4.1-mini", "range"),
        ("openai", "gpt-5", "fixed"),
        ("openai", "gpt-5-mini-2025-08-07", "fixed"),
        ("openai", "gpt-5.4-mini", "reasoning off"),
        ("openai", "gpt-5.2-pro", "fixed"),
        ("openai", "gpt-5.6-luna", "fixed"),
        ("openai", "gpt-6.1-sol", "forbidden"),
        ("openai", "o4-mini", "fixed"),
        ("gemini", "gemini-2.5-flash", "range"),
        ("gemini", "gemini-3-pro-preview", "advisory"),
        ("gemini", "gemini-3.5-flash", "advisory"),
        ("gemini", "gemini-3.5-flash-lite", "forbidden"),
        ("gemini", "gemini-3.8-flash", "forbidden"),
        ("openai", "gpt-4o-search-preview", "forbidden"),
        ("openai", "gpt-4o-mini-search-preview-2025-03-11", "forbidden"),
        ("openai", "gpt-5-search-api", "forbidden"),
        ("openai", "gpt-5-chat-latest", "range"),
        ("openai", "gpt-5.2-chat-latest", "fixed"),
        ("openai", "chatgpt-4o-latest", "range"),
        ("openai", "ft:gpt-4o-mini-2024-07-18:my-org:name:7p4lURel", "range"),
        ("openai", "ft:o4-mini-2025-04-16:my-org::x", "fixed"),
        ("anthropic", "claude-3-7-sonnet-latest", "range"),
        ("anthropic", "claude-sonnet-4-20250514", "range"),
        ("anthropic", "claude-opus-4-0", "range"),
        ("gemini", "gemini-flash-latest", "forbidden"),
        ("gemini", "gemini-pro-latest", "forbidden"),
        ("gemini", "models/gemini-3.5-flash", "advisory"),
        ("gemini", "gemini-2.5-flash-lite", "range"),
        ("server", "Qwen/Qwen3-0.6B", "range"),
        ("local", "smollm2", "range"),
    ],
)
def test_models_of_each_kind(provider, model, kind):
    row = rule_for(provider, model)
    kinds = {
        "forbidden": row.forbidden,
        "fixed": row.fixed is not None,
        "exclusive": row.exclusive,
        "advisory": row.advisory is not None,
        "reasoning off": row.send == {"reasoning_effort": "none"},
    }
    assert [name for name, holds in kinds.items() if holds] == ([] if kind == "range" else [kind])


@given(t=st.floats(0, 1), low=st.floats(0, 1), width=st.floats(0, 2))
def test_a_normalised_temperature_lies_on_the_scale(t, low, width):
    found = rule(low, low + width).temperature(t)
    assert found == pytest.approx(low + t * width)


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan])
def test_a_normalised_temperature_outside_is_refused(t):
    with pytest.raises(TemperatureError, match=r"0 \(cold\) .. 1 \(hot\)"):
        rule().temperature(t)


def test_within_the_range_all_policies_send_what_was_asked():
    for policy in POLICIES:
        assert rule().settle(0.3, None, policy, "m").temperature == 0.3
        assert rule().settle(None, 0.5, policy, "m")[:2] == (None, 0.5)


def test_strict_refuses_and_says_how_to_mend_it():
    with pytest.raises(TemperatureError, match="m takes 0 to 1; asked for temperature 1.5 under"):
        rule().settle(1.5, None, "strict", "m")
    with pytest.raises(TemperatureError, match="takes only 1; .*send 1 with the policy clamp"):
        rule(0.0, 2.0, fixed=1.0).settle(0.5, None, "strict", "m")
    assert rule(0.0, 2.0, fixed=1.0).settle(1.0, None, "strict", "m").temperature == 1.0
    with pytest.raises(TemperatureError, match="takes no temperature.*policy omit"):
        rule(forbidden=True).settle(0.5, None, "strict", "m")
    with pytest.raises(TemperatureError, match="temperature or top_p, not both"):
        rule(exclusive=True).settle(0.5, 0.9, "strict", "m")


def test_clamp_sends_the_nearest():
    sent = rule().settle(1.5, None, "clamp", "m")
    assert (sent.temperature, sent.note) == (1.0, "clamped from 1.5")
    assert rule(0.0, 2.0, fixed=1.0).settle(0.2, None, "clamp", "m").temperature == 1.0
    # Where nothing is taken there is nothing nearest.
    with pytest.raises(TemperatureError, match="takes no temperature"):
        rule(forbidden=True).settle(0.5, None, "clamp", "m")
    with pytest.raises(TemperatureError, match="not both"):
        rule(exclusive=True).settle(0.5, 0.9, "clamp", "m")


def test_omit_leaves_out_what_is_not_taken():
    assert rule().settle(1.5, None, "omit", "m").temperature is None
    assert rule(forbidden=True).settle(0.5, 0.9, "omit", "m")[:2] == (None, 0.9)
    assert rule(fixed=1.0).settle(0.5, None, "omit", "m").temperature is None
    assert rule(exclusive=True).settle(0.5, 0.9, "omit", "m")[:2] == (0.5, None)


def test_what_goes_with_a_temperature_goes_with_it_only():
    off = rule(send={"reasoning_effort": "none"})
    assert off.settle(0.5, None, "strict", "m").extra == {"reasoning_effort": "none"}
    assert off.settle(None, None, "strict", "m").extra == {}
    assert off.settle(7.0, None, "omit", "m").extra == {}


@pytest.mark.parametrize(
    ("model", "top_p", "stop"),
    [
        ("o3", False, False), ("o4-mini", False, False), ("gpt-5-mini", False, False),
        ("gpt-5.4", True, False), ("gpt-5.6-sol", False, False), ("gpt-4.1", True, True),
        ("gpt-4o-search-preview", False, False), ("gpt-5-chat-latest", True, True),
        ("ft:o4-mini:org::x", False, False), ("ft:gpt-4.1-mini:org::x", True, True),
    ],
)  # fmt: skip
def test_which_models_take_top_p_and_stop(model, top_p, stop):
    found = rule_for("openai", model)
    assert ("top_p" not in found.refuses, "stop" not in found.refuses) == (top_p, stop)


@pytest.mark.parametrize("name", ["claude-opus-4-7", "claude-sonnet-5", "claude-haiku-5-5"])
def test_where_no_temperature_is_taken_at_anthropic_top_p_is_not_either(name):
    found = rule_for("anthropic", name)
    assert found.settle(0.5, 0.9, "omit", name) == (
        None, None, {},
        "temperature left out: the model takes none; top_p left out: the model takes none",
    )  # fmt: skip


def test_a_top_p_that_is_not_taken():
    own = rule(refuses=("top_p",))
    with pytest.raises(TemperatureError, match="takes no top_p; asked for top_p 0.9 .* or clamp"):
        own.settle(0.5, 0.9, "strict", "m")
    with pytest.raises(TemperatureError, match="takes no top_p"):
        own.settle(None, 0.9, "strict", "m")
    left_out = "top_p left out: the model takes none"
    for policy in ("clamp", "omit"):
        assert own.settle(0.5, 0.9, policy, "m") == (0.5, None, {}, left_out)
        assert own.settle(None, 0.9, policy, "m") == (None, None, {}, left_out)
    # All tokens is what the model does unasked.
    assert own.settle(0.5, 1.0, "strict", "m") == (0.5, None, {}, None)


def test_what_goes_with_top_p_goes_with_it():
    off = rule(send={"reasoning_effort": "none"})
    assert off.settle(None, 0.9, "strict", "m").extra == {"reasoning_effort": "none"}
    assert off.settle(7.0, 0.9, "omit", "m").extra == {"reasoning_effort": "none"}


def test_a_note_of_a_row_is_told_with_every_call():
    (noted,) = parse_rules(GOOD.replace("source: s", "source: s, note: soon gone"), "own")
    assert noted.settle(0.5, None, "strict", "m").note == "soon gone"
    assert noted.settle(7.0, None, "clamp", "m").note == "clamped from 7; soon gone"
    assert "2026-12-01" in (rule_for("gemini", "gemini-2.5-pro").note or "")
    assert rule_for("gemini", "gemini-2.5-flash-lite").note is None


def test_advice_is_told_and_not_enforced():
    advised = rule(0.0, 2.0, advisory=1.0)
    assert advised.settle(0.5, None, "strict", "m")[0::3] == (0.5, "the provider advises 1")
    assert advised.settle(1.0, None, "strict", "m").note is None


def test_an_unknown_model():
    with pytest.raises(
        InputError, match="(?s)no row for openai model 'zorg'.*--models.*match: \"zorg\""
    ):
        rule_for("openai", "zorg")
    assert rule_for("openai", "zorg", "clamp").settle(1.7, None, "clamp", "zorg").temperature == 1
    assert rule_for("openai", "zorg", "omit").settle(0.7, None, "omit", "zorg").temperature is None
    with pytest.raises(InputError, match="a policy is strict, clamp, omit; got 'lax'"):
        rule_for("openai", "gpt-4.1", "lax")


def test_the_entry_that_the_error_shows_can_be_added(tmp_path):
    with pytest.raises(InputError) as caught:
        rule_for("openai", "zorg")
    entry = str(caught.value).split("\n", 1)[1].rsplit("\nor choose", 1)[0]
    path = tmp_path / "models.yaml"
    path.write_text(entry)
    assert rule_for("openai", "zorg", extra=user_rules(path)).range == (0.0, 1.0)


def test_a_users_row_comes_first():
    own = parse_rules(
        "models: [{provider: openai, match: 'gpt-4*', range: [0, 1.2], date: 2026-01-02, "
        "source: mine}]",
        "own",
    )
    assert rule_for("openai", "gpt-4.1", extra=own).source == "mine"


GOOD = "models: [{provider: p, match: m, range: [0, 1], date: 2026-11-22, source: s}]"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("range: [0, 1]", "range: [1, 0]", r"models\[0\].range: expected .low, high."),
        ("range: [0, 1]", "range: 1", r"models\[0\].range"),
        ("range: [0, 1]", "range: [0, hot]", "expected a number"),
        ("range: [0, 1]", "range: [0, .inf]", "a range without an end needs a scale"),
        ("range: [0, 1]", "range: [0, 1], scale: [0, 2]", "expected a number from 0 to 1, got 2"),
        ("range: [0, 1]", "range: [0, 1], fixed: 3", "fixed: expected a number from 0 to 1"),
        ("range: [0, 1]", "range: [0, 1], forbidden: yes please", "expected true or false"),
        ("range: [0, 1]", "range: [0, 1], exclusive: top_k", "exclusive: expected top_p"),
        ("range: [0, 1]", "range: [0, 1], refuses: [seed]", "refuses: expected a list of top_p"),
        ("range: [0, 1]", "range: [0, 1], refuses: stop", "refuses: expected a list of top_p"),
        ("range: [0, 1]", "range: [0, 1], note: 3", "note: expected a text"),
        ("range: [0, 1]", "range: [0, 1], ranges: 1", "unknown key 'ranges'; did you mean"),
        ("date: 2026-11-22", "date: lately", "date: expected a date such as"),
        (", source: s", "", "the key 'source' is missing"),
        ("models:", "model:", "unknown key 'model'"),
    ],
)
def test_broken_rows_name_what_is_wrong(old, new, message):
    assert old in GOOD and len(parse_rules(GOOD, "good")) == 1
    with pytest.raises(InputError, match=message):
        parse_rules(GOOD.replace(old, new, 1), "own.yaml")
