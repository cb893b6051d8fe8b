"""The console on a running server: a small one here, which speaks as `tempering serve` does."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from starlette.testclient import TestClient

from tempering import Profile
from tempering.console.remote import CANNOT, Remote, shape_of
from tempering.console.routes import Console
from tempering.errors import InputError, ProfileError, RefusedError
from tests.integration.console_client import HOST, TOKEN, Asked

ROWS = [[1.5, 1.0], [1.0, 0.5]]
PROFILE = Profile.by_module({"layers.0.attn": ROWS[0], "layers.1.attn": ROWS[1]})
WORDS = ("Hot", " layers", " explore", ".")


class Serve(BaseHTTPRequestHandler):
    """As much of vLLM's interface and of tempering's as the console uses."""

    protocol_version = "HTTP/1.0"
    seen: list[dict]
    active = "untempered"
    slow = threading.Event()
    closed: threading.Event
    fault: dict

    def log_message(self, *args):
        pass

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.headers.get("authorization") != "Bearer key-of-the-server":
            self.answer(401, {})
        elif self.path == "/v1/models":
            self.answer(200, {"data": [{"id": "org/served"}]})
        else:
            self.answer(200, {"active": type(self).active})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen.append(body)
        if self.path == "/v1/tempering/profile":
            type(self).active = "untempered" if body["profile"] is None else "digest"
            self.answer(200, {"active": self.active})
            return
        name = body["vllm_xargs"].get("tempering_profile")
        if name not in (None, "hot"):
            self.answer(400, {"error": {"message": f"no profile is called {name!r}"}})
            return
        self.send_response(200)
        self.end_headers()
        try:
            for word in WORDS if not self.fault.get("endless") else WORDS * 1000:
                if self.fault.get("break"):
                    self.wfile.write(b'data: {"choices": [{\n\n')
                    return
                others = [{"token": word, "logprob": -0.5}, {"token": "<b>", "logprob": -2.0}]
                told = {"token": word, "logprob": -0.5, "top_logprobs": others}
                choice = {"delta": {"content": word}, "logprobs": {"content": [told]}}
                if "completions" in self.path and "chat" not in self.path:
                    top = {item["token"]: item["logprob"] for item in reversed(others)}
                    columns = {"tokens": [word], "token_logprobs": [-0.5], "top_logprobs": [top]}
                    choice = {"text": word, "logprobs": columns}
                self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
                self.wfile.flush()
                time.sleep(0.01)
                if self.fault.get("silent"):  # gone between two events
                    return
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.closed.set()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("TEMPERING_SERVER_KEY", "key-of-the-server")
    kind = type("Own", (Serve,), {"seen": [], "fault": {}, "closed": threading.Event()})
    found = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    found.daemon_threads = True
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    found.kind, found.url = kind, f"http://127.0.0.1:{found.server_port}"
    yield found
    found.shutdown()
    found.server_close()
    thread.join(10)


@pytest.fixture
def page(server, tmp_path):
    remote = Remote.at(f"vllm:{server.url}")
    profile = Profile(PROFILE.rows, PROFILE.names)
    console = Console(shape_of(profile, remote.model), tmp_path, None, remote)
    app = console.app(host="127.0.0.1", port=7861, token=TOKEN)
    with TestClient(app, base_url=f"http://{HOST}") as client:
        yield Asked(client, console)


def test_the_page_is_told_of_the_server(page, server):
    state = page.get("/api/state").json()
    assert state["engine"]["model"] == "org/served" == state["name"]
    assert state["engine"]["address"] == server.url
    assert state["engine"]["cannot"] == CANNOT
    assert "key-of-the-server" not in json.dumps(state)
    assert [layer["heads"] for layer in state["layers"]] == [2, 2]


def test_a_painted_profile_is_put_in_force_and_taken_off(page, server):
    (asked,) = page.events("put", {"ask": True})
    assert asked == {"type": "in force", "digest": "untempered"}
    (told,) = page.events("put", {"profile": {"rows": ROWS}})
    assert told["digest"] == "digest"
    sent = Profile.from_json(server.kind.seen[-1]["profile"])
    assert sent.temperature.tolist() == ROWS
    assert sent.names == ("layers.0.attn", "layers.1.attn")
    (told,) = page.events("put", {"profile": None})
    assert told["digest"] == "untempered" and server.kind.seen[-1] == {"profile": None}
    assert "2 layers" in page.refused("put", {"profile": {"rows": [[1, 1]]}})["message"]


def test_columns_are_requests_with_their_profile_policy_and_seed(page, server):
    body = {"prompt": "Hi", "tokens": 9, "seed": 4, "policy": "support(3)", "names": ["hot"]}
    events = page.events("write", body)
    tokens = [event for event in events if event["type"] == "token"]
    for row in (0, 1):
        own = [t for t in tokens if t["row"] == row]
        assert [t["text"] for t in own] == list(WORDS)
        assert own[0]["log_probability"] == -0.5
        assert own[0]["alternatives"][1]["after"] == pytest.approx(0.1353, abs=1e-4)
    assert events[-1] == {"type": "done", "tokens": [4, 4]}
    sent = {b["vllm_xargs"].get("tempering_profile"): b for b in server.kind.seen}
    assert set(sent) == {None, "hot"}
    for request in sent.values():
        assert request["vllm_xargs"]["tempering"] == "support(3)"
        assert (request["seed"], request["max_tokens"], request["temperature"]) == (4, 9, 1)
        assert request["model"] == "org/served" and request["stream"] is True


def test_a_prompt_that_is_no_chat_turn_goes_on_as_it_stands(page, server):
    body = {"prompt": "Hi", "tokens": 9, "chat": False, "names": []}
    tokens = [event for event in page.events("write", body) if event["type"] == "token"]
    assert [t["text"] for t in tokens] == list(WORDS)
    assert tokens[0]["log_probability"] == -0.5
    assert [a["text"] for a in tokens[0]["alternatives"]] == ["Hot", "<b>"]
    assert tokens[0]["alternatives"][0]["after"] == pytest.approx(0.6065, abs=1e-4)
    (sent,) = server.kind.seen
    assert sent["prompt"] == "Hi" and "messages" not in sent and sent["logprobs"] == 12


def test_what_the_server_refuses_is_said_in_its_words(page):
    body = {"prompt": "Hi", "names": ["cold"]}
    assert page.events("write", body)[-1]["message"] == "no profile is called 'cold'"
    assert "prompt is empty" in page.refused("write", {"prompt": " ", "names": []})["message"]


def test_a_server_that_breaks_off_or_goes_away(page, server):
    for fault in ("break", "silent"):
        server.kind.fault = {fault: True}
        assert "broke off" in page.events("write", {"prompt": "Hi", "names": []})[-1]["message"]
    server.shutdown()
    server.server_close()
    for path, body in (("write", {"prompt": "Hi", "names": []}), ("put", {"ask": True})):
        assert "no server answers" in page.events(path, body)[-1]["message"]


def test_a_page_that_leaves_ends_its_request(page, server):
    import asyncio

    from tempering.console.fields import Fields
    from tempering.console.turns import Job

    server.kind.fault["endless"] = True
    work, _ = page.console._write_remote(Fields({"prompt": "Hi", "names": []}))

    async def leave():
        events = page.console.turns.add(Job("write", work)).events()
        async for event in events:
            if event["type"] == "token":
                break
        await events.aclose()

    asyncio.run(asyncio.wait_for(leave(), 60))
    assert server.kind.closed.wait(60)


@pytest.mark.parametrize(
    "path",
    ["alternatives", "divergence", "attention", "cost", "budget", "measure", "questions", "throb",
     "bake"],
)  # fmt: skip
def test_what_a_server_can_not_give_is_refused_with_the_reason(page, path):
    told = page.refused(path, {"profile": {"rows": ROWS}, "name": "x"})
    assert "the model runs on a server" in told["message"]


def test_addresses_and_shapes_that_are_none(server, monkeypatch):
    for engine in ("vllm", "vllm:", "openai", "local", "http://x"):
        with pytest.raises(InputError, match="--engine is vllm:ADDRESS"):
            Remote.at(engine)
    with pytest.raises(RefusedError, match="no server answers"):
        Remote.at("vllm:http://127.0.0.1:9")
    monkeypatch.setenv("TEMPERING_SERVER_KEY", "another-key-of-it")
    with pytest.raises(RefusedError, match="wants its key"):
        Remote.at(f"vllm:{server.url}")
    with pytest.raises(ProfileError, match="tells no model's shape"):
        shape_of(PROFILE, "m")  # it names some of the layers, perhaps
