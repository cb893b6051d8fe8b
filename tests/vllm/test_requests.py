"""Each request its own: profiles in one batch, over two ranks and compiled, and policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tempering.engines.vllm.swap import swap_profile
from tempering.errors import RefusedError
from tempering.tokens import RequestSettings, parse_policy, temper_logits
from tests.vllm.reference import (
    EXTENSION,
    TEXTS,
    ask,
    greedy,
    log_probabilities,
    per_head,
    per_layer,
    prompt_scores,
    worst,
)

CLOSE = 1e-4


def _named(model: Any, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    profiles = {"own": per_layer(model), "one": per_head(model, 1), "two": per_head(model, 2)}
    paths = {name: str(p.save(tmp_path / f"{name}.json")) for name, p in profiles.items()}
    config = {"profile": paths.pop("own"), "profiles": paths}
    settings = {
        "additional_config": {"tempering": config},
        "worker_extension_cls": EXTENSION,
    }
    return profiles, settings


def _check_mixed(llm: Any, model: Any, tokenizer: Any, profiles: dict[str, Any]) -> None:
    """Three profiles side by side on the same texts, twice, so that the prefix cache is used."""
    from vllm import SamplingParams

    prompts = [tokenizer(text).input_ids for text in TEXTS]
    names = ("own", "one", "two", "two^0.5", "two^-1.5")
    for name in names[3:]:
        profiles[name] = profiles["two"].scaled(float(name.partition("^")[2]))
    cases = [(ids, name) for ids in prompts for name in names]
    for scores in (0, None, None):
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=6,
                min_tokens=6,
                logprobs=0,
                prompt_logprobs=scores,
                extra_args=_extra(name),
            )
            for _, name in cases
        ]
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids, _ in cases], params, use_tqdm=False
        )
        for (ids, name), output in zip(cases, outputs, strict=True):
            answer = output.outputs[0]
            written = list(answer.token_ids)
            assert written == greedy(model, ids, profiles[name], 6)
            theirs = log_probabilities(model, [*ids, *written], profiles[name])
            own = [row[token].logprob for row, token in zip(answer.logprobs, written)]
            gap = (theirs[len(ids) - 1 :] - torch.tensor(own)).abs().max()
            assert float(gap) < CLOSE, name
            if scores is not None:
                gap = (prompt_scores(output) - theirs[: len(ids) - 1]).abs().max()
                assert float(gap) < CLOSE, name


@pytest.mark.parametrize("how", ["two ranks", "compiled"])
def test_profiles_of_requests_in_one_batch(tiny, engines, tmp_path, monkeypatch, how):
    from vllm.exceptions import VLLMValidationError

    directory, model, tokenizer = tiny
    profiles, settings = _named(model, tmp_path)
    if how == "two ranks":
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        settings |= {"tensor_parallel_size": 2, "enforce_eager": True}
    llm = engines(directory, **settings)
    _check_mixed(llm, model, tokenizer, profiles)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    # A swap changes the profile of those that name none, and of nobody else.
    profiles["own"] = per_head(model, 3)
    name = swap_profile(llm, profiles["own"])
    answers = llm.collective_rpc("tempering_active")
    assert [tuple(answer) for answer in answers] == [("", name)] * (1 + (how == "two ranks"))
    _check_mixed(llm, model, tokenizer, profiles)
    swap_profile(llm, None)
    assert worst(llm, model, prompts, None) < CLOSE
    with pytest.raises(VLLMValidationError, match="no profile 'three'; it has one, two"):
        ask(llm, prompts, extra_args={"tempering_profile": "three"})
    # Requests that are under way would change profile in the middle.
    llm.llm_engine.add_request(
        "1", {"prompt_token_ids": prompts[0]}, _params(max_tokens=4, min_tokens=4)
    )
    with pytest.raises(RefusedError, match="requests are in flight"):
        swap_profile(llm, per_layer(model))
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    swap_profile(llm, per_layer(model))


def _extra(name: str) -> dict[str, Any] | None:
    """The arguments of a request for the profile NAME^ROOM."""
    if name == "own":
        return None
    name, _, room = name.partition("^")
    return {"tempering_profile": name, **({"tempering_room": float(room)} if room else {})}


def _params(**settings: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**settings)


POLICIES = (
    None,
    "constant(0.7)",
    "constant(0)",
    "constant(inf)",
    "support(5)",
    "schedule(linear(2,0.5), length=6)",
    'phases(thinking=between(1.3, "e"), answer=0.2)',
    "entropy(T0=1.2, theta=0.5)",
    "ladder(0.5,2, n=3)",
    "dynatemp(0.5, exponent=2, temperature=0.8)|clip(0.5, 2)",
    'phases(thinking=between(sampler(T=1.3, top_k=9), "e"), answer=sampler(T=0.5, min_p=0.05))',
    'constant(0.7)|loops(heat=2, ngram=1, window=8)|after("e", 2, 1.5)',
    'phases(thinking=between(1, "e", "a"), answer=1)|budget(thinking=3)',
    "sampler(T=1.5, min_p=0.1)|order(min_p, top_k, top_p, temperature)",
)
# Of requests whose policy truncates: the settings that it leaves out.
GIVEN = {POLICIES[-4]: {"top_p": 0.8}, POLICIES[-1]: {"top_k": 20, "top_p": 0.9}}


def test_policies_of_requests_in_one_batch(tiny, engines):
    """What vLLM samples from is what the policy makes of transformers' logits, token by token."""
    directory, model, tokenizer = tiny
    llm = engines(
        directory, enforce_eager=True, logprobs_mode="processed_logprobs", max_logprobs=-1
    )
    ids = tokenizer(TEXTS[0]).input_ids[:24]
    settings: dict[str, Any] = {"temperature": 1.0, "max_tokens": 9, "min_tokens": 0}
    params = [
        _params(
            **settings,
            **GIVEN.get(text or "", {}),
            n=3 if text and "ladder" in text else 1,
            seed=index,
            logprobs=-1,
            extra_args=None if text is None else {"tempering": text},
        )
        for index, text in enumerate(POLICIES)
    ]
    outputs = llm.generate([{"prompt_token_ids": ids}] * len(params), params, use_tqdm=False)
    for text, output in zip(POLICIES, outputs, strict=True):
        for sample, answer in enumerate(output.outputs):
            _check_samples(model, tokenizer, text, ids, sample, answer)
    # Penalties before the policy, min-p, top-k and top-p after it: as in transformers.
    composed = {"repetition_penalty": 1.5, "min_p": 0.05, "top_k": 40, "top_p": 0.9}
    given = _params(
        temperature=1.0,
        max_tokens=1,
        logprobs=-1,
        extra_args={"tempering": "constant(2)"},
        **composed,
    )
    output = llm.generate([{"prompt_token_ids": ids}], given, use_tqdm=False)[0].outputs[0]
    kept = {token for token, row in output.logprobs[0].items() if row.logprob > -1e30}
    assert kept == _kept(model, ids, 2.0, **composed)
    assert kept != _kept(model, ids, 1.0, **composed)


def _check_samples(
    model: Any, tokenizer: Any, text: str | None, ids: list[int], sample: int, answer: Any
) -> None:
    written = list(answer.token_ids)
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *written]])).logits[0, len(ids) - 1 : -1].float()
    policy = parse_policy(text or "constant(1)", tokenizer)
    given = RequestSettings(**GIVEN.get(text or "", {}))
    states = [
        policy.state(ids, written[:i], sample=sample, given=given) for i in range(len(written))
    ]
    wanted = temper_logits(policy, logits, states)[0].softmax(-1)
    for row, expected in zip(answer.logprobs, wanted, strict=True):
        got = torch.zeros_like(expected)
        for token, item in row.items():
            got[token] = torch.tensor(item.logprob).exp()
        assert float((got - expected).abs().max()) < 1e-4, (text, sample)


def _kept(model: Any, ids: list[int], T: float, **settings: Any) -> set[int]:
    """The tokens that transformers' own processors leave, with the policy in its place."""
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    rows = torch.tensor([ids])
    with torch.no_grad():
        scores = model(rows).logits[:, -1].float()
    for step in (
        RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]),
        lambda _, scores: scores / T,
        MinPLogitsWarper(settings["min_p"]),
        TopKLogitsWarper(settings["top_k"]),
        TopPLogitsWarper(settings["top_p"]),
    ):
        scores = step(rows, scores)
    return set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())
