"""The console on a real `tempering serve`: swaps, named profiles, policies, and its end."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("starlette", reason="no starlette (pip install 'tempering[console]')")

from tests.e2e.browser import Browser, needs_chromium
from tests.e2e.console_page import STATUS, Page
from tests.e2e.console_server import TOKEN, Served, served
from tests.vllm.reference import TEXTS, greedy, per_head, per_layer
from tests.vllm.serving import KEY, Running, serving

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TOKENS = 12


class Driven(NamedTuple):
    """A server, the console that drives it, and the model by transformers."""

    running: Running
    console: Served
    model: Any
    tokenizer: Any
    profiles: dict[str, Any]

    def events(self, path: str, body: Any) -> list[dict[str, Any]]:
        """What the console answers, without events about turns."""
        request = urllib.request.Request(
            f"{self.console.base}/api/{path}",
            json.dumps(body).encode(),
            {"authorization": f"token {TOKEN}"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            found = [json.loads(line) for line in answer.read().splitlines()]
        return [event for event in found if event["type"] not in ("turn", "waiting")]

    def ids(self, prompt: str, chat: bool) -> list[int]:
        if not chat:
            return self.tokenizer(prompt).input_ids
        turn = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def written(self, prompt: str, profile: Any, chat: bool) -> str:
        """The likeliest continuation by transformers, up to its end token."""
        found = greedy(self.model, self.ids(prompt, chat), profile, TOKENS)
        end = self.tokenizer.eos_token_id
        return self.tokenizer.decode(found[: found.index(end)] if end in found else found)


@pytest.fixture(scope="module")
def driven(tiny, tmp_path_factory) -> Iterator[Driven]:
    from tempering.console.remote import Remote, shape_of

    kept, model, tokenizer = tiny
    home = tmp_path_factory.mktemp("console")
    directory = shutil.copytree(kept, home / "tiny")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    profiles = {"own": per_layer(model), "hot": per_head(model, 1)}
    paths = {name: p.save(home / f"{name}.json") for name, p in profiles.items()}
    arguments = ("--profile", str(paths["own"]), "--named", f"hot={paths['hot']}")
    os.environ["TEMPERING_SERVER_KEY"] = KEY
    try:
        with serving(directory, home, *arguments) as running:
            remote = Remote.at(f"vllm:{running.url}")
            subject = shape_of(profiles["own"], remote.model)
            start = {**subject.read(profiles["own"].to_json(), "own"), "name": "own"}
            with served(subject, home / "runs", start, remote) as console:
                yield Driven(running, console, model, tokenizer, profiles)
    finally:
        del os.environ["TEMPERING_SERVER_KEY"]


def text_of(events: list[dict[str, Any]], row: int) -> str:
    return "".join(e["text"] for e in events if e["type"] == "token" and e["row"] == row)


def whole(text: str) -> str:
    """The text without the half characters that a random model writes, which no token shows."""
    return text.replace("\ufffd", "")


def order(**more: Any) -> dict[str, Any]:
    return {"prompt": TEXTS[0][:60], "tokens": TOKENS, "policy": "constant(0)", "names": [], **more}


@pytest.mark.parametrize("chat", [True, False])
def test_columns_are_the_profile_in_force_and_the_named_ones(driven, chat):
    events = driven.events("write", order(names=["hot"], chat=chat))
    assert events[-1]["type"] == "done", events[-1]
    texts = []
    for row, name in enumerate(("own", "hot")):
        texts.append(driven.written(TEXTS[0][:60], driven.profiles[name], chat))
        assert text_of(events, row) == whole(texts[-1])
    assert texts[0] != texts[1]


def test_a_painted_profile_is_put_in_force_shown_and_taken_off(driven):
    from tempering.engines.vllm.client import active_profile
    from tempering.engines.vllm.worker import digest

    (told,) = driven.events("put", {"ask": True})
    assert told["digest"] == digest(driven.profiles["own"])
    painted = per_head(driven.model, 5)
    rows = [row.tolist() for row in painted.rows]
    (told,) = driven.events("put", {"profile": {"rows": rows}})
    assert told["digest"] == active_profile(driven.running.url, KEY) == digest(painted)
    events = driven.events("write", order(chat=False))
    assert text_of(events, 0) == whole(driven.written(TEXTS[0][:60], painted, False))
    (told,) = driven.events("put", {"profile": None})
    assert told["digest"] == "untempered"
    events = driven.events("write", order(chat=False))
    assert text_of(events, 0) == whole(driven.written(TEXTS[0][:60], None, False))
    (told,) = driven.events("put", {"profile": {"rows": [[1.0]] * len(rows)}})
    assert "heads" in told["message"]
    (told,) = driven.events("put", {"ask": True})
    assert told["digest"] == "untempered"


def test_a_policy_acts_on_its_request_alone(driven):
    driven.events("put", {"profile": None})
    with torch.no_grad():
        raw = driven.model(torch.tensor([driven.ids(TEXTS[1][:40], False)])).logits[0, -1]
    for policy, T in (
        ("constant(0.5)", 0.5),
        ("constant(2)", 2.0),
        ("schedule(linear(1.5,0.5), length=9)", 1.5),
    ):
        events = driven.events(
            "write", order(prompt=TEXTS[1][:40], policy=policy, chat=False, tokens=1, seed=3)
        )
        (token,) = [event for event in events if event["type"] == "token"]
        right = (raw.double() / T).log_softmax(-1)
        wanted = right.exp()
        told = torch.tensor([a["after"] for a in token["alternatives"]][:12]).double()
        # The server keys alternatives by their text, which half characters have in common, and
        # tells the sampled token's as well.
        assert len(told) > 3
        torch.testing.assert_close(told.max(), wanted.max(), rtol=2e-3, atol=1e-6)
        assert float(((told[:, None] - wanted).abs() / wanted).min(1).values.max()) < 2e-3
        assert float((right - token["log_probability"]).abs().min()) < 2e-3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"policy": "suport(3)"}, "did you mean support?"),
        ({"policy": "constant(-1)"}, "-1"),
        ({"policy": "ladder(0.5,2, n=3)"}, "3"),
        ({"names": ["cold"]}, "cold"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "hot " * 2000}, "512"),
        ({"tokens": 600}, "512"),
    ],
)
def test_what_the_server_refuses_is_said_in_its_words(driven, change, said):
    events = driven.events("write", order(**change))
    assert events[-1]["type"] == "error" and said in events[-1]["message"], events[-1]
    assert driven.events("write", order(tokens=1))[-1]["type"] == "done"


@pytest.fixture
def page(driven, tmp_path):
    browser = Browser(tmp_path / "browser")
    try:
        browser.attach()
        found = Page(browser, driven.console)
        found.open(width=1400)
        yield found
        assert browser.complaints() == []
    finally:
        browser.close()


@needs_chromium
def test_the_page_greys_what_a_server_can_not_give_and_says_why(driven, page):
    browser = page.browser
    greyed = browser.ask(
        "[...document.querySelectorAll('main button, main input, main select')]"
        ".filter(e => e.disabled).map(e => [e.id, e.title])"
    )
    reasons = {name: why for name, why in greyed if why}
    assert {"watch", "measure", "ask", "find", "meter", "run-stages", "bake"} <= set(reasons)
    assert "keeps attention in its workers" in reasons["watch"]
    assert "keeps attention in its workers" in page.text("cannot")
    browser.ask("document.getElementById('matrix').focus()")
    browser.key("l")
    page.says("status", "tells nothing about heads")
    assert page.rows() == [row.tolist() for row in driven.profiles["own"].rows]


@needs_chromium
def test_the_page_swaps_writes_and_shows_alternatives(driven, page):
    from tempering.engines.vllm.client import active_profile

    browser = page.browser
    page.set("auto", False)
    page.set("tokens", "6")
    page.set("chat", False)
    page.set("prompt", TEXTS[0][:60])
    page.set("named", "hot")
    page.set("policy", "constant(0)")
    browser.drag(page.cell(1, 1))
    browser.click("#put")
    page.says("put-facts", "in force: ")
    browser.wait(
        f"document.getElementById('put-facts').textContent.endsWith("
        f"{json.dumps(active_profile(driven.running.url, KEY))})"
    )
    browser.click("#write")
    browser.wait(f"{STATUS} === 'written'")
    names = browser.ask("[...document.querySelectorAll('.column h3')].map(e => e.textContent)")
    assert names == ["in force", "hot"]
    ids = driven.ids(TEXTS[0][:60], False)
    wanted = driven.tokenizer.decode(greedy(driven.model, ids, driven.profiles["hot"], 6))
    shown = browser.ask("document.querySelectorAll('.column .body')[1].textContent")
    assert shown == whole(wanted)[: len(shown)] and shown
    browser.click(".column:nth-child(2) .token")
    browser.wait("document.querySelectorAll('#alternatives tbody tr').length > 5")
    assert "as the server tells them" in page.text("token-facts")
    browser.click("#put-none")
    page.says("put-facts", "untempered")


@needs_chromium
def test_a_server_that_goes_away_is_told_and_nothing_painted_is_lost(driven, page):
    """The last test: the server is killed in the middle of a text."""
    browser = page.browser
    page.set("auto", False)
    page.set("tokens", "400")
    page.set("chat", False)
    # Hot enough for the end token to be as rare as any other: hundreds of tokens.
    page.set("prompt", TEXTS[0][:20])
    page.set("policy", "constant(100)")
    browser.drag(page.cell(2, 2))
    rows = page.rows()
    browser.click("#write")
    browser.wait("document.querySelectorAll('.token').length > 2")
    os.killpg(driven.running.process.pid, signal.SIGKILL)
    browser.wait("!document.getElementById('write-error').hidden")
    said = page.text("write-error")
    assert "broke off" in said or "no server answers" in said
    assert 2 < browser.ask("document.querySelectorAll('.token').length") < 400
    assert page.rows() == rows
    browser.click("#put")
    page.says("put-facts", "no server answers")
    browser.click("#write")
    page.says("write-error", "no server answers")
    assert page.rows() == rows
