"""The command line of a server, and talking to one about its profile."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.machinery import ModuleSpec
from typing import ClassVar

import pytest
import torch

from tempering.attention.profiles.profile import Profile
from tempering.cli import main
from tempering.engines.vllm import serve
from tempering.engines.vllm.client import active_profile, swap_remote
from tempering.errors import DataError, InputError, MissingExtraError, RefusedError


@pytest.fixture
def profile(tmp_path):
    return Profile.from_matrix(torch.full((2, 3), 1.5)).save(tmp_path / "p.json")


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(
        serve.importlib.util, "find_spec", lambda name: ModuleSpec(name, loader=None)
    )


def made(arguments=(), profile=None, named=(), environment=()):
    return serve.server_command("some/model", profile, dict(named), arguments, dict(environment))


def config_of(command):
    return json.loads(command[command.index("--additional-config") + 1])


def test_a_server_is_vllms_own(installed, profile):
    command, environment = made(
        ["--port", "9", "--additional-config", '{"other": 1}'], profile, {"hot": profile}
    )
    assert command[1] == "-m" and command[2].startswith("vllm.entrypoints.")
    assert command[-2:] == ["--port", "9"] and "some/model" in command
    assert command[command.index("--worker-extension-cls") + 1] == serve.EXTENSION
    assert config_of(command) == {
        "other": 1,
        "tempering": {"profile": str(profile), "profiles": {"hot": str(profile)}},
    }
    assert environment["VLLM_PLUGINS"].split(",")[-1] == "tempering"
    command, environment = made(['--additional-config={"a": 2}'], environment={"VLLM_PLUGINS": "x"})
    assert config_of(command) == {"a": 2, "tempering": {"profile": None}}
    assert environment["VLLM_PLUGINS"] == "x,tempering"


@pytest.mark.parametrize("option", ["--additional_config", "--additional-conf", "--ad"])
def test_every_spelling_that_vllm_takes_for_its_option_is_kept(installed, profile, option):
    """vLLM lets the last one win: left among the arguments, it would serve untempered."""
    for given in ([option, '{"other": 1}'], [option + '={"other": 1}']):
        command, _ = made(["--port", "9", *given], profile)
        assert config_of(command) == {"other": 1, "tempering": {"profile": str(profile)}}
        assert command[-2:] == ["--port", "9"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--additional-config", "{"], "is a JSON object, got '{'"),
        (["--additional-config"], "is a JSON object, got ''"),
        (["--additional-config=[1]"], "is a JSON object"),
        (["--additional-config.a", "1"], "as one JSON text"),
        (['--additional-config={"tempering": {}}'], "give --profile instead"),
        (["--additional_config.a", "1"], "as one JSON text"),
        (["--worker-extension-cls=x.Y"], "vLLM takes one"),
        (["--worker_extension_cls", "x.Y"], "vLLM takes one"),
        (["--worker-ext", "x.Y"], "vLLM takes one"),
    ],
)
def test_arguments_that_tempering_sets_itself(installed, arguments, message):
    with pytest.raises(InputError, match=message):
        made(arguments)


def test_what_a_server_needs(tmp_path, profile, monkeypatch):
    with pytest.raises(DataError, match=r"none\.json"):
        made(profile=tmp_path / "none.json")
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tempering\[vllm\]'"):
        made(profile=profile)


def test_the_command_hands_over_what_it_does_not_know(installed, profile, monkeypatch):
    seen = []
    monkeypatch.setattr(serve, "become_server", lambda command, environment: seen.append(command))
    with pytest.raises(SystemExit) as left:
        main(["serve", "m", "--named", f"hot={profile}", "--port", "7", "--enforce-eager"])
    assert left.value.code == 0
    assert seen[0][-3:] == ["--port", "7", "--enforce-eager"]
    assert config_of(seen[0])["tempering"]["profiles"] == {"hot": str(profile)}
    with pytest.raises(SystemExit) as left:
        main(["serve", "--port", "7", "m"])
    assert left.value.code == 2 and len(seen) == 1
    for wrong in ("hot", "=x", "hot="):
        with pytest.raises(SystemExit) as left:
            main(["serve", "m", "--named", wrong])
        assert left.value.code == 2


# -- a running server


class Answers(BaseHTTPRequestHandler):
    """A server's side: answers are taken from a list, requests are kept."""

    answers: ClassVar[list] = []
    seen: ClassVar[list] = []

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        self.seen.append((self.command, self.path, self.headers.get("Authorization"), body))
        code, text = self.answers.pop(0)
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST  # noqa: N815

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Answers.answers, Answers.seen = [], []
    with HTTPServer(("127.0.0.1", 0), Answers) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_a_server_is_asked_and_swapped(server, profile, capsys):
    Answers.answers = [(200, '{"active": "abc"}')] * 4
    assert active_profile(server) == "abc"
    assert swap_remote(server + "/v1/", Profile.load(profile), "key") == "abc"
    assert swap_remote(server, None) == "abc"
    with pytest.raises(SystemExit):
        main(["swap", str(profile), "--url", server])
    assert capsys.readouterr().out == "abc\n"
    path = "/v1/tempering/profile"
    sent = {"profile": Profile.load(profile).to_json()}
    assert Answers.seen == [
        ("GET", path, None, None),
        ("POST", path, "Bearer key", sent),
        ("POST", path, None, {"profile": None}),
        ("POST", path, None, sent),
    ]


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        ((400, '{"error": {"message": "has 2 layers"}}'), InputError, "has 2 layers"),
        ((409, '{"error": {"message": "paused"}}'), RefusedError, "paused"),
        ((404, "{}"), RefusedError, "start it by `tempering serve`"),
        ((401, "{}"), RefusedError, "give --api-key"),
        ((500, "oh"), RefusedError, "failed: 500"),
        ((500, "[]"), RefusedError, "failed: 500"),
        ((200, "oh"), RefusedError, "not as a tempering server: b'oh'"),
        ((200, "{}"), RefusedError, "not as a tempering server"),
        ((200, "[1]"), RefusedError, "not as a tempering server"),
    ],
)
def test_a_servers_refusals(server, answer, kind, message):
    Answers.answers = [answer]
    with pytest.raises(kind, match=message):
        swap_remote(server, None)


def test_no_server():
    with pytest.raises(InputError, match="begins with http"):
        active_profile("localhost:8000")
    with pytest.raises(RefusedError, match="all workers have changed or none has"):
        active_profile("http://127.0.0.1:9")
    for url in ("http://localhost:abc", "http://local host:80", "http://[::1", "http://x/é"):
        with pytest.raises(InputError, match="is no url of a server"):
            active_profile(url)
    with pytest.raises(InputError, match="characters that an HTTP header can't carry$"):
        active_profile("http://127.0.0.1:9", "secret\n")
    with pytest.raises(SystemExit) as left:
        main(["swap", "p.json", "--none"])
    assert left.value.code == 2


@pytest.mark.parametrize(
    "reply", [b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"]
)
def test_a_port_that_speaks_something_else(reply):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            with listening.accept()[0] as connection:
                connection.recv(1 << 16)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(RefusedError, match="no server answers"):
            active_profile(f"http://127.0.0.1:{listening.getsockname()[1]}")
        thread.join()
