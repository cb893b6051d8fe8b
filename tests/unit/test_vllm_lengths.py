"""The table of betas by length that vLLM's layers read, without vLLM."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from tempering.attention.profiles.law_tables import cut_rule, stacked
from tempering.attention.profiles.length_rules import InsteadOf, LogSteps, Power
from tempering.attention.profiles.profile import Profile
from tempering.attention.profiles.rules import PerHead, rule
from tempering.engines.vllm import layers as vllm_layers
from tempering.engines.vllm.layer_betas import RankLayer
from tempering.engines.vllm.length_table import LengthProfiles, LengthTable
from tempering.engines.vllm.settings import EngineSettings
from tempering.errors import ArchitectureError, ProfileError, RefusedError

NAMES = tuple(f"model.layers.{i}.self_attn" for i in range(3))
T = torch.tensor([[0.5, 1, 2, 4], [1, 1, 1, 1], [0.25, 0.8, 1.25, 3]], dtype=torch.float64)
SLOPES = ((0.1, -0.2, 0.3, 0.0), (0.05, 0.0, 0.0, -0.1), (0.2, 0.2, -0.2, 0.1))


class Attention(torch.nn.Module):
    """What is read of vLLM's layer of this name."""

    def __init__(self, heads=4, window=None):
        super().__init__()
        self.num_heads, self.sliding_window = heads, window
        self.register_buffer("tempering_beta", torch.ones(16, heads), persistent=False)


def slots(heads=4, rank=0, ranks=1):
    return [RankLayer(f"model.layers.{i}.self_attn.attn", heads, rank, ranks) for i in range(3)]


def law(length=5.0):
    rules = [Power(PerHead(row), length) for row in SLOPES]
    return Profile(tuple(T), NAMES).with_rules(rules)


def beta(layer, head, n, room=1.0, length=5.0):
    return (float(T[layer, head]) * (n / length) ** SLOPES[layer][head]) ** -room


def made(windows=(None, None, None), heads=4, kind=Attention):
    own = [kind(heads, window) for window in windows]
    return own, LengthTable(own, "tempering_beta", 16)


def test_tokens_find_their_betas_by_position_window_profile_and_room():
    own, table = made((None, 4, None))
    table.set(0, table.prepared(None, slots(), 512, None))
    table.set(1, table.prepared(law(), slots(), 512, None))
    profiles = LengthProfiles({"law": 1}, table)
    new = [
        SimpleNamespace(req_id=name, sampling_params=SimpleNamespace(extra_args=extra))
        for name, extra in (
            ("a", {"tempering_profile": "law"}),
            ("b", None),
            ("c", {"tempering_profile": "law", "tempering_room": 0.5}),
        )
    ]
    profiles.follow(SimpleNamespace(finished_req_ids=[], scheduled_new_reqs=new))
    profiles.fill(["a", "b", "c"], [3, 2, 1])
    profiles.at(torch.tensor([0, 1, 2, 7, 8, 99, 0, 0, 0]))  # the rest is padding
    wanted = [("a", 1), ("a", 2), ("a", 3), ("b", 8), ("b", 9), ("c", 100)]
    for token, (name, n) in enumerate(wanted):
        for layer in range(3):
            seen = min(n, 4) if layer == 1 else n
            for head in range(4):
                room = {"a": 1.0, "b": 0.0, "c": 0.5}[name]
                value = float(own[layer].tempering_beta[token, head])
                assert value == pytest.approx(beta(layer, head, seen, room), rel=1e-6)
    # One profile for the whole step: no index, and the same numbers.
    profiles.fill(["a", "a"], [1, 2])
    profiles.at(torch.tensor([99, 4, 5]))
    for token, n in enumerate((100, 5, 6)):
        for layer in range(3):
            seen = min(n, 4) if layer == 1 else n
            value = float(own[layer].tempering_beta[token, 2])
            assert value == pytest.approx(beta(layer, 2, seen), rel=1e-6)


def test_each_rank_has_the_slopes_of_its_heads():
    for rank in range(2):
        own, table = made(heads=2)
        table.set(0, table.prepared(law(), slots(2, rank, 2), 512, None))
        table.write(slice(0, 2), torch.tensor([9, 30]), 0, 1.0)
        for token, n in enumerate((10, 31)):
            for head in range(2):
                value = float(own[2].tempering_beta[token, head])
                assert value == pytest.approx(beta(2, 2 * rank + head, n), rel=1e-6)


def test_laws_of_many_layers_at_once_are_those_of_each():
    texts = [
        "power(heads(0.1,-0.2,0.3,0.5),7)",
        "power(0.4,3,0.5,2)",
        None,
        "log_length(6)",
        "ssmax(heads(0.5,0.6,0.7,0.8))",
        "power(heads(0.2,0.2,0.1,0.1),9,0.9,1000)",
        "affine(0.3,0.5,0.2,3)",
        "log_steps(0.2,4)",
        "power(0.1,5)|instead_of(log_steps(0.2,4))",
        "power(heads(0.1,0.2,0.3,0.4),5)|instead_of(log_steps(0.1,4))",
    ]
    rules = [None if text is None else rule(text) for text in texts]
    n = torch.tensor([1, 2, 3, 5, 8, 13, 400])
    together = stacked(rules, 4, torch.device("cpu"))(n[:, None])
    by_layer = stacked(rules, 4, torch.device("cpu"))(n[:, None].expand(-1, len(rules)))
    assert torch.equal(together, by_layer)
    for index, item in enumerate(rules):
        alone = torch.ones(1, 4, 7) if item is None else item.of_counts(n[None, None])
        alone = alone.expand(1, 4, 7)[0].T
        assert torch.allclose(together[:, index], alone.double(), rtol=1e-12, atol=0)
    assert cut_rule(rules[0], 1, 3) == rule("power(heads(-0.2,0.3),7)")
    assert cut_rule(rules[3], 1, 3) is rules[3]


def test_what_vllm_cannot_do_exactly_is_refused():
    _, table = made()
    held = Profile(tuple(T), NAMES).with_rules([rule("support(3)")] * 3)
    with pytest.raises(RefusedError, match=r"rule support\(3\): vLLM takes temperatures that are"):
        table.prepared(held, slots(), 512, None)
    own = InsteadOf(Power(0.1, 5.0), LogSteps(0.1, 8192.0))
    with pytest.raises(RefusedError, match="apply the law of the model in their own code"):
        table.prepared(Profile(tuple(T), NAMES).with_rules([own] * 3), slots(), 512, None)
    steep = Profile(tuple(T), NAMES).with_rules([None, Power(PerHead((0, 3, 0, 0)), 2.0), None])
    with pytest.raises(ProfileError, match=r"layers.1.self_attn.attn, head 1: .* context has 512"):
        table.prepared(steep, slots(), 512, None)
    hot = Profile((T[0], T[1] * 500, T[2]), NAMES).with_rules([None, Power(0.2, 2.0), None])
    with pytest.raises(ProfileError, match="head 0: .* with the profile's T has T = 1"):
        table.prepared(hot, slots(), 512, None)
    table.prepared(steep, slots(), 20, None)  # within 20 tokens T stays below 1000

    class ChunkedLocalAttention(Attention):
        pass

    _, chunked = made(kind=ChunkedLocalAttention)
    with pytest.raises(ArchitectureError, match="is a ChunkedLocalAttention, of which it isn't"):
        chunked.prepared(law(), slots(), 512, None)
    chunked.prepared(Profile(tuple(T), NAMES), slots(), 512, None)  # numbers are exact there
    with pytest.raises(ArchitectureError, match="layers with 2, 4 heads can't share a table"):
        LengthTable([Attention(4), Attention(2)], "tempering_beta", 16)
    config = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=1))
    with pytest.raises(RefusedError, match=r"\(power\(heads\(..\),5\)\): this engine was started"):
        vllm_layers.prepared_betas(config, [], law())
    split = SimpleNamespace(
        speculative_config=None,
        parallel_config=SimpleNamespace(enable_dbo=True),
        cache_config=SimpleNamespace(),
    )
    with pytest.raises(RefusedError, match="dual batch overlap"):
        vllm_layers.check_configuration(split, EngineSettings(law()))


@pytest.mark.parametrize(
    "own, message", [({"is_mm_prefix_lm": True}, "of an image"), ({"rswa_window": 64}, "a window")]
)
def test_queries_that_see_other_keys_than_those_before_them_take_no_rules(own, message):
    config = SimpleNamespace(
        speculative_config=None,
        parallel_config=SimpleNamespace(),
        cache_config=SimpleNamespace(),
        model_config=SimpleNamespace(**own),
    )
    vllm_layers.check_configuration(config, EngineSettings(Profile(tuple(T), NAMES)))
    with pytest.raises(RefusedError, match=message):
        vllm_layers.check_configuration(config, EngineSettings(law()))


def test_only_rules_make_an_engine_know_its_length():
    plain = Profile(tuple(T), NAMES)
    assert EngineSettings(law()).knows_length
    assert EngineSettings(None, {"a": plain, "b": law()}).knows_length
    assert not EngineSettings(plain, {"a": plain}).knows_length
    assert not EngineSettings().knows_length
    assert math.isclose(beta(0, 0, 5), 2.0)
