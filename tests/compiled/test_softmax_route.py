"""The softmax route, compiled: no graph break, and a new temperature without compiling again."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

from tempering.attention.control.tempered import tempered
from tempering.attention.profiles.profile import Profile
from tests.compiled import test_attention as compiled
from tests.integration.own_attention import OwnAttention, OwnProduct

check, given, logits = compiled.check, compiled.given, compiled.logits
oracle, IDS = compiled.oracle, compiled.IDS
LAYERS = 2


@pytest.fixture(params=[OwnAttention, OwnProduct], ids=["softmax", "scaled dot product"])
def model(request):
    made = oracle.tiny_llama(attention="eager", num_hidden_layers=LAYERS)
    for layer in made.model.layers:
        layer.self_attn.__class__ = request.param
    return made


def temperatures(seed, *rows):
    return compiled.temperatures(seed, *rows, layers=LAYERS)


@pytest.mark.parametrize("rows", [(), (3,)], ids=["one profile", "rows"])
def test_updates_do_not_compile_again(model, rows):
    counter = CompileCounter()
    run = torch.compile(model, fullgraph=True, backend=counter)
    first, second = (temperatures(seed, *rows) for seed in (1, 2))
    with tempered(model, given(first)) as handle:
        check(run, model, first)
        assert counter.frame_count == 1
        for T in (second, torch.full_like(first, 0.6), first):
            handle.update(given(T))
            check(run, model, T)
        assert counter.frame_count == 1


def test_compiled_before_tempering(model):
    counter = CompileCounter()
    run = torch.compile(model, fullgraph=True, backend=counter)
    plain, found = logits(run), []
    assert torch.equal(plain, logits(model))
    for seed in range(3):
        with tempered(model, given(temperatures(seed))):
            check(run, model, temperatures(seed))
        assert torch.equal(logits(run), plain)
        found.append(counter.frame_count)
    assert found[0] == found[-1] == 2
    with tempered(model, Profile.neutral(model)):
        assert torch.equal(logits(run), plain)


@pytest.mark.slow
def test_decoding_with_a_static_cache(model):
    run = torch.compile(model, fullgraph=True, backend="eager")
    T = temperatures(4, 3)
    memory = StaticCache(config=model.config, max_cache_len=12)
    parts = [IDS[:, :4], *IDS[:, 4:].split(1, dim=1)]
    with tempered(model, given(T)), torch.no_grad():
        steps = [run(part, past_key_values=memory, use_cache=True).logits for part in parts]
    exact = oracle.forward(model, IDS, T).logits
    assert (torch.cat(steps, 1) - exact).abs().max() < 2e-5
