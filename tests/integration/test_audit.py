"""The temperature of an engine by its log probabilities: value, interval, verdict, exit status."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch

from tempering.attention import Profile, tempered
from tempering.audit import audit, rounded, scored
from tempering.audit.likelihood import blocks_of, contest, fit, log_likelihoods, scale_of
from tempering.errors import DataError, InputError, RefusedError
from tests.integration import audit_tiny as tiny

PLAIN = {"rope_type": "default", "rope_theta": 1e4}


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.llama(num_hidden_layers=3, rope_parameters=PLAIN)


@pytest.fixture(scope="module")
def gemma() -> Any:
    return tiny.gemma3()


def at(model: Any, rows: Any, ids: Any) -> Any:
    """What an engine says that runs at these temperatures, by a copy of its own."""
    engine = copy.deepcopy(model)
    with tempered(engine, rows if isinstance(rows, Profile) else Profile.from_matrix(rows)):
        return tiny.said_by(engine, ids)


def uniform(temperature: float, layers: int) -> list[list[float]]:
    return [[temperature] * 4] * layers


@pytest.mark.parametrize("temperature", [0.5, 0.99, 1.01, 1.7])
def test_one_temperature_for_the_whole_model(llama, temperature):
    said = at(llama, uniform(temperature, 3), tiny.prompts())
    found = audit(llama, said, layers=False)
    assert found.right is False
    assert found.temperature.value == pytest.approx(temperature, rel=1e-4)
    assert found.temperature.low <= temperature <= found.temperature.high
    assert f"runs at T = {temperature:.3f}" in found.verdict
    assert found.candidates[0].kind == "model"


def test_the_scale_inside_the_model_is_the_same_temperature(llama):
    """Not by our own handle: 1/sqrt(d) of every layer over T."""
    engine = tiny.reconfigured(llama, lambda config: None)
    for layer in engine.model.layers:
        layer.self_attn.scaling /= 1.05
    found = audit(llama, tiny.said_by(engine, tiny.prompts()), layers=False)
    assert found.temperature.value == pytest.approx(1.05, rel=1e-4)


def test_a_temperature_for_each_kind_of_layer(gemma):
    said = at(gemma, [[1.0] * 4, [0.8] * 4], tiny.prompts())
    found = audit(gemma, said, layers=False)
    sliding, full = found.kinds
    assert (sliding.name, full.name) == ("sliding_attention", "full_attention")
    assert sliding.value == pytest.approx(1, abs=1e-3) and not sliding.significant
    assert full.value == pytest.approx(0.8, abs=1e-3) and full.significant
    assert "full attention at T = 0.800" in found.verdict and "sliding" not in found.verdict


def test_a_temperature_for_each_layer(llama):
    rows = [[1.0] * 4, [0.7] * 4, [1.2] * 4]
    found = audit(llama, at(llama, rows, tiny.prompts()))
    values = [item.value for item in found.layers]
    assert values == pytest.approx([1.0, 0.7, 1.2], rel=2e-3)
    assert [item.significant for item in found.layers] == [False, True, True]
    assert "layer 1 at T = 0.700" in found.verdict and "layer 2 at T = 1.200" in found.verdict


class Turned(torch.nn.Module):
    """Queries times (n/48)^0.1, n the keys that they see: T = (n/48)^-0.1."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any) -> Any:
        n = torch.arange(1, x.shape[1] + 1)
        return self.inner(x) * ((n / 48) ** 0.1)[None, :, None]


def test_a_temperature_that_changes_with_position(llama):
    ids = tiny.prompts(length=96)
    engine = copy.deepcopy(llama)
    for layer in engine.model.layers:
        layer.self_attn.q_proj = Turned(layer.self_attn.q_proj)
    found = audit(llama, tiny.said_by(engine, ids), layers=False)
    assert "its temperature changes with position" in found.verdict
    level, slope = next(c for c in found.candidates if c.kind == "position").temperatures
    assert slope.value == pytest.approx(math.exp(-0.1), rel=1e-3)
    assert level.value == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_right_and_three_percent_are_found(dtype):
    kind = getattr(torch, dtype)
    engine = tiny.llama(rope_parameters=PLAIN).to(kind)
    own = copy.deepcopy(engine).float()
    ids = tiny.prompts(4, 160)
    right = audit(own, tiny.said_by(engine, ids), precision=dtype, layers=False)
    assert right.right is True
    assert right.temperature.low <= 1 <= right.temperature.high
    for layer in engine.model.layers:
        layer.self_attn.scaling /= 1.03
    wrong = audit(own, tiny.said_by(engine, ids), precision=dtype, layers=False)
    assert wrong.right is False
    assert wrong.temperature.low <= 1.03 <= wrong.temperature.high


def test_an_interval_covers_the_truth():
    """bfloat16 rounds every draw of prompts anew; 90 of 100 and more in benchmarks/audit.py."""
    engine = tiny.llama(rope_parameters=PLAIN).bfloat16()
    own = copy.deepcopy(engine).float()
    covered = 0
    for seed in range(8):
        said = tiny.said_by(engine, tiny.prompts(2, 96, seed))
        found = audit(own, said, precision="bfloat16", layers=False, mistakes=[])
        covered += found.temperature.low <= 1 <= found.temperature.high
        assert found.right is True
    assert covered >= 7


def test_a_temperature_that_the_interval_denies_is_never_called_right():
    """3% from few tokens: too little for an alarm, and too much to be called right."""
    engine = tiny.llama(rope_parameters=PLAIN).bfloat16()
    own = copy.deepcopy(engine).float()
    for layer in engine.model.layers:
        layer.self_attn.scaling /= 1.03
    verdicts = []
    for seed in range(4):
        said = tiny.said_by(engine, tiny.prompts(2, 128, seed))
        found = audit(own, said, precision="bfloat16", layers=False, mistakes=[])
        assert found.right is not True, found.verdict
        verdicts.append(found)
    unsure = next(item for item in verdicts if item.right is None)
    assert unsure.exit_code == 2
    tokens, needed = re.findall(r"from (\d+) tokens .*give ([\d,]+)", unsure.verdict)[0]
    assert int(needed.replace(",", "")) >= 2 * int(tokens)


def test_too_few_tokens_are_said(llama):
    said = tiny.said_by(llama, tiny.prompts(1, 40))
    with pytest.raises(DataError, match="can't be told from 38 tokens; give 2,000"):
        audit(llama, said)


def test_what_prompts_share_counts_once():
    """An interval is as wide for a prompt given ten times, and for its beginnings beside it."""
    engine = tiny.llama(rope_parameters=PLAIN).bfloat16()
    own = copy.deepcopy(engine).float()
    said = tiny.said_by(engine, tiny.prompts(3, 96))
    parts = [
        scored(item.tokens[:n], item.logprobs[:n], "a part") for item in said for n in (3, 40, 95)
    ]

    def run(prompts: Any) -> Any:
        return audit(own, prompts, precision="bfloat16", layers=False, mistakes=[])

    alone = run(said)
    for more in (said * 9, parts, [scored([], [], "nothing"), scored([5], [None], "one")]):
        found = run([*said, *more])
        assert found.temperature == alone.temperature
        assert found.tokens == alone.tokens == 3 * 94
    # A beginning that prompts share: 30 tokens, of which 28 count.
    ids = tiny.prompts(3, 96)
    ids[:, :30] = ids[0, :30]
    assert run(tiny.said_by(engine, ids)).tokens == 28 + 3 * 66
    with pytest.raises(DataError, match=r"from 38 tokens \(342 more repeat a prompt"):
        run(tiny.said_by(engine, tiny.prompts(1, 40)) * 10)


def test_noise_that_hides_the_temperature_is_said():
    """Log probabilities as a server of 2 digits in a noisy format gives them."""
    engine = tiny.llama(initializer_range=0.02).bfloat16()
    own = copy.deepcopy(engine).float()
    found = audit(
        own, tiny.said_by(engine, tiny.prompts(2, 80)), precision="bfloat16", layers=False
    )
    assert found.right is None and found.exit_code == 2
    assert found.verdict.startswith("it can't be told from 156 tokens")
    assert "give" in found.verdict


def test_another_model_is_refused(llama):
    other = tiny.llama(seed=5, num_hidden_layers=3)
    with pytest.raises(RefusedError, match="nothing in common"):
        audit(llama, tiny.said_by(other, tiny.prompts()))


def test_something_unknown_is_put_down_to_its_layer():
    own = tiny.llama(num_hidden_layers=4)
    engine = tiny.reconfigured(own, lambda config: None)
    with torch.no_grad():
        engine.model.layers[2].mlp.down_proj.weight.mul_(1.3)
    found = audit(own, tiny.said_by(engine, tiny.prompts()), layers=False)
    assert found.right is False
    assert "none of the known mistakes" in found.verdict
    assert "model.layers.2.self_attn on" in found.verdict


def test_a_profile_is_applied_or_not(llama):
    rows = [[1.3, 0.8, 1.0, 1.1], [0.7] * 4, [1.2] * 4]
    profile, ids = Profile.from_matrix(rows), tiny.prompts()
    applied = audit(llama, at(llama, profile, ids), profile=profile)
    assert applied.right is True and "applies the profile" in applied.verdict
    assert [item.said for item in applied.layers] == pytest.approx(
        [math.prod(row) ** 0.25 for row in rows]
    )
    assert [item.value for item in applied.layers] == pytest.approx(
        [item.said for item in applied.layers], rel=1e-3
    )
    missing = audit(llama, tiny.said_by(llama, ids), profile=profile, layers=False)
    assert "as if the profile were not applied" in missing.verdict
    twice = audit(llama, at(llama, profile.scaled(2.0), ids), profile=profile, layers=False)
    assert "as if the profile were applied twice" in twice.verdict
    inverse = audit(llama, at(llama, profile.scaled(-1.0), ids), profile=profile, layers=False)
    assert "upside down" in inverse.verdict
    one = [rows[0], rows[1], [1.0] * 4]
    partly = audit(llama, at(llama, one, ids), profile=profile)
    assert "layer 2 at T = 1.000" in partly.verdict and "profile says 1.2" in partly.verdict


def test_rounding_gives_the_model_back_and_says_what_it_does(llama):
    ids = tiny.prompts(1)
    before = tiny.said_by(llama, ids)
    with rounded(llama, "q8"):
        noisy = tiny.said_by(llama, ids)
    assert tiny.said_by(llama, ids) == before
    apart = torch.tensor(noisy[0].values) - torch.tensor(before[0].values)
    assert 1e-4 < float(apart.abs().mean()) < 0.3
    with pytest.raises(InputError, match="not 'int4'"), rounded(llama, "int4"):
        pass


def test_the_scale_and_the_likelihood_are_those_of_student_t():
    from scipy import optimize, stats

    e = torch.tensor(stats.t.rvs(5, scale=0.3, size=400, random_state=0))
    value = scale_of(e)
    wanted = optimize.minimize_scalar(
        lambda s: -stats.t.logpdf(e.numpy(), 5, scale=s).sum(), (0.1, 0.5)
    ).x
    assert value == pytest.approx(wanted, rel=1e-5)
    assert log_likelihoods(e, 0.4).numpy() == pytest.approx(
        stats.t.logpdf(e.numpy(), 5, scale=0.4), rel=1e-9
    )


def test_a_linear_fit_has_the_right_value_and_spread():
    """y = a x + noise: the fit's standard error is that of the estimates over many draws."""
    from scipy import stats

    x = torch.linspace(-1, 1, 600, dtype=torch.float64)
    blocks, estimates, errors = blocks_of([600]), [], []
    for seed in range(60):
        noise = torch.tensor(stats.t.rvs(5, scale=0.2, size=600, random_state=seed))
        found = fit(0.3 * x + noise, lambda theta: theta[:, :1] * x, torch.zeros(1), blocks)
        estimates.append(float(found.theta[0]))
        errors.append(math.sqrt(float(found.variance[0, 0])))
    spread = torch.tensor(estimates).std()
    assert torch.tensor(estimates).mean() == pytest.approx(0.3, abs=4 * float(spread) / 60**0.5)
    assert torch.tensor(errors).mean() == pytest.approx(float(spread), rel=0.3)


def test_a_contest_is_paired_over_blocks():
    better, worse = torch.ones(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    better[::16] += 0.5
    blocks = blocks_of([40, 24])
    assert blocks.tolist() == [0] * 16 + [1] * 16 + [2] * 8 + [3] * 16 + [4] * 8
    sums = torch.zeros(5, dtype=torch.float64).index_add_(0, blocks, better)
    found = contest(better, worse, blocks)
    assert found.gain == pytest.approx(float(sums.sum()))
    assert found.z == pytest.approx(float(sums.sum() / (sums.std() * math.sqrt(5))))


@pytest.mark.parametrize(
    "tokens, values, says",
    [
        ([1, 2, 3], [None, -1.0], "3 tokens and 2 log"),
        ([1, 2, 3], [None, -1.0, 0.2], "token 2: a log probability is at most 0"),
        ([1, 2, 300], [None, -1.0, -2.0], "id 300, and the reference has 96"),
        ([1, 2, 3], [None, -1.0, -9999.0], "stands for none"),
        ([1, 2, 3], [None, -1.0, math.nan], "token 2: expected a log"),
        ([1, 2, 3], [None, -1.0, -(10**400)], r"-10{58}\.\.\. stands for none"),
        ([1, 2, 3], [None, -1.0, 10**400], r"at most 0, got 10{59}\.\.\.; are"),
        ([1, 2, 10**400], [None, -1.0, -1.0], r"id 10{59}\.\.\., and"),
        ([1, 2, 3], [None, -1.0, -math.inf], "-inf stands for none"),
        ([1, 2, -3], [None, -1.0, -1.0], "token 2: expected a token id"),
        ([1, True, 3], [None, -1.0, -1.0], "token 1: expected a token id"),
        ([1, 2, 3, 4], [None, None, None, None], "gives those of its top tokens only"),
    ],
)
def test_what_is_no_log_probability_is_named(tokens, values, says):
    with pytest.raises(DataError, match=says):
        scored(tokens, values, "prompt 0", 96)
