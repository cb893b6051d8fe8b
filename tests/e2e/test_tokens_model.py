"""Policies on the embedded model, in transformers: what users type, end to end."""

import pytest
import torch

from tempering.errors import TemperingWarning
from tempering.tokens import TemperingLogitsProcessor, Trace, parse_policy, temper_logits

pytestmark = pytest.mark.model


def chat(tokenizer, said, reply=""):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": said}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text + reply, return_tensors="pt")


def test_phases_of_a_reply_get_their_temperatures(smollm2):
    """Thinking opened in the reply and left open in the history; the trace sees both."""
    model, tokenizer = smollm2
    with pytest.warns(TemperingWarning, match="names delimiters of thinking"):  # SmolLM2 has none
        policy = parse_policy("phases(thinking=1.3, answer=0.2)|clip(0.1,2)", tokenizer)
    for said, reply, phase, temperature in [
        ("Why is the sky <think> blue?", "", "answer", 0.2),
        ("Why is the sky blue?", "<think>\nBecause", "thinking", 1.3),
        ("Why is the sky blue?", "<think>\nSo.</think>\n", "answer", 0.2),
    ]:
        trace = Trace()
        inputs = chat(tokenizer, said, reply)
        torch.manual_seed(0)
        out = model.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            max_new_tokens=4,
            logits_processor=[TemperingLogitsProcessor(policy, tokenizer, trace=trace)],
        )
        trace.complete(out)
        rows = trace.rows()
        new = out[0, inputs.input_ids.shape[1] :]
        assert "".join(row["token"] for row in rows) == tokenizer.decode(new)
        assert {row["phase"] for row in rows} == {phase}
        assert {round(row["temperature"], 6) for row in rows} == {temperature}


def test_a_batch_with_padding_keeps_twelve_tokens_alive(smollm2):
    model, tokenizer = smollm2
    trace = Trace()
    inputs = tokenizer(["Once upon a time", "The capital of France is the city of"], padding=True)
    inputs = {name: torch.tensor(ids) for name, ids in inputs.items()}
    out = model.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        min_new_tokens=4,  # a text that ends has no further rows
        max_new_tokens=4,
        logits_processor=[TemperingLogitsProcessor("support(12)", tokenizer, trace=trace)],
    )
    trace.complete(out)
    assert [row["support"] for row in trace.rows()] == pytest.approx([12] * 8, rel=1e-4)
    assert len({row["temperature"] for row in trace.rows()}) == 8


def test_the_tempered_logits_are_those_of_the_formula(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer("The river ran", return_tensors="pt").input_ids
    logits = model(ids).logits[:, -1]
    policy = parse_policy("entropy(T0=1.2, theta=0.5)")
    result, temperature = temper_logits(policy, logits, [policy.state(ids[0].tolist())])
    raw = logits.double().log_softmax(-1)
    entropy = torch.special.entr(raw.exp()).sum(-1)
    T = 1.2 * 0.8 ** (0.5 / entropy)
    assert temperature.item() == pytest.approx(T.item(), rel=1e-5)
    expected = (raw / T).softmax(-1)
    torch.testing.assert_close(result.double().softmax(-1), expected, atol=1e-6, rtol=1e-4)
