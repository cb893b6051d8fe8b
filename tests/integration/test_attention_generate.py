"""Generation under temperatures: caches, padding, sampling, many profiles in one call."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from tempering.attention.control.tempered import tempered
from tempering.attention.profiles.profile import Profile
from tempering.engines.generating.side_by_side import prompt_ids, stream
from tempering.errors import InputError
from tempering.tokens import parse_policy
from tests.integration import attention_oracle as oracle

LAYERS, HEADS = oracle.LAYERS, oracle.HEADS
NEW = 8


@pytest.fixture(scope="module")
def model():
    return oracle.tiny_llama()


def profiles(T):
    return [Profile.from_matrix(row) for row in T]


def continued(model, ids, T, choose, new=NEW, mask=None):
    """Token by token with a full forward of the oracle; `choose` maps logits to tokens."""
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in range(new):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = oracle.forward(model, ids, T, mask=mask, positions=positions).logits[:, -1]
        ids = torch.cat([ids, choose(out)[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


def greedy(logits):
    return logits.argmax(-1)


def sampled(logits):
    return torch.multinomial(torch.softmax(logits.float(), -1), 1)[:, 0]


def generate(model, ids, **settings):
    settings = {"max_new_tokens": NEW, "do_sample": False, "top_k": 0, **settings}
    settings.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **settings)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_greedy_with_padding_and_a_profile_a_row(implementation, cache):
    model = oracle.tiny_llama(attention=implementation)
    ids, mask = oracle.tokens(1, 4, 9), torch.ones(4, 9, dtype=torch.long)
    mask[1, :4] = mask[3, :7] = 0
    ids = ids * mask
    T = oracle.random_temperatures(1, 4, LAYERS, HEADS)
    settings = {"cache_implementation": cache} if cache else {"use_cache": False}
    plain = generate(model, ids, attention_mask=mask)
    with tempered(model, profiles(T)):
        out = generate(model, ids, attention_mask=mask, **settings)
    assert torch.equal(out, continued(model, ids, T, greedy, mask=mask))
    assert not torch.equal(out, plain)
    assert torch.equal(generate(model, ids, attention_mask=mask, **settings), plain)


@pytest.mark.parametrize("seed", range(3))
def test_sampling_with_a_seed(model, seed):
    ids = oracle.tokens(2, 2, 6)
    T = oracle.random_temperatures(2, LAYERS, HEADS)
    with tempered(model, Profile.from_matrix(T)):
        torch.manual_seed(seed)
        out = generate(model, ids, do_sample=True)
    torch.manual_seed(seed)
    assert torch.equal(out, continued(model, ids, T, sampled))


@pytest.mark.parametrize("prompts, each", [(1, 12), (2, 3)])
def test_as_many_profiles_as_returned_sequences(model, prompts, each):
    ids = oracle.tokens(3, prompts, 6)
    T = oracle.random_temperatures(3, prompts * each, LAYERS, HEADS)
    with tempered(model, profiles(T)):
        torch.manual_seed(5)
        out = generate(model, ids, do_sample=True, num_return_sequences=each)
    torch.manual_seed(5)
    wide = ids.repeat_interleave(each, 0)
    assert torch.equal(out, continued(model, wide, T, sampled))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["beams", "beams returned", "prompt lookup"],
)
def test_other_ways_of_decoding(settings):
    model = oracle.tiny_llama(attention="eager")
    ids = oracle.tokens(4, 1, 4).repeat(1, 2)
    T = oracle.random_temperatures(4, LAYERS, HEADS)
    with oracle.softmax_divided(list(T)):
        expected = generate(model, ids, **settings)
    with tempered(model, Profile.from_matrix(T)):
        out = generate(model, ids, **settings)
    assert torch.equal(out, expected)
    assert not torch.equal(out, generate(model, ids, **settings))


# the streaming generator, a row for each profile


@pytest.fixture(scope="module")
def speaker():
    return oracle.tiny_llama(vocab_size=259, eos_token_id=2), oracle.byte_tokenizer()


def steps_of(speaker, text, T, temperature=1.0, **settings):
    """Rows of tokens that `stream` gives for profiles T [rows, layers, heads]."""
    model, tokenizer = speaker
    prompt = prompt_ids(tokenizer, text, chat=False)
    policy = parse_policy(f"constant({temperature})")
    given = {"tokens": NEW, "policy": policy, **settings}
    rows = [[] for _ in T]
    for step in stream(model, tokenizer, prompt, profiles(T), **given):
        rows[step.row].append(step)
    return prompt, rows


def tokens_of(rows):
    return [[step.token for step in row] for row in rows]


def test_stream_at_zero_is_greedy_in_every_row(speaker):
    T = oracle.random_temperatures(5, 3, LAYERS, HEADS)
    prompt, rows = steps_of(speaker, "twelve", T, 0)
    exact = continued(speaker[0], prompt.expand(3, -1), T, greedy)[:, len(prompt) :]
    expected = [row[: row.index(2)] if 2 in row else row for row in exact.tolist()]
    assert tokens_of(rows) == expected


def test_stream_tells_the_probabilities_of_its_tokens(speaker):
    T = oracle.random_temperatures(9, 2, LAYERS, HEADS)
    prompt, rows = steps_of(speaker, "tell", T, 0.7, seed=2)
    for row, temperature in zip(rows, T, strict=True):
        ids = torch.cat([prompt, torch.tensor([step.token for step in row])])[None]
        out = oracle.forward(speaker[0], ids, temperature).logits[0, len(prompt) - 1 : -1]
        for step, logits in zip(row, out, strict=True):
            assert step.raw == pytest.approx(float(logits.log_softmax(-1)[step.token]), abs=1e-4)
            cooled = (logits / 0.7).log_softmax(-1)
            assert step.tempered == pytest.approx(float(cooled[step.token]), abs=1e-4)


def test_stream_rows_differ_by_their_temperatures_alone(speaker):
    hot = oracle.random_temperatures(6, LAYERS, HEADS)
    neutral = torch.ones_like(hot)

    def run(given, seed):
        return tokens_of(steps_of(speaker, "alike", given, seed=seed)[1])

    mixed = run([neutral, hot, neutral], 3)
    assert mixed[0] == mixed[2] != mixed[1]
    assert run([hot, neutral], 3) == [mixed[1], mixed[0]]
    assert run([neutral], 3) == [mixed[0]]
    assert run([neutral], 4) != [mixed[0]]


def test_stream_draws_from_the_tempered_distribution(speaker):
    """Each seed's token is the first whose cumulative probability exceeds its number."""
    T = oracle.random_temperatures(7, LAYERS, HEADS, low=0.05, high=0.2)
    prompt, draws = prompt_ids(speaker[1], "draw", chat=False), 150
    seen = torch.zeros(259)
    for seed in range(draws):
        _, (row,) = steps_of(speaker, "draw", T[None], 0.8, tokens=1, seed=seed)
        seen[row[0].token if row else 2] += 1  # the end token is not yielded

    def p_value(temperature):
        logits = oracle.forward(speaker[0], prompt[None], temperature).logits[0, -1]
        share = torch.softmax(logits / 0.8, -1)
        top = share.topk(6).indices
        expected = torch.cat([share[top], 1 - share[top].sum()[None]]) * draws
        counts = torch.cat([seen[top], draws - seen[top].sum()[None]]).double()
        return stats.chisquare(counts, expected * (counts.sum() / expected.sum())).pvalue

    assert p_value(T) > 1e-3
    assert p_value(None) < 1e-6


@pytest.fixture
def recital(speaker):
    """A model made to say one text and then its end token."""
    model, tokenizer = speaker
    text = "a é€😀 z"
    script = [*tokenizer(text, add_special_tokens=False).input_ids, 2, 40, 41, 42]
    said = []

    def force(module, args, logits):
        said.append(script[len(said)])
        forced = torch.full_like(logits, float("-inf"))
        forced[..., said[-1]] = 0.0
        return forced

    hook = model.lm_head.register_forward_hook(force)
    yield text, script
    hook.remove()


def test_stream_yields_whole_characters_and_stops_at_the_end_token(speaker, recital):
    text, script = recital
    _, rows = steps_of(speaker, "é", torch.ones(2, LAYERS, HEADS), tokens=30)
    for row in rows:
        assert [step.token for step in row] == script[:-4]
        assert "".join(step.text for step in row) == text
        assert all("\ufffd" not in step.text for step in row)


def test_stream_leaves_the_model_as_it_was(speaker):
    model, tokenizer = speaker
    prompt = prompt_ids(tokenizer, "leave", chat=False)
    with torch.no_grad():
        plain = model(prompt[None]).logits
    T = oracle.random_temperatures(8, 1, LAYERS, HEADS)
    policy = parse_policy("constant(1)")
    model.train()
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    going = stream(model, tokenizer, prompt, profiles(T), tokens=5, policy=policy)
    next(going)
    assert torch.is_grad_enabled()
    going.close()
    assert [module.training for module in model.modules()] == flags
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(prompt[None]).logits, plain)


def test_stream_refuses(speaker):
    one = torch.ones(1, LAYERS, HEADS)
    for wrong in ({"tokens": 0}, {"tokens": -3}):
        with pytest.raises(InputError, match="at least one new token"):
            steps_of(speaker, "no", one, **wrong)
    with pytest.raises(InputError, match="give a Profile"):
        steps_of(speaker, "no", one[:0])
    with pytest.raises(InputError, match="prompt is empty"):
        prompt_ids(speaker[1], "  ")
    model, tokenizer = speaker
    nothing, policy = torch.zeros(0, dtype=torch.long), parse_policy("constant(1)")
    with pytest.raises(InputError, match="no tokens"):
        list(stream(model, tokenizer, nothing, profiles(one), tokens=2, policy=policy))
