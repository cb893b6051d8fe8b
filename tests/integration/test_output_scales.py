"""Output scales of heads: live, in files, refused where nothing applies them, learned."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tempering import Profile, load_model, tempered
from tempering.attention.baking.bake import bake
from tempering.attention.examining.layout_of import layout
from tempering.attention.tuning import from_batches, tune
from tempering.attention.tuning.basis import make_basis, scale_basis
from tempering.attention.tuning.batches import text_batches
from tempering.attention.tuning.live_temperatures import live_temperatures
from tempering.attention.tuning.repair import repair
from tempering.cli import main
from tempering.cli.shared.llamacpp_runs import uniform_temperature
from tempering.engines.checkpoints.bake import bake_checkpoint, undo_checkpoint
from tempering.engines.checkpoints.gguf import bake_gguf, undo_gguf
from tempering.engines.loading.gguf_files import load_gguf
from tempering.engines.vllm.layer_betas import RankLayer, layer_betas
from tempering.errors import BakeError, InputError, ProfileError, RefusedError
from tests.integration.bake_tiny import FOLDS, HEADS, tiny
from tests.integration.test_bake_gguf import write_llama
from tests.integration.tuning_tiny import LAYERS, WORDS, sampled_text, tiny_llama
from tests.tiny import save_tiny_llama

# Their attention is code of their own.
OWN_SOFTMAX = ("gpt_neo", "codegen", "falcon")
IDS = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(0))


def drawn(model: Any, seed: int = 0, share: int = 2) -> Profile:
    """Random temperatures, and random output scales that `share` heads in a row have in common."""
    generator = torch.Generator().manual_seed(seed)
    neutral = Profile.neutral(model)

    def numbers(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64) + 0.5

    scales = [numbers(len(row) // share).repeat_interleave(share) for row in neutral.rows]
    rows = tuple(numbers(len(row)) for row in neutral.rows)
    return replace(neutral, rows=rows, output_scale=tuple(scales))


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def mixed(model: Any, scales: Any) -> Any:
    """The oracle: a copy whose o has its columns multiplied, head by head."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer, row in zip(other.model.layers, scales, strict=True):
            weight = layer.self_attn.o_proj.weight
            weight.mul_(row.repeat_interleave(weight.shape[1] // len(row)).to(weight))
    return other


# -- live


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_head_gives_its_output_times_its_scale(implementation: str) -> None:
    model = tiny_llama(dtype=torch.float64)
    model.set_attn_implementation(implementation)
    profile = drawn(model, share=1)
    other = mixed(model, profile.output_scale)
    with tempered(other, replace(profile, output_scale=(), model=None)):
        wanted = logits(other)
    before = logits(model)
    with tempered(model, profile):
        got = logits(model)
    torch.testing.assert_close(got, wanted, atol=1e-11, rtol=0)
    assert float((got - before).abs().max()) > 0.1
    assert torch.equal(logits(model), before)


def test_rows_of_a_batch_have_scales_of_their_own_and_nested_ones_multiply() -> None:
    model = tiny_llama(dtype=torch.float64)
    one, two = drawn(model, 1), drawn(model, 2)
    plain = replace(Profile.neutral(model), rows=two.rows)
    with tempered(model, one):
        first = logits(model)
    with tempered(model, plain):
        second = logits(model)
    with tempered(model, [one, plain]) as handle:
        torch.testing.assert_close(logits(model), torch.stack([first[0], second[1]]))
        handle.update(plain)
        torch.testing.assert_close(logits(model), second)
        handle.update(one)
        torch.testing.assert_close(logits(model), first)
    both = replace(
        one,
        rows=tuple(a * b for a, b in zip(one.rows, two.rows, strict=True)),
        output_scale=tuple(a * b for a, b in zip(one.output_scale, two.output_scale, strict=True)),
    )
    with tempered(model, both):
        wanted = logits(model)
    with tempered(model, one), tempered(model, two) as inner:
        torch.testing.assert_close(logits(model), wanted)
        inner.remove()
        torch.testing.assert_close(logits(model), first)


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (torch.ones(1, 1), "shape"),  # would spread over all heads
        (torch.ones(4), "shape"),
        (torch.ones(0, 4), "shape"),
        (torch.tensor([[1.0, 1.0, math.nan, 1.0]]), "head 2: output scale nan"),
        (torch.tensor([[1.0, 0.0, 1.0, 1.0]]), "head 1: output scale 0"),
    ],
)
def test_a_handle_refuses_what_is_no_scale_and_keeps_what_it_has(
    scale: torch.Tensor, said: str
) -> None:
    model = tiny_llama()
    profile = drawn(model)
    with tempered(model, profile) as handle:
        before = logits(model)
        with pytest.raises(ProfileError, match=said):
            handle.set_scales([torch.full((1, 4), 2.0), None, scale])
        with pytest.raises(ProfileError, match="2 layers were given, the model has 3"):
            handle.set_scales([None, None])
        assert torch.equal(logits(model), before)


def test_every_stack_of_an_encoder_decoder_takes_them() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.3,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).double().eval()
    profile = drawn(model, share=1)
    other = copy.deepcopy(model)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    with torch.no_grad():
        for name, row in zip(profile.names or (), profile.output_scale, strict=True):
            other.get_submodule(name).out_proj.weight.mul_(row.repeat_interleave(8))
        with tempered(other, replace(profile, output_scale=(), model=None)):
            wanted = other(**inputs).logits
        with tempered(model, profile):
            torch.testing.assert_close(model(**inputs).logits, wanted, atol=1e-11, rtol=0)


def test_sinks_and_a_batch_of_profiles_go_together() -> None:
    model = tiny("gpt_oss")
    profiles = [drawn(model, 1), drawn(model, 2)]
    alone = []
    for profile in profiles:
        with tempered(model, profile):
            alone.append(logits(model))
    with tempered(model, profiles):
        both = logits(model)
    torch.testing.assert_close(both, torch.stack([alone[0][0], alone[1][1]]))


def test_half_precision_keeps_its_dtype() -> None:
    model = tiny_llama().to(torch.bfloat16)
    with tempered(model, drawn(model)):
        assert logits(model).dtype == torch.bfloat16


# -- the profile


def test_a_file_keeps_them_and_older_readers_refuse_it(tmp_path: Path) -> None:
    profile = drawn(tiny_llama())
    again = Profile.load(profile.save(tmp_path / "p.json"))
    assert all(map(torch.equal, again.output_scale, profile.output_scale))
    assert profile.to_json()["version"] == 3
    assert replace(profile, output_scale=()).to_json()["version"] == 1
    assert not profile.changes_nothing
    assert not replace(
        Profile.neutral(tiny_llama()), output_scale=profile.output_scale
    ).changes_nothing
    assert Profile.neutral(tiny_llama()).changes_nothing


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1e9])
def test_a_number_that_is_no_scale_is_named(value: float) -> None:
    profile = drawn(tiny_llama())
    scales = [row.clone() for row in profile.output_scale]
    scales[1][2] = value
    with pytest.raises(ProfileError, match="layer 1, head 2: output scale"):
        replace(profile, output_scale=tuple(scales))


@pytest.mark.parametrize("damage", ["missing", "text", "short"])
def test_a_damaged_file_is_refused(damage: str) -> None:
    data = json.loads(drawn(tiny_llama()).to_text())
    if damage == "missing":
        del data["layers"][1]["output_scale"]
    elif damage == "text":
        data["layers"][1]["output_scale"] = ["1", "1", "1", "1"]
    else:
        data["layers"][1]["output_scale"] = [1.0]
    with pytest.raises(ProfileError):
        Profile.from_json(data)


def test_controls_carry_them_along() -> None:
    profile = drawn(tiny_llama(), share=1)
    mirror = profile.scaled(-1.0)
    torch.testing.assert_close(
        mirror.output_scale[1] * profile.output_scale[1], torch.ones(4, dtype=torch.float64)
    )
    shuffled = profile.shuffled(0)
    pairs = {
        (float(t), float(s))
        for item in (profile, shuffled)
        for t, s in zip(torch.cat(item.rows), torch.cat(tuple(item.output_scale)), strict=True)
    }
    assert len(pairs) == 4 * LAYERS  # each head's two numbers stay together
    assert not torch.equal(shuffled.temperature, profile.temperature)


def test_the_command_shows_them_and_compares_temperatures_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(drawn(tiny_llama()).save(tmp_path / "p.json"))
    with pytest.raises(SystemExit) as ended:
        main(["profile", "show", path])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.count("output scales") == LAYERS
    first = Profile.load(path).output_scale[0].tolist()
    assert " ".join(f"{value:.3f}" for value in first) in shown
    with pytest.raises(SystemExit) as ended:
        main(["profile", "diff", path, path])
    assert ended.value.code
    assert "has output scales; only temperatures have a ratio" in capsys.readouterr().err


def test_places_that_take_temperatures_alone_refuse_them(tmp_path: Path) -> None:
    model = tiny_llama()
    profile = drawn(model)
    layers = [RankLayer(f"model.layers.{i}.self_attn.attn", 4) for i in range(LAYERS)]
    with pytest.raises(RefusedError, match="output scales"):
        layer_betas(profile, layers)
    level = replace(profile, rows=tuple(torch.full_like(row, 1.1) for row in profile.rows))
    with pytest.raises(InputError, match="one attention temperature"):
        uniform_temperature(None, level.save(tmp_path / "p.json"))
    for name in OWN_SOFTMAX:
        own = tiny(name)
        with pytest.raises(RefusedError, match="attends by code of its own"):
            tempered(own, drawn(own))
    with pytest.raises(RefusedError, match="output scales"):
        profile.resolve(layout(model), rules=True)


# -- folded


@pytest.mark.parametrize("name", [n for n in FOLDS if n not in OWN_SOFTMAX])
def test_they_fold_into_what_makes_the_values(name: str) -> None:
    model = tiny(name)
    layer_heads = {len(row) for row in Profile.neutral(model).rows}
    assert layer_heads == {HEADS}
    kv = getattr(model.config, "num_key_value_heads", HEADS)
    if name in ("gpt2", "gpt_neox", "opt"):
        kv = HEADS
    profile = drawn(model, share=HEADS // kv)
    if FOLDS[name][1] == "per layer":
        profile = replace(profile, rows=tuple(torch.full_like(row, 1.3) for row in profile.rows))
    plain = logits(model)
    with tempered(model, profile):
        wanted = logits(model)
    got = logits(bake(model, profile))
    spread = float(wanted.std())
    assert float((got - wanted).abs().max()) < 1e-4 * spread
    assert float((plain - wanted).abs().max()) > 1e-3 * spread


def test_heads_that_share_values_need_one_scale() -> None:
    model = tiny("llama")
    with pytest.raises(BakeError, match="4 heads share the values of 2"):
        bake(model, drawn(model, share=1))


def test_a_checkpoint_takes_them_and_gives_them_back(tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path / "tiny", layers=2)
    model, _ = load_model(source)
    profile = drawn(model)
    bake_checkpoint(source, profile, tmp_path / "baked")
    baked, _ = load_model(tmp_path / "baked")
    with tempered(model, profile):
        wanted = logits(model)
    torch.testing.assert_close(logits(baked), wanted, atol=1e-4, rtol=0)
    assert "factor on their outputs" in (tmp_path / "baked" / "README.md").read_text()
    undo_checkpoint(tmp_path / "baked", tmp_path / "undone")
    undone, _ = load_model(tmp_path / "undone")
    torch.testing.assert_close(logits(undone), logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("values", ["Q4_0", "Q6_K", "F16"])
def test_gguf_scales_take_them_in_place(tmp_path: Path, values: str) -> None:
    source = write_llama(tmp_path / "cold.gguf", ["Q4_1", "Q8_0"], values=values)
    model, _ = load_gguf(source)
    profile = drawn(model)
    out = tmp_path / "warm.gguf"
    result = bake_gguf(source, profile, out, in_place=True)
    assert out.stat().st_size == source.stat().st_size
    assert result.deviation < 1e-4
    assert sum(result.kept.values()) == 4  # q and v of two layers
    with tempered(model, profile):
        wanted = logits(model)
    again, _ = load_gguf(out)
    assert float((logits(again) - wanted).abs().max()) < 0.02 * float(wanted.std())
    undo_gguf(out, tmp_path / "undone.gguf")
    undone, _ = load_gguf(tmp_path / "undone.gguf")
    assert float((logits(undone) - logits(model)).abs().max()) < 0.02 * float(wanted.std())


# -- learned


def test_gradients_of_scales_are_those_of_differences() -> None:
    model = tiny_llama(dtype=torch.float64)
    ids = sampled_text(model, None, 2, 16, seed=3)
    goal = from_batches("text", text_batches(ids))
    plan = layout(model)
    basis, scales = make_basis(model, plan, "head"), scale_basis(plan)
    generator = torch.Generator().manual_seed(0)
    size = len(basis.names) + len(scales.names)
    theta = 0.2 * torch.randn(size, generator=generator, dtype=torch.float64)
    with live_temperatures(model, basis, (0.2, 5.0), checkpoint=False, scales=scales) as live:

        def loss(at: torch.Tensor) -> torch.Tensor:
            live.set(at)
            return goal.pieces[0].losses(live.model).sum()

        theta.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(theta), theta)
        with torch.no_grad():
            for index in (0, len(basis.names), size - 1):
                step = torch.zeros(size, dtype=torch.float64)
                step[index] = 1e-2
                slope = (loss(theta + step) - loss(theta - step)) / 2e-2
                # Losses are summed in float32.
                torch.testing.assert_close(gradient[index], slope.double(), atol=1e-3, rtol=1e-2)
        assert float(gradient[len(basis.names) :].abs().min()) > 0


def test_repair_finds_what_was_taken_from_the_values(tmp_path: Path) -> None:
    reference = tiny_llama()
    harmed = copy.deepcopy(reference)
    taken = torch.linspace(0.7, 1.3, 2 * LAYERS, dtype=torch.float64).view(LAYERS, 2)
    with torch.no_grad():
        for layer, row in zip(harmed.model.layers, taken, strict=True):
            weight = layer.self_attn.v_proj.weight
            weight.mul_(row.repeat_interleave(len(weight) // 2)[:, None].to(weight))
    text = from_batches("text", text_batches(sampled_text(reference, None, 32, 48, 1)))
    tuned = repair(
        harmed, reference, text, lessons=tmp_path, top=None, passes=80, rows=16, prior_sd=50.0,
        output_scales=True,
    )  # fmt: skip
    found = torch.stack(tuned.profile.output_scale)[:, ::2]
    torch.testing.assert_close(found.log(), taken.reciprocal().log(), atol=0.03, rtol=0)
    assert tuned.after < 1e-2 * tuned.before
    assert len(tuned.names) == len(tuned.theta) == 4 * LAYERS + 2 * LAYERS
    assert tuned.names[-1] == f"output scale of layer {LAYERS - 1} value head 1"


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model = tiny_llama()
    ids = torch.randint(0, WORDS, (8, 24), generator=torch.Generator().manual_seed(5))
    text = from_batches("text", text_batches(ids))
    settings: Any = {"method": "adam", "rate": 0.05, "held_out": 0.25, "output_scales": True}
    whole = tune(model, text, steps=6, **settings)
    again = tune(model, text, steps=6, state=tmp_path / "state", **settings)
    kept = tune(model, text, steps=6, state=tmp_path / "state", **settings)
    assert torch.equal(whole.theta, again.theta)
    assert torch.equal(kept.theta, again.theta)
