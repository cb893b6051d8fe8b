"""Denoisers of diffusers inside pipelines: profiles, sizes of images, schedules over the steps."""

from __future__ import annotations

import math

import pytest
import torch

from tempering import Profile, layout, recorded_call, schedule, tempered
from tempering.attention import adaptive_profile, pipeline_callback, resolution_profile
from tempering.attention.examining.subject import check_subject
from tempering.attention.profiles.rules import rule
from tempering.errors import (
    ArchitectureError,
    InputError,
    ProfileError,
    RefusedError,
    ScheduleError,
    TemperatureError,
)
from tests.integration import denoisers_tiny as tiny

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::tempering.errors.DepthWarning"),
]
STEPS = 4


def stable_diffusion():
    unet, _ = tiny.make("unet")
    pipe = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, steps=STEPS, **more):
    """Latents that a pipeline makes, with guidance, from one seed."""
    given = {
        "prompt_embeds": tiny.draw(1, tiny.TEXT, tiny.TEXT_WIDTH),
        "negative_prompt_embeds": tiny.draw(1, tiny.TEXT, tiny.TEXT_WIDTH, seed=9),
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": steps,
        "output_type": "latent",
        **more,
    }
    return pipe(**given).images


@pytest.fixture
def pipe():
    return stable_diffusion()


@pytest.fixture
def sample(pipe):
    with recorded_call(pipe.unet) as kept:
        run(pipe, 1)
    layout(pipe.unet, kept)
    return kept


def close(ours, exact, relative=1e-4):
    assert (ours - exact).abs().max() < relative * exact.abs().max()


def test_the_recorded_call_is_what_the_denoiser_was_given(pipe, sample):
    assert {"sample", "timestep", "encoder_hidden_states", "return_dict"} <= set(sample)
    assert sample["sample"].shape == (2, 4, 8, 8)  # both halves of guidance
    assert pipe.unet._forward_pre_hooks == {}
    with recorded_call(pipe.unet) as nothing:
        pass
    assert nothing == {}


def test_a_pipeline_runs_under_a_profile(pipe, sample):
    plain = run(pipe)
    plan = layout(pipe.unet, sample)
    rows = tiny.random_rows(plan)
    with tiny.attention_divided(pipe.unet, dict(zip(plan.names, rows, strict=True))) as called:
        exact = run(pipe)
    assert len(called) == STEPS * len(plan.names)
    with tempered(pipe.unet, Profile.from_rows(rows, plan)) as handle:
        ours = run(pipe)
        assert set(handle.calls().values()) == {STEPS}
    close(ours, exact)
    assert (ours - plain).abs().max() > 1e-3 * plain.abs().max()
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("stack", [None, "encoder", "cross"])
def test_temperatures_follow_the_steps(pipe, sample, stack):
    """Against a loop of one's own, with a profile made for each step."""
    plan = layout(pipe.unet, sample)
    rows = tiny.random_rows(plan)
    pattern = schedule("throb(2,1,0.5,1.5)")
    values = pattern.sample(STEPS).tolist()
    moved = [stack in (None, layer.stack) for layer in plan.layers]
    unet, forward, step = pipe.unet, type(pipe.unet).forward, iter(range(STEPS))

    def divided(self, *args, **kwargs):
        value = values[next(step)]
        now = [row * value if move else row for row, move in zip(rows, moved, strict=True)]
        with tiny.attention_divided(self, dict(zip(plan.names, now, strict=True))):
            return forward(self, *args, **kwargs)

    unet.forward = divided.__get__(unet)
    exact = run(pipe)
    del unet.forward
    with tempered(pipe.unet, Profile.from_rows(rows, plan)) as handle:
        follow = pipeline_callback(handle, pattern, stack=stack)
        ours = run(pipe, callback_on_step_end=follow)
        again = run(pipe, callback_on_step_end=follow)
        fixed = run(pipe)
    close(ours, exact)
    assert torch.equal(ours, again)
    assert not torch.equal(ours, fixed)


def test_a_run_after_an_interrupted_one_is_told(pipe, sample):
    with tempered(pipe.unet, Profile.neutral(pipe.unet)) as handle:
        follow = pipeline_callback(handle, "linear(2,1)")

        def stop(pipeline, step, *rest):
            if step == 1:
                raise KeyboardInterrupt
            return follow(pipeline, step, *rest)

        with pytest.raises(KeyboardInterrupt):
            run(pipe, callback_on_step_end=stop)
        with pytest.raises(RefusedError, match=r"step 0 .* where step 1 was expected"):
            run(pipe, callback_on_step_end=follow)
        anew = pipeline_callback(handle, "linear(2,1)")
        assert run(pipe, callback_on_step_end=anew).isfinite().all()


def test_schedules_that_do_not_fit(pipe, sample):
    with tempered(pipe.unet, Profile.neutral(pipe.unet)) as handle:
        before = handle.rows()
        with pytest.raises(ProfileError, match=r"no stack 'decoder'; it has .*cross"):
            pipeline_callback(handle, 2.0, stack="decoder")
        with pytest.raises(TemperatureError, match="temperature 100000"):
            pipeline_callback(handle, 1e5)
        with pytest.raises(ScheduleError, match="on_clock"):
            pipeline_callback(handle, "shuffle(throb(12,3,1,12), seed=0)")
        assert all(map(torch.equal, handle.rows(), before))
        with pytest.raises(ScheduleError, match="4 stages .* 2 points"):
            run(pipe, 2, callback_on_step_end=pipeline_callback(handle, "throb(2,1,0.5,1.5)"))


# -- images of another size than those of training


def jin(trained, seen):
    return math.sqrt(math.log(seen) / math.log(trained))


@pytest.mark.parametrize("processor", ["AttnProcessor2_0", "AttnProcessor"])
@pytest.mark.parametrize("side", [16, 4])
@pytest.mark.parametrize("name", ["unet", "unet_masked"])
def test_another_resolution(name, side, processor):
    """Jin et al. 2023: the logits of self-attention times sqrt(log n / log n_trained)."""
    model, sample = tiny.make(name, torch.float64)
    model.set_attn_processor(getattr(diffusers.models.attention_processor, processor)())
    profile = resolution_profile(model, sample)
    plan = layout(model)
    own = {layer.name: layer.keys for layer in plan.layers if layer.stack == "encoder"}
    assert set(own.values()) == {64, 16}
    other = {**sample, "sample": tiny.image(side=side).double()}
    plain = tiny.output(model, other)

    def beta(module, seen):
        if module not in own:
            return torch.ones(())
        return torch.tensor(jin(own[module], int(seen.max())), dtype=torch.float64)

    ones = {layer.name: torch.ones(layer.heads) for layer in plan.layers}
    with tiny.attention_divided(model, ones, beta):
        exact = tiny.output(model, other)
    with tempered(model, profile):
        ours = tiny.output(model, other)
        as_trained = tiny.output(model, sample)
    close(ours, exact, 1e-9)
    assert (ours - plain).abs().max() > 1e-4 * plain.abs().max()
    close(as_trained, tiny.output(model, sample), 1e-9)


def test_joint_attention_counts_text_as_well():
    model, sample = tiny.make("flux", torch.float64)
    profile = resolution_profile(model, sample)
    assert set(map(str, profile.rules)) == {"root_log_length(21)"}
    side = 8
    other = {
        **sample,
        "hidden_states": tiny.draw(2, side * side, 4).double(),
        "img_ids": tiny.draw(side * side, 3).double(),
    }
    plan = layout(model)
    ones = {layer.name: torch.ones(layer.heads) for layer in plan.layers}
    factor = jin(21, side * side + tiny.TEXT)
    with tiny.attention_divided(model, ones, lambda *_: factor):
        exact = tiny.output(model, other)
    with tempered(model, profile):
        close(tiny.output(model, other), exact, 1e-9)
    with tempered(model, adaptive_profile("root_log_length(21)", model)):
        close(tiny.output(model, other), exact, 1e-9)


def test_keys_that_a_mask_hides_are_not_counted():
    model, sample = tiny.make("pixart", torch.float64)
    profile = (
        adaptive_profile("root_log_length(9)", model, stack="cross")
        if layout(model, sample)
        else None
    )
    plan = layout(model)
    ones = {layer.name: torch.ones(layer.heads) for layer in plan.layers}
    crosses = {layer.name for layer in plan.layers if layer.stack == "cross"}
    counts = []

    def beta(module, seen):
        if module not in crosses:
            return torch.ones(())
        counts.extend(seen.unique().tolist())
        return (seen.double().log() / math.log(9)).sqrt()

    with tiny.attention_divided(model, ones, beta):
        exact = tiny.output(model, sample)
    assert set(counts) == {3, 5}
    with tempered(model, profile):
        close(tiny.output(model, sample), exact, 1e-9)


def test_the_rule_itself():
    found = rule("root_log_length(16)")
    assert str(found) == "root_log_length(16)"
    beta = found.of_counts(torch.tensor([[[1, 4, 16, 256]]]))
    assert torch.allclose(beta[0, 0], torch.tensor([1, 0.5**0.5, 1, 2**0.5], dtype=torch.float64))
    with pytest.raises(ProfileError, match="at least 2"):
        rule("root_log_length(1)")


def test_rules_that_read_logits_are_refused_where_the_code_is_the_models_own():
    model, sample = tiny.make("unet")
    layout(model, sample)
    with pytest.raises(ArchitectureError, match="support needs transformers' attention interface"):
        adaptive_profile("support(3)", model)


# -- bad input


def test_a_pipeline_in_place_of_a_model(pipe):
    said = r"^StableDiffusionPipeline is a pipeline and no model; give the model in it: pipe\.unet$"
    with pytest.raises(ArchitectureError, match=said):
        check_subject(pipe)
    model, _ = tiny.make("flux")
    parts = dict.fromkeys("vae text_encoder tokenizer text_encoder_2 tokenizer_2".split())
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    other = diffusers.FluxPipeline(transformer=model, scheduler=scheduler, **parts)
    with pytest.raises(ArchitectureError, match=r"give the model in it: pipe\.transformer$"):
        check_subject(other)


def test_a_sample_that_is_missing(pipe):
    with pytest.raises(InputError, match=r"UNet2DConditionModel is a model of diffusers.*sample="):
        layout(pipe.unet)
    with pytest.raises(InputError, match="recorded_call"):
        tempered(pipe.unet, Profile.by_module({"mid_block": 2.0}))


def test_a_sample_is_kept(pipe, sample):
    plan = layout(pipe.unet, sample)
    assert layout(pipe.unet) is plan
    pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    assert layout(pipe.unet).names == plan.names  # examined anew, with the same sample
    with tempered(pipe.unet, Profile.neutral(plan)):
        pass


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sample": torch.ones(2, 3, 8, 8)}, "fails on the sample .*sample, timestep, enc"),
        (
            {"encoder_hidden_states": torch.ones(2, 5, 7)},
            r"fails on the sample .*\(in down_blocks\.0\..*attn2\.to_k, Linear\)",
        ),
        ({"encoder_hidden_states": None}, "fails on the sample"),
        ({"pixels": torch.ones(2)}, "fails on the sample .*pixels"),
    ],
)
def test_a_sample_of_another_shape(pipe, change, said):
    _, own = tiny.make("unet")
    with pytest.raises(ArchitectureError, match=said):
        layout(pipe.unet, {**own, **change})
    with pytest.raises(InputError, match="this is a dict without a tensor"):
        layout(pipe.unet, {"timestep": 3})


def test_profiles_that_do_not_fit(pipe, sample):
    plan = layout(pipe.unet, sample)
    count = len(plan.layers)
    with pytest.raises(
        ProfileError, match=f"has {count - 1} layers x 2 heads, the model has {count} l"
    ):
        tempered(pipe.unet, Profile.from_matrix(torch.ones(count - 1, 2)))
    with pytest.raises(
        ProfileError, match=f"has {count} layers x 3 heads, the model has {count} l"
    ):
        tempered(pipe.unet, Profile.from_matrix(torch.ones(count, 3)))
    with pytest.raises(ProfileError, match="no attention module 'attn1'; its modules are called"):
        tempered(pipe.unet, Profile.by_module({"attn1": 2.0}))
    with pytest.raises(RefusedError, match="output scale"):
        scaled = Profile.from_rows([torch.ones(2)] * count, plan)
        object.__setattr__(scaled, "output_scale", tuple([torch.full((2,), 2.0)] * count))
        tempered(pipe.unet, scaled)


def test_what_needs_text_is_refused_in_words(pipe, sample):
    from tempering.attention.baking.bake import bake, foldable
    from tempering.attention.measuring.measure import measure_tokens
    from tempering.errors import BakeError

    plan = layout(pipe.unet, sample)
    assert "a model of diffusers" in foldable(pipe.unet).reason
    with pytest.raises(BakeError, match="a model of diffusers"):
        bake(pipe.unet, Profile.neutral(plan))
    with pytest.raises(ArchitectureError, match="measure_tokens needs a transformers model"):
        measure_tokens(pipe.unet, torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ArchitectureError, match="is a part of a diffusers model"):
        layout(pipe.unet.mid_block)
