"""vLLM's own batch of its older runner: where the policies stand, and tokens that come late."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tempering.tokens import parse_policy, temper_logits
from tests.vllm.test_processor import CONFIG, Config

VOCABULARY = 32


@pytest.fixture
def batch() -> Any:
    """vLLM's batch with its own processors and ours."""
    return made_batch(None)


@pytest.fixture
def speculating() -> Any:
    """The batch of an engine that speculates, for which vLLM leaves our processors out."""
    return made_batch(object())


def made_batch(speculation: Any) -> Any:
    from vllm.v1.sample.logits_processor import build_logitsprocs
    from vllm.v1.worker.gpu_input_batch import InputBatch

    from tempering.engines.vllm.by_row import _build_processors, init_batch
    from tempering.engines.vllm.wrapping import wrap

    wrap(InputBatch, "__init__", init_batch)
    config = Config(
        **{**vars(CONFIG), "speculative_config": speculation},
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        reasoning_config=None,
    )
    config.model_config.runner_type = "generate"
    device = torch.device("cpu")
    return InputBatch(
        max_num_reqs=8,
        max_model_len=64,
        max_num_batched_tokens=64,
        device=torch.device("cpu"),
        vocab_size=VOCABULARY,
        block_sizes=[16],
        max_num_blocks_per_req=[4],
        logitsprocs=_build_processors(build_logitsprocs, config, device, False, False),
    )


def request(name: str, policy: str | None, prompt: list[int], generated: list[int]) -> Any:
    from vllm import SamplingParams
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    extra = None if policy is None else {"tempering": policy}
    return CachedRequestState(
        req_id=name,
        prompt_token_ids=prompt,
        mm_features=[],
        sampling_params=SamplingParams(temperature=1.0, max_tokens=40, extra_args=extra),
        generator=None,
        block_ids=([0],),
        num_computed_tokens=0,
        output_token_ids=generated,
    )


PHASES = "phases(thinking=between(1.7, ids(3), ids(4)), answer=0.3)"


def tempered_rows(batch: Any, logits: torch.Tensor) -> torch.Tensor:
    for processor in batch.logitsprocs.argmax_invariant:
        logits = processor.apply(logits)
    return logits


def test_policies_stand_before_min_p(batch):
    names = [type(item).__name__ for item in batch.logitsprocs.argmax_invariant]
    assert names[0] == "ByRow" and "MinPLogitsProcessor" in names


def test_only_policies_that_read_tokens_ask_for_them(batch):
    batch.add_request(request("a", "support(3)", [1], []))
    batch.refresh_metadata()
    assert not batch.sampling_metadata.output_token_ids
    batch.add_request(request("b", PHASES, [1], []))
    batch.refresh_metadata()
    assert len(batch.sampling_metadata.output_token_ids) == 2
    batch.remove_request("b")
    batch.condense()
    batch.refresh_metadata()
    assert not batch.sampling_metadata.output_token_ids


def test_under_speculation_every_policy_asks_for_tokens(speculating):
    """Only they say how many of the drafted ones were accepted."""
    names = [type(item).__name__ for item in speculating.logitsprocs.argmax_invariant]
    assert names == ["ByRow"]
    speculating.add_request(request("a", "schedule(linear(2,1), length=9)", [1], []))
    speculating.refresh_metadata()
    assert len(speculating.sampling_metadata.output_token_ids) == 1
    speculating.remove_request("a")
    speculating.add_request(request("b", None, [1], []))
    speculating.condense()
    speculating.refresh_metadata()
    assert not speculating.sampling_metadata.output_token_ids


def test_drafts_that_were_not_accepted_are_not_counted(speculating):
    """Asynchronous scheduling: vLLM takes all drafts for accepted until the tokens come."""
    batch, draw = speculating, random.Random(1)
    text = "schedule(linear(2,0.5), length=40)"
    policy, event = parse_policy(text), SimpleNamespace(synchronize=lambda: None)
    lists: list[list[int]] = [[], [], []]
    counts = [0, 0, 0]
    for place, generated in enumerate(lists):
        batch.add_request(request(f"{place}", text, [1], generated))
    for _ in range(12):
        batch.refresh_metadata()
        batch.update_async_output_token_ids()
        logits = torch.randn(3, VOCABULARY)
        got = tempered_rows(batch, logits.clone())
        states = [policy.state([1], [0] * count) for count in counts]
        wanted = temper_logits(policy, logits, states)[0]
        torch.testing.assert_close(got.softmax(-1), wanted.softmax(-1))
        drafted = [draw.randrange(4) for _ in counts]
        accepted = [draw.randint(1, many + 1) for many in drafted]
        rows = [[draw.randrange(9) for _ in range(many)] + [-1] * (4 - many) for many in accepted]
        batch.set_async_sampled_token_ids(torch.tensor(rows), event)
        batch.prev_req_id_to_index = {f"{place}": place for place in range(3)}
        for place, generated in enumerate(lists):
            generated += [-1] * (drafted[place] + 1)
            counts[place] += accepted[place]
    # Without the tokens no count is sure: the request fails by name.
    batch.sampled_token_ids_cpu = None
    tempered_rows(batch, torch.randn(3, VOCABULARY))
    step = batch.logitsprocs.argmax_invariant[0]._take_step()
    failed, _ = step.outcome({i: f"{i}" for i in range(3)}, {f"{i}": [5] for i in range(3)})
    assert all("which drafted tokens were accepted" in reason for reason in failed.values())
    assert len(failed) == 3


def test_tokens_that_come_late_are_waited_for(batch):
    """Asynchronous scheduling: placeholders stand where the last step's tokens will be."""
    draw = random.Random(0)
    event = SimpleNamespace(synchronize=lambda: None)
    lists: dict[str, list[int]] = {}
    truth: dict[str, list[int]] = {}
    for step in range(60):
        for name in [n for n in lists if draw.random() < 0.15]:
            batch.remove_request(name)
            del lists[name], truth[name]
        free = [f"{step}-{i}" for i in range(8 - len(lists))]
        for name in free[: draw.randrange(3)]:
            lists[name], truth[name] = [], []
            batch.add_request(request(name, PHASES, [draw.choice((1, 3))], lists[name]))
        batch.condense()
        batch.refresh_metadata()
        ids = batch.req_ids
        if not ids:
            continue
        batch.update_async_output_token_ids()
        logits = torch.randn(len(ids), VOCABULARY)
        got = tempered_rows(batch, logits.clone())
        policy = parse_policy(PHASES)
        prompts = [batch.token_ids_cpu[row, :1].tolist() for row in range(len(ids))]
        states = [policy.state(p, truth[n]) for p, n in zip(prompts, ids, strict=True)]
        wanted = temper_logits(policy, logits, states)[0]
        torch.testing.assert_close(got.softmax(-1), wanted.softmax(-1))
        # What was drawn is known a step later; until then vLLM writes -1.
        drawn = [draw.choice((1, 3, 4)) for _ in ids]
        batch.set_async_sampled_token_ids(torch.tensor(drawn)[:, None], event)
        batch.prev_req_id_to_index = {name: row for row, name in enumerate(ids)}
        for name, token in zip(ids, drawn, strict=True):
            lists[name].append(-1)
            truth[name].append(token)
