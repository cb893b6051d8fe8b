"""Models of diffusers: every head of every layer attends with softmax(l / T), or is refused."""

from __future__ import annotations

import pytest
import torch

from tempering import Profile, layout, schedule, tempered
from tempering.errors import ArchitectureError, ProfileError
from tests.integration import denoisers_tiny as tiny

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
]


def close(ours, exact, relative=1e-6):
    assert (ours.double() - exact.double()).abs().max() < relative * exact.double().abs().max()


def under(model, rows, plan, sample):
    """The oracle's output under temperatures, and the modules that it met."""
    with tiny.attention_divided(model, dict(zip(plan.names, rows, strict=True))) as called:
        return tiny.output(model, sample), called


@pytest.mark.parametrize("name", tiny.REFUSED)
def test_what_is_out_of_reach_is_refused_by_name(name):
    model, sample = tiny.make(name)
    with pytest.raises(ArchitectureError, match=rf"^{tiny.REFUSED[name]} \(.* out of reach"):
        layout(model, sample)


@pytest.mark.parametrize("name", sorted(tiny.MAKERS.keys() - tiny.REFUSED.keys()))
def test_every_head_obeys(name):
    single = name in tiny.SINGLE
    model, sample = tiny.make(name, torch.float32 if single else torch.float64)
    plan = layout(model, sample)
    rows = tiny.random_rows(plan)
    plain = tiny.output(model, sample)
    exact, called = under(model, rows, plan, sample)
    assert set(called) == set(plan.names)
    with tempered(model, Profile.from_rows(rows, plan), sample=sample) as handle:
        ours = tiny.output(model, sample)
        assert handle.calls() == {name: called.count(name) for name in plan.names}
    close(ours, exact, 1e-4 if single else 1e-6)
    assert (ours - plain).abs().max() > 1e-3 * plain.abs().max()
    assert torch.equal(tiny.output(model, sample), plain)


@pytest.mark.parametrize("name", ["unet", "dit", "flux", "sd3", "latte"])
def test_in_single_precision_and_half(name):
    """What most pipelines run in: as near to the oracle as the dtype allows."""
    for dtype, near in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        model, sample = tiny.make(name, dtype)
        plan = layout(model, sample)
        rows = tiny.random_rows(plan)
        exact, _ = under(model, rows, plan, sample)
        with tempered(model, Profile.from_rows(rows, plan), sample=sample):
            close(tiny.output(model, sample), exact, near)


@pytest.mark.parametrize("name", ["unet", "unet_masked", "flux", "latte"])
def test_one_head_of_one_layer(name):
    """A profile by name moves what the oracle moves, and nothing else."""
    model, sample = tiny.make(name, torch.float64)
    plan = layout(model, sample)
    plain = tiny.output(model, sample)
    for layer in plan.layers:
        one = torch.ones(layer.heads, dtype=torch.float64)
        one[-1] = 3.0
        rows = {other.name: torch.ones(other.heads) for other in plan.layers}
        with tiny.attention_divided(model, rows | {layer.name: one}):
            exact = tiny.output(model, sample)
        profile = Profile.by_module({layer.name: one.tolist()})
        with tempered(model, profile, sample=sample):
            ours = tiny.output(model, sample)
        assert (exact - plain).abs().max() > 1e-6 * plain.abs().max(), layer.name
        assert (ours - exact).abs().max() < 1e-3 * (exact - plain).abs().max()


def test_a_profile_for_each_row():
    """The rows of guidance: without the prompt at the model's own temperature, with it hotter."""
    model, sample = tiny.make("unet", torch.float64)
    plan = layout(model, sample)
    tables = [
        torch.tensor([[1.0] * layer.heads, [1.7] * layer.heads]).double() for layer in plan.layers
    ]
    with tiny.attention_divided(model, dict(zip(plan.names, tables, strict=True))):
        exact = tiny.output(model, sample)
    profiles = [Profile.neutral(plan), Profile.from_rows([row[1] for row in tables], plan)]
    plain = tiny.output(model, sample)
    with tempered(model, profiles, sample=sample):
        ours = tiny.output(model, sample)
    close(ours, exact)
    assert torch.equal(ours[0], plain[0])
    assert not torch.equal(ours[1], plain[1])


@pytest.mark.parametrize(
    "name", ["unet3d", "unet_motion", "unet_spatio_temporal", "latte", "mochi"]
)
def test_frames_are_no_rows(name):
    model, sample = tiny.make(name)
    plan = layout(model, sample)
    assert not all(layer.of_rows for layer in plan.layers)
    profiles = [Profile.neutral(plan)] * 2
    with pytest.raises(ProfileError, match="its rows can't be told from frames"):
        tempered(model, profiles, sample=sample)


@pytest.mark.parametrize("T", [1e-3, 1e3])
@pytest.mark.parametrize("processor", ["AttnProcessor2_0", "AttnProcessor"])
def test_what_is_masked_stays_masked(T, processor):
    """Its masks add -1e4, which live logits over T = 1e-3 may well lie under."""
    model, sample = tiny.make("unet_masked", torch.float64)
    model.set_attn_processor(getattr(diffusers.models.attention_processor, processor)())
    for name, weight in model.named_parameters():
        if "attn2.to_k" in name:  # every live key of every query scores far below 0
            weight.data.mul_(10)
    plan = layout(model, sample)
    rows = [torch.full((heads,), T, dtype=torch.float64) for heads in plan.heads]
    exact, _ = under(model, rows, plan, sample)
    longer = dict(sample)
    longer["encoder_hidden_states"] = sample["encoder_hidden_states"].clone()
    longer["encoder_hidden_states"][1, 3:] += 5.0  # what is hidden may be anything
    with tempered(model, Profile.from_rows(rows, plan), sample=sample):
        close(tiny.output(model, sample), exact)
        assert torch.equal(tiny.output(model, longer), tiny.output(model, sample))


def test_one_row_of_a_sample_tells_nothing_of_rows():
    model, sample = tiny.make("unet")
    one = {name: x[:1] if isinstance(x, torch.Tensor) else x for name, x in sample.items()}
    plan = layout(model, one)
    with pytest.raises(ProfileError, match="a sample of two rows"):
        tempered(model, [Profile.neutral(plan)] * 2)
    handle = tempered(model, Profile.neutral(plan))
    with handle, pytest.raises(ProfileError, match="2 profiles were given"):
        handle.set_rows([torch.ones(2, heads) for heads in plan.heads])
    with tempered(model, [Profile.neutral(plan)] * 2, sample=sample):
        tiny.output(model, sample)


def test_a_profile_in_a_file(tmp_path):
    model, sample = tiny.make("flux")
    layout(model, sample)
    profile = Profile.from_schedule("linear(2,0.5)", model)
    assert profile.temperature[:, 0].tolist() == schedule("linear(2,0.5)").sample(4).tolist()
    read = Profile.load(profile.save(tmp_path / "flux.json"))
    with tempered(model, read):
        ours = tiny.output(model, sample)
    assert not torch.equal(ours, tiny.output(model, sample))
    with torch.no_grad():
        model.proj_out.weight.mul_(2)
    with pytest.raises(ProfileError, match=r"made for FluxTransformer2DModel .*profile\.adopt"):
        tempered(model, read)
    with tempered(model, read.adopt(model)):
        pass


def test_depth_is_the_order_in_which_layers_run():
    model, sample = tiny.make("unet")
    plan = layout(model, sample)
    own = [layer.name.split(".")[0] for layer in plan.layers if layer.stack == "encoder"]
    assert own == ["down_blocks", "mid_block", "up_blocks", "up_blocks"]
    assert plan.depths == {"encoder": 4, "cross": 4}
    assert [layer.index for layer in plan.layers] == [0, 1, 2, 3] * 2
    assert all(".attn1" in name for name in plan.names[:4])
    model, sample = tiny.make("flux")
    plan = layout(model, sample)
    assert plan.depths == {"encoder": 4}
    assert [name.split(".")[0] for name in plan.names] == ["transformer_blocks"] * 2 + [
        "single_transformer_blocks"
    ] * 2


def test_linear_attention_is_named_untempered():
    model, sample = tiny.make("sana")
    plan = layout(model, sample)
    assert plan.names == tuple(f"transformer_blocks.{i}.attn2" for i in range(2))
    assert plan.untempered == tuple(f"transformer_blocks.{i}.attn1" for i in range(2))
