"""What the console's server answers, against the library's own functions and by-hand numbers."""

from __future__ import annotations

import base64
import json
import math

import numpy as np
import pytest
import torch

from tempering import Profile
from tempering.attention.measuring.measure import measure_tokens
from tempering.console.costs import QUANTITIES, sample
from tempering.console.subject import Subject
from tempering.engines.generating.side_by_side import prompt_ids, stream
from tempering.engines.loading.hub import load_model
from tempering.evaluation.cost import Variant, measure_costs
from tempering.reports import Record
from tempering.tokens import parse_policy
from tests.integration.console_client import HEADS, LAYERS, ONES, asked, tiny_subject
from tests.tiny import save_tiny_llama

PATTERN = "throb(12,3,1,12)|amplitude(1.5)"
ORDER = {"run": "r", "prompt": "Hot layers", "tokens": 6, "seed": 3, "policy": "constant(0.8)"}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return tiny_subject(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def page(subject, tmp_path_factory):
    with asked(subject, tmp_path_factory.mktemp("runs")) as page:
        yield page


@pytest.fixture(scope="module")
def painted(subject) -> dict:
    """A profile as the page holds it."""
    return subject.from_text("throb(12,3,1,12)", 1.5)


def floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


# -- the matrix


def test_the_page_is_told_what_the_model_has(page):
    state = page.get("/api/state").json()
    assert [row["layer"] for row in state["rows"]] == list(range(LAYERS))
    assert [layer["heads"] for layer in state["layers"]] == [HEADS] * LAYERS
    assert state["refused"] is None and state["context"] == 512
    assert "smollm2/text" in state["gallery"]
    assert json.dumps(state)  # plain JSON


def test_layers_without_a_softmax_are_blank_rows():
    from tempering.attention.layout import AttentionLayer, Layout
    from tempering.console.subject import _grid_rows

    layers = tuple(AttentionLayer(f"layers.{i}.attn", "decoder", i, 4, 4) for i in (1, 3))
    rows = _grid_rows(Layout(layers, ("layers.0", "layers.2"), {"decoder": 4}))
    assert [row["layer"] for row in rows] == [None, 0, None, 1]


@pytest.mark.parametrize("text", [PATTERN, "linear(2,0.5)", "constant(1.25)"])
def test_a_schedule_becomes_the_profile_of_the_library(page, subject, text):
    found = page.post("pattern", {"text": text}).json()
    expected = Profile.from_schedule(text, subject.model).temperature.tolist()
    assert found["rows"] == expected
    assert found["pattern"] == found["text"] == text
    assert len(found["curve"]["points"]) == LAYERS and len(found["curve"]["values"]) == 129
    assert found["curve"]["values"][0] == found["curve"]["points"][0] == expected[0][0]


def test_the_amplitude_is_that_of_the_schedule(page, subject):
    found = page.post("pattern", {"text": "throb(12,3,1,12)", "amplitude": 1.5}).json()
    assert found["pattern"] == PATTERN
    assert max(map(max, found["rows"])) == 1.5


def test_a_control_has_points_and_no_curve_between_them(page):
    found = page.post("pattern", {"text": "shuffle(linear(2,0.5), seed=1)"}).json()
    assert found["curve"]["values"] == [] and len(found["curve"]["points"]) == LAYERS


def test_a_rule_stands_on_every_layer(page):
    found = page.post("pattern", {"text": "support(throb(6,3,2,6))"}).json()
    assert found["rows"] == ONES
    assert found["rules"][0] == "support(6)" and found["curve"] is None
    saved = page.post("profile/save", {"profile": found}).json()
    assert saved["layers"][0]["rule"] == "support(6)"


@pytest.mark.parametrize(
    ("text", "column"),
    [("thorb(12)", 1), ("throb(12,,3)", 10), ("constant(1)|", 13), ("linear(1,2", 11),
     ("support(0.5)", 1), ("support(thorb(3))", 9), ("constant(1)|amplitude(x=1)", 23), ("", 1)],
)  # fmt: skip
def test_an_error_names_its_column(page, text, column):
    told = page.refused("pattern", {"text": text})
    assert told["column"] == column
    assert told["message"].startswith(f"column {column}:")


def test_policies_have_the_same_errors(page):
    assert page.post("policy", {"text": "support(12)|clip(0.3,2)"}).json() == {
        "text": "support(12)|clip(0.3,2)"
    }
    assert page.refused("policy", {"text": "suport(12)"})["column"] == 1
    assert page.refused("policy", {"text": "support(12)|clip(2)"})["column"] == 13
    told = page.refused("write", {**ORDER, "profiles": [], "policy": "ladder(0.5,1.5, n=3)"})
    assert "one sample under several profiles" in told["message"]


def test_a_profile_survives_page_and_file(page, subject, painted):
    saved = page.post("profile/save", {"profile": painted}).json()
    profile = Profile.from_json(saved)
    profile.check_model(subject.model)
    assert profile.temperature.tolist() == painted["rows"]
    again = page.post("profile/read", {"profile": saved}).json()
    assert again["rows"] == painted["rows"] and "note" not in again


def test_a_profile_of_another_model_is_named_or_refused(page, tmp_path):
    told = page.refused("profile/load", {"name": "smollm2/text"})
    assert "30 layers" in told["message"] and "8 layers" in told["message"]
    other, _ = load_model(save_tiny_llama(tmp_path / "other", seed=5))
    data = Profile.from_schedule(PATTERN, other).to_json()
    found = page.post("profile/read", {"profile": data}).json()
    assert "made for LlamaForCausalLM" in found["note"]
    assert "is not a profile" in page.refused("profile/read", {"profile": {"a": 1}})["message"]


# -- two columns


def test_the_columns_are_those_of_the_library_token_by_token(page, subject, painted):
    events = page.events("write", {**ORDER, "profiles": [painted, {"rows": ONES}], "chat": False})
    tokens = [event for event in events if event["type"] == "token"]
    rows = [Profile.neutral(subject.model), Profile.from_schedule(PATTERN, subject.model)]
    ids = prompt_ids(subject.tokenizer, ORDER["prompt"])
    policy = parse_policy("constant(0.8)")
    expected = list(
        stream(
            subject.model, subject.tokenizer, ids, [*rows, rows[0]],
            tokens=6, policy=policy, seed=3,
        )
    )  # fmt: skip
    assert [(t["row"], t["id"], t["text"]) for t in tokens] == [t[:3] for t in expected]
    for told, own in zip(tokens, expected, strict=True):
        assert told["temperature"] == own.known.temperature
        assert told["entropy"] == own.known.entropy_after
        assert told["support"] == own.known.support
        assert (told["raw"], told["log_probability"]) == (own.raw, own.tempered)
    # The same random numbers: a second untempered column says what the first says.
    columns = [[t["id"] for t in tokens if t["row"] == row] for row in range(3)]
    assert columns[0] == columns[2] != columns[1]
    assert events[0]["tokens"] == ids.tolist()
    assert events[-1] == {"type": "done", "tokens": [len(column) for column in columns]}


def test_watching_heads_changes_no_token(page, painted):
    body = {**ORDER, "profiles": [painted]}
    with_heads, without = (
        page.events("write", {**body, "watch": watch}) for watch in (True, False)
    )
    ids = [[e["id"] for e in events if e["type"] == "token"] for events in (with_heads, without)]
    assert ids[0] == ids[1]
    kinds = {event["type"] for event in without}
    assert kinds == {"prompt", "token", "done"}
    assert [e["step"] for e in with_heads if e["type"] == "heads"] == list(range(6))


def by_hand(model, ids: list[int], profile: Profile) -> np.ndarray:
    """[layers, heads, keys]: the last query's attention in float64, from the model's own weights.

    The residual stream is the model's; queries, keys and the softmax are formed here.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from tempering import tempered

    with torch.no_grad(), tempered(model, profile):
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    place = torch.arange(len(ids))[None]
    found = []
    for layer, hidden, row in zip(
        model.model.layers, out.hidden_states, profile.temperature, strict=False
    ):
        own = layer.self_attn
        x = layer.input_layernorm(hidden)
        cos, sin = model.model.rotary_emb(x, place)
        shape = (1, len(ids), -1, own.head_dim)
        q, k = (f(x).view(shape).transpose(1, 2) for f in (own.q_proj, own.k_proj))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        logits = (q[:, :, -1:].double() @ k.double().transpose(-1, -2))[0, :, 0]
        logits = logits / own.head_dim**0.5 / row[:, None]
        found.append(torch.softmax(logits, -1).detach().numpy())
    return np.stack(found)


def test_what_heads_keep_at_each_step_is_what_they_keep(page, subject, painted):
    events = page.events("write", {**ORDER, "profiles": [painted], "chat": False})
    ids = events[0]["tokens"]
    written = [[e["id"] for e in events if e.get("row") == row] for row in (0, 1)]
    told = [e for e in events if e["type"] == "heads"]
    profiles = [Profile.neutral(subject.model), Profile.from_schedule(PATTERN, subject.model)]
    for event in told:
        values = floats(event["values"]).reshape(3, 2, LAYERS, HEADS)
        for row, profile in enumerate(profiles):
            if len(written[row]) < event["step"]:  # this row has ended, the other goes on
                assert np.isnan(values[:, row]).all()
                continue
            r = by_hand(subject.model, ids + written[row][: event["step"]], profile)
            entropy = -(r * np.log(np.clip(r, 1e-300, None))).sum(-1)
            expected = (np.exp(entropy), r[..., 0], r.max(-1))
            for own, right in zip(values[:, row], expected, strict=True):
                np.testing.assert_allclose(own, right, rtol=2e-4, atol=1e-6)
    lengths = sorted(map(len, written))
    assert [event["step"] for event in told] == list(range(6))
    assert lengths[0] < 6 == lengths[1]  # with this seed one row ends early


def test_one_head_s_attention_before_and_after(page, subject, painted):
    ids = page.events("write", {**ORDER, "profiles": []})[0]["tokens"] * 3
    profile = Profile.from_schedule(PATTERN, subject.model)
    neutral = Profile.neutral(subject.model)
    for layer, head in ((0, 0), (5, 3), (7, 1)):
        body = {"tokens": ids, "start": 1, "profile": painted, "layer": layer, "head": head}
        found = page.events("attention", body)[-1]
        for name, own in (("before", neutral), ("after", profile)):
            right = by_hand(subject.model, ids, own)[layer, head]
            np.testing.assert_allclose(floats(found[name]), right, rtol=2e-4, atol=1e-7)
        assert found["sink"] == [None, None]
    assert np.abs(floats(found["before"]) - floats(found["after"])).max() > 1e-3


def test_alternatives_before_and_after(page, subject, painted):
    from tempering import tempered

    ids = page.events("write", {**ORDER, "profiles": []})[0]["tokens"]
    body = {"tokens": [*ids, 7, 8], "start": len(ids), "profile": painted, "policy": "support(3)"}
    (found,) = page.events("alternatives", body)
    given = torch.tensor([[*ids, 7, 8]])
    with torch.no_grad():
        before = subject.model(given).logits[0, -1].double()
        with tempered(subject.model, Profile.from_schedule(PATTERN, subject.model)):
            after = subject.model(given).logits[0, -1].double()
    p = torch.softmax(before, -1)
    q = torch.softmax(after / found["temperature"], -1)
    assert math.exp(float(-(q * q.log()).sum())) == pytest.approx(3, rel=1e-4)
    for row in found["tokens"]:
        assert row["before"] == pytest.approx(float(p[row["id"]]), rel=1e-4, abs=1e-8)
        assert row["after"] == pytest.approx(float(q[row["id"]]), rel=1e-4, abs=1e-8)
    named = {row["id"] for row in found["tokens"]}
    assert set(p.topk(12).indices.tolist()) | set(q.topk(12).indices.tolist()) == named


def test_divergence_is_that_of_the_same_text(page, subject, painted):
    from tempering import tempered

    ids, reply = [5, 6, 7, 8], [9, 10, 11]
    body = {"tokens": ids + reply, "start": 4, "profile": painted}
    (found,) = page.events("divergence", body)
    given = torch.tensor([ids + reply])
    with torch.no_grad():
        p = torch.log_softmax(subject.model(given).logits[0].double(), -1)[3:-1]
        with tempered(subject.model, Profile.from_schedule(PATTERN, subject.model)):
            q = torch.log_softmax(subject.model(given).logits[0].double(), -1)[3:-1]
    expected = (p.exp() * (p - q)).sum(-1)
    assert found["kl"] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-6)
    told = page.events("divergence", {**body, "start": len(ids + reply)})[-1]
    assert "the reply has no token yet" in told["message"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"tokens": 600}, "more than the 512"),
        ({"tokens": 0}, "tokens is a whole number"),
        ({"seed": -1}, "seed is a whole number"),
        ({"seed": 2**63}, "seed is a"),
        ({"profiles": [{"rows": ONES}] * 61}, "at most 60"),
        ({"prompt": "\ud800"}, "half a character (U+D800)"),
        ({"policy": "phases(answer=)"}, "column 15"),
    ],
)
def test_what_can_not_be_written_is_said_before_the_model_runs(page, change, said):
    body = json.dumps({**ORDER, "profiles": [], **change})
    answer = page.client.post("/api/write", content=body, headers=page.headers)
    assert answer.json()["type"] == "error"
    assert said in answer.json()["message"]


def test_tokens_that_the_model_has_not_are_refused(page, painted):
    body = {"profile": painted, "layer": 0, "head": 0, "start": 1}
    for tokens, said in (
        ([10**6], "token ids"),
        ([], "no token"),
        ([1] * 513, "more than the 512"),
    ):
        assert said in page.refused("attention", {**body, "tokens": tokens})["message"]
    told = page.refused("attention", {**body, "tokens": [1], "layer": 8})
    assert "whole number from 0 to 7" in told["message"]
    told = page.refused("alternatives", {**body, "tokens": [1], "start": 2})
    assert "start" in told["message"]


# -- what it costs


def test_the_meter_ends_at_the_library_s_cost(page, subject, painted):
    text = "Temperature decides how many hypotheses stay alive. " * 60
    events = page.events("cost", {"profile": painted, "text": text})
    chunks = sample(subject, text)
    profile = Profile.from_schedule(PATTERN, subject.model)
    (expected,), _ = measure_costs(subject.model, chunks, [Variant("x", profile)])
    assert len(events) == len(chunks) > 3
    last = events[-1]
    assert last["cost"]["value"] == pytest.approx(expected.cost.value, rel=1e-9)
    assert last["cost"]["low"] == pytest.approx(expected.cost.low, rel=1e-9)
    assert last["kl"]["value"] == pytest.approx(expected.kl.value, rel=1e-9)
    assert events[0]["cost"]["low"] is None  # one chunk has no interval
    assert [e["chunks"] for e in events] == list(range(1, len(chunks) + 1))


def test_the_budget_finds_an_amplitude_within_it(page, painted):
    body = {"profile": painted, "pattern": "throb(12,3,1,12)", "nats": 0.02}
    events = page.events("budget", body)
    found = events[-1]
    tried = {e["amplitude"]: e["cost"]["value"] for e in events if e["type"] == "tried"}
    assert found["type"] == "budget" and found["room"] is None
    assert tried[found["amplitude"]] <= 0.02
    assert all(cost > 0.02 for a, cost in tried.items() if a > found["amplitude"])
    by_room = page.events("budget", {"profile": painted, "nats": 0.02})[-1]
    reach = max(abs(math.log(t)) for row in painted["rows"] for t in row)
    assert by_room["room"] * reach == pytest.approx(math.log(by_room["amplitude"]))
    told = page.events("budget", {"profile": {"rows": ONES}, "nats": 0.02})[-1]
    assert "paint something first" in told["message"]
    ruled = {"rows": ONES, "rules": ["support(6)"] * LAYERS}
    told = page.events("budget", {"profile": ruled, "nats": 0.02})[-1]
    assert "has rules (support(6)): no amplitude scales them" in told["message"]
    told = page.events("budget", {"profile": painted, "nats": -1})[-1]
    assert "positive number of nats" in told["message"]


def test_what_is_measured_is_the_library_s_measurement(page, subject, painted):
    before, after = page.events("measure", {"profile": painted})
    part = sample(subject, None)[:2]
    profile = Profile.from_schedule(PATTERN, subject.model)
    for told, own in ((before, None), (after, profile)):
        found = measure_tokens(subject.model, part, profile=own)
        for name in QUANTITIES:
            assert told[name] == getattr(found, name).tolist()


def test_texts_that_are_too_short_are_said(page, painted):
    for path in ("cost", "measure"):
        assert "token" in page.refused(path, {"profile": painted, "text": "short"})["message"]


def test_the_questions_are_the_demo_s(page, subject, painted, monkeypatch):
    calls = []

    def answers(network, tokenizer, profile, label, *, seed, progress):
        calls.append((network, profile.temperature.tolist(), seed))
        progress(1, 2)
        return {"answers": [{"question": "q"}], "answered": {"questions": 1}}

    monkeypatch.setattr("tempering.console.costs.answers", answers)
    events = page.events("questions", {"profile": painted, "seed": 4})
    assert calls == [(subject.model, painted["rows"], 4)]
    assert events[-1]["answers"] == [{"question": "q"}]
    assert events[-2] == {"type": "progress", "done": 1, "total": 2}


# -- saving


def test_a_record_holds_everything_on_the_page(page, painted):
    events = page.events("write", {**ORDER, "profiles": [painted]})
    before, after = page.events("measure", {"profile": painted})
    text = "".join(e["text"] for e in events if e.get("row") == 1)
    cost = {"label": "A", "cost": 0.1, "unit": "nats/token", "low": None, "high": None}
    body = {
        **ORDER,
        "columns": [{"label": "A", **painted}],
        "samples": [{"label": "A", "seed": 3, "text": text, "tokens": 6}],
        "measured": {"before": before, "after": {"A": after}},
        "cost": [cost],
        "budget": [{"label": "A", "nats": 0.02, "amplitude": 1.5, "cost": 0.01}],
        "answers": [{"question": "q", "stated": "1"}],
        "answered": {"questions": 1, "right, painted": 0},
    }
    name = page.post("record", body).json()["name"]
    record = Record.load(page.console.out / f"{name}.json")
    assert record.kind == "console" and record.seed == 3
    assert record.results["pattern"][1]["temperature"] == painted["rows"]
    assert record.results["generations"]["samples"][0]["text"] == text
    assert record.results["support"]["after"]["A"] == after["support"]
    for section in ("cost", "budget", "answers", "answered"):
        assert record.results[section] == body[section]
    assert (
        Profile.from_json(record.settings["profiles"]["A"]).temperature.tolist() == painted["rows"]
    )
    assert page.get(f"/reports/{name}").status_code == 200
    assert name in [row["name"] for row in page.get("/api/records").json()["records"]]
    told = page.refused("record", {**body, "columns": [{"label": "A", **painted}] * 2})
    assert "two columns are called A" in told["message"]
    sample = body["samples"][0]
    for change, said in (
        ({"answers": "yes"}, "answers: expected a list, got the text 'yes'"),
        ({"answers": {}}, "answers: expected a list"),
        ({"answers": [3]}, "answers[0]: expected an object"),
        ({"answers": [{"question": 3, "stated": "1"}]}, "answers[0].question: expected a text"),
        ({"answers": [{"question": "q"}]}, "stated"),
        ({"answers": [{"question": "q", "stated": "1", "x": [1]}]}, "answers[0].x: expected a sin"),
        ({"answered": []}, "answered: expected an object"),
        ({"answered": {"right": {"a": 1}}}, "answered.right: expected a single value"),
        ({"budget": {"label": "A"}}, "budget: expected a list"),
        ({"budget": [{"label": "A", "nats": "few", "amplitude": 1}]}, "budget[0].nats"),
        ({"budget": [{"label": "B", "nats": 1, "amplitude": 1}]}, "a column 'B'"),
        ({"cost": 3}, "sent.cost: expected a list"),
        ({"cost": [{**cost, "label": "B"}]}, "a column 'B'; it sent the columns A"),
        ({"measured": {"before": 3, "after": {}}}, "measured.before: expected an object"),
        ({"measured": {"before": before, "after": {"A": {}}}}, "measured.after.A"),
        ({"measured": {"before": before, "after": {"B": after}}}, "a column 'B'"),
        ({"measured": {"before": {**before, "support": [[1.0]]}, "after": {}}}, "other heads"),
        ({"measured": {"before": {**before, "peak": 3}, "after": {}}}, "quantities.peak"),
        ({"samples": [{"label": 3}]}, "samples[0]"),
        ({"samples": [{**sample, "label": "B"}]}, "a column 'B'"),
        ({"samples": [{**sample, "trace": [{"token": []}]}]}, "trace[0].token"),
        ({"columns": [{"label": "A", "rows": ONES, "pattern": "constant(2)"}]}, "of their pattern"),
    ):
        told = page.refused("record", {**body, **change})
        assert said in told["message"], change
    kept = {path.name for path in page.console.out.glob("console-*")}
    assert kept == {f"{name}.json", f"{name}.html"}  # a refusal leaves nothing behind


def test_a_pattern_is_taken_only_with_its_own_temperatures(page, subject):
    rows = Profile.from_schedule(PATTERN, subject.model).temperature.tolist()
    off = [list(row) for row in rows]
    off[3][1] += 1e-3
    some = Profile.from_schedule(PATTERN, subject.model, layers=[2, 3]).temperature.tolist()
    ruled = ["support(6)"] * LAYERS
    for rows_, rules, pattern in (
        (rows, None, PATTERN),
        (some, None, PATTERN),  # read for these layers alone
        (ONES, ruled, "support(6)"),
        (ONES, [None, *ruled[1:]], "support(6)"),
        (off, None, None),
    ):
        sent = {"rows": rows_, "rules": rules, "pattern": pattern}
        found = page.post("profile/save", {"profile": sent}).json()
        assert found["pattern"] == pattern
    for rows_, rules, pattern in (
        (off, None, PATTERN),
        (ONES, None, PATTERN),
        (rows, None, "linear(2,0.5)"),
        (rows, None, "nonsense"),
        (rows, None, ""),
        (rows, None, "<b>"),
        (rows, None, "(" * 5000),
        (rows, None, "throb(12,3,1,12) as layer support, amplitude 1.5, per head"),
        (ONES, None, "support(6)"),
        (ONES, ruled, "support(7)"),
        (ONES, ruled, PATTERN),
    ):
        sent = {"rows": rows_, "rules": rules, "pattern": pattern}
        told = page.refused("profile/save", {"profile": sent})
        assert "are not those of their pattern" in told["message"], pattern
    # A file's pattern that only its own data could tell is not taken over, and this is said.
    told = Profile.from_schedule(PATTERN, subject.model).to_json()
    told["pattern"] = "throb(12,3,1,12) as layer support, amplitude 1.5, per head"
    found = page.post("profile/read", {"profile": told}).json()
    assert found["pattern"] is None and "can't be told from the temperatures" in found["note"]
    assert found["rows"] == rows


def test_stages_run_are_kept_and_go_on(page):
    body = {"task": "Name a shop.", "pattern": "throb(3,2,1,3)", "tokens": 4, "seed": 1}
    events = page.events("throb", body)
    assert events[0]["type"] == "tree"
    assert [len(stage["workers"]) for stage in events[0]["stages"]] == [3, 2, 1]
    rows = {(e["stage"], e["worker"]): e["row"] for e in events if e["type"] == "row"}
    last = events[-1]
    assert last["type"] == "record"
    record = Record.load(page.console.out / f"{last['name']}.json")
    kept = {
        (stage["stage"], row["worker"]): row
        for stage in record.results["stages"]
        for row in stage["workers"]
    }
    assert kept == rows and len(kept) == 6
    assert record.settings["run"]["timeout"] == 120.0 and record.settings["run"]["retries"] == 5
    # What a worker writes comes as it is written; its last token with its row.
    said = {}
    for event in events:
        if event["type"] == "worker":
            where = (event["stage"], event["worker"])
            said[where] = said.get(where, "") + event["text"]
    for where, row in rows.items():
        assert row["output"].startswith(said[where].strip()), where
    assert any(said.values())
    again = page.events("throb", {"resume": last["name"]})
    assert {(e["stage"], e["worker"]): e["row"] for e in again if e["type"] == "row"} == rows
    told = page.refused("throb", {**body, "pattern": "thorb(3)"})
    assert told["column"] == 1
    assert "the task is empty" in page.events("throb", {**body, "task": " "})[-1]["message"]


def test_a_refused_model_says_why_everywhere(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    network = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2))
    _, tokenizer = load_model(save_tiny_llama(tmp_path / "tiny"))
    subject = Subject.of("mamba", network.eval(), tokenizer)
    with asked(subject, tmp_path) as page:
        assert "softmax" in page.get("/api/state").json()["refused"]
        for path, body in (
            ("pattern", {"text": "constant(1)"}),
            ("write", {**ORDER, "profiles": []}),
            ("cost", {"profile": {"rows": ONES}}),
            ("throb", {"task": "x", "pattern": "throb(3,2,1,3)"}),
            ("record", {**ORDER, "columns": [], "samples": []}),
        ):
            assert page.refused(path, body)["message"] == subject.refused
