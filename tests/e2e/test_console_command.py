"""`tempering console` as a process: its address, its port, its end; and tabs that come and go."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest

from tempering.console.subject import Subject
from tempering.engines.loading.hub import load_model
from tests.e2e.browser import PATIENCE
from tests.e2e.console_server import TOKEN, served
from tests.tiny import save_tiny_llama

ORDER = {"run": "r", "prompt": "Hot layers", "policy": "constant(2)", "profiles": []}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def test_it_says_its_address_takes_the_next_port_and_ends_whole(directory, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-m", "tempering", "console", "--model", str(directory), "--no-open",
             "--port", str(port), "--out", str(tmp_path / "runs")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        killer = threading.Timer(7 * PATIENCE, process.kill)
        killer.start()
        try:
            said = ""
            while "Ctrl-C" not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            assert f"port {port} is in use" in said
            url, own = re.search(r"(http://127\.0\.0\.1:(\d+)/\?token=\S{32})", said).groups()
            assert port < int(own) < port + 20
            page = urllib.request.urlopen(url, timeout=PATIENCE).read().decode()
            assert "<title>tempering console</title>" in page
            base, token = url.split("/?token=")
            order = {**ORDER, "tokens": 480}
            request = urllib.request.Request(
                f"{base}/api/write", json.dumps(order).encode(),
                {"authorization": f"token {token}"},
            )  # fmt: skip
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                while json.loads(answer.readline())["type"] != "token":
                    pass
                process.send_signal(signal.SIGINT)  # while it writes
                assert process.wait(PATIENCE) == 0
            out, err = process.communicate()
            assert out == "" and "Traceback" not in err, err
            assert token not in err.replace(url, "")
        finally:
            killer.cancel()
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def server(directory, tmp_path_factory):
    subject = Subject.of("tiny", *load_model(directory))
    with served(subject, tmp_path_factory.mktemp("runs")) as server:
        yield server


def asked(server, path, body, *, timeout=PATIENCE):
    request = urllib.request.Request(
        f"{server.base}/api/{path}", json.dumps(body).encode(), {"authorization": f"token {TOKEN}"}
    )
    return urllib.request.urlopen(request, timeout=timeout)


def begun(server, tokens=480, run="r"):
    """An open stream that has written its first token."""
    answer = asked(server, "write", {**ORDER, "tokens": tokens, "run": run})
    while json.loads(answer.readline())["type"] != "token":
        pass
    return answer


def test_a_closed_connection_frees_the_model(server):
    answer = begun(server)
    running = server.console.turns._running
    assert running is not None and running.kind == "write"
    answer.close()
    assert server.idle()
    assert running.stopped
    # The model is as it was: no profile is in force in any thread.
    found = [json.loads(line) for line in asked(server, "write", {**ORDER, "tokens": 2})]
    assert found[-1]["type"] == "done"


def test_two_tabs_take_turns_and_are_told(server):
    first = begun(server)
    second = asked(server, "write", {**ORDER, "tokens": 2, "run": "s"})
    told = json.loads(second.readline())
    assert (told["type"], told["ahead"], told["whose"]) == ("waiting", 1, "write")
    first.close()
    kinds = [json.loads(line)["type"] for line in second]
    assert kinds[0] == "turn" and kinds[-1] == "done"


def test_an_edit_goes_on_in_its_own_run_alone(server):
    answer = begun(server)
    rows = [[1.5] * 4] * 8
    for body, status in (
        ({"run": "other", "profiles": [{"rows": rows}]}, False),
        ({"run": "r", "profiles": []}, True),
    ):
        assert json.load(asked(server, "write/change", body)) == {"changed": status}
    told = json.load(asked(server, "write/change", {"run": "r", "profiles": [{"rows": rows}]}))
    assert "0 columns are being written" in told["message"]
    answer.close()
    assert server.idle()
    assert server.console.orders == {}
    assert json.load(asked(server, "write/change", {"run": "r", "profiles": []})) == {
        "changed": False
    }


def test_a_crash_is_a_message_and_the_next_text_is_written(server, monkeypatch, capfd):
    def crashed(*args, **kwargs):
        raise RuntimeError("out of memory, or what a driver says")
        yield

    monkeypatch.setattr("tempering.console.writing.stream", crashed)
    events = [json.loads(line) for line in asked(server, "write", {**ORDER, "tokens": 2})]
    assert events[-1]["message"] == "RuntimeError: out of memory, or what a driver says"
    monkeypatch.undo()
    events = [json.loads(line) for line in asked(server, "write", {**ORDER, "tokens": 2})]
    assert events[-1]["type"] == "done"


def test_the_meter_lets_a_text_pass(server):
    rows = [[2.0] * 4] * 8
    meter = asked(server, "cost", {"profile": {"rows": rows}})
    while json.loads(meter.readline())["type"] != "cost":
        pass
    events = [json.loads(line)["type"] for line in asked(server, "write", {**ORDER, "tokens": 2})]
    assert events[-1] == "done"
    assert json.loads(meter.readline())["type"] in ("cost", "waiting")  # it goes on
    meter.close()
    assert server.idle()


def test_two_tabs_that_write_and_one_that_measures_disturb_none_of_them(server):
    rows = [[1.5] * 4] * 8
    written = ("write", {**ORDER, "tokens": 12, "profiles": [{"rows": rows}]})
    asks = [written, ("measure", {"profile": {"rows": rows}}), written]

    def told(answer):
        found = [json.loads(line) for line in answer]
        return [event for event in found if event["type"] not in ("waiting", "turn")]

    alone = [told(asked(server, *ask)) for ask in asks]
    together = [asked(server, *ask) for ask in asks]
    assert [told(answer) for answer in together] == alone
    assert [events[-1]["type"] for events in alone] == ["done", "measured", "done"]


@pytest.mark.parametrize("path", ["measure", "cost"])
def test_a_tab_that_closes_while_it_measures_frees_the_model(server, path):
    answer = asked(server, path, {"profile": {"rows": [[1.5] * 4] * 8}})
    assert json.loads(answer.readline())["type"] == "turn"
    answer.close()
    assert server.idle()
    events = [json.loads(line) for line in asked(server, "write", {**ORDER, "tokens": 2})]
    assert events[-1]["type"] == "done"


def test_a_tab_that_closes_while_it_bakes_ends_the_command_and_leaves_nothing(server, monkeypatch):
    started, kept = threading.Event(), []
    start = asyncio.create_subprocess_exec

    async def noted(*arguments, **options):
        kept.append(await start(*arguments, **options))
        started.set()
        return kept[0]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noted)
    host, port = server.base.removeprefix("http://").split(":")
    body = json.dumps({"profile": {"rows": [[1.5] * 4] * 8}, "name": "left"}).encode()
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as tab:
        tab.sendall(
            f"POST /api/bake HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: token {TOKEN}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert started.wait(PATIENCE)
    (process,) = kept
    for _ in range(int(PATIENCE * 20)):
        if process.returncode is not None:
            break
        threading.Event().wait(0.05)
    assert process.returncode not in (None, 0)
    assert not (server.console.out / "left").exists()


def test_stages_that_are_left_keep_their_record(server):
    body = {"task": "Name it.", "pattern": "throb(3,1,1,3)", "tokens": 200, "seed": 0}
    answer = asked(server, "throb", body)
    while json.loads(answer.readline())["type"] != "row":
        pass
    answer.close()
    assert server.idle()
    kept = json.load(
        urllib.request.urlopen(
            urllib.request.Request(
                f"{server.base}/api/records", headers={"authorization": f"token {TOKEN}"}
            )
        )
    )
    assert [row["kind"] for row in kept["records"]] == ["throb"]


def test_a_bake_streams_and_a_taken_name_is_refused(server):
    rows = [[1.5] * 4] * 8
    (server.console.out / "taken").mkdir(parents=True, exist_ok=True)
    events = [
        json.loads(line)
        for line in asked(server, "bake", {"profile": {"rows": rows}, "name": "taken"})
    ]
    assert "exists already" in events[-1]["message"]
    # `tiny` is no name of a model, so the command refuses; what it says comes through.
    events = [
        json.loads(line)
        for line in asked(
            server, "bake", {"profile": {"rows": rows}, "name": "warm"}, timeout=7 * PATIENCE
        )
    ]
    assert any("no model 'tiny'" in e.get("text", "") for e in events)
    assert "tempering bake ended with code" in events[-1]["message"]
