"""Several ranks share the work of a run, to the result of one process; errors reach all of them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import torch.multiprocessing

from tempering import Profile
from tempering.attention.measuring.measure import QUANTITIES, measure_tokens
from tempering.attention.tuning import Constraint, from_batches, from_functions, tune
from tempering.attention.tuning.batches import text_batches
from tempering.cli import _run
from tempering.errors import RankError, TemperingError
from tempering.estimators import TemperatureScaler
from tempering.estimators.calibration.language import Question, TokenLogits, answer_logits
from tempering.evaluation.cost import Variant, cost_rows
from tempering.evaluation.evidence import contenders, measure_evidence
from tempering.evaluation.journal import Journal
from tempering.ranks import ALONE, here, joined
from tests.integration.tuning_tiny import HEADS, LAYERS, WORDS, sampled_text, tiny_llama
from tests.tiny import TEXT, save_tiny_llama

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


class Words:
    """A tokenizer of one word a letter, enough for questions."""

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoded", (), {"input_ids": [ord(c) % WORDS for c in text]})()


def everything(folder: Path, rank: int = 0) -> dict[str, Any]:
    """The result of every function that shares its work, on this process's ranks."""
    model = tiny_llama()
    generator = torch.Generator().manual_seed(1)
    truth = torch.exp(torch.randn(LAYERS, HEADS, generator=generator) * 0.5)
    profile = Profile.from_matrix(truth, model)
    ids, other = (sampled_text(model, p, 21, 16, seed=s) for p, s in ((profile, 3), (None, 4)))
    text, rest = (from_batches(n, text_batches(t)) for n, t in (("text", ids), ("rest", other)))
    found: dict[str, Any] = {}
    for name, chunks in (("five chunks", ids[:5]), ("one chunk", ids[:1])):
        measured = measure_tokens(model, chunks, profile=profile, buckets=3)
        found[name] = [getattr(measured, quantity) for quantity in QUANTITIES]
        found[name] += [*measured.by_position.values(), measured.entropy_by_chunk]
    # A model whose weights accelerate keeps elsewhere, as device_map does it.
    offloaded = accelerate.cpu_offload(tiny_llama(), torch.device("cpu"))
    found["offloaded"] = [measure_tokens(offloaded, ids[:3], profile=profile).entropy]
    rule = tempering_rule(model)
    found["rules"] = [
        [count.queries, count.coldest, count.hottest]
        for counts in measure_tokens(model, ids[:3], profile=rule).rules.values()
        for count in counts
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, more in {
            "newton": {"rows": 4, "steps": 3},
            "newton, one row": {"steps": 2, "held_out": 0},
            "adam": {"method": "adam", "rows": 3, "steps": 6, "rate": 0.1},
        }.items():
            constraint = Constraint(rest, 0.05)
            tuned = tune(model, text, constraint=constraint, per="layer", **more)
            found[name] = [tuned.theta, tuned.after, tuned.cost, len(tuned.history)]
        functions = [lambda m, i=i: m(ids[i : i + 1], labels=ids[i : i + 1]).loss for i in range(5)]
        tuned = tune(model, from_functions("f", functions), per="layer", steps=2)
        found["functions"] = [tuned.theta, tuned.after]
    variants = [Variant("hot", profile), Variant("warm", None, 1.3)]
    journal = None
    if here().first:
        journal = Journal(folder, "costs", {"ranks": here().size})
        journal.put("1:hot", [9.0, 8.0])  # as if it had been finished before
    costs = cost_rows(model, ids[:5], variants, journal=journal)
    found["costs"] = [[row[label][:2] for label in ("", "hot", "warm")] for row in costs.rows]
    found["kept"] = sorted(journal.entries) if journal is not None else None
    if journal is not None:
        journal.close()
    rivals = contenders(model, profile, shuffles=1)
    evidence = measure_evidence(model, [rest], rivals)
    found["evidence"] = [[row.untempered, row.value, row.change.low] for row in evidence]
    labels = np.arange(60) % 3
    table = np.random.default_rng(0).normal(size=(60, 3)) + 2 * np.eye(3)[labels]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for per in ("global", "class", "input"):
            data = TokenLogits(model, ids)
            scaler = TemperatureScaler(per=per, prior=(0.0, 0.5)).fit(data, data.labels)
            report = scaler.report(data, data.labels, resamples=20)
            found[f"tokens, {per}"] = [scaler.temperature_, scaler.standard_error_]
            found[f"report, {per}"] = [[m.before.value, m.after.low] for m in report.metrics]
            scaler = TemperatureScaler(per=per).fit(table, labels, sample_weight=labels + 0.5)
            found[f"table, {per}"] = [scaler.temperature_, scaler.standard_error_]
    questions = [Question("ab" * i, ("c", "de"), 0) for i in range(1, 4)]
    found["answers"] = answer_logits(model, Words(), questions)
    return found


def tempering_rule(model: Any) -> Profile:
    from tempering import adaptive_profile

    return adaptive_profile("support(3,0.8,1.25)", model)


def flat(value: Any) -> list[float]:
    """All numbers in nested lists of numbers, arrays and tensors."""
    if isinstance(value, list | tuple):
        return [number for item in value for number in flat(item)]
    return np.asarray(value, np.float64).flatten().tolist()


def failures() -> list[str]:
    """The messages of errors that reach all ranks, whichever of them has the cause."""
    rank, model = here().rank, tiny_llama()
    ids = sampled_text(model, None, 5, 16, seed=3)
    told = []

    def failing(call: Any) -> None:
        try:
            call()
        except (TemperingError, KeyboardInterrupt) as error:
            told.append(f"{type(error).__name__}: {error}")

    failing(lambda: measure_tokens(tiny_llama(seed=rank), ids))
    changed = tiny_llama()
    with torch.no_grad():  # one bit of one weight, which no fingerprint samples
        changed.lm_head.weight.view(torch.int32)[7, 5] ^= rank
    failing(lambda: measure_tokens(changed, ids))
    failing(lambda: measure_tokens(model, ids + rank))
    failing(lambda: tune(model, from_batches("t", text_batches(ids)), prior_sd=0.5 + rank))
    broken = tiny_llama()

    def poison(module: Any, arguments: Any, output: Any) -> Any:
        return output * float("nan") if rank == 1 else output

    broken.model.layers[1].self_attn.q_proj.register_forward_hook(poison)
    failing(lambda: measure_tokens(broken, ids))
    failing(lambda: cost_rows(model, ids, [Variant("x", None, 1.0 + rank)]))
    objective = from_batches("t", text_batches(ids))

    def stop(stage: str, done: int, total: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C reaches one rank alone

    failing(lambda: tune(model, objective, per="layer", progress=stop))
    rivals = contenders(model, Profile.from_matrix(torch.ones(LAYERS, HEADS), model), shuffles=0)
    test = from_batches("t", text_batches(ids if rank == 0 else ids.flip(1)))
    failing(lambda: measure_evidence(model, [test], rivals))
    labels = np.arange(600) % 3
    table = np.random.default_rng(0).normal(size=(600, 3)) + 2 * np.eye(3)[labels]
    groups = np.array(["a", "b"])[(np.arange(600) + rank) % 2]
    failing(lambda: TemperatureScaler(per="group").fit(table, labels, groups=groups))
    scaler = TemperatureScaler().fit(table, labels)
    failing(lambda: scaler.report(table, labels, clusters=groups))
    table[401, 1] += rank
    failing(lambda: TemperatureScaler().fit(table, labels))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = _run(["measure", "--chunk", str(32 + rank), "--text", f"{rank}/a.txt"], False)
    told.append(f"{code} {said.getvalue()}")
    # After all that the ranks still meet.
    told.append(str(here().each(rank)))
    return told


def on_a_rank(rank: int, folder: str) -> None:
    """All that is compared with one process, and all errors, on one of two ranks."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    with joined() as ranks:
        assert (ranks.rank, ranks.size) == (rank, 2)
        found = {"found": everything(Path(folder), rank), "told": failures()}
    assert here() is ALONE
    torch.save(found, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))  # a spawned process gets its parent's path, to find this
        torch.multiprocessing.spawn(on_a_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(two_ranks, tmp_path):
    alone = everything(tmp_path)
    first, second = (item["found"] for item in two_ranks)
    assert first.pop("kept") == alone.pop("kept") and second.pop("kept") is None
    assert first.keys() == alone.keys() == second.keys()
    assert first["costs"][1][1] == [9.0, 8.0]  # from the journal, on whichever rank
    for name, expected in alone.items():
        np.testing.assert_allclose(flat(first[name]), flat(expected), 1e-6, 1e-9, err_msg=name)
        np.testing.assert_array_equal(flat(first[name]), flat(second[name]), err_msg=name)


@pytest.mark.slow
def test_an_error_on_one_rank_reaches_the_other(two_ranks):
    first, second = (item["told"] for item in two_ranks)
    names = ("model (fingerprint)", "weights (checksum)", "text", "prior_sd")
    for name, mine, theirs in zip(names, first, second, strict=False):
        assert mine == theirs
        assert mine.startswith("RankError: rank 1 of 2 (on ") and f"another {name} " in mine
    assert first[4].startswith("RankError: rank 1 of 2 failed: model.layers.1.self_attn, head 0")
    assert second[4].startswith("EnergyError: model.layers.1.self_attn, head 0")
    assert first[5] == second[5] and "another variants than rank 0" in first[5]
    assert first[6] == second[6] == "KeyboardInterrupt: "
    for name, mine, theirs in zip(
        ("tests", "groups", "clusters", "logits"), first[7:], second[7:], strict=False
    ):
        assert mine == theirs and f"another {name} than rank 0" in mine
    assert first[11].startswith("1 tempering: rank 1 of 2 (on ") and second[11] == "1 "
    assert "has another --chunk than rank 0" in first[11]
    assert first[12] == second[12] == "[0, 1]"


def torchrun(*arguments: object, ranks: int = 2, entry: tuple[object, ...] = ("-m", "tempering")):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    process = subprocess.Popen(
        [*command, str(ranks), *map(str, entry), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
    )
    try:
        out, told = process.communicate(timeout=500)
    except subprocess.TimeoutExpired:
        process.terminate()  # and with it the ranks, which killing torchrun would leave behind
        out, told = process.communicate(timeout=60)
        raise AssertionError(f"not done in 500 s: {told[-3000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, told)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=2))


# On rank 1 the process is killed after the first step, as by a machine that runs out of memory.
KILLED = """
import os, signal, sys
from tempering.attention.tuning.run import Run
from tempering.cli import main
if os.environ["RANK"] == "1":
    Run._keep = lambda self: os.kill(os.getpid(), signal.SIGKILL) if self.step == 1 else None
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_rank_that_is_killed_loses_nothing_that_is_finished(model, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "killed.py").write_text(KILLED)
    options = ["tune", "--model", model, "--data", tmp_path / "a.txt", "--chunk", 32]
    options += ["--chunks", 9, "--steps", 3, "--per", "layer", "--shuffles", 1, "--elsewhere", 0]
    options += ["--held-out", 0]
    out = tmp_path / "out" / "tuned.json"
    done = torchrun(*options, "--out", out, entry=(tmp_path / "killed.py",))
    assert done.returncode != 0
    ended = [line for line in done.stderr.splitlines() if line.startswith("tempering: rank 0")]
    assert len(ended) == 1 and ("lost the others" in ended[0] or "SIGTERM" in ended[0])
    assert out.with_name("tuned.json.state").exists()
    done = torchrun(*options, "--out", out, "--resume", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and done.stderr.count("step 3: ") == 1
    record = json.loads(done.stdout)  # one record, of rank 0
    assert len([*out.parent.glob("tune-*.json")]) == 1
    assert _run([str(item) for item in (*options, "--out", tmp_path / "1" / "t.json")], False) == 0
    capsys.readouterr()
    alone = json.loads(next((tmp_path / "1").glob("tune-*.json")).read_text())
    assert record["settings"]["step"] == alone["settings"]["step"] > 0
    for one, other in zip(
        record["results"]["training"]["history"], alone["results"]["training"]["history"]
    ):
        assert one["held_out"] == pytest.approx(other["held_out"], abs=1e-6)
    for one, other in zip(record["results"]["cost"], alone["results"]["cost"], strict=True):
        assert one["cost"] == pytest.approx(other["cost"], abs=1e-6)
    ours, theirs = Profile.load(out), Profile.load(tmp_path / "1" / "t.json")
    torch.testing.assert_close(ours.temperature, theirs.temperature, rtol=1e-6, atol=1e-6)


# One process group for all commands: torchrun's store serves a single one.
SEVERAL = """
import json, sys, torch
from tempering.cli import main
torch.distributed.init_process_group("gloo")
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as left:
        if left.code:
            raise
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:linear.* has 2 stages on 2 points")
def test_commands_on_two_ranks_write_one_record_with_the_numbers_of_one_process(
    model, tmp_path, capsys
):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "several.py").write_text(SEVERAL)
    source = ["--text", str(tmp_path / "a.txt"), "--model", model, "--chunk", "32", "--chunks", "5"]
    patterns = ["--pattern", "linear(1.2,0.9)"]
    commands = [
        ["measure", *source, *patterns, "--read-as", "relative-support", "--amplitude", "0.5"],
        ["measure", *source, "--pattern", "support(4,0.8,1.25)"],
        ["compare", *source, *patterns, "--samples", "2", "--prompts", "3", "--max-tokens", "4"],
        ["calibrate", *source],
    ]
    there, here_ = tmp_path / "two", tmp_path / "one"
    asked = [[*command, "--out", str(there)] for command in commands]
    done = torchrun(json.dumps(asked), entry=(tmp_path / "several.py",))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("record: ") == len(commands)  # of rank 0 alone
    for command in commands:
        assert _run([*command, "--out", str(here_)], debug=False) == 0
    capsys.readouterr()
    records = [sorted(place.glob("*.json"), key=created) for place in (there, here_)]
    assert len(records[0]) == len(records[1]) == len(commands)
    for one, other in zip(*records):
        two, alone = (json.loads(path.read_text()) for path in (one, other))
        assert two["kind"] == alone["kind"] and two["settings"] == alone["settings"]
        numbers = [numbers_in(item["results"]) for item in (two, alone)]
        np.testing.assert_allclose(*numbers, 1e-5, 1e-6, err_msg=two["kind"])
        assert len(numbers[0]) > 10
    assert not [*there.glob("*.partial.jsonl")] and not [*there.glob("*.lock")]


def created(path: Path) -> int:
    return path.stat().st_mtime_ns


def numbers_in(value: Any) -> list[float]:
    """All numbers in nested JSON, in their order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return [float(value)] if plain else []


@pytest.mark.slow
def test_a_command_that_does_not_share_says_so_once(tmp_path):
    done = torchrun("patterns", ranks=2)
    assert done.returncode != 0 and done.stdout == ""
    told = [line for line in done.stderr.splitlines() if line.startswith("tempering: ")]
    assert told == [
        "tempering: patterns runs in one process, and 2 were started; run it without torchrun "
        "(only tune, measure, compare, calibrate share their work)"
    ]


def test_one_process_meets_nobody(monkeypatch):
    ranks = here()
    assert ranks is ALONE and [*ranks.mine(3)] == [0, 1, 2] and ranks.each("x") == ["x"]
    ranks.agree({"anything": object()})
    value = torch.tensor([1.0, float("nan")])
    (total,) = ranks.sum(value)
    assert total.dtype == torch.float64 and torch.equal(total[:1], torch.ones(1).double())
    with pytest.raises(ZeroDivisionError), ranks.together():
        _ = 1 / 0
    for name, given in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "h")):
        monkeypatch.setenv(name, given)
    from tempering.ranks import started

    assert not started()  # without a port it is no launcher of ours
    monkeypatch.setenv("MASTER_PORT", "1")
    assert started()
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert not started()


def test_ranks_that_can_not_meet_say_what_is_amiss(monkeypatch):
    for name, given in (("RANK", "5"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, given)
    monkeypatch.setenv("MASTER_PORT", "not a port")
    told = "can't meet the other ranks at localhost.*MASTER_PORT"
    with pytest.raises(RankError, match=told), joined():
        pass
    assert here() is ALONE
