"""Diversity of samples against loops; that sampling is what it says; comparisons as a whole."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats

from tempering.attention.profiles.profile import Profile
from tempering.errors import DataError, InputError
from tempering.evaluation.benefit import distinct, measure_benefits, sample, semantic_spread
from tempering.evaluation.compare import compare
from tempering.evaluation.cost import Variant
from tempering.evaluation.journal import Journal
from tests.integration import attention_oracle as oracle

LAYERS, HEADS = oracle.LAYERS, oracle.HEADS
PROMPTS = oracle.tokens(2, 3, 5)
TEXT = "Hypotheses compete, temperature decides how many stay alive. " * 3
pytestmark = pytest.mark.filterwarnings("ignore::tempering.errors.DepthWarning")


@pytest.fixture
def model():
    return oracle.tiny_llama(eos_token_id=2)


@pytest.fixture
def speaker():
    return oracle.tiny_llama(vocab_size=259, eos_token_id=2), oracle.byte_tokenizer()


def test_distinct():
    samples = [[1, 2, 3, 1, 2], [1, 2], [4], []]
    grams = {1: [1, 2, 3, 1, 2, 1, 2, 4], 2: ["12", "23", "31", "12", "12"], 3: ["123", "231"]}
    grams[3].append("312")
    for n, all_of_them in grams.items():
        assert distinct(samples, n) == len(set(all_of_them)) / len(all_of_them)
    assert distinct([[], []], 1) == 0.0
    assert distinct([[7, 7, 7, 7]], 2) == pytest.approx(1 / 3)


def test_spread():
    vectors = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    pairs = list(itertools.combinations(vectors.double(), 2))
    exact = sum(1 - float(a @ b / (a.norm() * b.norm())) for a, b in pairs) / len(pairs)
    assert semantic_spread(vectors) == pytest.approx(exact, rel=1e-12)
    assert semantic_spread(vectors * 1e4) == pytest.approx(exact, rel=1e-6)
    assert semantic_spread(vectors[:1].expand(4, -1)) == pytest.approx(0.0, abs=1e-12)
    assert semantic_spread(torch.stack([vectors[0], -vectors[0]])) == pytest.approx(2.0)
    with pytest.raises(InputError, match="at least 2 samples"):
        semantic_spread(vectors[:1])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_follow_the_tempered_distribution(model, temperature):
    T = oracle.random_temperatures(3, LAYERS, HEADS)
    variant = Variant("v", Profile.from_matrix(T), temperature)
    k = 3000
    rows = sample(model, PROMPTS[0], variant, k=k, tokens=1, seed=1)
    assert len(rows) == k
    exact = oracle.forward(model, PROMPTS[:1], T).logits[0, -1].div(temperature).softmax(-1)
    counts = torch.zeros(len(exact))
    for row in rows:
        counts[row[0] if row else 2] += 1  # the end token is left out
    common = exact * k > 5
    seen = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    expected = torch.cat([exact[common], exact[~common].sum()[None]]) * k
    assert stats.chisquare(seen, expected * (seen.sum() / expected.sum())).pvalue > 1e-3
    other = oracle.forward(model, PROMPTS[:1]).logits[0, -1].softmax(-1)
    expected = torch.cat([other[common], other[~common].sum()[None]]) * k
    assert stats.chisquare(seen, expected * (seen.sum() / expected.sum())).pvalue < 1e-9


def test_samples_are_reproducible_and_leave_the_random_state_alone(model):
    variant = Variant("v", None, 0.9)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    rows = sample(model, PROMPTS[0], variant, k=4, tokens=6, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sample(model, PROMPTS[0], variant, k=4, tokens=6, seed=1) == rows
    assert sample(model, PROMPTS[0], variant, k=4, tokens=6, seed=2) != rows
    neutral = Variant("n", Profile.neutral(model), 0.9)
    assert sample(model, PROMPTS[0], neutral, k=4, tokens=6, seed=1) == rows


def test_plain_sampling_whatever_the_model_suggests(model):
    """Published generation settings (penalties, cut-offs) must not join in."""
    plain = sample(model, PROMPTS[0], Variant("v", None, 1.0), k=8, tokens=8, seed=1)
    settings = model.generation_config
    settings.repetition_penalty, settings.min_p, settings.typical_p = 9.0, 0.4, 0.3
    settings.top_k, settings.top_p, settings.no_repeat_ngram_size = 2, 0.4, 1
    settings.temperature, settings.do_sample, settings.min_new_tokens = 0.2, True, 3
    assert sample(model, PROMPTS[0], Variant("v", None, 1.0), k=8, tokens=8, seed=1) == plain


def test_benefits_equal_loops(model):
    T = oracle.random_temperatures(4, LAYERS, HEADS)
    variants = [Variant("plain", None, 1.2), Variant("attention", Profile.from_matrix(T))]
    benefits, complete = measure_benefits(model, PROMPTS, variants, k=3, tokens=7, seed=5)
    assert complete
    found = {(b.label, b.metric): b for b in benefits}
    assert len(found) == 8
    for variant in variants:
        rows = {name: [] for name in ("distinct-1", "distinct-2", "spread", "nll")}
        for index, prompt in enumerate(PROMPTS):
            samples = sample(model, prompt, variant, k=3, tokens=7, seed=5 + index)
            embeddings, nll = [], []
            for tokens in samples:
                ids = torch.cat([prompt, torch.tensor(tokens, dtype=torch.long)])[None]
                with torch.no_grad():
                    out = model(ids, output_hidden_states=True)
                logp = oracle.forward(model, ids).logits[0].log_softmax(-1)
                nll += [-float(logp[4 + i, token]) for i, token in enumerate(tokens)]
                embeddings.append(out.hidden_states[-1][0, 5 if tokens else 4 :].double().mean(0))
            rows["distinct-1"].append(distinct(samples, 1))
            rows["distinct-2"].append(distinct(samples, 2))
            rows["spread"].append(semantic_spread(torch.stack(embeddings)))
            rows["nll"].append(sum(nll) / len(nll))
        for metric, values in rows.items():
            ours = found[variant.label, metric]
            assert ours.estimate.value == pytest.approx(sum(values) / 3, rel=1e-5)
            assert ours.estimate.n == 3
            assert (ours.k, ours.tokens, ours.seed) == (3, 7, 5)
            assert ours.estimate.low <= ours.estimate.value <= ours.estimate.high


def test_benefits_resume(model, tmp_path):
    variants = [Variant("a", None, 0.9), Variant("b", None, 1.3)]
    settings = {"k": 2, "tokens": 4, "seed": 3}
    whole, _ = measure_benefits(model, PROMPTS, variants, **settings)

    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    journal = Journal(tmp_path, "run", {})
    part, complete = measure_benefits(
        model, PROMPTS, variants, journal=journal, progress=interrupt, **settings
    )
    journal.close()
    assert not complete
    assert part == measure_benefits(model, PROMPTS[:2], variants, **settings)[0]
    drawn = []
    hook = model.register_forward_hook(lambda *_: drawn.append(1))
    with Journal(tmp_path, "run", {}) as journal:
        again, complete = measure_benefits(model, PROMPTS, variants, journal=journal, **settings)
    hook.remove()
    assert complete
    assert again == whole
    assert 0 < len(drawn) <= 2 * (4 + 1)  # one prompt, two variants: tokens and the embedding


def test_models_in_training_are_sampled_without_dropout(model):
    noisy = oracle.tiny_llama(eos_token_id=2, attention_dropout=0.5, attention="eager")
    still = oracle.tiny_llama(eos_token_id=2, attention="eager")
    noisy.train()
    variants = [Variant("a", None, 1.0)]
    ours, _ = measure_benefits(noisy, PROMPTS, variants, k=2, tokens=4)
    assert noisy.training
    assert ours == measure_benefits(still, PROMPTS, variants, k=2, tokens=4)[0]


@pytest.mark.parametrize("wrong", [{"k": 1}, {"tokens": 0}, {"k": 0}], ids=str)
def test_bad_input(model, wrong):
    with pytest.raises(InputError):
        measure_benefits(model, PROMPTS, [Variant("a")], **wrong)
    with pytest.raises(InputError):
        measure_benefits(model, PROMPTS[:0], [Variant("a")])
    with pytest.raises(InputError):
        measure_benefits(model, PROMPTS, [Variant("a"), Variant("a")])


# comparisons


def test_compare_puts_it_together(speaker):
    model, tokenizer = speaker
    T = oracle.random_temperatures(6, LAYERS, HEADS)
    given = ["linear(1.3,0.8)", ("mine", Profile.from_matrix(T))]
    found = compare(
        model, tokenizer, TEXT, given, chunk=20, limit=4, samples=2, prompts=2, new_tokens=3
    )
    assert found.complete
    assert (found.chunks, found.chunk_length) == (4, 20)
    assert [v.label for v in found.variants] == [c.label for c in found.costs]
    labels = [v.label for v in found.variants]
    assert {b.label for b in found.benefits} == {"untempered", *labels}
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False).input_ids)
    chunks = ids[: len(ids) // 20 * 20].view(-1, 20)
    chunks = chunks[torch.linspace(0, len(chunks) - 1, 4).round().long()]
    linear = torch.tensor([1.3, 1.3 - 0.5 / 3, 0.8 + 0.5 / 3, 0.8], dtype=torch.float64)
    for label, matrix in ((labels[0], linear[:, None].expand(-1, HEADS)), ("mine", T)):
        nll = []
        for temperature in (None, matrix):
            logp = oracle.forward(model, chunks, temperature).logits[:, :-1].log_softmax(-1)
            nll.append(-logp.gather(2, chunks[:, 1:, None]).mean(dim=(1, 2)))
        rise = (nll[1] - nll[0]).numpy()
        assert found.cost(label).cost.value == pytest.approx(rise.mean(), abs=2e-6)
        assert found.cost(label).cost.se == pytest.approx(stats.sem(rise), abs=2e-6)


def test_controls_and_budget(speaker):
    model, tokenizer = speaker
    found = compare(
        model,
        tokenizer,
        TEXT,
        ["throb(12,3,1,12)|amplitude(1.5)"],
        chunk=20,
        limit=3,
        with_controls=True,
        budget=0.01,
    )
    controls = [v for v in found.variants if v.family == "control"]
    own = found.variants[0].profile.temperature[:, 0]
    assert len(controls) >= 4
    for variant in controls:
        T = variant.profile.temperature[:, 0]
        if variant.label.startswith("shuffled"):
            assert torch.equal(T.sort().values, own.sort().values)
        if variant.label.startswith("reversed"):
            torch.testing.assert_close(T, own.flip(0))
        if variant.label.startswith("upside down"):
            torch.testing.assert_close(T.log(), 2 * own.log().mean() - own.log())
        if variant.label.startswith("uniform"):
            torch.testing.assert_close(T, own.log().mean().exp().expand(LAYERS))
    names = {variant.label.split(":")[0].split(" ")[0] for variant in controls}
    assert {"shuffled", "reversed", "upside", "uniform"} == names
    (budget,) = found.budgets.values()
    inside = [v for v in found.variants if v.label.startswith("within")]
    if budget.cost is None:
        assert inside == []
    else:
        assert budget.cost.value <= 0.01
        assert found.cost(inside[0].label).cost == budget.cost
        hottest = inside[0].profile.temperature.max()
        assert hottest == pytest.approx(budget.amplitude, rel=1e-6)


@pytest.mark.parametrize("stage", ["cost", "samples", "amplitude"])
def test_compare_resumes_with_identical_numbers(speaker, tmp_path, stage):
    model, tokenizer = speaker
    settings = {"chunk": 20, "limit": 3, "samples": 2, "prompts": 2, "new_tokens": 3}
    settings |= {"budget": 1.0}
    given = ["linear(1.3,0.8)"]
    whole = compare(model, tokenizer, TEXT, given, **settings)

    def interrupt(name, done, total):
        if name.startswith(stage) and done == 1:
            raise KeyboardInterrupt

    journal = Journal(tmp_path, "compare", {})
    try:
        part = compare(
            model, tokenizer, TEXT, given, journal=journal, progress=interrupt, **settings
        )
    except KeyboardInterrupt:
        assert stage == "amplitude"
    else:
        assert not part.complete
        assert part.costs[0].cost.n == (1 if stage == "cost" else 3)
    journal.close()
    assert journal.path.exists()
    with Journal(tmp_path, "compare", {}) as journal:
        again = compare(model, tokenizer, TEXT, given, journal=journal, **settings)
    assert again.complete
    assert again.costs == whole.costs
    assert again.benefits == whole.benefits
    assert {k: b.tried for k, b in again.budgets.items()} == {
        k: b.tried for k, b in whole.budgets.items()
    }


def never(stage, done, total):
    raise AssertionError("worked before it looked at its input")


def test_compare_refuses(speaker):
    model, tokenizer = speaker
    with pytest.raises(InputError, match="at least one pattern"):
        compare(model, tokenizer, TEXT, [])
    with pytest.raises(DataError, match="less than one chunk of 512"):
        compare(model, tokenizer, "short", ["linear(1.1,0.9)"])
    with pytest.raises(InputError, match="two variants"):
        compare(model, tokenizer, TEXT, ["linear(1.1,0.9)", "linear(1.1, 0.9)"], chunk=20)
    neutral = Profile.neutral(model)
    with pytest.raises(InputError, match="two variants are called 'untempered'"):
        compare(model, tokenizer, TEXT, [("untempered", neutral)], chunk=20, samples=2)
    with pytest.raises(InputError, match="at least 2 samples"):
        compare(model, tokenizer, TEXT, [("mine", neutral)], chunk=20, samples=1, progress=never)
    with pytest.raises(InputError, match="'untempered'"):
        compare(model, tokenizer, TEXT, [("untempered", neutral)], chunk=20, progress=never)
    assert math.isnan(compare(model, tokenizer, TEXT, ["linear(1.1,0.9)"], chunk=99).costs[0].kl.se)
