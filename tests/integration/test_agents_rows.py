"""Many rows in one batch against each row alone: other code, without cache or padding."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from tempering import Profile, load_model, tempered
from tempering.agents.contract import Call, Reply, never, no_progress
from tempering.agents.temperatures import rule_for
from tempering.engines.generating.local import LocalEngine
from tempering.engines.generating.row_sampling import BatchRow
from tempering.engines.generating.row_scores import score_rows
from tempering.engines.generating.rows import generate_rows
from tempering.errors import InputError, TemperatureError
from tempering.tokens import parse_policy
from tests.tiny import save_tiny_llama

WORD = 2**64


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_model(str(save_tiny_llama(tmp_path_factory.mktemp("tiny"))))


def uniform(seed: int, step: int, token: int) -> float:
    """SplitMix64 from its paper, on unbounded integers."""
    key = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "big")
    z = (key + (token + (step << 32)) * 0x9E3779B97F4A7C15) % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    z ^= z >> 31
    return ((z >> 12) + 0.5) * 2.0**-52


def alone(model: Any, row: BatchRow) -> tuple[list[int], int | None]:
    """One row, every step a pass over all of it: argmax of log p + Gumbel noise, in float64."""
    ids = row.prompt.tolist()
    own = row.profile or Profile.from_schedule(1.0, model)
    ends = {model.generation_config.eos_token_id, *row.stop}
    written: list[int] = []
    with tempered(model, own), torch.no_grad():
        for step in range(row.tokens):
            logits = model(input_ids=torch.tensor([ids + written])).logits[0, -1].double()
            if row.temperature == 0:
                token = int(logits.argmax())
            else:
                p = (logits / row.temperature).softmax(0)
                if row.top_p is not None:
                    order = p.argsort(descending=True).tolist()
                    mass, kept = 0.0, []
                    for v in order:
                        if mass >= row.top_p:
                            break
                        kept.append(v)
                        mass += float(p[v])
                    p = torch.tensor([float(p[v]) if v in kept else 0.0 for v in range(len(p))])
                scores = [
                    math.log(float(p[v])) - math.log(-math.log(uniform(row.seed, step, v)))
                    if p[v] > 0
                    else -math.inf
                    for v in range(len(p))
                ]
                token = scores.index(max(scores))
            if token in ends:
                return written, token
            written.append(token)
    return written, None


def some_rows(model: Any, tokenizer: Any) -> list[BatchRow]:
    """Rows that differ in all that a row has; several share a prompt, two share a profile too."""
    texts = ["Hot layers", "Hot layers explore, cold layers commit. It is", "stay"]
    prompts = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
    profiles = [
        None,
        Profile.from_schedule(1.6, model),
        Profile.from_schedule("throb(12,3,1,12)|amplitude(2)", model),
    ]
    stop = tuple(i for i in range(len(tokenizer)) if "e" in tokenizer.decode([i]))
    rows = []
    for i in range(14):
        rows.append(
            BatchRow(
                prompts[i % 3],
                temperature=(0.0, 0.3, 1.0, 1.5, 0.6)[i % 5],
                profile=profiles[i % 4 % 3],
                seed=100 + i // 2,
                tokens=(3, 12, 9)[i // 3 % 3],
                top_p=(None, None, 0.8)[i % 3 if i > 6 else 0],
                stop=stop if i % 4 == 1 else (),
            )
        )
    return rows


def test_each_row_says_what_it_says_alone(tiny):
    model, tokenizer = tiny
    rows = some_rows(model, tokenizer)
    found = generate_rows(model, rows)
    expected = [alone(model, row) for row in rows]
    assert [(own.tokens, own.end) for own in found] == expected
    # The comparison has what it needs: rows that stopped, rows that didn't, profiles that tell.
    ends = [end for _, end in expected]
    assert None in ends and len(set(ends)) > 1
    plain = generate_rows(model, [replace(row, profile=None) for row in rows])
    changed = [i for i, row in enumerate(rows) if plain[i] != found[i]]
    assert changed and all(rows[i].profile is not None for i in changed)


def drawn_alone(model: Any, row: BatchRow, temperature: Any, kept: int = 300) -> list[int]:
    """One row without cache: argmax of log p + Gumbel noise at temperature(position, logits)."""
    ids, written = row.prompt.tolist(), []
    with torch.no_grad():
        for step in range(row.tokens):
            logits = model(input_ids=torch.tensor([ids + written])).logits[0, -1].double()
            p = (logits / temperature(step, logits)).softmax(0)
            likely = p.argsort(descending=True).tolist()[:kept]
            noise = {v: -math.log(-math.log(uniform(row.seed, step, v))) for v in likely}
            token = max(likely, key=lambda v: math.log(float(p[v])) + noise[v])
            if token == model.generation_config.eos_token_id:
                break
            written.append(token)
    return written


def edt(position: int, logits: torch.Tensor) -> float:
    p = logits.softmax(0)
    return 1.2 * 0.8 ** (0.5 / float(-(p * p.log()).sum()))


def test_rows_under_policies_draw_as_their_formulas_say_beside_rows_without(tiny):
    model, tokenizer = tiny
    prompts = [tokenizer(t, return_tensors="pt").input_ids[0] for t in ("Hot layers", "It is")]
    oracles = {
        "schedule(steps(0.3,2), length=8)": (lambda step, _: (0.3, 2.0)[step >= 4], 300),
        "entropy(T0=1.2, theta=0.5)": (edt, 300),
        "sampler(T=1.5, top_k=3)": (lambda step, _: 1.5, 3),
        "constant(0.8)": (lambda step, _: 0.8, 300),
    }
    made = {text: parse_policy(text) for text in oracles}
    rows, expected = [], []
    for seed in range(3):
        for text, (temperature, kept) in oracles.items():
            row = BatchRow(prompts[seed % 2], seed=seed, tokens=8, policy=made[text])
            rows.append(row)
            expected.append(drawn_alone(model, row, temperature, kept))
            plain = BatchRow(prompts[seed % 2], temperature=0.8, seed=seed, tokens=8)
            rows.append(plain)
            expected.append(alone(model, plain)[0])
    assert [own.tokens for own in generate_rows(model, rows)] == expected
    # A constant policy and a temperature are one thing.
    assert expected[6::8] == expected[7::8]
    assert len({tuple(tokens) for tokens in expected}) > 8


def test_phases_and_budgets_follow_each_row_by_itself(tiny):
    """A phase opens at a token of the row, and its budget forces the closer there."""
    model, tokenizer = tiny
    prompt = tokenizer("Hot layers", return_tensors="pt").input_ids[0]
    plain = [BatchRow(prompt, temperature=1.0, seed=seed, tokens=30) for seed in range(12)]
    written = Counter(token for own in generate_rows(model, plain) for token in own.tokens)
    opener, closer = written.most_common(1)[0][0], tokenizer.encode("Z")[0]
    policy = parse_policy(
        f"phases(a=between(0.5, ids({opener}), ids({closer})), answer=1)|budget(a=3)", tokenizer
    )
    rows = [BatchRow(prompt, seed=seed, tokens=30, policy=policy) for seed in range(12)]
    opened = 0
    for own in generate_rows(model, rows):
        for place, token in enumerate(own.tokens):
            if token == opener and closer not in own.tokens[place + 1 : place + 4]:
                assert place + 4 > len(own.tokens), "the budget of 3 was not kept"
            opened += token == opener
    assert opened > 3


def test_what_no_row_can_follow_is_refused(tiny):
    model, tokenizer = tiny
    prompt = tokenizer("Hot", return_tensors="pt").input_ids[0]
    with pytest.raises(InputError, match="temperature for each of 4 samples"):
        generate_rows(model, [BatchRow(prompt, policy=parse_policy("ladder(0.5,1, n=4)"))])
    engine = LocalEngine(model, tokenizer, name="tiny")
    for text, options, words in (
        ("ladder(0.5,1, n=4)", {}, "a call is one sample"),
        ("constant(hot)", {}, "column"),
        ('constant(1)|after("\\u0000\\u0001", 1, 0.5)', {"temperature": 0.7}, "temperature 1"),
        ("support(3)", {"top_p": 0.9}, "no top_p"),
    ):
        call = replace(Call("k", "Hot", 1.0, 4, 0, token_policy=text), **options)
        with pytest.raises(InputError, match=words):
            engine.check([call])


def test_a_common_beginning_is_read_once_for_each_profile(tiny):
    model, tokenizer = tiny
    texts = ["cold layers commit. " * 9 + end for end in ("Hot", "It is a truth", "stay", "all")]
    prompts = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
    hot = Profile.from_schedule(1.5, model)
    rows = [BatchRow(prompts[i % 4], 1.0, (None, hot)[i // 4], seed=i, tokens=4) for i in range(8)]
    shapes: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    try:
        found = generate_rows(model, rows)
    finally:
        handle.remove()
    start, rest = shapes[:2]
    assert start[0] == 2 and rest[0] == 8 and start[1] + rest[1] == max(map(len, prompts))
    assert rest[1] < start[1]
    assert [(own.tokens, own.end) for own in found] == [alone(model, row) for row in rows]


def test_rows_that_end_early_leave_the_batch_and_the_others_alone(tiny):
    model, tokenizer = tiny
    prompt = tokenizer("Hot layers explore", return_tensors="pt").input_ids[0]
    hot = Profile.from_schedule(1.5, model)
    short = [BatchRow(prompt, 1.0, seed=i, tokens=1 + i % 3, profile=hot) for i in range(9)]
    long = [
        BatchRow(prompt, 1.0, seed=50 + i, tokens=20, profile=(None, hot)[i % 2]) for i in range(3)
    ]
    shapes: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    try:
        mixed = generate_rows(model, [*long, *short])
    finally:
        handle.remove()
    assert shapes[0] == 2, "a prompt is read once for each profile"
    going = [(row.profile is None, own.tokens[0]) for row, own in
             zip([*long, *short], mixed, strict=True) if own.tokens and row.tokens > 1]  # fmt: skip
    assert shapes[1] == len(set(going)) < len(going), "rows that said the same are one row"
    assert shapes[-1] <= 3
    assert [(own.tokens, own.end) for own in mixed[:3]] == [alone(model, row) for row in long]


def test_tokens_come_as_often_as_their_probabilities_say(tiny):
    model, tokenizer = tiny
    prompt = tokenizer("Hot", return_tensors="pt").input_ids[0]
    n = 4000
    found = generate_rows(model, [BatchRow(prompt, 0.7, seed=i, tokens=1) for i in range(n)])
    with torch.no_grad():
        p = (model(input_ids=prompt[None]).logits[0, -1].double() / 0.7).softmax(0)
    counts = torch.zeros(len(p), dtype=torch.float64)
    for own in found:
        counts[own.tokens[0] if own.tokens else own.end] += 1
    deviation = (counts / n - p).abs() / (p * (1 - p) / n).sqrt().clamp_min(1e-3)
    assert deviation.max() < 5


def test_scores_are_the_untempered_likelihoods(tiny):
    model, tokenizer = tiny
    texts = ["Hot", "cold layers commit. It", "Hot"]
    prompts = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
    outputs = [[5, 9, 40, 2], [7], [], [5, 9, 40, 2], [1, 2]]
    prompts = [*prompts, prompts[0], prompts[1]]
    expected = []
    for prompt, output in zip(prompts, outputs, strict=True):
        whole = torch.cat([prompt, torch.tensor(output, dtype=torch.long)])
        with torch.no_grad():
            logs = model(input_ids=whole[None]).logits[0].double().log_softmax(-1)
        terms = [float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(output)]
        expected.append(sum(terms) / len(terms) if terms else None)
    found = score_rows(model, prompts, outputs)
    assert found[2] is None
    assert [s for s in found if s is not None] == pytest.approx(
        [s for s in expected if s is not None], abs=1e-5
    )


def test_progress_is_told_after_every_token(tiny):
    model, tokenizer = tiny
    prompt = tokenizer("Hot", return_tensors="pt").input_ids[0]
    told: list[tuple[int, int, int]] = []
    rows = [BatchRow(prompt, 1.0, seed=i, tokens=3 + 2 * i) for i in range(2)]
    found = generate_rows(model, rows, progress=lambda *change: told.append(change))
    for i, own in enumerate(found):
        going = [count for row, count, _ in told if row == i]
        last = len(own.tokens) if own.end is not None else rows[i].tokens - 1
        assert going == list(range(1, last + 1))
        assert [token for row, _, token in told if row == i] == own.tokens[:last]


def test_a_stop_lets_the_batch_finish_and_starts_no_other(tiny):
    model, tokenizer = tiny
    engine = LocalEngine(model, tokenizer, name="tiny", batch=2)
    calls = [Call(f"k{i}", "Hot", 1.0, 5, i, raw=True) for i in range(6)]
    found: dict[int, Reply] = {}
    begun: list[int] = []
    engine.run(calls, found.__setitem__, lambda index, *_: begun.append(index), lambda: bool(begun))
    assert sorted(found) == [0, 1] and all(reply.output for reply in found.values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": -1.0}, TemperatureError, "row 1: a sampling temperature is 0 or more"),
        ({"temperature": math.inf}, TemperatureError, "row 1: .* finite, not inf"),
        ({"temperature": math.nan}, TemperatureError, "row 1: .* not nan"),
        ({"top_p": 0.0}, InputError, r"row 1: top_p lies in \(0, 1\], got 0"),
        ({"tokens": 0}, InputError, "row 1: a row needs a prompt and at least 1 new token"),
        ({"tokens": 600}, InputError, "row 1: .*600 new ones don't fit the model's 512 positions"),
    ],
)
def test_rows_that_are_none(tiny, change, error, message):
    model, tokenizer = tiny
    row = BatchRow(tokenizer("Hot", return_tensors="pt").input_ids[0], 1.0, tokens=2)
    with pytest.raises(error, match=message):
        generate_rows(model, [row, replace(row, **change)])
    with pytest.raises(InputError, match="there is no row"):
        generate_rows(model, [])


def answers(engine: LocalEngine, calls: list[Call]) -> dict[int, Reply]:
    found: dict[int, Reply] = {}
    engine.run(calls, found.__setitem__, no_progress, never)
    return found


def test_the_engine_gives_each_call_its_own(tiny):
    model, tokenizer = tiny
    calls = [
        Call(f"k{i}", "Hot layers " * (1 + i % 3), (0.0, 1.2)[i % 2], 8, i,
             attention=(None, "constant(1.7)")[i // 2 % 2], raw=True, stop=(None, "e")[i % 5 == 0])
        for i in range(10)
    ]  # fmt: skip
    whole = answers(LocalEngine(model, tokenizer, name="tiny", score=True), calls)
    parts = answers(LocalEngine(model, tokenizer, name="tiny", batch=3, score=True), calls)
    assert sorted(whole) == sorted(parts) == list(range(10))
    for i, call in enumerate(calls):
        row = BatchRow(
            tokenizer(call.prompt, return_tensors="pt").input_ids[0],
            call.temperature or 0.0,
            None if call.attention is None else Profile.from_schedule(1.7, model),
            call.seed,
            call.tokens,
            stop=()
            if call.stop is None
            else tuple(t for t in range(len(tokenizer)) if "e" in tokenizer.decode([t])),
        )
        tokens, end = alone(model, row)
        text = tokenizer.decode([*tokens, end] if call.stop and end else tokens)
        text = text.split(call.stop)[0] if call.stop else text.removesuffix("<|end|>")
        for reply in (whole[i], parts[i]):
            assert (reply.output or "") == text.strip()
            assert (reply.error is None) == bool(text.strip())
            assert reply.temperature_sent == call.temperature and reply.seed_sent
            assert reply.tokens_in == len(row.prompt)
            assert reply.tokens_out == len(tokens) + (end is not None)
        assert whole[i].score == pytest.approx(parts[i].score, abs=1e-5)


def test_a_users_rule_binds_the_model_in_this_process(tiny):
    model, tokenizer = tiny
    rule = replace(rule_for("local", "tiny"), range=(0.0, 1.0), scale=(0.0, 1.0))
    hot = Call("hot", "Hot", 1.5, 6, 3, raw=True)
    with pytest.raises(TemperatureError, match="tiny takes 0 to 1; asked for temperature 1.5"):
        LocalEngine(model, tokenizer, name="tiny", rule=rule).check([hot])
    clamp = LocalEngine(model, tokenizer, name="tiny", rule=rule, policy="clamp")
    (reply,) = answers(clamp, [hot]).values()
    assert reply.temperature_sent == 1.0 and reply.note == "clamped from 1.5"
    plain = LocalEngine(model, tokenizer, name="tiny")
    assert reply.output == answers(plain, [replace(hot, temperature=1.0)])[0].output


def test_a_call_that_can_not_run_is_a_reply_and_the_others_run(tiny):
    model, tokenizer = tiny
    engine = LocalEngine(model, tokenizer, name="tiny")
    calls = [Call("long", "Hot " * 600, 1.0, 4, 0, raw=True), Call("ok", "Hot", 1.0, 4, 0)]
    found = answers(engine, calls)
    assert found[0].output is None and "don't fit the model's 512 positions" in str(found[0].error)
    assert found[1].error is None or "wrote nothing" in found[1].error
    with pytest.raises(InputError, match="long: prompt and new tokens come to .* shorten the task"):
        engine.check(calls)
    with pytest.raises(InputError, match="temperature inf is no temperature"):
        engine.check([Call("hot", "Hot", math.inf, 4, 0)])
    with pytest.raises(InputError, match="stops at one character, not at 'ab'"):
        answers(engine, [Call("stop", "Hot", 1.0, 4, 0, stop="ab")])
    with pytest.raises(InputError, match="a batch has 1 row or more"):
        LocalEngine(model, tokenizer, name="tiny", batch=0)
