"""Several servers of one model: calls are shared, one that dies loses nothing, others are named."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tempering.agents.contract import Call, EngineError, Reply, never, no_progress
from tempering.agents.tasks import generate_tasks, write_tasks
from tempering.attention.examining.layout_of import layout
from tempering.cli import _run
from tempering.engines.providers import Backoff, provider, replicas
from tempering.errors import InputError
from tempering.evaluation.compare import pattern_variants
from tempering.schedules import schedule
from tests.integration.agents_command import call, record_of, workers_of
from tests.integration.replicas_server import Fake, loss, running
from tests.tiny import TEXT, save_tiny_llama

NONE = Backoff(retries=0)


def engine(*fakes: Fake, backoff: Backoff = NONE, spec: str = "", **options: Any) -> Any:
    made = provider(spec + ",".join(fake.address for fake in fakes), "m", **options)
    made.backoff = backoff
    return made


def calls(count: int, **options: Any) -> list[Call]:
    return [Call(f"k{i}", f"prompt {i}", 0.5, 10, i, **options) for i in range(count)]


def replies(made: Any, asked: list[Call]) -> list[Reply]:
    found: dict[int, Reply] = {}

    def done(index: int, reply: Reply) -> None:
        assert index not in found, "a call was answered twice"
        found[index] = reply

    made.run(asked, done, no_progress, never)
    return [found[i] for i in range(len(asked))]


def test_calls_go_to_the_replica_with_the_fewest_under_way():
    fast, slow = Fake(), Fake(slow=0.2)
    with running(fast, slow):
        made = engine(fast, slow, concurrency=4)
        found = replies(made, calls(30))
        assert made.describe()["replicas"] == [fast.address, slow.address]
    assert [reply.output for reply in found] == [f"echo: prompt {i}" for i in range(30)]
    shares = Counter(reply.replica for reply in found)
    assert shares[fast.address] == len(fast.answered) > 2 * len(slow.answered) > 0
    assert fast.most <= 4 and slow.most <= 4


@pytest.mark.parametrize("dies_at", [0, 3])
def test_a_replica_that_dies_loses_nothing_even_without_retries(dies_at):
    first, second, third = Fake(slow=0.01), Fake(slow=0.01, dies_at=dies_at), Fake(slow=0.01)
    with running(first, second, third):
        found = replies(engine(first, second, third, concurrency=6), calls(40))
    assert [reply.output for reply in found] == [f"echo: prompt {i}" for i in range(40)]
    assert len(second.answered) <= dies_at
    moved = [reply for reply in found if reply.attempts > 1]
    assert moved and all(reply.replica != second.address for reply in moved)
    assert sum(len(fake.answered) for fake in (first, second, third)) == 40


@pytest.mark.parametrize("status", [503, 404, 401])
def test_a_replica_that_answers_with_errors_takes_no_calls_from_the_others(status):
    # It answers at once, so it always has the fewest requests under way.
    first, second, good = Fake(refuses=status), Fake(refuses=status), Fake(slow=0.1)
    with running(first, second, good):
        found = replies(engine(first, second, good, concurrency=8), calls(24))
    assert [reply.output for reply in found] == [f"echo: prompt {i}" for i in range(24)]
    assert first.requests + second.requests <= 16


def test_a_request_that_no_replica_can_serve_is_refused_by_each_of_them():
    first, second = Fake(refuses=400), Fake(refuses=400)
    with running(first, second):
        found = replies(engine(first, second, concurrency=2), calls(6))
    assert all(reply.output is None and "HTTP 400" in reply.error for reply in found)
    assert first.requests + second.requests == 6  # nothing was asked twice


def test_all_replicas_dead_is_an_error_in_every_reply_and_one_that_comes_back_is_used(monkeypatch):
    first, second = Fake(dies_at=2), Fake(dies_at=2)
    with running(first, second):
        made = engine(first, second, concurrency=1)
        found = replies(made, calls(8))
    assert [reply.output is None for reply in found] == [False] * 4 + [True] * 4
    assert [reply.replica for reply in found[:4]] == [first.address] * 2 + [second.address] * 2
    assert all("127.0.0.1" in reply.error for reply in found[4:])
    # A replica rests for a while after a failure, and is asked again then.
    monkeypatch.setattr(replicas, "REST", 0.05)

    def broken_once(fake: Fake, number: int) -> None:
        fake.dead = number == 0

    third, fourth = Fake(), Fake(meddle=broken_once)
    with running(third, fourth):
        made = engine(third, fourth, concurrency=2)
        assert all(reply.output for reply in replies(made, calls(2)))
        fourth.dead = False
        time.sleep(0.1)
        assert all(reply.output for reply in replies(made, calls(6)))
        assert fourth.answered


def test_what_differs_between_replicas_is_named_before_the_first_call():
    good, other, plain = Fake(), Fake(models=("n", "o")), Fake(profiles=False)
    tempered, dead = Fake(), Fake()
    tempered.swap({"rows": "hot"})
    with running(good, other, plain, tempered, dead):
        dead.die()
        for wrong, words in (
            (other, f"the replica {other.address} serves n, o and not m"),
            (plain, f"the replica {plain.address} serves attention profiles not at all, and "),
            (tempered, f"the replica {tempered.address} serves the attention profile {'[0-9a-f]'}"),
            (
                dead,
                f"1 of 2 replicas can't be asked what they serve: {dead.address}: can't connect",
            ),
        ):
            with pytest.raises(EngineError, match=words):
                replies(engine(good, wrong), calls(3))
        assert not any(fake.answered for fake in (good, other, plain, tempered, dead))
        # An attention pattern is refused by each replica that doesn't know it, and then sent.
        found = replies(engine(good, spec="vllm:"), calls(2, attention="uniform(1.2)"))
        assert all(reply.output and reply.replica is None for reply in found)


def test_addresses_are_read_from_a_list_or_a_file(tmp_path):
    path = tmp_path / "replicas.txt"
    path.write_text("# ours\nhttp://a:1/v1  # the first\n\nhttp://b:2/v1/\n")
    for spec in (str(path), f"vllm:{path}", "http://a:1/v1, http://b:2/v1"):
        made = provider(spec, "m")
        assert [c.address for c in made.clients] == ["http://a:1/v1", "http://b:2/v1"]
        assert made.has_attention == spec.startswith("vllm:")
    path.write_text("# nobody\n")
    with pytest.raises(InputError, match="names no server; write an address a line"):
        provider(str(path), "m")
    path.write_text("a:1/v1\n")
    with pytest.raises(InputError, match="an address in .*replicas.txt 'a:1/v1' is not an address"):
        provider(str(path), "m")
    with pytest.raises(InputError, match="the server http://a:1/v1 is named twice"):
        provider("http://a:1/v1,http://a:1/v1/", "m")
    with pytest.raises(InputError, match="did you mean http://b:2"):
        provider("http://a:1/v1,b:2", "m")


def test_explore_and_throb_keep_the_replica_of_every_reply(tmp_path, capsys):
    tasks = write_tasks(tmp_path / "tasks.jsonl", generate_tasks(3, seed=1))
    first, second = Fake(slow=0.01), Fake(slow=0.01, dies_at=5)
    with running(first, second):
        servers = ["--engine", f"{first.address},{second.address}", "--model", "m"]
        code = call("explore", "--tasks", tasks, "-k", 4, *servers, "--out", tmp_path / "e")
        assert code in (0, 1)  # the echo answers no task
        rows = [
            json.loads(line)
            for line in next((tmp_path / "e").glob("*.samples.jsonl")).read_text().splitlines()
        ]
        assert len(rows) == 3 * 4 * 2 and all(row["output"] for row in rows)
        shares = Counter(row["replica"] for row in rows)
        assert shares[first.address] == len(first.answered)
        assert 24 - len(first.answered) == shares[second.address] <= 5
        settings = record_of(tmp_path / "e", "explore").settings
        assert settings["replicas"] == [first.address, second.address]
    third, fourth = Fake(), Fake(dies_at=4)
    with running(third, fourth):
        servers = ["--engine", f"{third.address},{fourth.address}", "--model", "m"]
        assert call("throb", "Plan a picnic.", *servers, "--out", tmp_path / "t") == 0
        workers = workers_of(record_of(tmp_path / "t"))
        assert len(workers) == 12 + 3 + 1 and all(row["output"] for row in workers)
        assert Counter(row["replica"] for row in workers)[fourth.address] <= 4
    capsys.readouterr()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=4))


def compared(model: str, out: Path, *fakes: Fake) -> int:
    text = out.parent / "text.txt"
    text.write_text(TEXT)
    spec = "vllm:" + ",".join(fake.address for fake in fakes)
    return _run(
        ["compare", "--engine", spec, "--model", model, "--text", str(text), "--chunk", "32",
         "--chunks", "6", "--pattern", "linear(1.2,0.9)", "--controls", "--out", str(out)],
        debug=False,
    )  # fmt: skip


def costs(out: Path) -> dict[str, float]:
    return {row["label"]: row["cost"] for row in record_of(out, "compare").results["cost"]}


def expected(model: str) -> dict[str, float]:
    """The costs by the servers' own formula, from profiles made here."""
    from tempering.chunks import token_chunks
    from tempering.engines.loading.hub import load_model

    network, tokenizer = load_model(model)
    plan = layout(network)
    chunks = token_chunks(tokenizer, TEXT, 32, 6).tolist()
    variants = pattern_variants(schedule("linear(1.2,0.9)"), plan, 4, True)
    base = [loss(ids, None) for ids in chunks]
    found = {}
    for variant in variants:
        own = [loss(ids, variant.profile.to_json()) for ids in chunks]
        found[variant.label] = sum(a - b for a, b in zip(own, base)) / len(base)
    return found


def test_compare_over_replicas_is_that_of_one_and_a_dying_one_loses_nothing(
    model, tmp_path, capsys
):
    wanted = expected(model)

    def restarted(fake: Fake, number: int) -> None:
        if number > 4 and fake.profile is not None:
            fake.swap(None)  # as a server that was started anew, with the profile of its start

    quiet, dying, forgetful = Fake(slow=0.01), Fake(slow=0.01, dies_at=3), Fake(meddle=restarted)
    with running(quiet, dying, forgetful):
        assert compared(model, tmp_path / "a", quiet, dying, forgetful) == 0
        told = capsys.readouterr().err
        assert f"the replica {dying.address} is left: " in told
        found = costs(tmp_path / "a")
        assert found.keys() == wanted.keys() and len(wanted) > 4
        for label, value in wanted.items():
            assert found[label] == pytest.approx(value, abs=1e-9), label
        assert quiet.digest == "untempered"  # as it was found
        rows = record_of(tmp_path / "a", "compare").results["replicas"]
        assert sum(row["scored"] for row in rows) == 6 * (1 + len(wanted))
        assert [row["left because"] is None for row in rows][:2] == [True, False]
    # One sends bodies that are cut, another NaN: both are left, and no number comes from them.
    cut = Fake(spoils=lambda data, number: data[:-9] if number > 1 else data)
    none = Fake(spoils=lambda data, number: data.replace(b": -", b': NaN, "was": -', 1))
    good = Fake(slow=0.01)
    with running(cut, none, good):
        assert compared(model, tmp_path / "c", cut, none, good) == 0
    told = capsys.readouterr().err
    assert f"the replica {cut.address} is left: JSONDecodeError" in told
    assert f"the replica {none.address} is left: it gives a token a log probability" in told
    for label, value in wanted.items():
        assert costs(tmp_path / "c")[label] == pytest.approx(value, abs=1e-9), label
    # All die: what was finished is kept, and other replicas go on.
    last = Fake(dies_at=20)
    with running(last):
        assert compared(model, tmp_path / "b", last) == 1
        assert "no replica is left" in capsys.readouterr().err
    fresh = Fake()
    with running(fresh):
        assert compared(model, tmp_path / "b", fresh) == 0
        kept = int(re.search(r"resuming: (\d+) finished pieces", capsys.readouterr().err)[1])
        # One chunk is scored again, to see that the weights are the same.
        assert 0 < kept <= 20 and len(fresh.answered) == 6 * (1 + len(wanted)) - kept + 1
    for label, value in wanted.items():
        assert costs(tmp_path / "b")[label] == pytest.approx(value, abs=1e-9), label


def test_compare_goes_on_with_the_same_weights_alone(model, tmp_path, capsys):
    first, retrained = Fake(dies_at=9), Fake(worse=0.2)
    with running(first, retrained):
        assert compared(model, tmp_path / "a", first) == 1
        assert compared(model, tmp_path / "a", retrained) == 1
        told = capsys.readouterr().err
        assert f"{retrained.address} gives the first chunk a loss of" in told
        assert "another model under one name. Give another --out" in told
    other, same = Fake(models=("n",), worse=0.2), Fake()
    with running(other, same):  # of another name: a run of its own
        assert compared(model, tmp_path / "a", other) == 0
        assert "resuming" not in capsys.readouterr().err
        assert compared(model, tmp_path / "a", same) == 0
        assert "resuming" in capsys.readouterr().err
    good, bad = Fake(), Fake(worse=0.2)
    with running(good, bad):
        assert compared(model, tmp_path / "b", good, bad) == 1
        told = capsys.readouterr().err
        assert f"the replicas {good.address} and {bad.address} give the first chunk" in told
        assert "other weights under one name" in told


def test_a_replica_that_was_left_ends_as_it_was_found(model, tmp_path, capsys):
    def failing(fake: Fake, number: int) -> None:
        fake.refuses = 500 if fake.profile is not None else 200

    good, broken = Fake(), Fake(meddle=failing)
    poor = Fake(spoils=lambda data, number: data.replace(b"prompt_logprobs", b"nothing"))
    with running(good, broken, poor):
        assert compared(model, tmp_path, good, broken, poor) == 0
        told = capsys.readouterr().err
        assert f"the replica {broken.address} is left: " in told
        assert f"the replica {poor.address} is left: it gives no log probabilities" in told
        assert broken.digest == good.digest == poor.digest == "untempered"
    values = expected(model)
    assert costs(tmp_path) == {
        label: pytest.approx(value, abs=1e-9) for label, value in values.items()
    }
    poor = Fake(spoils=lambda data, number: data.replace(b"prompt_logprobs", b"nothing"))
    with running(poor):
        assert compared(model, tmp_path / "p", poor) == 1
        assert "no replica is left" in capsys.readouterr().err


def test_compare_refuses_replicas_that_differ_or_are_tempered(model, tmp_path, capsys):
    good, other, hot, deep = Fake(), Fake(models=("n",)), Fake(), Fake()
    hot.swap({"rows": "hot"})
    deep.depth = 5
    with running(good, other, hot, deep):
        for fakes, words in (
            ((good, other), f"the replica {other.address} serves n and not m"),
            ((good, hot), f"the replica {hot.address} serves the attention profile"),
            ((hot,), f"the replica {hot.address} serves the profile {hot.digest}"),
            ((good, deep), f"the replica {deep.address} has other layers than {good.address}"),
        ):
            assert compared(model, tmp_path / "o", *fakes) == 1
            assert words in capsys.readouterr().err
        assert not good.answered and hot.digest != "untempered"  # left as they were found
        good.die()
        assert compared(model, tmp_path / "o", good, hot) == 1
        assert f"{good.address} doesn't tell its models: " in capsys.readouterr().err
