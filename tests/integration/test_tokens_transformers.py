"""Policies inside generate(): batches, beams, assistants, and a tiny random model's own logits."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaForCausalLM, TemperatureLogitsWarper

from tempering.errors import InputError, RefusedError
from tempering.tokens import TemperingLogitsProcessor, Trace, check_engine, parse_policy
from tests.integration import tokens_tiny as tiny

PAD, PHASES, PROMPT, MASK = tiny.PAD, tiny.PHASES, tiny.PROMPT, tiny.MASK
generate, wanted = tiny.generate, tiny.wanted


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tiny_tokenizer()


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
            str(policy),
            TemperingLogitsProcessor(policy, prompt_length=longest, given=requests[0].given),
        )
        rows = [[PAD] * (longest - len(r.prompt)) + [*r.prompt, *r.generated] for r in requests]
        return processor(torch.tensor(rows), logits)

    assert check_engine(run) > 200


def test_a_prompt_of_embeddings_needs_its_ids(model):
    # transformers hands a processor no ids for it, so an open phase would be read as closed.
    embeds = model.get_input_embeddings()(PROMPT)
    for policy in (PHASES, f"{PHASES}|room(0.5)"):
        with pytest.raises(RefusedError, match="as embeddings alone; give its ids beside them"):
            generate(model, policy, None, MASK, inputs_embeds=embeds)
    policy = parse_policy(PHASES)
    given = generate(model, policy, None, MASK, inputs_embeds=embeds, input_ids=PROMPT)
    plain = generate(model, policy)
    assert torch.equal(given.sequences, plain.sequences)
    for step, (raw, scores) in enumerate(zip(given.logits, given.scores)):
        after = wanted(policy, raw, given.sequences[:, : 4 + step], 4)
        assert torch.allclose(scores.log_softmax(-1), after, atol=1e-5)
    # What reads no tokens reads no prompt either.
    out = generate(model, "schedule(linear(2,0.5), length=4)", None, MASK, inputs_embeds=embeds)
    assert out.sequences.shape == (2, 10)


def test_rows_are_in_the_phases_of_their_own_last_turn(model):
    # Two rows, padded on the left by the token that ends turns: one is opened by its template.
    turn = "phases(thinking=between(1.5, ids(3), ids(4)), answer=0.5)"
    policy = parse_policy(turn)
    prompt = torch.tensor([[PAD, PAD, 5, 3, 7], [3, 9, 4, 9, 10]])
    out = generate(model, policy, prompt, (prompt != PAD).long(), max_new_tokens=1)
    rows = [policy.state(row[:5]).phase for row in out.sequences.tolist()]
    assert rows == ["thinking", "answer"]
