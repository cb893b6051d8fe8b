"""`tempering audit` on a file and on a server: verdict, record, report, exit status, refusals."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, RopeScalingType

from tempering.attention import Profile, tempered
from tempering.cli import main
from tempering.engines.loading.hub import load_model
from tempering.errors import ModelError
from tests.integration.llamacpp_tiny import write_gguf
from tests.tiny import TEXT, save_tiny_llama


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=2)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["audit", *arguments])
    return int(done.value.code or 0)


@torch.no_grad()
def logprobs(network: Any, ids: list[int]) -> list[float | None]:
    rows = network(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [None, *rows[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()]


def written(path: Path, directory: Path, temperature: float, length: int = 90) -> Path:
    network, tokenizer = load_model(directory)
    ids = tokenizer(TEXT).input_ids
    with tempered(network, Profile.from_matrix([[temperature] * 4] * 2)):
        lines = [
            json.dumps({"tokens": part, "logprobs": logprobs(network, part)})
            for part in (ids[:length], ids[length : 2 * length])
        ]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("temperature, code", [(1.0, 0), (1.1, 1)])
def test_a_file_of_log_probabilities(directory, tmp_path, capsys, temperature, code):
    file = written(tmp_path / "said.jsonl", directory, temperature)
    arguments = ("--reference", str(directory), "--engine", str(file), "--out", str(tmp_path / "r"))
    assert run(*arguments) == code
    verdict = capsys.readouterr().out.strip().splitlines()[-1]
    assert f"runs at T = {temperature:.3f}" in verdict
    (record,) = (tmp_path / "r").glob("audit-*.json")
    found = json.loads(record.read_text())
    assert found["kind"] == "audit"
    results = found["results"]
    assert results["verdict"][0]["right"] == ("yes" if code == 0 else "no")
    rows = results["temperature_of_each_layer"]
    assert [row["T"] for row in rows] == pytest.approx([temperature] * 2, rel=1e-3)
    assert all(row["low"] <= row["T"] <= row["high"] for row in rows)
    assert results["hypotheses"][0]["gain of log likelihood"] >= 0
    assert len(results["where_they_part"]) == 12
    page = record.with_suffix(".html").read_text()
    assert "where they part" in page.lower() and "runs at T" in page


def test_a_profile_that_was_not_applied(directory, tmp_path, capsys):
    file = written(tmp_path / "said.jsonl", directory, 1.0)
    profile = tmp_path / "p.json"
    Profile.from_matrix([[1.2] * 4] * 2).save(profile)
    code = run(
        "--reference", str(directory), "--engine", str(file), "--profile", str(profile),
        "--out", str(tmp_path), "--no-layers",
    )  # fmt: skip
    assert code == 1
    assert "as if the profile were not applied" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, says",
    [
        ("nonsense", "line 1"),
        ('{"tokens": [5, 6]}', 'expected {"tokens"'),
        ('{"tokens": [5, 6, 7], "logprobs": [null, -1.0]}', "3 tokens and 2 log"),
        ('{"tokens": [5, 6, 9999], "logprobs": [null, -1, -1]}', "another one"),
        ("", "is empty"),
        ('{"tokens": [5, 6, 7, 8], "logprobs": [null, -1, -1, -2]}', "from 2 tokens; give 2,000"),
    ],
)
def test_a_file_that_is_none(directory, tmp_path, capsys, line, says):
    file = tmp_path / "said.jsonl"
    file.write_text(line)
    code = run("--reference", str(directory), "--engine", str(file), "--out", str(tmp_path))
    message = capsys.readouterr().err
    assert code == 2 and says in message and message.count("\n") == 1


def test_options_that_fit_nothing(directory, tmp_path, capsys):
    file = written(tmp_path / "said.jsonl", directory, 1.0)
    own = ("--reference", str(directory), "--out", str(tmp_path))
    for more, says in (
        (("--engine", "nowhere"), "is none of these"),
        (("--engine", str(file), "--text", str(file)), "leave out --text"),
        (("--engine", str(file), "--precision", "int3"), "not 'int3'"),
        (("--engine", "vllm", "--precision", "q8"), "q8 is llama.cpp's"),
        (("--engine", "vllm", "--chunk", "9999"), "reads at most 512 tokens"),
    ):
        assert run(*own, *more) == 2
        assert says in capsys.readouterr().err


class Server(BaseHTTPRequestHandler):
    """An engine of one temperature that echoes; `trouble` says what else it does wrong."""

    network: Any
    tokenizer: Any
    trouble = ""
    asked = 0

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = type(self)
        kind.asked += 1
        ids, status = body["prompt"], 200
        if kind.trouble == "limit" and kind.asked % 2:
            status = 429
        if kind.trouble == "texts" and not isinstance(ids, str):
            status = 422
        if isinstance(ids, str):
            ids = self.tokenizer(ids).input_ids
        if kind.trouble == "bos":
            ids = [self.tokenizer.eos_token_id, *ids]
        if kind.trouble == "cuts":
            ids = ids[:40]
        values = logprobs(self.network, ids)
        names = [self.tokenizer.decode([token]) for token in ids]
        if kind.trouble == "other":
            names = [name.upper() for name in names]
        if kind.trouble == "top":
            values = [None if i % 5 else value for i, value in enumerate(values)]
        found: dict[str, Any] = {"tokens": [*names, "x"], "token_logprobs": [*values, -1.0]}
        if kind.trouble == "no echo":
            found = {"tokens": ["x"], "token_logprobs": [-1.0]}
        reply: Any = {
            "choices": [{"text": "", "logprobs": None if kind.trouble == "none" else found}],
            "usage": {"completion_tokens": 1},
        }
        if status != 200:
            message = "prompt: Input should be a valid string" if status == 422 else "slow down"
            reply = {"error": {"message": message}}
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(scope="module")
def server(directory) -> Iterator[str]:
    Server.network, Server.tokenizer = load_model(directory)
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{running.server_address[1]}/v1"
    running.shutdown()
    thread.join(30)
    running.server_close()


def of_server(server: str, directory: Path, tmp_path: Path, trouble: str) -> int:
    Server.trouble, Server.asked = trouble, 0
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return run(
        "--reference", str(directory), "--engine", server, "--text", str(text), "--chunk", "80",
        "--chunks", "3", "--no-layers", "--out", str(tmp_path / "runs"),
    )  # fmt: skip


@pytest.mark.parametrize("trouble", ["", "limit", "texts"])
def test_a_right_server_is_right(server, directory, tmp_path, capsys, trouble):
    assert of_server(server, directory, tmp_path, trouble) == 0
    assert "runs at T = 1.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "trouble, says, asked",
    [
        ("bos", "puts '<|end|>' before the prompt", 1),
        ("cuts", "read 40 of 80 tokens: it cuts prompts", 1),
        ("other", "has another tokenizer", 1),
        ("top", "top tokens only", 1),
        ("no echo", "ignores `echo`", 1),
        ("none", "gives no log probabilities of its prompt", 1),
    ],
)
def test_what_a_server_does_wrong_is_said_after_one_prompt(
    server, directory, tmp_path, capsys, trouble, says, asked
):
    assert of_server(server, directory, tmp_path, trouble) in (1, 2)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in message and Server.asked == asked


def test_a_server_of_another_model_is_refused_after_one_prompt(
    server, directory, tmp_path, capsys, monkeypatch
):
    other, _ = load_model(save_tiny_llama(tmp_path / "other", layers=2, seed=7))
    monkeypatch.setattr(Server, "network", other)
    assert of_server(server, directory, tmp_path, "") == 1
    assert "nothing in common" in capsys.readouterr().err and Server.asked == 1


def yarn(out: GGUFWriter) -> None:
    out.add_rope_scaling_type(RopeScalingType.YARN)
    out.add_rope_scaling_factor(8.0)


def llama3(out: GGUFWriter) -> None:
    out.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))


@pytest.mark.parametrize(
    "more, says", [(yarn, "rope.scaling.type = yarn"), (llama3, "its tensor rope_freqs.weight")]
)
def test_a_gguf_file_that_stretches_positions_is_no_reference(tmp_path, capsys, more, says):
    """transformers would leave it out, and a right engine would be called wrong."""
    file = write_gguf(tmp_path / "stretched.gguf", more=more)
    said = tmp_path / "said.jsonl"
    said.write_text('{"tokens": [5, 6, 7], "logprobs": [null, -1.0, -1.0]}')
    assert run("--reference", str(file), "--engine", str(said), "--out", str(tmp_path / "r")) == 1
    message = capsys.readouterr().err
    assert says in message and "Name the checkpoint that the file was made from" in message
    with pytest.raises(ModelError, match="stretches positions"):
        load_model(file)


def test_a_gguf_file_that_says_that_it_stretches_nothing_is_read(tmp_path):
    file = write_gguf(
        tmp_path / "plain.gguf", more=lambda out: out.add_rope_scaling_type(RopeScalingType.NONE)
    )
    network, _ = load_model(file)
    assert network.config.rope_parameters["rope_type"] == "default"
