"""Temperatures fitted to one context: what is learned from, in how much time, what is refused."""

from __future__ import annotations

import itertools
import json
import time

import pytest
import torch

from tempering import Profile, sample_text
from tempering.attention.tuning import context as fitting
from tempering.attention.tuning import from_batches, tune, tune_context
from tempering.attention.tuning.batches import text_batches
from tempering.cli import _run
from tempering.cli.shared.context import duration
from tempering.errors import ConvergenceWarning, DataError, InputError
from tempering.ranks import Ranks
from tests.integration.tuning_tiny import HEADS, LAYERS, sampled_text, tiny_llama
from tests.tiny import save_tiny_llama


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def context(model):
    """120 texts of 16 tokens, of the model under other temperatures, one after the other."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.exp(torch.randn(LAYERS, HEADS, generator=generator) * 0.5)
    return sampled_text(model, Profile.from_matrix(truth, model), 120, 16, seed=3).flatten()


KINDS, PLACES = 32, 64


@pytest.fixture(scope="module")
def recalling():
    """A GPT-2 that goes on as it did after the last such token, by weights set by hand.

    Its stream holds the token, the one before, the one to come, and the place, one-hot. Head 0 of
    layer 0 looks one place back and writes the token there to "before"; head 0 of layer 1 looks for
    places where "before" is this token, and writes the token there to "to come"; it looks softly.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    width = 3 * KINDS + PLACES
    sizes = {"vocab_size": KINDS, "n_positions": PLACES, "n_embd": width, "n_inner": 4}
    ends = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ends, n_layer=2, n_head=2)).eval()
    own, before, after, place = (
        slice(KINDS * part, KINDS * part + size)
        for part, size in enumerate((KINDS, KINDS, KINDS, PLACES))
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ln_" not in name:
                weight.zero_()
        model.transformer.wte.weight[:, own] = torch.eye(KINDS)
        model.transformer.wpe.weight[:, place] = torch.eye(PLACES)
        model.lm_head.weight[:, after] = torch.eye(KINDS)
        first, second = (block.attn for block in model.transformer.h)
        query, key, value = (slice(width * part, width * (part + 1)) for part in range(3))
        first.c_attn.weight[place, query][:, :PLACES] = torch.eye(PLACES)
        first.c_attn.weight[place, key][:, 1:PLACES] = torch.eye(PLACES)[:, :-1]
        first.c_attn.weight[own, value][:, :KINDS] = torch.eye(KINDS)
        first.c_proj.weight[:KINDS, before] = torch.eye(KINDS)
        second.c_attn.weight[own, query][:, :KINDS] = torch.eye(KINDS)
        second.c_attn.weight[before, key][:, :KINDS] = torch.eye(KINDS)
        second.c_attn.weight[own, value][:, :KINDS] = torch.eye(KINDS)
        second.c_proj.weight[:KINDS, after] = torch.eye(KINDS)
    return model, torch.randint(0, KINDS, (40 * 16,), generator=torch.Generator().manual_seed(0))


def test_fit_gains_on_spans_that_it_did_not_learn_from(recalling):
    fit = tune_context(*recalling, seconds=60, span=16)
    assert fit.spans == 40
    assert [len(goal.before) for goal in fit.tuned.held_out] == [10]
    assert fit.tuned.after < fit.tuned.before - 0.2
    matrix = fit.profile.temperature
    assert matrix.shape == (2, 2)
    assert float(matrix.min()) >= 0.5
    assert float(matrix.max()) <= 2
    assert float(matrix[1, 0]) < 0.8  # what recalls looks harder
    assert torch.allclose(matrix[:, 1], torch.ones(2).double())  # what does nothing stays


def test_model_is_left_as_it_was(recalling):
    model, context = recalling
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        plain = model(context[None, :32]).logits
        tune_context(model, context, seconds=30, span=16)
        assert torch.equal(model(context[None, :32]).logits, plain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("start", [[], [901, 902]])
@pytest.mark.parametrize("size", [16, 40, 257])
def test_second_halves_of_excerpts_are_asked_for(size, start):
    spans = torch.arange(1000, 1000 + 5 * size).reshape(5, size)
    goal = fitting.context_objective(spans, torch.Generator().manual_seed(0), start)
    length = max(8, size // 8)
    excerpts = []
    for own, piece in zip(spans.tolist(), goal.pieces, strict=True):
        ids, targets = piece.source.ids[0].tolist(), piece.source.targets[0].tolist()
        assert ids[: len(start) + size] == [*start, *own]
        assert not any(targets[: len(start) + size])
        rest, asked = ids[len(start) + size :], targets[len(start) + size :]
        assert len(rest) == 4 * length
        for at in range(0, len(rest), length):
            begin = own.index(rest[at])
            assert rest[at : at + length] == own[begin : begin + length]
            half = length // 2
            assert asked[at : at + length] == [False] * half + [True] * (length - half)
            excerpts.append(begin)
    assert len(set(excerpts)) > 3
    assert goal.count == 5 * 4 * (length - length // 2)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.zeros(2, 80, dtype=torch.long), r"integers \[length\]"),
        (torch.full((80,), 10**6), "ids lie in 1000000 to 1000000"),
        (torch.full((80,), -1), "ids lie in -1 to -1"),
    ],
)
def test_ids_that_are_none(model, ids, words):
    with pytest.raises(InputError, match=words):
        tune_context(model, ids, seconds=1)


@pytest.mark.filterwarnings("ignore:no step lowered")
@pytest.mark.parametrize("seed", [2**62, 2**70, -1])
@pytest.mark.parametrize("kind", [torch.int16, torch.int32])
def test_ids_of_any_integers_and_seeds_of_any_size(model, context, kind, seed):
    assert tune_context(model, context.to(kind), seconds=1e-3, span=16, seed=seed).spans == 4


@pytest.mark.filterwarnings("ignore:no step lowered")
def test_spans_and_their_excerpts_fit_the_model_s_positions(model, context, monkeypatch):
    sizes, make = [], fitting.context_objective

    def watched(spans, generator, start):
        sizes.append(spans.shape[1])
        return make(spans, generator, start)

    monkeypatch.setattr(fitting, "context_objective", watched)
    monkeypatch.setattr(model.config, "max_position_embeddings", 72)
    tune_context(model, context.repeat(4), seconds=1e-3, start=[1, 2])
    (size,) = sizes
    assert 2 + size + 4 * max(8, size // 8) <= 72 < 2 + size + 1 + 4 * max(8, (size + 1) // 8)


class Clock:
    """Goes on by a second whenever somebody looks."""

    def __init__(self) -> None:
        self.ticks = itertools.count()

    def perf_counter(self) -> float:
        return float(next(self.ticks))


def test_fit_without_time_changes_nothing_and_says_so(model, context, monkeypatch):
    monkeypatch.setattr("tempering.attention.tuning.run.time", Clock())
    monkeypatch.setattr("tempering.attention.tuning.context.time", Clock())
    with pytest.warns(ConvergenceWarning, match="T is 1 everywhere"):
        fit = tune_context(model, context, seconds=0.5, span=16)
    assert fit.spans == 4
    assert fit.profile.changes_nothing
    assert fit.tuned.stopped_because == "time is up"
    assert [step.step for step in fit.tuned.history] == [0]


@pytest.mark.filterwarnings("ignore:no step lowered")
def test_more_time_takes_more_steps(model, context, monkeypatch):
    steps = []
    for seconds in (4, 40, 300):
        monkeypatch.setattr("tempering.attention.tuning.run.time", Clock())
        objective = from_batches("text", text_batches(context.reshape(-1, 16)))
        tuned = tune(model, objective, rows=15, steps=6, until=float(seconds))
        steps.append(tuned.history[-1].step)
    assert steps[0] < steps[1] < steps[2]


@pytest.mark.filterwarnings("ignore:no step lowered")
def test_run_that_was_out_of_time_goes_on_from_its_state(model, context, monkeypatch, tmp_path):
    objective = from_batches("text", text_batches(context.reshape(-1, 16)))
    options = {"rows": 15, "steps": 3}
    whole = tune(model, objective, **options)
    monkeypatch.setattr("tempering.attention.tuning.run.time", Clock())
    first = tune(model, objective, **options, state=tmp_path / "run", until=4.0)
    monkeypatch.setattr("tempering.attention.tuning.run.time", time)
    second = tune(model, objective, **options, state=tmp_path / "run")
    assert first.stopped_because == "time is up"
    assert second.stopped_because == whole.stopped_because
    assert torch.equal(second.theta, whole.theta)
    assert [step.step for step in second.history] == [step.step for step in whole.history]


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), True])
def test_seconds_are_a_positive_number(model, context, seconds):
    with pytest.raises(InputError, match="seconds is a positive number"):
        tune_context(model, context, seconds=seconds)


def test_ids_are_one_row_of_integers(model, context):
    for wrong in (context[None], context.float(), context > 3):
        with pytest.raises(InputError, match="integers"):
            tune_context(model, wrong, seconds=1)
    with pytest.raises(DataError, match="63 tokens"):
        tune_context(model, context[:63], seconds=1)
    for wrong in (15, True):
        with pytest.raises(InputError, match="span"):
            tune_context(model, context, seconds=1, span=wrong)


def test_fit_against_the_clock_takes_one_process(model, context, monkeypatch):
    monkeypatch.setattr("tempering.attention.tuning.fit.here", lambda: Ranks(0, 2))
    with pytest.raises(InputError, match="takes one process"):
        tune_context(model, context, seconds=1)


def test_context_that_repeats_one_token_is_refused_or_fitted(model):
    with pytest.raises(DataError, match="all alike, so none can be held out to judge by; leave"):
        tune_context(model, torch.full((400,), 7), seconds=5)


@pytest.mark.parametrize(("text", "seconds"), [("20s", 20), ("1.5m", 90), (" 3s ", 3)])
def test_durations(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["20", "s", "-3s", "0s", "nan s", "1h", "1e3s", ""])
def test_durations_that_are_none(text):
    with pytest.raises(InputError, match="20s"):
        duration(text)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("context")
    model = str(save_tiny_llama(place / "model", layers=2))
    (place / "letters.txt").write_text(sample_text("fiction")[:400])
    (place / "blank.txt").write_text(" \n\t\n")
    return model, place


@pytest.mark.filterwarnings("ignore:no step lowered")
def test_generate_fits_to_a_context(files, tmp_path, capsys):
    model, place = files
    code = _run(
        [
            *("generate", "Who came?", "--context", str(place / "letters.txt"), "--fit", "2s"),
            *("--model", model, "--raw", "--max-tokens", "4", "--out", str(tmp_path), "--json"),
        ],
        debug=False,
    )
    assert code == 0, capsys.readouterr().err
    record = json.loads(capsys.readouterr().out)
    section = record["results"]["context"]
    assert section["held out after"] <= section["held out before"]
    assert section["tokens"] >= 64
    assert record["settings"]["fit"] == "2s"
    assert record["settings"]["prompt"].endswith("\n\nWho came?")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fit", "5s"), "--context"),
        (("--fit", "5s", "--context", "{}", "--pattern", "constant(2)"), "--pattern"),
        (("--fit", "soon", "--context", "{}"), "20s"),
        (("--context", "missing.txt"), "missing.txt"),
        (("--context", "{}/../blank.txt", "--fit", "5s"), "is empty"),
        (("--context", "{}", "--max-tokens", "100000", "--fit", "9m"), "reads at most"),
    ],
)
def test_generate_refuses_before_it_fits(files, tmp_path, capsys, arguments, message):
    model, place = files
    given = [a.format(place / "letters.txt").replace("letters.txt/../", "") for a in arguments]
    code = _run(
        ["generate", "Who?", *given, "--model", model, "--raw", "--out", str(tmp_path)], debug=False
    )
    assert code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
