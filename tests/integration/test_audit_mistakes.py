"""Mistakes of the catalogue, made by another configuration or by hand, are each named first."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tempering.audit import KNOWN, MistakeCase, attributes, audit, cases
from tests.integration import audit_tiny as tiny

REFERENCES: dict[str, Any] = {}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
# Architectures with positions that are not their default.
STRETCHED: dict[str, Any] = {
    "llama, longrope": lambda: tiny.llama(rope_parameters=dict(tiny.LONGROPE)),
    "llama, llama3": lambda: tiny.llama(rope_parameters=dict(tiny.LLAMA3)),
    "qwen2, llama3": lambda: tiny.qwen2(rope_parameters=dict(tiny.LLAMA3)),
    "mistral, linear": lambda: tiny.mistral(rope_parameters=dict(tiny.LINEAR)),
    "gemma3, linear": lambda: tiny.gemma3(
        rope_parameters={"sliding_attention": PLAIN, "full_attention": dict(tiny.LINEAR)}
    ),
}


def reference(kind: str) -> Any:
    if kind not in REFERENCES:
        REFERENCES[kind] = STRETCHED.get(kind, getattr(tiny, kind, None))()
    return REFERENCES[kind]


def setting(**values: Any) -> Any:
    def change(config: Any) -> None:
        for name, value in values.items():
            setattr(config, name, value)

    return change


def rope(kind: str | None = None, **values: Any) -> Any:
    def change(config: Any) -> None:
        settings = config.rope_parameters[kind] if kind else config.rope_parameters
        settings.update(values)

    return change


def each(model: Any, name: str) -> list[Any]:
    return [getattr(layer.self_attn, name) for layer in model.model.layers]


def no_sinks(model: Any) -> None:
    for sinks in each(model, "sinks"):
        sinks.data.fill_(-1e30)


def no_norms(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_norm = torch.nn.Identity()
        layer.self_attn.k_norm = torch.nn.Identity()


def factor(power: float) -> Any:
    def change(model: Any) -> None:
        model.model.rotary_emb.attention_scaling **= power

    return change


def scaled(value: float) -> Any:
    def change(model: Any) -> None:
        for layer in model.model.layers:
            layer.self_attn.scaling = value

    return change


def wide(module: Any) -> None:
    """What a config can't say: no window at all, in every place that reads one."""
    module.config.sliding_window = 10**6
    for layer in module.model.layers:
        if layer.self_attn.sliding_window:
            layer.self_attn.sliding_window = 10**6


# Lists of one number for each pair of dimensions.
LONG, SHORT = tiny.LONGROPE["long_factor"], tiny.LONGROPE["short_factor"]
NEITHER = {"short_factor": [1.0] * 16, "long_factor": [1.0] * 16}
OWN = {"attention_factor": 1.2079441541679836}
SQRT = "(query_pre_attn_scalar, attention_multiplier) were ignored"
# (architecture, what the verdict says, changed configuration, changed model)
WRONG = [
    ("llama", "YaRN's factor 1.2079 were applied twice", None, factor(2)),
    ("llama", "YaRN's factor 1.2079 were missing", rope(attention_factor=1.0), None),
    ("llama", "stretching of positions were missing", rope(factor=1.0, **OWN), None),
    ("llama", "factor 8 of positions were squared", rope(factor=64.0, **OWN), None),
    ("llama", "base of its rotation were 500000", rope(rope_theta=500000.0), None),
    ("llama", "padded to 64", None, scaled(64**-0.5)),
    ("llama", "wrong head size: 1/sqrt(16)", None, scaled(0.25)),
    ("llama", "not scaled", None, scaled(1.0)),
    ("llama", "scale were applied twice", None, scaled(1 / 32)),
    ("qwen2", "YaRN's factor 1.2079 were applied twice", None, factor(2)),
    ("qwen2", "YaRN's factor 1.2079 were missing", rope(attention_factor=1.0), None),
    ("qwen2", "applied to the queries and not to the keys", None, factor(0.5)),
    ("qwen2", "padded to 64", None, scaled(64**-0.5)),
    ("gemma2", SQRT, setting(query_pre_attn_scalar=32), None),
    ("gemma2", "soft cap of its attention", setting(attn_logit_softcapping=None), None),
    ("gemma2", "soft cap of its logits were missing", setting(final_logit_softcapping=None), None),
    ("gemma2", "window of its sliding layers were 25", setting(sliding_window=25), None),
    ("gemma2", "window of its sliding layers were missing", None, wide),
    ("gemma3", SQRT, setting(query_pre_attn_scalar=32), None),
    ("gemma3", "soft cap of its logits were missing", setting(final_logit_softcapping=None), None),
    ("gemma3", "window of its sliding layers were 23", setting(sliding_window=23), None),
    ("gemma3", "window of its sliding layers were missing", None, wide),
    ("gemma3", "norms of queries and keys were missing", None, no_norms),
    ("gemma3", "1e+06 in place of 10000 in its", rope("sliding_attention", rope_theta=1e6), None),
    ("gemma3", "10000 in place of 1e+06 in its full", rope("full_attention", rope_theta=1e4), None),
    ("qwen3", "norms of queries and keys were missing", None, no_norms),
    ("gpt_oss", "sinks were missing", None, no_sinks),
    ("gpt_oss", "YaRN's factor 1.2079 were applied twice", None, factor(2)),
    ("gpt_oss", "window of its sliding layers were 25", setting(sliding_window=25), None),
    ("granite", SQRT, setting(attention_multiplier=32**-0.5), None),
    ("granite", "scale 2 of its logits were missing", setting(logits_scaling=1.0), None),
    ("cohere", "scale 0.5 of its logits were missing", setting(logit_scale=1.0), None),
    ("qwen2", "stretching of positions were missing", rope(factor=1.0, **OWN), None),
    ("qwen2", "factor 8 of positions were squared", rope(factor=64.0, **OWN), None),
    ("qwen2", "base of its rotation were 500000", rope(rope_theta=500000.0), None),
    ("qwen2", "wrong head size: 1/sqrt(16)", None, scaled(0.25)),
    ("qwen2", "scale were applied twice", None, scaled(1 / 32)),
    ("llama", "applied to the queries and not to the keys", None, factor(0.5)),
    ("gemma2", "scale were 1/32 in place of 1/sqrt(32)", None, scaled(1 / 32)),
    ("gemma3", "scale were 1/32 in place of 1/sqrt(32)", None, scaled(1 / 32)),
    ("gemma3", "not scaled", None, scaled(1.0)),
    ("gpt_oss", "window of its sliding layers were 23", setting(sliding_window=23), None),
    ("mistral", "base of its rotation were 1e+06", rope(rope_theta=1e6), None),
    ("mistral", "window of its sliding layers were 25", setting(sliding_window=25), None),
    ("mistral", "window of its sliding layers were missing", setting(sliding_window=None), None),
    ("vaultgemma", "soft cap of its attention", setting(attn_logit_softcapping=None), None),
    ("granite_swa", "sinks were missing", None, no_sinks),
    ("granite_swa", "base of its rotation were 500000", setting(layer_rope_theta=[5e5] * 2), None),
    ("phi3", "longrope's factor 1.2247 were applied twice", rope(attention_factor=1.5), None),
    ("phi3", "longrope's factor 1.2247 were missing", rope(attention_factor=1.0), None),
    ("phi3", "longrope's stretching of positions were missing", rope(**NEITHER), None),
    ("phi3", "for short texts were used for texts of more than 64", rope(long_factor=SHORT), None),
    ("phi3", "base of its rotation were 500000", rope(rope_theta=500000.0), None),
    ("llama", "YaRN's factor were 4 in place of 8", rope(factor=4.0), None),
    ("qwen2", "YaRN's factor were 16 in place of 8", rope(factor=16.0), None),
    ("qwen2, llama3", "llama3's factor were 4 in place of 8", rope(factor=4.0), None),
    ("mistral, linear", "linear RoPE's factor were 8 in place of 4", rope(factor=8.0), None),
    ("mistral", "stretched by 4 (linear RoPE)", setting(rope_parameters=dict(tiny.LINEAR)), None),
    ("gemma3", "stretched by 8 (linear RoPE) in its full",
     rope("full_attention", rope_type="linear", factor=8.0), None),
    ("llama", "YaRN were left out", setting(rope_parameters=PLAIN), None),
    ("gpt_oss", "YaRN were left out", setting(rope_parameters=PLAIN), None),
    ("phi3", "longrope were left out", rope(attention_factor=1.0, **NEITHER), None),
    ("llama, longrope", "factor 1.2247 were applied twice", rope(attention_factor=1.5), None),
    ("llama, longrope", "factor 1.2247 were missing", rope(attention_factor=1.0), None),
    ("llama, longrope", "stretching of positions were missing", rope(**NEITHER), None),
    ("llama, longrope", "for short texts were used for", rope(long_factor=SHORT), None),
    ("llama, llama3", "llama3's stretching", setting(rope_parameters=PLAIN), None),
    ("llama, llama3", "llama3's factor 8 of positions were squared", rope(factor=64.0), None),
    ("qwen2, llama3", "llama3's stretching", setting(rope_parameters=PLAIN), None),
    ("qwen2, llama3", "llama3's factor 8 of positions were squared", rope(factor=64.0), None),
    ("mistral, linear", "RoPE's stretching", setting(rope_parameters=PLAIN), None),
    ("mistral, linear", "RoPE's factor 4 of positions were squared", rope(factor=16.0), None),
    ("gemma3, linear", "missing in its full", rope("full_attention", factor=1.0), None),
    ("gemma3, linear", "squared in its full", rope("full_attention", factor=16.0), None),
]  # fmt: skip


@pytest.mark.parametrize(
    "kind, says, config, model", WRONG, ids=[f"{kind}: {says}" for kind, says, *_ in WRONG]
)
def test_it_is_named_first(kind, says, config, model):
    own = reference(kind)
    engine = tiny.reconfigured(own, config or (lambda c: None))
    if model is not None:
        model(engine)
    found = audit(own, tiny.said_by(engine, tiny.prompts()), layers=False)
    assert found.right is False and found.exit_code == 1
    assert says in found.verdict and found.verdict.startswith("the engine is wrong")
    first = found.candidates[0]
    assert first.kind == "mistake" and says in first.name
    assert first.scale < found.scale / 10


@pytest.mark.parametrize("beside", [1.0002, 1.001])
@pytest.mark.parametrize(
    "kind, says, model",
    [
        ("llama", "YaRN's factor 1.2079 were applied twice", factor(2)),
        ("qwen2", "YaRN's factor 1.2079 were missing", factor(0)),
        ("mistral", "heads padded to 64", scaled(64**-0.5)),
    ],
)
def test_a_mistake_that_is_a_temperature_is_named_beside_rounded_constants(
    kind, says, model, beside
):
    """vLLM's own rounding moves T a little, which makes a fitted T the likelier one."""
    own = reference(kind)
    engine = tiny.reconfigured(own, lambda config: None)
    model(engine)
    for layer in engine.model.layers:
        layer.self_attn.scaling /= beside
    found = audit(own, tiny.said_by(engine, tiny.prompts()), layers=False)
    assert says in found.verdict and says in found.candidates[0].name
    assert max(found.candidates, key=lambda item: item.gain).kind == "model"


def test_another_temperature_is_not_the_nearest_mistake():
    """1% off what YaRN's factor twice would be is no rounding."""
    own = reference("llama")
    engine = tiny.reconfigured(own, lambda config: None)
    factor(2)(engine)
    for layer in engine.model.layers:
        layer.self_attn.scaling /= 1.01
    found = audit(own, tiny.said_by(engine, tiny.prompts()), layers=False)
    assert found.candidates[0].kind == "model"
    assert f"it runs at T = {1.01 / OWN['attention_factor'] ** 2:.3f}" in found.verdict


@pytest.mark.parametrize("kind", ["phi3", "llama, longrope"])
def test_longropes_factors_for_long_texts_in_short_ones(kind):
    """What engines do that choose by the longest text that they were started for."""
    own = reference(kind)
    engine = tiny.reconfigured(own, rope(short_factor=LONG))
    both = [*tiny.said_by(engine, tiny.prompts(2, 60)), *tiny.said_by(engine, tiny.prompts(1, 80))]
    found = audit(own, both, layers=False)
    says = "longrope's factors for long texts were used for texts of at most 64 tokens"
    assert says in found.verdict and found.candidates[0].kind == "mistake"


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_norms_after_the_rotation(kind, monkeypatch):
    own = reference(kind)
    engine = tiny.reconfigured(own, lambda config: None)
    import sys

    place = sys.modules[type(engine.model.layers[0].self_attn).__module__]
    rotate = place.apply_rotary_pos_emb
    norms = [(a.q_norm, a.k_norm) for a in (layer.self_attn for layer in engine.model.layers)]
    no_norms(engine)
    calls = iter(norms * 1000)

    def after(q, k, *args, **kwargs):
        q, k = rotate(q, k, *args, **kwargs)
        q_norm, k_norm = next(calls)
        return q_norm(q), k_norm(k)

    monkeypatch.setattr(place, "apply_rotary_pos_emb", after)
    said = tiny.said_by(engine, tiny.prompts())
    monkeypatch.undo()
    found = audit(own, said, layers=False)
    assert "normed queries and keys after the rotation" in found.verdict


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("shift", [1, -1])
def test_a_bos_too_many_or_too_few(kind, shift):
    own, ids = reference(kind), tiny.prompts()
    with torch.no_grad():
        if shift == 1:
            read = torch.cat([torch.ones_like(ids[:, :1]), ids], 1)
            logits = own(input_ids=read).logits[:, 1:]
        else:
            logits = own(input_ids=ids[:, 1:]).logits
            logits = torch.cat([torch.zeros_like(logits[:, :1]), logits], 1)
    said = []
    for row, place in zip(ids, logits, strict=True):
        values = place.float().log_softmax(-1)[:-1].gather(1, row[1:, None])[:, 0].tolist()
        said.append(tiny.scored(row.tolist(), [None, *values], "a prompt"))
    found = audit(own, said, layers=False)
    says = "a BOS (id 1) were put before" if shift == 1 else "first token of the prompt"
    assert says in found.verdict


@pytest.mark.parametrize(
    "kind",
    [
        *("llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_oss", "granite", "cohere"),
        *("mistral", "vaultgemma", "granite_swa", "phi3", *STRETCHED),
    ],
)
def test_a_right_engine_is_right_and_the_reference_is_given_back(kind):
    own = reference(kind)
    engine = tiny.reconfigured(own, lambda config: None)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    settings = own.config.to_dict()
    found = audit(own, tiny.said_by(engine, tiny.prompts()), layers=False)
    assert found.right is True and found.exit_code == 0
    assert found.verdict.startswith("the engine runs at T = 1.000")
    low, high = found.temperature.low, found.temperature.high
    assert low <= 1 <= high and high - low < 1e-3
    assert own.config.to_dict() == settings
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    again = tiny.said_by(own, tiny.prompts())
    assert [row.logprobs for row in again] == [
        row.logprobs for row in tiny.said_by(engine, tiny.prompts())
    ]


def test_every_case_undoes_itself_also_after_an_exception():
    kinds = ("gemma2", "gemma3", "gpt_oss", "granite_swa", "granite", "llama", "mistral", "phi3")
    for kind in kinds:
        own = reference(kind)

        def said(own: Any = own) -> Any:
            """Of a text that is short for longrope, and a long one."""
            return [tiny.said_by(own, tiny.prompts(1, length)) for length in (60, 80)]

        before = said()
        held = [set(vars(module)) for module in own.modules()]
        for case in cases(own):
            with pytest.raises(KeyError), case.change():
                assert said() != before, case.name
                raise KeyError
            assert said() == before, case.name
        assert [set(vars(module)) for module in own.modules()] == held


def test_a_mistake_of_ones_own():
    def values_bias_missing(model):
        """The values' bias left out, as once in an engine of our own."""
        biased = [layer.self_attn.v_proj for layer in model.model.layers]
        if biased[0].bias is not None:
            yield MistakeCase("the bias of its values were missing", attributes(biased, bias=None))

    own = reference("qwen2")
    engine = tiny.reconfigured(own, lambda config: None)
    for layer in engine.model.layers:
        layer.self_attn.v_proj.bias.data.zero_()
    said = tiny.said_by(engine, tiny.prompts())
    named = audit(own, said, mistakes=[*KNOWN, values_bias_missing], layers=False)
    assert "as if the bias of its values were missing" in named.verdict
    unknown = audit(own, said, layers=False)
    assert "none of the known mistakes" in unknown.verdict
    # All layers were changed: the verdict promises the one that weighs most, whichever that is.
    # That one changed layer is named is tested in test_audit.py.
    named = [f"{layer}.self_attn on" for layer in ("model.layers.0", "model.layers.1")]
    assert sum(name in unknown.verdict for name in named) == 1
