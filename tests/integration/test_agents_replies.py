"""Replies that are not as the manual says, over HTTP: what was paid for is kept, once."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import pytest

from tempering.agents.contract import Call, Reply, never, no_progress
from tempering.agents.plan import Plan, Stage
from tempering.agents.run import run_plan
from tempering.engines.providers import Backoff, provider
from tempering.errors import InputError
from tests.integration.agents_server import Fault, serving

FAST = Backoff(retries=3, first=0.01, most=0.02)
CALL = Call("k", "hi there", 0.5, 40, 0)  # reckoned at 8 // 3 + 16 tokens


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(name, "sk-0123456789-abcdef")
    for name in ("GOOGLE_API_KEY", "TEMPERING_SERVER_KEY"):
        monkeypatch.delenv(name, raising=False)


def ask(monkeypatch: Any, kind: str, body: Any, call: Call = CALL) -> tuple[Reply, int]:
    """(the reply, the requests it took) of a server that always answers `body`."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fault: Fault = (200, {}, data)
    found: list[Reply] = []
    with serving(lambda entry: fault) as (address, log):
        for name in ("ANTHROPIC_BASE_URL", "GOOGLE_GEMINI_BASE_URL"):
            monkeypatch.setenv(name, address)
        spec, model = {
            "openai": (f"{address}/v1", "m"),
            "anthropic": ("anthropic", "claude-haiku-4-5"),
            "gemini": ("gemini", "gemini-3-flash"),
        }[kind]
        made = provider(spec, model)
        made.backoff = FAST
        made.run([call], lambda index, reply: found.append(reply), no_progress, never)
        return found[0], len(log.requests)


def chat(
    content: Any = "8", usage: Any = None, finish: Any = "stop", **more: Any
) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **more}
    body: dict[str, Any] = {"choices": [{"message": message, "finish_reason": finish}]}
    return body if usage is None else {**body, "usage": usage}


def gemini(**more: Any) -> dict[str, Any]:
    return {"candidates": [{"content": {"parts": [{"text": "8"}]}, "finishReason": "STOP"}], **more}


COUNTED = {"prompt_tokens": 20, "completion_tokens": 5}


@pytest.mark.parametrize(
    ("kind", "body", "tokens"),
    [
        ("openai", chat(), (18, 1)),
        ("openai", {**chat(), "usage": None}, (18, 1)),
        ("openai", chat(usage={}), (18, 1)),
        ("openai", chat(usage={"prompt_tokens": 20, "total_tokens": 20}), (20, 1)),
        ("openai", chat(usage={"prompt_tokens": 20, "total_tokens": 26}), (20, 6)),
        ("openai", chat(usage={"prompt_tokens": 20.0, "completion_tokens": 5.0}), (20, 5)),
        ("openai", chat(usage={"prompt_tokens": "20", "completion_tokens": "5"}), (20, 5)),
        ("openai", chat(usage={"prompt_tokens": -1, "completion_tokens": True}), (18, 1)),
        ("openai", chat(usage={"prompt_tokens": 10**400, "completion_tokens": 5}), (18, 5)),
        ("openai", chat(usage=[1, 2]), (18, 1)),
        ("openai", chat(usage="many"), (18, 1)),
        ("openai", json.dumps(chat(usage={"prompt_tokens": float("nan")})).encode(), (18, 1)),
        ("openai", chat(content="word " * 100), (18, 62)),
        ("anthropic", {"content": [{"type": "text", "text": "8"}]}, (18, 1)),
        ("anthropic", {"content": "8", "usage": {"input_tokens": 20}}, (20, 1)),
        ("gemini", gemini(), (18, 1)),
        ("gemini", gemini(usageMetadata={"promptTokenCount": 20}), (20, 1)),
        ("gemini", gemini(usageMetadata={"thoughtsTokenCount": 30}), (18, 30)),
    ],
)
def test_a_reply_that_doesn_t_count_its_tokens_is_kept_and_reckoned(
    monkeypatch, kind, body, tokens
):
    reply, requests = ask(monkeypatch, kind, body)
    assert reply.error is None and reply.output in ("8", ("word " * 100).strip())
    assert requests == reply.attempts == 1 and reply.tokens_discarded == 0
    assert (reply.tokens_in, reply.tokens_out) == tokens
    told = tokens != (20, 5) and tokens != (20, 6)
    assert ("doesn't count its tokens" in (reply.note or "")) is told


@pytest.mark.parametrize(
    ("kind", "body", "text"),
    [
        ("openai", chat([{"type": "text", "text": "8"}], COUNTED), "8"),
        ("openai", chat([{"type": "thinking", "thinking": [{"type": "text", "text": "9"}]},
                         {"type": "text", "text": "8"}], COUNTED), "8"),
        ("openai", chat(["a", "b"], COUNTED), "ab"),
        ("openai", chat({"type": "text", "text": {"value": "8"}}, COUNTED), "8"),
        ("openai", {"choices": [{"text": "8", "finish_reason": "stop"}], "usage": COUNTED}, "8"),
        ("openai", {**chat("8", COUNTED), "error": None}, "8"),
        ("openai", {**chat("8", COUNTED), "error": {"message": "late"}}, "8"),
        ("openai", [chat("8", COUNTED)], "8"),
        ("openai", chat("8", COUNTED, finish={"type": "stop"}), "8"),
        ("openai", json.dumps(chat("a \ud83d b", COUNTED)).encode(), "a \ufffd b"),
        ("openai", json.dumps(chat("\ud83d\ude00", COUNTED)).encode(), "\U0001f600"),
        ("openai", chat("8", COUNTED, finish="\udc00"), "8"),
        ("openai", json.dumps(chat("a%b", COUNTED)).encode().replace(b"%", b"\xff\xc3"),
         "a\ufffd\ufffdb"),
        ("openai", chat("a\x00b", COUNTED), "a\x00b"),
        ("openai", b"\xef\xbb\xbf" + json.dumps(chat("8", COUNTED)).encode(), "8"),
        ("openai", json.dumps(chat("8", COUNTED)).encode("utf-16"), "8"),
        ("openai", b'{"n": ' + b"9" * 5000 + b", " + json.dumps(chat("8", COUNTED)).encode()[1:],
         "8"),
        ("openai", json.dumps({**chat("8", COUNTED), "logprobs": float("nan")}).encode(), "8"),
        ("openai", b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
         b'data: {"choices": [{"delta": {"content": "b"}, "finish_reason": "stop"}], '
         b'"usage": {"prompt_tokens": 20, "completion_tokens": 5}}\n\ndata: [DONE]\n\n', "ab"),
        ("openai", b": WAIT\n\n: WAIT\n\n" + json.dumps(chat("8", COUNTED)).encode(), "8"),
        ("openai", {"choices": [{"delta": {"content": "8"}}], "usage": COUNTED}, "8"),
        ("openai", {"choices": [{"delta": {"content": [{"type": "text", "text": "8"}]},
         "message": None}], "usage": COUNTED}, "8"),
        ("openai", b': KEEPALIVE\n\ndata: {"choices": [{"delta": {"content": "8"}}]}\n\n'
         b'data: {"usage": {"prompt_tokens": 20, "completion_tokens": 5}, "choices": []}\n\n', "8"),
        ("anthropic", {"content": [{"type": "thinking", "thinking": "9"}, {"type": "text",
         "text": "8"}], "usage": {"input_tokens": 20, "output_tokens": 5}}, "8"),
        ("gemini", {"candidates": [{"content": {"parts": [{"text": "9", "thought": True},
         {"text": "8"}]}, "finishReason": "NEW_REASON"}],
         "usageMetadata": {"promptTokenCount": 20, "candidatesTokenCount": 5}}, "8"),
    ],
)  # fmt: skip
def test_a_text_is_found_in_whatever_holds_it(monkeypatch, kind, body, text):
    reply, requests = ask(monkeypatch, kind, body)
    assert (reply.output, reply.error, requests) == (text, None, 1)
    assert (reply.tokens_in, reply.tokens_out) == (20, 5)
    reply.output.encode()
    assert reply.finish is None or reply.finish.encode()


@pytest.mark.parametrize(
    ("kind", "body", "error"),
    [
        ("openai", {"choices": [], "usage": COUNTED}, "the reply has no choices"),
        ("openai", {"choices": None, "usage": COUNTED}, "the reply has no choices"),
        ("openai", {"id": "x", "usage": COUNTED}, "no choices in the reply"),
        ("openai", chat(None, COUNTED, "content_filter"), "no text (finish: content_filter)"),
        ("openai", chat(None, COUNTED, refusal="I won't"), "the model refused: I won't"),
        ("openai", chat([{"type": "refusal", "refusal": "I won't"}], COUNTED),
         "the model refused: I won't"),
        ("openai", chat("", COUNTED, "length"), "allow more tokens"),
        ("openai", chat(None, COUNTED, "stop", reasoning_content="hm"), "reasoning and no answer"),
        ("openai", {"choices": [{"message": None, "finish_reason": "content_filter: X"}],
                    "usage": COUNTED}, "content_filter: X"),
        ("openai", {"error": {"message": "out of credits"}, "usage": COUNTED}, "out of credits"),
        ("openai", {"choices": [{"error": {"message": "upstream broke"}, "finish_reason": "error",
                                 "message": {"content": "half an"}}], "usage": COUNTED},
         "upstream broke"),
        ("anthropic", {"content": [], "stop_reason": "refusal",
                       "usage": {"input_tokens": 20, "output_tokens": 5}}, "finish: refusal"),
        ("gemini", {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"},
                    "usageMetadata": {"promptTokenCount": 20}}, "blocked: PROHIBITED_CONTENT"),
        ("gemini", {"candidates": [{"finishReason": "SAFETY", "finishMessage": "too hot"}],
                    "usageMetadata": {"promptTokenCount": 20}}, "too hot (finish: SAFETY)"),
        ("gemini", {"candidates": [], "usageMetadata": {"promptTokenCount": 20}}, "no candidates"),
    ],
)  # fmt: skip
def test_a_refusal_is_told_and_not_asked_for_again(monkeypatch, kind, body, error):
    reply, requests = ask(monkeypatch, kind, body)
    assert reply.error is not None and error in reply.error
    assert requests == reply.attempts == 1
    assert reply.tokens_in == 20 and reply.output is not None, "it came, and was paid for"
    # The record's word for the end says so too, where the provider has one.
    for name, finish in (("blocked", "blocked: PROHIBITED_CONTENT"), ("refused", "refusal")):
        assert name not in error or reply.finish == finish
    if error == "upstream broke":
        assert reply.output == "half an"


def test_a_streamed_reply_that_was_cut_off_is_kept_and_told(monkeypatch):
    body = b'data: {"choices": [{"delta": {"content": "half an"}}]}\n\ndata: {"choices": [{"del'
    reply, requests = ask(monkeypatch, "openai", body)
    assert (reply.output, requests) == ("half an", 1)
    assert reply.error is not None and "the streamed reply was cut off" in reply.error


@pytest.mark.parametrize(
    ("body", "requests", "error"),
    [
        (b'{"error": {"message": "overloaded", "code": 503}}', 4, "HTTP 200: overloaded after 4"),
        (b'{"error": {"message": "no credits", "code": 402}}', 1, "HTTP 200: no credits"),
        (b'{"error": "no such model"}', 1, "HTTP 200: no such model"),
        (b"<!doctype html><title>Open WebUI</title>", 1, "a web page: Open WebUI"),
        (b'{"unexpected": true}', 4, 'no choices in the reply: {"unexpected": true} after 4 tries'),
        (b'{"choices": [{"mess', 4, 'no JSON: {"choices": [{"mess after 4 tries'),
        (b"", 4, "it is empty after 4 tries"),
        (b"[" * 3000, 4, "no JSON"),
    ],
)
def test_what_is_no_answer_keeps_the_server_s_words(monkeypatch, body, requests, error):
    reply, asked = ask(monkeypatch, "openai", body)
    assert reply.output is None and reply.error is not None and error in reply.error
    assert asked == reply.attempts == requests
    # What came with 200 and can't be read is reckoned: prompt and bytes, each time.
    malformed = "malformed" in reply.error
    each = 18 + (max(min(len(body) // 3 + 1, 40), len(body) // 8) if body else 0)
    assert reply.tokens_discarded == (requests * each if malformed else 0)


def test_discarded_replies_count_against_the_budget():
    plan = Plan((Stage("a", 2, (1.0, 0.0), "{task}", tokens=50), Stage("b", 1, (0.0, 0.0), "x")))
    seen: list[int] = []

    def fault(entry: dict[str, Any]) -> Fault | None:
        seen.append(entry["body"]["seed"])
        return "malformed" if seen.count(entry["body"]["seed"]) < 3 else None

    with serving(fault) as (address, _):
        made = provider(f"{address}/v1", "m")
        made.backoff = FAST
        outcome = run_plan(plan, "go", made)
    rows = [row for stage in outcome.stages for row in stage["workers"]]
    assert [row["attempts"] for row in rows] == [3, 3, 3]
    assert all(row["tokens_discarded"] > 2 * 16 for row in rows)
    assert outcome.tokens == sum(12 + row["tokens_discarded"] for row in rows)


def test_what_a_failed_worker_cost_stays_on_the_account(tmp_path):
    from tempering.evaluation.journal import Journal

    plan = Plan((Stage("a", 2, (1.0, 0.0), "{task}", tokens=50),))
    empty = json.dumps(chat("", COUNTED, "length"))
    ledger = Journal(tmp_path, "throb", {})
    with serving(lambda entry: (200, {}, empty) if entry["n"] == 0 else None) as (address, _):
        first = run_plan(plan, "go", provider(f"{address}/v1", "m"), ledger=ledger)
        again = run_plan(plan, "go", provider(f"{address}/v1", "m"), ledger=ledger)
    ledger.close()
    assert first.tokens == 25 + 12 and again.tokens == 25 + 12 + 12
    assert sorted(r["tokens_discarded"] for r in again.stages[0]["workers"]) == [0, 25]


def test_a_surrogate_in_an_old_journal_doesn_t_end_a_resumed_run(tmp_path):
    from tempering.evaluation.journal import Journal
    from tempering.reports import Record

    ledger = Journal(tmp_path, "throb", {})
    ledger.put("1/a/1", {"output": "x"})
    ledger.close()
    path = ledger.path
    path.write_text(
        path.read_text().replace('"x"', '"x \\ud83d y"') + "9" * 5000 + "\n" + "[" * 9999
    )
    kept = Journal(tmp_path, "throb", {})
    assert kept["1/a/1"] == {"output": "x \ufffd y"}
    record = Record.new("generate", settings={"rows": kept.entries}, results={})
    assert Record.load(record.save(tmp_path / "r.json")).settings["rows"] == kept.entries


@pytest.mark.parametrize(
    ("asked", "refused", "kept"),
    [
        ("max_tokens", "max_tokens' is not supported with this model. Use 'max_completion_tokens'",
         "max_completion_tokens"),
        ("stop", "Unsupported parameter: 'stop' is not supported with this model.", None),
    ],
)  # fmt: skip
def test_a_request_is_put_otherwise_where_that_changes_nothing(asked, refused, kept):
    def fault(entry: dict[str, Any]) -> Fault | None:
        no = json.dumps({"error": {"message": refused}})
        return (400, {}, no) if asked in entry["body"] else None

    calls = [Call(f"k{i}", f"a{i}|b", 0.5, 40, i, stop="|") for i in range(6)]
    found: dict[int, Reply] = {}
    with serving(fault) as (address, log):
        made = provider(f"{address}/v1", "m", concurrency=1)
        made.run(calls, found.__setitem__, no_progress, never)
        assert len(log.requests) == 7, "the server is asked in vain once"
    assert [found[i].output for i in range(6)] == [f"echo: a{i}" for i in range(6)]
    assert kept is None or all(body[kept] == 40 for body in log.bodies[1:])


def test_another_s_organisation_goes_to_no_server(monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    with serving() as (address, log):
        provider(f"{address}/v1", "m").run([CALL], lambda i, r: None, no_progress, never)
        monkeypatch.setenv("OPENAI_BASE_URL", f"{address}/v1")
        provider("openai", "gpt-4.1").run([CALL], lambda i, r: None, no_progress, never)
    server, own = (entry["headers"] for entry in log.requests)
    assert "authorization" not in server and "org-1" not in json.dumps(server)
    assert (own["openai-organization"], own["openai-project"]) == ("org-1", "proj-1")


def failing(address: str, **options: Any) -> str:
    found: list[Reply] = []
    made = provider(address, "m", **options)
    made.backoff = Backoff(retries=0)
    made.run([CALL], lambda index, reply: found.append(reply), no_progress, never)
    assert found[0].error is not None
    return found[0].error


def test_a_server_that_is_not_there_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert failing(f"{address}/v1") == (
            f"can't connect to {address}: connection refused; is the server running there?"
        )
    assert "can't find the server no-such-host.invalid" in failing("http://no-such-host.invalid/v1")
    with serving() as (address, _):
        secure = address.replace("http:", "https:")
        assert "doesn't speak HTTPS" in failing(f"{secure}/v1")
    with serving(lambda entry: "slow", slow=1.0) as (address, _):
        error = failing(f"{address}/v1", timeout=0.2)
        assert error == f"timed out: no reply of {address}/v1 in 0.2 s (--timeout)"


def test_a_wait_that_is_too_long_is_told():
    with serving(lambda entry: (429, {"Retry-After": "600"}, '{"error": "of the day"}')) as (
        address, log,
    ):  # fmt: skip
        error = failing(f"{address}/v1")
        assert "HTTP 429: of the day; the server asks to wait 600 s, and at most 120 s" in error
        assert len(log.requests) == 1


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:9", "is a SOCKS proxy.*httpx2.socks"),
        ("ALL_PROXY", "socks4://127.0.0.1:9", "names a proxy"),
        ("SSL_CERT_FILE", "/no/such/file", "can't read the certificates"),
    ],
)
def test_an_environment_that_is_off_is_named(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with serving() as (address, log):
        with pytest.raises(InputError, match=message):
            failing(f"{address}/v1")
        assert not log.requests


def test_no_proxy_names_a_server_that_is_asked_directly(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.com,127.0.0.1")
    with serving() as (address, log):
        provider(f"{address}/v1", "m").run([CALL], lambda i, r: None, no_progress, never)
        assert len(log.requests) == 1
        # A proxy that isn't there: the message says that it is in the way.
        monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("NO_PROXY", "example.com")
        assert "the environment's ALL_PROXY may be in the way" in failing(f"{address}/v1")


def raw_server(data: bytes) -> tuple[str, threading.Thread]:
    """Says `data` to whoever comes, twice, and hangs up."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listening:
            for _ in range(2):
                place, _ = listening.accept()
                with place:
                    place.recv(65536)
                    place.sendall(data)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}/v1", thread


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("data", "paid"),
    [
        (OK + b"Content-Length: 900\r\n\r\n" + b'{"choices": [{"mess', True),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n13\r\n" + b'{"choices": [{"mess', True),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}", True),
        (OK + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", True),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 900\r\n\r\nabc", False),
        (b"SSH-2.0-OpenSSH_9.6\r\n", False),
        (b"", False),
    ],
)
def test_a_connection_that_breaks_is_tried_again_and_named(data, paid):
    address, thread = raw_server(data)
    found: list[Reply] = []
    made = provider(address, "m")
    made.backoff = Backoff(retries=1, first=0.01, most=0.02)
    made.run([CALL], lambda index, reply: found.append(reply), no_progress, never)
    thread.join(5)
    assert found[0].attempts == 2 and found[0].output is None
    assert found[0].error is not None and "the connection to http://127.0.0.1:" in found[0].error
    assert (found[0].tokens_discarded >= 2 * 18) is paid


def test_a_reply_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr("tempering.engines.providers.transport.MOST", 10_000)
    with serving(lambda entry: (200, {}, b" " * 20_000)) as (address, _):
        assert "a reply of over" in failing(f"{address}/v1")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("localhost:8000/v1", "did you mean http://localhost:8000/v1"),
        ("192.168.0.7:8000/v1", "did you mean http://192.168.0.7:8000/v1"),
        ("vllm:gpu1:8000/v1", "did you mean http://gpu1:8000/v1"),
        ("http:/localhost:8000", "did you mean http://localhost:8000"),
        ("https//api.example.com/v1", "did you mean https://api.example.com/v1"),
        ("api.example.com", "did you mean http://api.example.com"),
        ("http://h/v1/chat/completions", "names one function of the server; give http://h/v1"),
        ("http://h/v 1", "holds a character"),
        ("http://h:99999/v1", "can't be read"),
    ],
)
def test_what_was_probably_meant_by_an_address(spec, message):
    with pytest.raises(InputError, match=message):
        provider(spec, "m")


def test_a_redirection_keeps_the_request_on_its_server(monkeypatch):
    monkeypatch.setenv("TEMPERING_SERVER_KEY", "sk-0123456789-abcdef")
    with serving() as (other, elsewhere), serving(
        lambda entry: (307, {"Location": "/new/v1/chat/completions"}, "")
        if entry["path"].startswith("/old") else
        (307, {"Location": f"{other}/v1/chat/completions"}, "")
        if entry["path"].startswith("/away") else None
    ) as (address, log):  # fmt: skip
        found: list[Reply] = []
        made = provider(f"{address}/old/v1", "m")
        made.run([CALL], lambda index, reply: found.append(reply), no_progress, never)
        assert found[0].output == "echo: hi there"
        assert log.requests[-1]["path"] == "/new/v1/chat/completions"
        assert f"it moved to {other}/v1/chat/completions" in failing(f"{address}/away/v1")
        assert not elsewhere.requests, "a key goes to no other server"
