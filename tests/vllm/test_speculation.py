"""Policies under speculative decoding: every token keeps the law that it has without."""

from __future__ import annotations

import dataclasses
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tempering.tokens import check_engine
from tempering.tokens.engine_check import Request
from tempering.tokens.settings import RequestSettings
from tests.vllm.laws import (
    CASES,
    LENGTH,
    PROMPT,
    SPECULATION,
    WORDS,
    fit,
    law,
    network_logits,
    save_early_copy,
    save_network,
    speculating,
    written,
)
from tests.vllm.test_processor import CONFIG, Config, Rows, Slots, own

SPECULATING: Any = Config(**{**vars(CONFIG), "speculative_config": object()})


def cut(requests: list[Request]) -> tuple[list[Request], list[list[int]]]:
    """Each request some tokens earlier, and those tokens, which are drafted again."""
    sizes = [min(i % 4, len(r.generated)) for i, r in enumerate(requests)]
    drafts = [list(r.generated[len(r.generated) - n :]) for r, n in zip(requests, sizes)]
    before = [
        dataclasses.replace(r, generated=r.generated[: len(r.generated) - len(draft)])
        for r, draft in zip(requests, drafts)
    ]
    return before, drafts


def sampling_of(rows: Rows, requests: Any) -> Any:
    """What the older runner's sampler and rejection sampler read of a batch."""
    return SimpleNamespace(
        logitsprocs=SimpleNamespace(argmax_invariant=[rows.processor]),
        temperature=own(requests)[:, 0],
        all_greedy=False,
        top_k=None,
        top_p=None,
    )


def verified(rows: Rows, requests: Any, drafts: list[list[int]], target: Any, bonus: Any) -> Any:
    """Target and bonus logits as the older runner's rejection sampler would sample from them."""
    from tempering.engines.vllm import by_row

    counts = [len(draft) for draft in drafts]
    flat = torch.tensor([t for draft in drafts for t in draft], dtype=torch.int32)
    sampling = sampling_of(rows, requests)

    def forward(self: Any, drafts: Any, probs: Any, logits: Any, sampling: Any) -> Any:
        after = rows.processor.apply(bonus / own(requests))
        ends = torch.tensor(counts).cumsum(0).to(torch.int32)
        return by_row._constrain(pytest.fail, target, ends, sampling), after

    metadata = SimpleNamespace(num_draft_tokens=counts, draft_token_ids=flat)
    return by_row._verify(forward, None, metadata, None, None, sampling)


def test_the_older_interface_keeps_the_contract_at_every_drafted_token():
    """The row after some drafted tokens, and the same row with one more drafted behind it."""

    def run(policy, requests, logits):
        before, drafts = cut(requests)
        rows = Rows(SPECULATING)
        rows.add([(place, policy, request) for place, request in enumerate(before)])
        rows.update()
        noise = torch.randn(sum(map(len, drafts)), logits.shape[1])
        _, last = verified(rows, requests, drafts, noise, logits.clone())
        longer = [[*draft, -1, 1] if i % 2 else [*draft, 1, 1] for i, draft in enumerate(drafts)]
        places = torch.tensor(list(map(len, longer))).cumsum(0) - 2
        target = torch.randn(sum(map(len, longer)), logits.shape[1])
        target[places] = logits
        between, _ = verified(rows, requests, longer, target.clone(), logits.clone())
        torch.testing.assert_close(between[places], last)
        # A token -1 is none: nothing is sampled after it, so that row is left alone.
        alone = places[1::2] + 1
        torch.testing.assert_close(between[alone], target[alone] / own(requests)[1::2])
        return last

    assert check_engine(run) > 100


def expanded(
    slots: Slots, places: list[int], before: list[Request], drafts: list[list[int]], logits: Any
) -> torch.Tensor:
    """The newer runner's call for requests with drafted tokens: a row for each and one more."""
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

    rows = [
        (place, ahead, len(r.prompt) + len(r.generated) + ahead - 1, token)
        for place, r, draft in zip(places, before, drafts)
        for ahead, token in enumerate([0, *draft])
    ]
    columns = [torch.tensor(column, dtype=torch.int32) for column in zip(*rows)]
    context = LogitsContext(
        expanded_idx_mapping=columns[0],
        idx_mapping=torch.tensor(places),
        idx_mapping_np=np.array(places),
        expanded_local_pos=columns[1],
        input_ids=columns[3],
        pos=columns[2].long(),
        seq_lens_upper_bound_np=np.full(len(places), 99),  # the host doesn't know
    )
    return slots.processor.apply(logits, context)


def test_the_newer_interface_keeps_the_contract_at_every_drafted_token():
    def run(policy, requests, logits):
        before, drafts = cut(requests)
        slots = Slots(config=SPECULATING)
        places = [(3 * index + 1) % 16 for index in range(len(requests))]
        for slot, request in zip(places, before):
            slots.add(slot, policy, request)
        longer = [[*draft, -1 if i % 2 else 1] for i, draft in enumerate(drafts)]
        last = torch.tensor([len(draft) + 1 for draft in longer]).cumsum(0) - 2
        given = torch.randn(sum(len(draft) + 1 for draft in longer), logits.shape[1])
        given[last] = logits
        # A token -1 is none, and the row after it is left alone.
        after = expanded(slots, places, before, longer, given.clone())
        for index, draft in enumerate(longer):
            if draft[-1] < 0:
                assert torch.equal(after[last[index] + 1], given[last[index] + 1])
        return after[last] / own(requests)

    assert check_engine(run) > 100


# -- the law, by vLLM's own rejection sampler


@pytest.fixture(scope="module")
def sampler() -> Any:
    """vLLM's rejection sampler, with the functions for CPUs where it runs on one."""
    from vllm.platforms import current_platform
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler

    from tempering.engines.vllm.by_row import wrap_speculation

    current_platform.import_kernels()
    register = getattr(current_platform, "register_triton_kernel_overrides", None)
    if register is not None:
        register()
    wrap_speculation()
    return RejectionSampler(Sampler())


TABLE = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(2)) * 1.2


def next_logits(rows: list[list[int]]) -> torch.Tensor:
    """A model of two words: the next one depends on the last two."""
    last, before = (torch.tensor([row[-k] for row in rows]) for k in (1, 2))
    return TABLE[last] + 0.5 * TABLE[:, before].T


def drafted(kind: str, text: list[int], draw: torch.Generator) -> tuple[list[int], Any]:
    """Drafted tokens after a text, and what they were drawn from, where they were drawn."""
    tokens, probs = list(text), []
    for _ in range({"fewer": len(text) % 3}.get(kind, 3)):
        q = (TABLE[tokens[-1]] * 0.7).softmax(-1)
        if kind == "probabilistic":  # a draft model that draws
            probs.append(q)
            tokens.append(int(torch.multinomial(q, 1, generator=draw)))
        else:  # n-grams, EAGLE, MTP, a draft model without a draw: the likeliest
            tokens.append(int(q.argmax()))
    return tokens[len(text) :], probs


def texts(sampler: Any, kind: str, policy: str, given: dict[str, Any], runs: int) -> Counter[Any]:
    """So many texts, written 250 side by side in steps of the older runner."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    found: Counter[Any] = Counter()
    request = Request(tuple(PROMPT), (), 0, RequestSettings(**given))
    while found.total() < runs:
        rows, size = Rows(SPECULATING), 250
        rows.add([(place, policy, request) for place in range(size)])
        rows.update()
        while any(len(text) < LENGTH for text in rows.lists.values()):
            whole = [[*PROMPT, *rows.lists[place]] for place in range(size)]
            pairs = [drafted(kind, text, draw) for text in whole]
            histories = [
                [*text, *tokens[:ahead]]
                for text, (tokens, _) in zip(whole, pairs)
                for ahead in range(len(tokens) + 1)
            ]
            probs = [q for _, row in pairs for q in row]
            output = sampler(
                drafts_of([tokens for tokens, _ in pairs]),
                torch.stack(probs) if probs else None,
                next_logits(histories),
                metadata(rows, size, float(given.get("temperature", 1))),
            )
            for place, row in enumerate(output.sampled_token_ids.tolist()):
                rows.lists[place] += [token for token in row if token >= 0]
        assert not list(rows.processor._take_step().places())
        found.update(tuple(text[:LENGTH]) for text in rows.lists.values())
    return found


def drafts_of(drafts: list[list[int]]) -> Any:
    """Drafted tokens as the older runner lays them out: a row of logits for each, then one more."""
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    counts = torch.tensor([len(tokens) for tokens in drafts])
    ends = (counts + 1).cumsum(0)
    verified = torch.ones(int(ends[-1]), dtype=torch.bool)
    verified[ends - 1] = False
    flat = [token for tokens in drafts for token in tokens]
    return SpecDecodeMetadata(
        draft_token_ids=torch.tensor(flat, dtype=torch.int32),
        num_draft_tokens=counts.tolist(),
        cu_num_draft_tokens=counts.cumsum(0).to(torch.int32),
        cu_num_sampled_tokens=ends.to(torch.int32),
        target_logits_indices=verified.nonzero()[:, 0],
        bonus_logits_indices=ends - 1,
        logits_indices=torch.arange(len(verified)),
    )


def metadata(rows: Rows, size: int, temperature: float) -> Any:
    """What vLLM's samplers know of a batch: our processor, and the requests' own temperature."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    processors = LogitsProcessors()
    processors.argmax_invariant.append(rows.processor)
    return SamplingMetadata(
        temperature=torch.full((size,), temperature),
        all_greedy=False,
        all_random=True,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=torch.zeros(size),
        presence_penalties=torch.zeros(size),
        repetition_penalties=torch.ones(size),
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=processors,
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("likeliest", name) for name in CASES), ("probabilistic", "phases"), ("fewer", "sampler")],
)
def test_drafts_of_every_kind_keep_the_law(sampler, name, kind):
    policy, given, other = CASES[name]
    counts = texts(sampler, kind, policy, given, 2000)
    settings = RequestSettings(**given)
    assert fit(counts, law(next_logits, policy, settings))["p"] > 1e-3
    assert fit(counts, law(next_logits, other, settings))["p"] < 1e-6


def test_a_wrong_law_is_found_out(sampler, monkeypatch):
    """Policies at the last row alone, or with the history before all of the drafted tokens."""
    from tempering.engines.vllm.by_row import ByRow
    from tempering.engines.vllm.streams import DraftedStates

    policy, given, _ = CASES["phases"]
    expected = law(next_logits, policy)
    with monkeypatch.context() as patch:
        patch.setattr(ByRow, "apply_to_drafts", lambda self, logits: logits)
        assert fit(texts(sampler, "likeliest", policy, given, 2000), expected)["p"] < 1e-9
    with monkeypatch.context() as patch:
        right = DraftedStates.after
        patch.setattr(DraftedStates, "after", lambda self, ahead: right(self, 0))
        assert fit(texts(sampler, "likeliest", policy, given, 2000), expected)["p"] < 1e-9


def test_other_temperatures_and_requests_without_a_policy_keep_their_law(sampler):
    """A request's own temperature, by which vLLM divides at every drafted token."""
    given = {"temperature": 0.6}
    policy = "sampler(top_k=5)|order(top_k, temperature)"
    counts = texts(sampler, "likeliest", policy, given, 2000)
    assert fit(counts, law(next_logits, policy, RequestSettings(**given)))["p"] > 1e-3


def test_requests_beside_one_with_a_policy_have_their_own_settings():
    """A policy, T with top-k, T with top-p, and a greedy request: each drafted token by hand."""
    from tempering.engines.vllm import by_row

    rows = Rows(SPECULATING)
    none = [(place, None, Request(tuple(PROMPT), ())) for place in (1, 2, 3)]
    rows.add([(0, "schedule(linear(2,0.5), length=4)", Request(tuple(PROMPT), (1,))), *none])
    rows.update()
    sampling = SimpleNamespace(
        logitsprocs=SimpleNamespace(argmax_invariant=[rows.processor]),
        temperature=torch.tensor([1.0, 0.4, 3.0, 0.0]),
        all_greedy=False,
        top_k=torch.tensor([WORDS, 3, WORDS, WORDS], dtype=torch.int32),
        top_p=torch.tensor([1.0, 1.0, 0.5, 0.3]),
    )
    logits = torch.randn(7, WORDS, generator=torch.Generator().manual_seed(3))
    ends = torch.tensor([2, 5, 5, 7], dtype=torch.int32)
    with rows.processor.verifying([2, 3, 0, 2], torch.tensor([4, 5, 6, 7, 8, 9, 1])):
        got = by_row._constrain(pytest.fail, logits.clone(), ends, sampling).softmax(-1)
    heats = [1.5, 1.0, 0.4, 0.4, 0.4, 1.0, 1.0]
    wanted = (logits / torch.tensor(heats)[:, None]).softmax(-1)
    least = wanted[2:5].topk(3).values[:, -1:]
    wanted[2:5] *= wanted[2:5] >= least
    for row in (5, 6):
        order = wanted[row].argsort(descending=True)
        kept = int((wanted[row][order].cumsum(0) < 0.3).sum()) + 1
        wanted[row][order[kept:]] = 0
    torch.testing.assert_close(got, wanted / wanted.sum(-1, keepdim=True))


# -- failures and traces of drafted tokens


def test_what_happened_at_a_token_that_was_not_accepted_is_forgotten():
    from tempering.engines.vllm.step import Step
    from tempering.engines.vllm.streams import Draw
    from tempering.tokens.trace import TraceStep

    step = Step()
    logs = torch.full((5,), 0.2).log()
    for ahead in range(4):
        step.drew(3, ahead, Draw(TraceStep(f"{ahead}", 1.0, 0, 0, 1.0), logs, logs))
        step.drew(4, ahead, Draw(TraceStep("", 1.0, 0, 0, 1.0), logs, logs))
    step.fail(7, 2, "late")
    step.fail(7, 1, "early")
    step.fail(7, 3, "latest")
    step.fail(8, 1, "not reached")
    names = {3: "c", 4: "d", 7: "g", 8: "h"}
    sampled = {"c": [4, 2], "d": [], "g": [1, 1], "h": [1]}
    failed, traced = step.outcome(names, sampled)
    assert failed == {"g": "early"}
    assert [(entry["token_id"], entry["phase"]) for entry in traced.pop("c")] == [
        (4, "0"),
        (2, "1"),
    ]
    assert traced == {}


# -- real engines


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> tuple[Any, Any]:
    """(target, draft model), saved."""
    home = tmp_path_factory.mktemp("networks")
    target = save_network(home / "target", 0, 3)
    return target, save_early_copy(target, home / "draft", 2)


@pytest.mark.parametrize("kind", [kind for kind in SPECULATION if kind != "none"])
def test_an_engine_that_speculates_keeps_the_law(networks, kind):
    target, draft = networks
    logits = network_logits(target)
    llm = speculating(kind, target, draft)
    try:
        for policy, given, other in CASES.values():
            settings = RequestSettings(**given)
            counts, accepted = written(llm, policy, given, 1500)
            assert fit(counts, law(logits, policy, settings))["p"] > 1e-3
            assert fit(counts, law(logits, other, settings))["p"] < 1e-6
            assert accepted > 0.01
        _check_failures_alone(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()


def _check_failures_alone(llm: Any) -> None:
    """A policy that can't be carried out ends its request with the reason, and no other."""
    from vllm import SamplingParams

    given = {"temperature": 1.0, "max_tokens": 30, "ignore_eos": True, "detokenize": False}
    budget = "phases(thinking=between(1, ids(3), ids(5)), answer=1)|budget(thinking=9)"
    asked = {"tempering": budget, "tempering_trace": True}
    shut = [token for token in range(WORDS) if token != 5]  # the phase can't be closed
    params = [
        SamplingParams(**given, extra_args=asked, allowed_token_ids=shut if place % 2 else None)
        for place in range(8)
    ]
    start = {"prompt_token_ids": [*PROMPT, 3]}
    for place, reply in enumerate(llm.generate([start] * 8, params, use_tqdm=False)):
        output = reply.outputs[0]
        if place % 2:
            assert output.finish_reason == "error" and len(output.token_ids) < 9
            assert "token 5, which the engine masks" in output.stop_reason
            continue
        assert [entry["token_id"] for entry in output.tempering_trace] == list(output.token_ids)
        phases = [entry["phase"] for entry in output.tempering_trace]
        assert "thinking" in phases and len(phases) == 30
        for token, phase, after in zip(output.token_ids, phases, phases[1:]):
            assert after == ("thinking" if token == 3 else "answer" if token == 5 else phase)
