"""What stands at vLLM's boundary, without vLLM: identity, two-step swaps, batches, scoring."""

from __future__ import annotations

import gc
import json
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tempering.attention.profiles.fingerprint import fingerprint
from tempering.attention.profiles.profile import Profile
from tempering.engines.loading.hub import load_model
from tempering.engines.vllm import layers, worker
from tempering.engines.vllm.identity import (
    check_identity,
    checkpoint_directory,
    checkpoint_fingerprint,
)
from tempering.engines.vllm.profile_rows import RowsOfTokens, follow_requests
from tempering.engines.vllm.scoring import VllmScorer
from tempering.engines.vllm.settings import PerEngine
from tempering.engines.vllm.swap import swap_profile
from tempering.errors import ArchitectureError, InputError, ProfileError, RefusedError
from tempering.evaluation.cost import Variant, measure_costs
from tests.tiny import save_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = save_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=2)
    return directory, *load_model(str(directory))


def served(directory, architecture="LlamaForCausalLM"):
    config = SimpleNamespace(architectures=[architecture])
    return SimpleNamespace(model=str(directory), revision=None, hf_config=config)


def test_a_checkpoint_has_the_fingerprint_of_its_model(tiny, tmp_path):
    directory, model, _ = tiny
    assert checkpoint_fingerprint(directory, "LlamaForCausalLM") == fingerprint(model)
    shards = tmp_path / "shards"
    model.save_pretrained(shards, max_shard_size="100KB")
    assert (shards / "model.safetensors.index.json").is_file()
    assert checkpoint_fingerprint(shards, "LlamaForCausalLM") == fingerprint(model)
    assert checkpoint_fingerprint(directory, "GPT2LMHeadModel") is None
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "config.json").write_text(
        '{"model_type": "no_such", "architectures": ["NoSuchModel"]}'
    )
    assert checkpoint_fingerprint(newer, "NoSuchModel") is None
    assert checkpoint_directory(str(directory)) == directory
    assert checkpoint_directory(str(tmp_path)) is None


def test_profiles_of_other_models_are_refused(tiny, tmp_path):
    directory, model, _ = tiny
    profile = Profile.from_matrix([1.2, 0.8], model)
    assert check_identity(profile, served(directory)) is None
    assert check_identity(Profile.from_matrix(torch.ones(2, 4)), served(directory)) is None
    with pytest.raises(ProfileError, match="made for LlamaForCausalLM.*serves GPT2LMHeadModel"):
        check_identity(profile, served(directory, "GPT2LMHeadModel"))
    other = save_tiny_llama(tmp_path, layers=2, seed=1)
    with pytest.raises(ProfileError, match=rf"{fingerprint(model)}.*serves weights with"):
        check_identity(profile, served(other))
    assert "no safetensors" in str(check_identity(profile, served(tmp_path / "none")))


# -- swaps


class Layer:
    """What is read of vLLM's attention layers."""

    def __init__(self, index, heads=4):
        self.layer_name = f"model.layers.{index}.self_attn.attn"
        self.num_heads, self.num_kv_heads = heads, heads
        self.tempering_beta = torch.ones(heads)


@dataclass(eq=False)
class Config:
    """What is read of vLLM's configuration."""

    parallel_config: Any
    model_config: Any
    layers: Any


class Engine:
    """What is used of vllm.LLM: workers that answer, and a prefix cache."""

    def __init__(self, monkeypatch, directory, ranks=2):
        self.layers = [[Layer(0), Layer(1)] for _ in range(ranks)]
        parallel = SimpleNamespace(pipeline_parallel_size=1)
        self.configs = [Config(parallel, served(directory), own) for own in self.layers]
        monkeypatch.setattr(layers, "layers_of", lambda config: config.layers)
        monkeypatch.setattr(
            layers,
            "rank_layers",
            lambda own: [layers.RankLayer(x.layer_name, x.num_heads) for x in own],
        )
        self.workers = []
        for rank, config in enumerate(self.configs):
            own = worker.Worker()
            own.vllm_config, own.rank = config, rank
            worker.state_of(config)["active"] = "untempered"
            self.workers.append(own)
        self.busy, self.resets, self.empties = False, 0, True
        self.llm_engine = SimpleNamespace(
            has_unfinished_requests=lambda: self.busy, engine_core=None
        )

    def collective_rpc(self, name, timeout=None, args=()):
        return [getattr(own, name)(*args) for own in self.workers]

    def reset_prefix_cache(self, reset_connector):
        self.resets += 1
        return self.empties

    def betas(self):
        return [torch.stack([x.tempering_beta for x in own]) for own in self.layers]


@pytest.fixture
def engine(monkeypatch, tiny):
    return Engine(monkeypatch, tiny[0])


def test_a_swap_changes_all_workers_or_none(engine, tiny):
    profile = Profile.from_matrix([2.0, 0.5], tiny[1])
    name = swap_profile(engine, profile)
    assert name == worker.digest(profile) and engine.resets == 1
    wanted = torch.tensor([[0.5] * 4, [2.0] * 4])
    assert all(torch.equal(own, wanted) for own in engine.betas())
    broken = engine.layers[1].pop()  # the second worker can't take what the first one can
    for given in (profile, Profile.from_matrix(torch.full((2, 4), 3.0))):
        with pytest.raises(ProfileError, match="1 layers x 4 heads"):
            swap_profile(engine, given)
    engine.layers[1].append(broken)
    assert all(torch.equal(own, wanted) for own in engine.betas())
    engine.busy = True
    with pytest.raises(RefusedError, match="in flight"):
        swap_profile(engine, None)
    engine.busy, engine.empties = False, False
    with pytest.raises(RefusedError, match="nothing was changed"):
        swap_profile(engine, None)
    assert all(torch.equal(own, wanted) for own in engine.betas())
    engine.empties = True
    assert swap_profile(engine, None) == "untempered"
    assert all(torch.equal(own, torch.ones(2, 4)) for own in engine.betas())


def test_a_restarted_worker_does_not_commit_what_it_never_saw(engine, tiny):
    profile = Profile.from_matrix([2.0, 0.5], tiny[1])
    engine.collective_rpc("tempering_stage", args=(json.dumps(profile.to_json()),))
    worker.state_of(engine.configs[1]).pop("staged")  # it died and came back
    answers = engine.collective_rpc("tempering_commit", args=(worker.digest(profile),))
    assert answers[1][0] == "RefusedError" and "is staged in this worker" in answers[1][1]
    for config in engine.configs:
        worker.state_of(config).clear()
    with pytest.raises(InputError, match="started without tempering"):
        swap_profile(engine, profile)


def test_engines_of_one_process_share_nothing():
    kept = PerEngine()
    one, two = Config(1, 1, 1), Config(1, 1, 1)
    kept.set(one, "a")
    kept.set(two, "b")
    assert (kept.get(one), kept.get(two)) == ("a", "b")
    del one
    gc.collect()
    assert list(kept._values.values()) == ["b"]


# -- layers


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"alibi_slopes": [1.0]}, "decoder", "adds ALiBi's position bias"),
        ({"logits_soft_cap": 30.0}, "decoder", "caps its logits"),
        ({"sinks": torch.zeros(4)}, "decoder", "adds a sink logit"),
        ({}, "encoder_only", "is encoder_only attention"),
        ({}, "encoder_decoder", "decoder-only models"),
    ],
)
def test_layers_that_queries_do_not_temper(given, kind, message):
    layer = Layer(0)
    layer.attn_type = kind
    with pytest.raises(ArchitectureError, match=message):
        layers._check_layer(layer, given)


def test_layers_that_queries_temper():
    layer = Layer(0)
    layer.attn_type = "decoder"
    layers._check_layer(layer, {"logits_soft_cap": 0, "sinks": None, "alibi_slopes": None})
    layer.query_quant = object()
    with pytest.raises(RefusedError, match="calibrated without temperatures"):
        layers._check_layer(layer, {})


def test_configurations_that_are_refused():
    def config(**more):
        given = {
            "speculative_config": None,
            "parallel_config": SimpleNamespace(),
            "cache_config": SimpleNamespace(),
        }
        return SimpleNamespace(**{**given, **more})

    one = layers.EngineSettings()
    two = layers.EngineSettings(None, {"hot": Profile.from_matrix(torch.ones(2, 4))})
    for method in ("ngram", "suffix"):
        layers.check_configuration(config(speculative_config=SimpleNamespace(method=method)), two)
    with pytest.raises(RefusedError, match="'eagle' brings attention layers"):
        layers.check_configuration(config(speculative_config=SimpleNamespace(method="eagle")), one)
    split = config(parallel_config=SimpleNamespace(enable_dbo=True))
    layers.check_configuration(split, one)
    with pytest.raises(RefusedError, match="dual batch overlap"):
        layers.check_configuration(split, two)


# -- profiles of requests


def scheduled(new=(), finished=()):
    requests = [
        SimpleNamespace(
            req_id=name,
            sampling_params=SimpleNamespace(
                extra_args=None if profile is None else {"tempering_profile": profile, **room}
            ),
        )
        for name, profile, room in new
    ]
    return SimpleNamespace(scheduled_new_reqs=requests, finished_req_ids=set(finished))


@pytest.mark.parametrize("newer", [True, False])
def test_tokens_of_a_batch_find_their_profiles(newer):
    index, rooms = torch.zeros(12, dtype=torch.long), torch.ones(12)
    seen, strengths = [], []

    def look():
        seen.append(index.clone())
        strengths.append(rooms.clone())

    class Runner:
        input_batch = SimpleNamespace(req_ids=[])
        positions = torch.zeros(0, dtype=torch.long)

        def execute_model(self, plan, counts):
            if counts:
                self._prepare_inputs(plan, list(counts.values()))

        def _prepare_inputs(self, plan, counts):
            look()

    class Newer(Runner):
        def execute_model(self, plan, counts):
            if counts:
                self.prepare_inputs(plan, counts)
                look()

        def prepare_inputs(self, plan, counts):
            return SimpleNamespace(
                req_ids=list(counts),
                num_scheduled_tokens=list(counts.values()),
                positions=self.positions,
            )

    runner = Newer() if newer else Runner()
    follow_requests(runner, RowsOfTokens({"hot": 1, "cold": 2}, index, rooms))
    began = [("a", "hot", {}), ("b", None, {}), ("c", "cold", {"tempering_room": 0.5})]
    for plan, counts in (
        (scheduled(began), {"a": 3, "b": 2, "c": 1}),
        (scheduled([("d", "hot", {"tempering_room": -2})], ["a"]), {"c": 1, "d": 2, "b": 1}),
        (scheduled(finished=["b", "c"]), {}),
        (scheduled([("a", None, {})]), {"a": 1, "d": 1}),
    ):
        runner.input_batch.req_ids = [*counts, "beyond the batch"]
        runner.execute_model(plan, counts)
    assert [rows[:n].tolist() for rows, n in zip(seen, (6, 4, 2), strict=True)] == [
        [1, 1, 1, 0, 0, 2],
        [2, 1, 1, 0],
        [0, 1],
    ]
    assert [rows[:n].tolist() for rows, n in zip(strengths, (6, 4, 2), strict=True)] == [
        [1, 1, 1, 1, 1, 0.5],
        [0.5, -2, -2, 1],
        [1, -2],
    ]


# -- costs


def test_costs_by_an_engine_are_those_in_process(engine, tiny, monkeypatch):
    """A scorer over an engine whose log probabilities are computed by transformers."""
    from tempering.attention import tempered

    _, model, tokenizer = tiny
    monkeypatch.setitem(
        __import__("sys").modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace)
    )
    scorer = VllmScorer.__new__(VllmScorer)
    scorer.llm, scorer.tokenizer = engine, tokenizer
    engine.llm_engine.model_config = SimpleNamespace(get_total_num_hidden_layers=lambda: 2)
    plan = scorer.layout()
    assert plan.describe() == "2 layers x 4 heads"

    def generate(prompts, params, use_tqdm):
        outputs = []
        for prompt in prompts:
            ids = torch.tensor([prompt["prompt_token_ids"]])
            active = Profile.from_matrix(1 / engine.betas()[0].double())
            with tempered(model, active), torch.no_grad():
                scores = model(ids).logits[0].float().log_softmax(-1)
            rows = [None]
            for place, token in enumerate(ids[0, 1:].tolist()):
                rows.append({token: SimpleNamespace(logprob=float(scores[place, token]))})
            outputs.append(SimpleNamespace(prompt_logprobs=rows))
        return outputs

    engine.generate = generate
    chunks = torch.randint(0, 200, (3, 20), generator=torch.Generator().manual_seed(0))
    variants = [
        Variant(str(T), Profile.from_rows([torch.full((4,), t) for t in T], plan))
        for T in ((2.0, 0.5), (1.5, 1.5))
    ]
    own = scorer.costs(chunks, variants)
    theirs, _ = measure_costs(model, chunks, variants)
    for a, b in zip(own, theirs, strict=True):
        assert a.label == b.label and a.tokens == b.tokens and math.isnan(a.kl.value)
        assert math.isclose(a.cost.value, b.cost.value, abs_tol=1e-5)
        assert math.isclose(a.cost.se, b.cost.se, abs_tol=1e-5)
    with pytest.raises(InputError, match="sampling temperature 1 alone"):
        scorer.costs(chunks, [Variant("T", None, 1.2)])
