"""Attention whose rows are windows or frames, which masks nothing, or masks by -100."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import Tensor, nn

from tempering.attention import Profile, layout, tempered
from tempering.attention.control.self_check import self_check
from tempering.errors import ProfileError
from tempering.survey.models import strengthen

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SAMPLE = {"pixel_values": IMAGES}


def swin(kind: str, **more) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        image_size=32, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4,
        **more,
    )  # fmt: skip
    return made(f"{kind}Model", config)


def made(name: str, config, implementation: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, name)._from_config(config, attn_implementation=implementation)
    strengthen(model)
    return model.eval()


def random_rows(plan, low: float, high: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    span = math.log(high / low)
    return [
        low * torch.exp(torch.rand(layer.heads, generator=generator).double() * span)
        for layer in plan.layers
    ]


class Oracle:
    """Float64 softmax(l / T) in place of every softmax over attention logits, hidden keys apart.

    The logits of the n-th call are those of the n-th layer; what is at or below `hidden` is masked.
    """

    def __init__(self, rows: list[Tensor], hidden: float = -math.inf) -> None:
        self.rows, self.hidden, self.calls = rows, hidden, 0
        self.plain = nn.functional.softmax

    def __call__(self, logits: Tensor, dim: int | None = None, dtype=None, **_) -> Tensor:
        heads = self.rows[self.calls]
        self.calls += 1
        # [rows, heads, (windows,) queries, keys]
        shaped = logits.double()
        shape = (-1, *[1] * (logits.ndim - 2))
        over_t = (shaped / heads.view(shape)).masked_fill(shaped <= self.hidden, -math.inf)
        return (over_t.exp() / over_t.exp().sum(-1, keepdim=True)).view(logits.shape)


def agree(
    model: nn.Module,
    monkeypatch,
    rows: list[Tensor],
    hidden: float = -math.inf,
    inputs: Tensor = IMAGES,
) -> None:
    """The tempered model against its float64 copy whose softmaxes the oracle computes."""
    sample = {"pixel_values": inputs}
    plan = layout(model, sample)
    with tempered(model, Profile.from_rows(rows, plan), sample=sample), torch.no_grad():
        found = model(inputs).last_hidden_state
    untempered = model(inputs).last_hidden_state
    oracle = Oracle(rows, hidden)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "softmax", oracle)
        patch.setattr(
            Tensor, "softmax", lambda logits, *args, **more: oracle(logits, *args, **more)
        )
        wanted = model.double()(inputs.double()).last_hidden_state
        model.float()
    assert oracle.calls == len(rows)  # every softmax is one of the layout's
    assert (found - wanted).abs().max() < 2e-5 * wanted.std()
    assert (untempered - wanted).abs().max() > 0.01 * wanted.std()


@pytest.mark.parametrize("kind", ["Swin", "Swinv2", "DonutSwin", "MaskFormerSwin"])
@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (20.0, 50.0)])
def test_windows_stay_apart_at_high_temperatures(monkeypatch, kind, low, high):
    """-100 between windows hides at T = 1; over T = 50 it would be a logit like any other."""
    model = swin(kind)
    plan = layout(model, SAMPLE)
    assert plan.heads == (2, 2, 4, 4)
    assert [layer.soft_mask is not None for layer in plan.layers][:2] == [False, True]
    assert not plan.layers[0].of_rows
    agree(model, monkeypatch, random_rows(plan, low, high), hidden=-60.0)


@pytest.mark.parametrize("kind", ["Swin", "Swinv2"])
def test_neutral_temperatures_change_no_bit_of_windows(kind):
    model = swin(kind)
    self_check(model, SAMPLE)
    with torch.no_grad():
        plain = model(IMAGES).last_hidden_state
        with tempered(model, Profile.neutral(layout(model, SAMPLE)), sample=SAMPLE):
            assert torch.equal(model(IMAGES).last_hidden_state, plain)


def test_windows_take_one_profile_for_all_rows():
    model = swin("Swin")
    plan = layout(model, SAMPLE)
    profiles = [Profile.neutral(plan), Profile.from_rows(random_rows(plan, 0.5, 2), plan)]
    with pytest.raises(ProfileError, match=r"layers.0.*windows.*give one profile for all rows"):
        tempered(model, profiles, sample=SAMPLE)
    with tempered(model, profiles[1], sample=SAMPLE) as handle:
        with pytest.raises(ProfileError, match="give one profile for all rows"):
            handle.update(profiles)
        with pytest.raises(ProfileError, match="give one profile for all rows"):
            handle.set_rows([torch.ones(2, layer.heads).double() for layer in plan.layers])


# -- attention that masks nothing, by code of its own


def blip() -> nn.Module:
    config = transformers.BlipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8,
    )  # fmt: skip
    return made("BlipVisionModel", config)


def timesformer() -> nn.Module:
    config = transformers.TimesformerConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        image_size=16, patch_size=8, num_frames=3,
    )  # fmt: skip
    return made("TimesformerModel", config)


def hiera() -> nn.Module:
    config = transformers.HieraConfig(
        image_size=[32, 32], patch_size=[7, 7], embed_dim=16, depths=[1, 1], num_heads=[1, 2],
        num_query_pool=1, masked_unit_size=[4, 4],
    )  # fmt: skip
    return made("HieraModel", config)


FRAMES = torch.randn(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("build", "inputs", "apart"),
    [(blip, IMAGES, True), (timesformer, FRAMES, False), (hiera, IMAGES, True)],
)
def test_softmaxes_that_mask_nothing_are_tempered(monkeypatch, build, inputs, apart):
    model = build()
    plan = layout(model, {"pixel_values": inputs})
    assert {layer.route for layer in plan.layers} == {"softmax"}
    assert all(layer.of_rows for layer in plan.layers) == apart
    agree(model, monkeypatch, random_rows(plan, 0.5, 2), inputs=inputs)


def test_latents_are_not_left_out():
    """Perceiver forms its softmax by nn.Softmax(dim=-1)(logits), and masks its inputs alone."""
    config = transformers.PerceiverConfig(
        vocab_size=64, d_latents=32, d_model=32, num_latents=6, num_blocks=1,
        num_self_attends_per_block=2, num_self_attention_heads=4, num_cross_attention_heads=4,
        max_position_embeddings=16, qk_channels=32, v_channels=32,
    )  # fmt: skip
    model = made("PerceiverForMaskedLM", config)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[:, :2] = 0
    sample = {"inputs": torch.arange(5, 16).expand(2, -1), "attention_mask": mask}
    plan = layout(model, sample)
    assert len(plan.layers) == 4  # into the latents, among them twice, and out of them
    assert plan.untempered == ()
    self_check(model, sample)
    profiles = [Profile.neutral(plan), Profile.from_rows(random_rows(plan, 0.5, 2), plan)]
    with torch.no_grad():
        plain = model(**sample).logits
        with tempered(model, profiles, sample=sample):
            both = model(**sample).logits
    assert torch.equal(both[0], plain[0])
    assert (both[1] - plain[1]).abs().max() > 0.01 * plain.std()


@pytest.mark.parametrize("need_weights", [True, False])
def test_multi_head_attention_of_pytorch_is_tempered(need_weights):
    """It calls its softmax inside a function that a function mode is shown whole."""
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        image_size=32, patch_size=8,
    )  # fmt: skip
    model = made("SiglipVisionModel", config)
    head = next(part for part in model.modules() if isinstance(part, nn.MultiheadAttention))
    forward = head.forward
    head.forward = lambda *args: forward(*args, need_weights=need_weights)
    plan = layout(model, SAMPLE)
    name = plan.layers[-1].name
    assert type(model.get_submodule(name)) is nn.MultiheadAttention
    rows = [torch.ones(layer.heads).double() for layer in plan.layers]
    rows[-1] = random_rows(plan, 0.3, 3)[-1]
    seen: dict[str, Tensor] = {}
    head.register_forward_hook(lambda _, args, output: seen.update(x=args, y=output[0]))
    with tempered(model, Profile.from_rows(rows, plan), sample=SAMPLE), torch.no_grad():
        model(IMAGES)
    query, key, value = (
        (item.double() @ weight.double().T + bias.double()).unflatten(-1, (4, 8)).transpose(1, 2)
        for item, weight, bias in zip(
            seen["x"], head.in_proj_weight.chunk(3), head.in_proj_bias.chunk(3), strict=True
        )
    )
    logits = query @ key.mT / math.sqrt(8) / rows[-1][:, None, None]
    mixed = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
    wanted = mixed @ head.out_proj.weight.double().T + head.out_proj.bias.double()
    assert (seen["y"] - wanted).abs().max() < 1e-5 * wanted.std()


def test_heads_inside_windows_are_each_its_own():
    """VitDet folds windows and heads into one axis; head h is the h-th slice of its projections."""
    config = transformers.VitDetConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=4,
        pretrain_image_size=32, window_size=4, window_block_indices=[0],
        use_relative_position_embeddings=False,
    )  # fmt: skip
    model = made("VitDetModel", config)
    plan = layout(model, SAMPLE)
    (layer,) = plan.layers
    assert (layer.axes, layer.of_rows) == (("(b h) q k",), False)
    module = model.get_submodule(layer.name)
    rows = random_rows(plan, 0.3, 3)
    seen: dict[str, Tensor] = {}
    module.register_forward_hook(lambda _, args, output: seen.update(x=args[0], y=output[0]))
    with tempered(model, Profile.from_rows(rows, plan), sample=SAMPLE), torch.no_grad():
        model(IMAGES)
    assert seen["x"].shape == (8, 4, 4, 32)  # two images of four windows
    weight, bias = module.qkv.weight.double(), module.qkv.bias.double()
    query, key, value = (
        (seen["x"].double().flatten(1, 2) @ w.T + b).unflatten(-1, (4, 8)).transpose(1, 2)
        for w, b in zip(weight.chunk(3), bias.chunk(3), strict=True)
    )
    logits = query @ key.mT / math.sqrt(8) / rows[0][:, None, None]
    mixed = (logits.softmax(-1) @ value).transpose(1, 2).reshape(8, 4, 4, 32)
    wanted = mixed @ module.proj.weight.double().T + module.proj.bias.double()
    assert (seen["y"] - wanted).abs().max() < 1e-5 * wanted.std()


@pytest.mark.parametrize("kind", ["Wav2Vec2ForCTC", "SpeechT5ForSpeechToText"])
def test_a_number_at_the_end_of_a_name_is_no_place_in_a_list(kind):
    """Layers of `wav2vec2.encoder.layers` stand in no list `wav2vec` at place 2."""
    small = {"hidden_size": 32, "conv_dim": [16], "conv_kernel": [10], "conv_stride": [40],
             "num_feat_extract_layers": 1, "num_conv_pos_embeddings": 4, "vocab_size": 32,
             "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}  # fmt: skip
    if kind == "Wav2Vec2ForCTC":
        config = transformers.Wav2Vec2Config(
            num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **small
        )
    else:
        config = transformers.SpeechT5Config(
            encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, **small,
        )  # fmt: skip
    sample = {"input_values": torch.randn(1, 1200).expand(2, -1).contiguous()}
    if config.is_encoder_decoder:
        sample["decoder_input_ids"] = torch.arange(5, 12).expand(2, -1)
    model = made(kind, config)
    self_check(model, sample)
    plan = layout(model, sample)
    assert plan.untempered == ()
    assert len(plan.layers) == (6 if config.is_encoder_decoder else 2)
