"""Rules of length in vLLM equal those in transformers: eager, compiled, cached, in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tempering import layout
from tempering.attention import Profile, adaptive_profile
from tempering.attention.profiles.length_rules import Power
from tempering.attention.profiles.rules import PerHead
from tempering.engines.vllm.swap import swap_profile
from tempering.errors import ProfileError, RefusedError
from tests.vllm.reference import EXTENSION, ask, greedy, log_probabilities, prompt_scores, worst

CLOSE = 1e-4  # nats; the two engines sum in another order


def power(model: Any, seed: int, length: float = 40.0) -> Profile:
    """Another temperature and another slope for every head of every layer."""
    plan = layout(model)
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.empty(heads).uniform_(0.7, 1.4, generator=draw) for heads in plan.heads]
    slopes = [torch.empty(heads).uniform_(-0.3, 0.3, generator=draw) for heads in plan.heads]
    rules = [Power(PerHead(slope.double().tolist()), length) for slope in slopes]
    return Profile.from_rows(rows, plan).adopt(model).with_rules(rules)


def prompts_of(tokenizer: Any, lengths: tuple[int, ...]) -> list[list[int]]:
    draw = torch.Generator().manual_seed(7)
    size = len(tokenizer)
    return [torch.randint(3, size, (n,), generator=draw).tolist() for n in lengths]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_laws_equal_transformers(tiny, engines, tmp_path, eager):
    """Prompts in chunks of 64 tokens, prefixes from the cache, and tokens one by one."""
    directory, model, tokenizer = tiny
    law, other = power(model, 0), power(model, 1, 90.0)
    llm = engines(
        directory,
        enforce_eager=eager,
        additional_config={"tempering": {"profile": str(law.save(tmp_path / "law.json"))}},
        worker_extension_cls=EXTENSION,
        max_num_batched_tokens=64,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
    )
    prompts = prompts_of(tokenizer, (300, 17, 150))
    assert worst(llm, model, prompts, law) < CLOSE
    assert worst(llm, model, prompts, law.at_length(300)) > 0.01  # the slopes are no small matter
    for _ in range(2):  # the second time from the prefix cache
        for ids, output in zip(prompts, ask(llm, prompts, 12, logprobs=0), strict=True):
            written = list(output.outputs[0].token_ids)
            assert written == greedy(model, ids, law, 12)
            theirs = log_probabilities(model, [*ids, *written], law)[len(ids) - 1 :]
            own = [row[token].logprob for row, token in zip(output.outputs[0].logprobs, written)]
            assert float((theirs - torch.tensor(own)).abs().max()) < CLOSE
    swap_profile(llm, other)
    assert worst(llm, model, prompts, other) < CLOSE
    swap_profile(llm, adaptive_profile("log_length(64)", model))
    assert worst(llm, model, prompts, adaptive_profile("log_length(64)", model)) < CLOSE
    swap_profile(llm, law.at_length(300))
    assert worst(llm, model, prompts, law.at_length(300)) < CLOSE
    with pytest.raises(RefusedError, match=r"rule support\(4\): vLLM takes .* rules of length"):
        swap_profile(llm, adaptive_profile("support(4)", model))
    steep = adaptive_profile("power(2.5,20)", model)
    with pytest.raises(ProfileError, match=r"T = .* that sees .* keys, and the context has 512"):
        swap_profile(llm, steep)
    swap_profile(llm, None)
    assert worst(llm, model, prompts, None) < CLOSE


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_every_request_has_its_own_law(tiny, engines, tmp_path, eager):
    directory, model, tokenizer = tiny
    laws = {"a": power(model, 2), "b": power(model, 3), "plain": Profile.neutral(model)}
    paths = {name: str(item.save(tmp_path / f"{name}.json")) for name, item in laws.items()}
    llm = engines(
        directory,
        enforce_eager=eager,
        additional_config={"tempering": {"profiles": paths}},
        worker_extension_cls=EXTENSION,
        max_num_batched_tokens=96,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
    )
    from vllm import SamplingParams

    (shared,) = prompts_of(tokenizer, (120,))
    tails = prompts_of(tokenizer, (9, 30, 50, 70, 3))
    prompts = [[*shared, *tail] for tail in tails]  # one prefix under five temperatures
    wanted = [("a", 1.0), ("b", 1.0), (None, 1.0), ("a", 0.5), ("plain", 1.0)]
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=6,
            min_tokens=6,
            prompt_logprobs=0,
            extra_args={"tempering_profile": name, "tempering_room": room} if name else None,
        )
        for name, room in wanted
    ]
    for _ in range(2):
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
        for ids, (name, room), output in zip(prompts, wanted, outputs, strict=True):
            profile = laws[name].scaled(room) if name else None
            gap = prompt_scores(output) - log_probabilities(model, ids, profile)
            assert float(gap.abs().max()) < CLOSE
            assert list(output.outputs[0].token_ids) == greedy(model, ids, profile, 6)


def test_an_engine_of_numbers_refuses_a_law(tiny, engines):
    directory, model, _ = tiny
    llm = engines(
        directory,
        enforce_eager=True,
        additional_config={"tempering": {"profile": None}},
        worker_extension_cls=EXTENSION,
    )
    with pytest.raises(RefusedError, match=r"rules \(power.*started with profiles of numbers"):
        swap_profile(llm, power(model, 0))
