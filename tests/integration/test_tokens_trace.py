"""What generate() does around a policy, as reported; and what a trace says was sampled."""

import pytest
import torch
from pyarrow import parquet
from transformers import GenerationConfig, LogitsProcessorList

from tempering.errors import InputError, RefusedError
from tempering.tokens import Trace, effective_order, parse_policy
from tests.integration import tokens_tiny as tiny

PAD, END, PHASES, PROMPT, MASK = tiny.PAD, tiny.END, tiny.PHASES, tiny.PROMPT, tiny.MASK
generate = tiny.generate


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tiny_tokenizer()


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
    changed = out.sequences.clone()
    changed[0, 4] = (changed[0, 4] - 2) % 30 + 3  # another token, not the one that ends
    with pytest.raises(InputError, match=r"sequence 0: .* no record of the token at position 0"):
        trace.complete(changed)
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
    table = parquet.read_table(Trace().to_parquet(tmp_path / "t.parquet"))
    assert table.num_rows == 0 and table.num_columns == 11
