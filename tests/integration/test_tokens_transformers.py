"""Policies inside generate(): batches, beams, assistants, and a tiny random model's own logits."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
)

from tempering.errors import InputError, RefusedError
from tempering.tokens import (
    TemperingLogitsProcessor,
    Trace,
    check_engine,
    effective_order,
    parse_policy,
    temper_logits,
)
from tempering.tokens.contract import VOCABULARY

PAD, END, OPEN, CLOSE = 0, 1, 3, 4
PHASES = f"phases(thinking=between(1.5, ids({OPEN}), ids({CLOSE})), answer=0.5)"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors on several threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.6,
        pad_token_id=PAD,
        bos_token_id=2,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    """One byte-level character a token: enough for a trace's text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCABULARY]
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


PROMPT = torch.tensor([[5, OPEN, 7, 8], [PAD, PAD, 9, 10]])  # the second is padded on the left
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


def generate(
    model, policy, ids=PROMPT, mask=MASK, *, seed=0, tokenizer=None, trace=None, **settings
):
    torch.manual_seed(seed)
    processor = TemperingLogitsProcessor(policy, tokenizer, trace=trace)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 10} | settings
    return model.generate(
        ids,
        attention_mask=mask,
        logits_processor=[processor],
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **settings,
    )


def wanted(policy, raw, rows, prompt, samples=None):
    """Tempered log probabilities of a step, with states rebuilt from the tokens."""
    states = [
        policy.state(row[:prompt], row[prompt:], sample=i % samples if samples else 0)
        for i, row in enumerate(rows.tolist())
    ]
    return temper_logits(policy, raw, states)[0].log_softmax(-1)


@pytest.mark.parametrize(
    ("text", "samples"),
    [
        (PHASES, None),
        ("schedule(linear(2,0.2), length=8)", None),
        ("support(4)", None),
        ("entropy(T0=1, theta=0.5)|clip(0.3,2)", None),
        ("dynatemp(0.5, exponent=1, temperature=0.8)", None),
        ("ladder(0.2,3, n=3)", 3),
        ("constant(0)", None),
        ("constant(inf)", None),
    ],
)
def test_generate_samples_from_the_tempered_posterior(model, text, samples):
    policy = parse_policy(text)
    out = generate(model, policy, num_return_sequences=3, eos_token_id=None)
    for step, (raw, scores) in enumerate(zip(out.logits, out.scores)):
        rows = out.sequences[:, : 4 + step]
        expected = wanted(policy, raw, rows, 4, samples)
        torch.testing.assert_close(scores.log_softmax(-1), expected, atol=2e-6, rtol=1e-5)
    if text == "constant(0)":
        for step, raw in enumerate(out.logits):
            assert torch.equal(out.sequences[:, 4 + step], raw.argmax(-1))


def test_left_padding_changes_nothing(model):
    alone = generate(model, PHASES, PROMPT[1:, 2:], MASK[1:, 2:], max_new_tokens=1)
    batch = generate(model, PHASES, max_new_tokens=1)
    torch.testing.assert_close(batch.scores[0][1], alone.scores[0][0], atol=1e-5, rtol=1e-4)
    # the first row is thinking, the second answers: 1.5 and 0.5
    raw, scores = batch.logits[0], batch.scores[0]
    assert torch.allclose(scores[0].softmax(-1), (raw[0] / 1.5).softmax(-1), atol=1e-6)
    assert torch.allclose(scores[1].softmax(-1), (raw[1] / 0.5).softmax(-1), atol=1e-6)


def test_a_temperature_of_one_is_generation_untouched(model):
    torch.manual_seed(5)
    plain = model.generate(PROMPT, attention_mask=MASK, do_sample=True, max_new_tokens=12)
    ours = generate(model, "constant(1)", seed=5, max_new_tokens=12, top_k=50)
    assert torch.equal(plain, ours.sequences)


def test_a_constant_temperature_is_that_of_transformers(model):
    torch.manual_seed(5)
    plain = model.generate(
        PROMPT, attention_mask=MASK, do_sample=True, max_new_tokens=12, temperature=0.6, top_p=0.9
    )
    ours = generate(model, "constant(0.6)", seed=5, max_new_tokens=12, top_k=50, top_p=0.9)
    assert torch.equal(plain, ours.sequences)


@pytest.mark.parametrize("sampling", [False, True])
def test_beams_follow_their_histories(model, sampling):
    """Every step of every beam is tempered by the history that the beam then has."""
    policy = parse_policy(PHASES)
    seen = []

    class Watched(TemperingLogitsProcessor):
        def __call__(self, input_ids, scores):
            result = super().__call__(input_ids, scores)
            expected = wanted(policy, scores, input_ids, 4)
            torch.testing.assert_close(result.log_softmax(-1), expected, atol=2e-6, rtol=1e-5)
            # what beam search sums must be log probabilities
            torch.testing.assert_close(
                result.logsumexp(-1), torch.zeros(len(result)), atol=1e-5, rtol=0
            )
            seen.append(input_ids.clone())
            return result

    torch.manual_seed(1)
    model.generate(
        PROMPT,
        attention_mask=MASK,
        logits_processor=[Watched(policy)],
        num_beams=3,
        do_sample=sampling,
        max_new_tokens=8,
        eos_token_id=None,
    )
    moved = any(not torch.equal(b[:, :-1], a) for a, b in itertools.pairwise(seen))
    assert moved  # otherwise this has tested no reordering


def test_a_cold_policy_makes_beams_greedy(model):
    out = generate(
        model, "constant(0)", num_beams=2, do_sample=False, max_new_tokens=6, eos_token_id=None
    )
    greedy = model.generate(
        PROMPT, attention_mask=MASK, do_sample=False, max_new_tokens=6, eos_token_id=None
    )
    assert torch.equal(out.sequences, greedy)


def test_a_ladder_is_refused_in_beams_and_without_its_samples(model):
    with pytest.raises(RefusedError, match="beam search moves histories"):
        generate(model, "ladder(0.5,2, n=2)", num_beams=2, num_return_sequences=2)
    with pytest.raises(InputError, match="num_return_sequences=3; give num_return_sequences=2"):
        generate(model, "ladder(0.5,2, n=2)", num_return_sequences=3)


def test_rows_of_a_ladder_must_stay_in_place():
    processor = TemperingLogitsProcessor("ladder(0.5,2, n=2)", prompt_length=2)
    processor(torch.tensor([[5, 6, 7], [5, 6, 8]]), torch.zeros(2, 9))
    with pytest.raises(RefusedError, match="row 1 continues what was row 0"):
        processor(torch.tensor([[5, 6, 7, 1], [5, 6, 7, 2]]), torch.zeros(2, 9))
    with pytest.raises(InputError, match="these 3 rows are not 2 of each"):
        processor(torch.tensor([[5, 6], [5, 6], [5, 6]]), torch.zeros(3, 9))
    with pytest.raises(InputError, match="these 2 rows are not 2 of each"):
        processor(torch.tensor([[5, 6], [5, 7]]), torch.zeros(2, 9))


@pytest.mark.parametrize("lookup", [False, True])
def test_assisted_decoding_is_tempered_by_position(model, lookup):
    """Speculated tokens and rewinds: the verified rows have the temperatures of their places."""
    policy = parse_policy("schedule(linear(3,0.2), length=10)")
    torch.manual_seed(3)
    small = LlamaForCausalLM(model.config).eval()
    small.generation_config.num_assistant_tokens = 3
    small.generation_config.num_assistant_tokens_schedule = "constant"
    small.generation_config.assistant_confidence_threshold = 0.0
    checked = []

    class Watched(TemperingLogitsProcessor):
        def __call__(self, input_ids, scores):
            result = super().__call__(input_ids, scores)
            expected = wanted(policy, scores, input_ids, 4)
            torch.testing.assert_close(result.log_softmax(-1), expected, atol=2e-6, rtol=1e-5)
            checked.append(input_ids.shape[1])
            return result

    how = {"prompt_lookup_num_tokens": 3} if lookup else {"assistant_model": small}
    model.generate(
        PROMPT[:1],
        attention_mask=MASK[:1],
        logits_processor=[Watched(policy)],
        do_sample=True,
        top_k=0,
        max_new_tokens=10,
        eos_token_id=None,
        **how,
    )
    assert max(checked) == 13
    if not lookup:
        assert any(b < a for a, b in itertools.pairwise(checked))  # it did go back


def test_one_processor_serves_one_generate_after_another(model):
    policy = "schedule(linear(3,0.2), length=10)"
    processor = TemperingLogitsProcessor(policy)
    settings = {"do_sample": True, "max_new_tokens": 4, "logits_processor": [processor]}
    torch.manual_seed(0)
    first = model.generate(PROMPT, attention_mask=MASK, eos_token_id=None, **settings)
    # what was generated becomes the prompt: its clock begins anew
    longer = torch.cat([MASK, torch.ones(2, 4, dtype=torch.long)], -1)
    out = generate(model, policy, first, longer, max_new_tokens=1)
    torch.manual_seed(0)
    again = model.generate(
        first,
        attention_mask=longer,
        return_dict_in_generate=True,
        output_scores=True,
        **(settings | {"max_new_tokens": 1, "top_k": 0}),
    )
    assert torch.equal(again.scores[0], out.scores[0])
    T = (out.logits[0] / 3).log_softmax(-1)
    torch.testing.assert_close(again.scores[0], T, atol=1e-5, rtol=1e-5)


def test_threads_may_share_a_processor(model):
    policy = parse_policy("schedule(linear(3,0.2), length=8)")
    processor = TemperingLogitsProcessor(policy)

    def run(length):
        ids = PROMPT[:1].repeat(1, length)
        return length * 4, model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=12,
            eos_token_id=None,
            logits_processor=[processor],
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )

    with ThreadPoolExecutor(3) as pool:
        for prompt, out in pool.map(run, [1, 2, 3, 1, 2, 3]):
            for step, (raw, scores) in enumerate(zip(out.logits, out.scores)):
                rows = out.sequences[:, : prompt + step]
                expected = wanted(policy, raw, rows, prompt)
                torch.testing.assert_close(scores.log_softmax(-1), expected, atol=2e-6, rtol=1e-5)


def test_a_prompt_of_embeddings_has_no_ids(model):
    embeddings = model.get_input_embeddings()(PROMPT[:1]).detach()
    out = model.generate(
        inputs_embeds=embeddings,
        attention_mask=MASK[:1],
        do_sample=True,
        top_k=0,
        max_new_tokens=4,
        eos_token_id=None,
        logits_processor=[TemperingLogitsProcessor("schedule(linear(4,1), length=4)")],
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    for T, raw, scores in zip((4, 3, 2, 1), out.logits, out.scores):
        torch.testing.assert_close(scores.softmax(-1), (raw / T).softmax(-1), atol=1e-6, rtol=1e-5)


def test_a_second_temperature_is_refused_wherever_it_comes_from(model):
    with pytest.raises(RefusedError, match=r"two temperatures: .*temperature=0.7.*temperature=1.0"):
        generate(model, "support(4)", temperature=0.7)
    before = model.generation_config.temperature
    model.generation_config.temperature = 0.6
    try:
        with pytest.raises(RefusedError, match="two temperatures"):
            generate(model, "support(4)")
        generate(model, "support(4)", temperature=1.0)
    finally:
        model.generation_config.temperature = before
    with pytest.raises(RefusedError, match="two temperatures"):
        model.generate(
            PROMPT,
            do_sample=True,
            max_new_tokens=2,
            logits_processor=[
                TemperingLogitsProcessor("support(4)"),
                TemperingLogitsProcessor("support(3)"),
            ],
        )
    with pytest.raises(RefusedError, match="two temperatures"):
        model.generate(
            PROMPT,
            do_sample=True,
            max_new_tokens=2,
            logits_processor=[TemperingLogitsProcessor("support(4)"), TemperatureLogitsWarper(0.5)],
        )


def test_greedy_decoding_is_refused(model):
    with pytest.raises(RefusedError, match="same at every temperature"):
        generate(model, "constant(2)", do_sample=False)


def test_outside_generate_the_prompt_must_be_told(tokenizer):
    with pytest.raises(InputError, match=r"prompt_length=input_ids.shape\[1\]"):
        TemperingLogitsProcessor("constant(2)")(PROMPT, torch.zeros(2, 9))
    with pytest.raises(InputError, match="shorter than prompt_length=5"):
        TemperingLogitsProcessor("constant(2)", prompt_length=5)(PROMPT, torch.zeros(2, 9))
    with pytest.raises(InputError, match="give the tokenizer"):
        TemperingLogitsProcessor("constant(2)", trace=Trace())


def test_the_processor_keeps_the_contract_of_engines():
    processors = {}

    def run(policy, requests, logits):
        longest = max(len(r.prompt) for r in requests)
        processor = processors.setdefault(
            str(policy), TemperingLogitsProcessor(policy, prompt_length=longest)
        )
        rows = [[PAD] * (longest - len(r.prompt)) + [*r.prompt, *r.generated] for r in requests]
        return processor(torch.tensor(rows), logits)

    assert check_engine(run) > 200


SETTINGS = {
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[7]],
    "min_length": 2,
    "suppress_tokens": [6],
    "remove_invalid_values": True,
    "top_k": 9,
    "top_p": 0.9,
    "min_p": 0.05,
    "typical_p": 0.9,
    "epsilon_cutoff": 1e-4,
    "eta_cutoff": 1e-4,
    "renormalize_logits": True,
}


def test_the_reported_order_is_that_of_generate(model, monkeypatch):
    """Each field of the report is the processor at that place of generate()'s own list."""
    lists = []
    run = LogitsProcessorList.__call__

    def spy(self, input_ids, scores, **kwargs):
        lists.append([type(p).__name__ for p in self])
        return run(self, input_ids, scores, **kwargs)

    monkeypatch.setattr(LogitsProcessorList, "__call__", spy)
    generate(model, "support(4)", max_new_tokens=2, **SETTINGS)
    config = GenerationConfig(do_sample=True, **SETTINGS)
    order = effective_order(config, parse_policy("support(4)"))
    names = [entry.partition("=")[0] for entry in order]
    assert names[-1] == "sample"
    written = {
        "repetition_penalty": "RepetitionPenaltyLogitsProcessor",
        "no_repeat_ngram_size": "NoRepeatNGramLogitsProcessor",
        "bad_words_ids": "NoBadWordsLogitsProcessor",
        "min_length": "MinLengthLogitsProcessor",
        "suppress_tokens": "SuppressTokensLogitsProcessor",
        "remove_invalid_values": "InfNanRemoveLogitsProcessor",
        "support(4)": "TemperingLogitsProcessor",
        "top_k": "TopKLogitsWarper",
        "top_p": "TopPLogitsWarper",
        "min_p": "MinPLogitsWarper",
        "typical_p": "TypicalLogitsWarper",
        "epsilon_cutoff": "EpsilonLogitsWarper",
        "eta_cutoff": "EtaLogitsWarper",
        "renormalize_logits": "LogitNormalization",
    }
    assert [written[name] for name in names[:-1]] == lists[0]


def test_the_order_reports_the_defaults_that_generate_adds():
    policy = parse_policy("support(4)")
    order = effective_order(GenerationConfig(do_sample=True), policy)
    assert order == ("support(4)", "top_k=50", "sample")
    order = effective_order(GenerationConfig(num_beams=3), policy)
    assert order == ("support(4)", "top of 3 beams")


def test_penalties_come_before_and_cuts_after(model):
    """top-p sees the tempered posterior: hot, it keeps more tokens."""
    kept = {}
    for text in ("constant(0.3)", "constant(3)"):
        out = generate(model, text, max_new_tokens=1, top_p=0.8, suppress_tokens=[11])
        assert (out.scores[0][:, 11] == -torch.inf).all()
        kept[text] = (out.scores[0] > -torch.inf).sum().item()
    assert kept["constant(0.3)"] < kept["constant(3)"]


@pytest.mark.parametrize("beams", [1, 3])
def test_the_trace_is_what_was_sampled(model, tokenizer, tmp_path, beams):
    policy, trace = parse_policy(PHASES), Trace()
    out = generate(
        model, policy, tokenizer=tokenizer, trace=trace, num_return_sequences=3, num_beams=beams
    )
    with pytest.raises(InputError, match=r"call trace.complete\(sequences\)"):
        trace.rows()
    trace.complete(out)
    rows = trace.rows()
    place = 0
    for index, sequence in enumerate(out.sequences):
        prompt = sequence[:4].tolist()
        mask = torch.ones(1, len(sequence), dtype=torch.long)
        mask[0, :2] = torch.tensor(prompt[:2]) != PAD
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(sequence[None], attention_mask=mask, position_ids=positions).logits[0]
        for position, token in enumerate(sequence[4:].tolist()):
            row = rows[place]
            state = policy.state(prompt, sequence[4 : 4 + position].tolist())
            raw = logits[3 + position].log_softmax(-1)
            T = 1.5 if state.phase == "thinking" else 0.5
            after = (raw / T).log_softmax(-1)
            assert (row["sequence"], row["position"], row["token_id"]) == (index, position, token)
            assert (row["phase"], row["temperature"]) == (state.phase, T)
            assert row["token"] == tokenizer.decode([token])
            numbers = [
                ("entropy_before", torch.special.entr(raw.exp()).sum()),
                ("entropy_after", torch.special.entr(after.exp()).sum()),
                ("support", torch.special.entr(after.exp()).sum().exp()),
                ("log_probability_raw", raw[token]),
                ("log_probability", after[token]),
            ]
            for name, value in numbers:
                assert row[name] == pytest.approx(value.item(), rel=1e-3, abs=1e-4), name
            place += 1
            if token == END:
                break
    assert place == len(rows)
    assert any(row["token_id"] == END for row in rows)  # padding after the end was left out

    from pyarrow import parquet

    assert trace.to_parquet(tmp_path / "t.parquet") == tmp_path / "t.parquet"
    assert parquet.read_table(tmp_path / "t.parquet").to_pylist() == rows


def test_traces_grow_run_by_run_and_refuse_what_they_cannot_follow(model, tokenizer):
    trace = Trace()
    for seed in (0, 1):
        trace.complete(generate(model, PHASES, seed=seed, tokenizer=tokenizer, trace=trace))
    assert trace.sequences == 4
    with pytest.raises(InputError, match="nothing was traced"):
        trace.complete(PROMPT)
    out = generate(model, PHASES, tokenizer=tokenizer, trace=trace)
    with pytest.raises(InputError, match="waits for an earlier run"):
        generate(model, PHASES, tokenizer=tokenizer, trace=trace)
    with pytest.raises(InputError, match="sequence 0: the trace has no record"):
        trace.complete(out.sequences.flip(-1))
    with pytest.raises(RefusedError, match="trace without an assistant"):
        generate(
            model,
            PHASES,
            PROMPT[:1],
            MASK[:1],
            tokenizer=tokenizer,
            trace=Trace(),
            prompt_lookup_num_tokens=2,
        )


def test_an_empty_trace_is_an_empty_table(tmp_path):
    from pyarrow import parquet

    table = parquet.read_table(Trace().to_parquet(tmp_path / "t.parquet"))
    assert table.num_rows == 0 and table.num_columns == 11
