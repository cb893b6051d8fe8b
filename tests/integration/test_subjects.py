"""Unusual models: offloaded, quantised, with adapters, without tokens. Controlled, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from transformers import CLIPConfig, CLIPModel, LlamaForCausalLM, ViTConfig, ViTModel

from tempering.attention.baking.bake import bake, foldable
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.examining.stored import input_device
from tempering.attention.examining.subject import check_sample
from tempering.attention.measuring.measure import measure_tokens
from tempering.attention.profiles.fingerprint import fingerprint
from tempering.attention.profiles.profile import Profile
from tempering.engines.loading.hub import load_model
from tempering.errors import ArchitectureError, BakeError, InputError, ModelError, ProfileError
from tests.integration import attention_oracle as oracle
from tests.tiny import save_tiny_llama

# Of peft's own, under the newest transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

IDS = oracle.tokens(1, 2, 9)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def check_exact(model, like, profile):
    """The model's logits under a profile are the oracle's for `like`, and its own afterwards."""
    plain = logits(model)
    with tempered(model, profile):
        found = logits(model)
    exact = oracle.forward(like, IDS, profile.temperature).logits
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()
    assert torch.equal(logits(model), plain)


# -- weights that accelerate keeps elsewhere


def on_cpu(model, folder):
    return pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu"))


def on_disk(model, folder):
    return pytest.importorskip("accelerate").disk_offload(model, folder, torch.device("cpu"))


def by_map(model, folder):
    model.save_pretrained(folder / "saved")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(oracle.LAYERS)}
    return LlamaForCausalLM.from_pretrained(
        folder / "saved", device_map=places | {"lm_head": "cpu"}, offload_folder=folder / "off"
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("place", [on_cpu, on_disk, by_map])
def test_a_model_that_accelerate_offloads(place, tied, tmp_path):
    """It has the profile, the fingerprint and the exact temperatures of the model in memory."""
    model = oracle.tiny_llama(tie_word_embeddings=tied)
    profile = Profile.from_schedule("linear(2,0.5)", model)
    away = place(oracle.tiny_llama(tie_word_embeddings=tied), tmp_path)
    assert any(parameter.is_meta for parameter in away.parameters())
    assert fingerprint(away) == fingerprint(model)
    assert layout(away) == layout(model)
    check_exact(away, model, profile)
    check_exact(away, model, Profile.from_schedule(1.5, away))
    assert measure_tokens(away, IDS).layers == layout(model).layers
    assert input_device(away).type == "cpu"
    with pytest.raises(BakeError, match=r"by accelerate; load the model without a device_map"):
        bake(away, profile)


def test_offloaded_weights_are_read_once(tmp_path, monkeypatch):
    import tempering.attention.examining.stored as stored

    away = on_disk(oracle.tiny_llama(), tmp_path)
    reads, own = [], stored.offloaded
    monkeypatch.setattr(stored, "offloaded", lambda *a: reads.append(a) or own(*a))
    profile = Profile.from_schedule(1.5, away)
    first = len(reads)
    for _ in range(3):
        with tempered(away, profile):
            logits(away)
    assert len(reads) == first == len(list(away.parameters()))


def test_a_double_model_that_is_offloaded(tmp_path):
    model = oracle.in_double(oracle.tiny_llama(attention="eager"))
    away = on_disk(copy.deepcopy(model), tmp_path)
    profile = Profile.from_schedule("linear(2,0.5)", model)
    with tempered(away, profile):
        found = logits(away)
    exact = oracle.forward(model, IDS, profile.temperature).logits
    assert (found - exact).abs().max() < 1e-6


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = oracle.tiny_llama()
    for use in (layout, fingerprint, Profile.neutral, foldable):
        with pytest.raises(ModelError, match=r"embed_tokens.weight is on the meta device.*load"):
            use(model)


# -- weights that are tensors around tensors


class Packed(torch.Tensor):
    """What torchao and quanto make of a weight: codes and scales in one tensor subclass."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Packed(**inner)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            made = Packed(args[0].codes, args[0].scale)
            return return_and_correct_aliasing(func, args, kwargs or {}, made)
        if func in (torch.ops.aten.linear.default, torch.ops.aten.t.default):
            args = [a.codes * a.scale if isinstance(a, Packed) else a for a in args]
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default or func is torch.ops.aten.addmm.default:
            args = [a.codes * a.scale if isinstance(a, Packed) else a for a in args]
            return func(*args, **(kwargs or {}))
        raise NotImplementedError(f"Packed dispatch: attempting to run {func}")


def pack(model):
    """(a model of packed weights, the same with plain ones)"""
    plain = copy.deepcopy(model)
    for own, other in zip(model.modules(), plain.modules(), strict=True):
        if isinstance(own, nn.Linear) and own is not model.lm_head:
            scale = own.weight.detach().abs().amax(1, keepdim=True) / 127
            codes = (own.weight.detach() / scale).round().to(torch.int8)
            own.weight = nn.Parameter(Packed(codes, scale), requires_grad=False)
            other.weight.data.copy_(codes * scale)
    return model, plain


def test_a_quantised_model_is_controlled():
    model, plain = pack(oracle.tiny_llama())
    profile = Profile.from_schedule("linear(2,0.5)", model)
    assert profile.model["fingerprint"] == fingerprint(model) != fingerprint(plain)
    assert fingerprint(pack(oracle.tiny_llama())[0]) == fingerprint(model)
    assert fingerprint(pack(oracle.tiny_llama(seed=2))[0]) != fingerprint(model)
    check_exact(model, plain, profile)
    model.model.layers[1].self_attn.q_proj.weight.scale.mul_(2)
    with pytest.raises(ProfileError, match="made for"):
        tempered(model, profile)


def test_a_quantised_model_is_not_baked():
    model, _ = pack(oracle.tiny_llama())
    said = r"weights are quantised \(model.layers.0.self_attn.q_proj.weight is Packed\); bake the"
    assert foldable(model).verdict == "no"
    with pytest.raises(BakeError, match=said):
        bake(model, Profile.from_schedule("linear(2,0.5)", model))


@pytest.mark.parametrize("way", ["torchao", "quanto"])
def test_a_model_that_a_library_quantised(way):
    torch.manual_seed(0)
    model = oracle.tiny_llama(hidden_size=64, head_dim=16)
    if way == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    else:
        quanto = pytest.importorskip("optimum.quanto")
        quanto.quantize(model, weights=quanto.qint8)
        quanto.freeze(model)
    plain = oracle.tiny_llama(hidden_size=64, head_dim=16)
    for own, other in zip(model.modules(), plain.modules(), strict=True):
        if hasattr(getattr(own, "weight", None), "dequantize"):
            other.weight.data.copy_(own.weight.dequantize())
    check_exact(model, plain, Profile.from_schedule("linear(2,0.5)", model))
    with pytest.raises(BakeError, match="weights are quantised"):
        bake(model, Profile.neutral(model))


# -- adapters


def with_lora(model, **settings):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings
    )
    return peft.get_peft_model(model, config).eval()


def test_a_profile_of_the_base_model_on_its_peft_model():
    base = oracle.tiny_llama()
    profile = Profile.from_schedule("linear(2,0.5)", base)
    model = with_lora(base)
    said = r"with the adapter default; .*rebind it: profile.adopt\(model\)"
    for one in (model, model.get_base_model()):
        with pytest.raises(ProfileError, match=said):
            tempered(one, profile)
    merged = copy.deepcopy(model).merge_and_unload()
    adopted = profile.adopt(model)
    assert adopted.names == profile.names
    assert adopted.model["fingerprint"] == fingerprint(model) == fingerprint(base)
    check_exact(model, merged, adopted)
    check_exact(model.get_base_model(), merged, adopted)
    assert measure_tokens(model, IDS).layers == layout(merged).layers
    with pytest.raises(ProfileError, match="made for"):
        tempered(merged, adopted)
    check_exact(merged, merged, profile.adopt(merged))
    with pytest.raises(BakeError, match=r"PeftModel.*merge_and_unload\(\), and bake what"):
        bake(model, adopted)
    assert bake(merged, profile.adopt(merged)) is not merged


def test_an_adapter_that_is_merged_in_place_is_noticed():
    model = with_lora(oracle.tiny_llama())
    profile = Profile.from_schedule("linear(2,0.5)", model)
    model.merge_adapter()
    with pytest.raises(ProfileError, match="made for"):
        tempered(model, profile)


def test_a_prompt_of_peft_s():
    peft = pytest.importorskip("peft")
    base = oracle.tiny_llama()
    profile = Profile.from_schedule("linear(2,0.5)", base)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(base, config).eval()
    with pytest.raises(ProfileError, match=r"those of model.get_base_model\(\): give that"):
        tempered(model, profile)
    plain = logits(model)
    with tempered(model.get_base_model(), profile) as handle:
        assert not torch.equal(logits(model), plain)
        assert all(handle.calls().values())


def test_advice_that_would_fail_is_not_given():
    profile = Profile.from_schedule(1.5, oracle.tiny_llama(num_hidden_layers=3))
    with pytest.raises(ProfileError, match="it doesn't fit: .* the model has 4 layers") as error:
        tempered(oracle.tiny_llama(), profile)
    assert "adopt" not in str(error.value)


def test_the_directory_of_an_adapter(tmp_path):
    """The message gives the lines that make a model of it; they are run as they stand."""
    from transformers import AutoTokenizer

    adapted = pytest.importorskip("peft").AutoPeftModelForCausalLM
    base = save_tiny_llama(tmp_path / "base", layers=2)
    with_lora(LlamaForCausalLM.from_pretrained(base)).save_pretrained(tmp_path / "lora")
    with pytest.raises(ModelError, match=r"lora holds an adapter.*--model .*lora-merged") as error:
        load_model(tmp_path / "lora")
    lines = str(error.value).split("with peft: ")[1].split("; then give")[0]
    exec(lines, {"AutoTokenizer": AutoTokenizer, "AutoPeftModelForCausalLM": adapted})
    model, tokenizer = load_model(tmp_path / "lora-merged")
    ids = tokenizer("It is a truth", return_tensors="pt").input_ids
    wanted = logits(adapted.from_pretrained(tmp_path / "lora").eval(), ids)
    assert (logits(model, ids) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("content", ["{}", "not json", '{"base_model_name_or_path": null}'])
def test_a_damaged_adapter(content, tmp_path):
    (tmp_path / "adapter_config.json").write_text(content)
    said = "is not JSON" if content == "not json" else "without the model it was made for"
    with pytest.raises(ModelError, match=said):
        load_model(tmp_path)


# -- models that take no tokens, or not tokens alone


def test_a_model_of_text_and_images():
    sizes = {"text_config": {**SIZES, "vocab_size": 99, "max_position_embeddings": 32}}
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**sizes, vision_config=vision)).eval()
    assert layout(model).depths == {"vision encoder": 2, "text decoder": 2}  # a sample of its own
    sample = {"input_ids": torch.arange(6).repeat(2, 1), "pixel_values": torch.randn(2, 3, 32, 32)}
    plan = layout(model, sample)
    assert len(plan.layers) == 4
    profile = Profile.from_matrix(torch.full((4, 4), 2.0), model)
    with torch.no_grad():
        plain = model(**sample)
        with tempered(model, profile, sample=sample) as handle:
            warm = model(**sample)
            assert all(handle.calls().values())
    for part in ("text_model_output", "vision_model_output"):
        moved = warm[part].last_hidden_state - plain[part].last_hidden_state
        assert moved.abs().max() > 1e-3


class Embedless(LlamaForCausalLM):
    """As vision towers are: nothing in it embeds tokens, by its own word."""

    def get_input_embeddings(self):
        raise NotImplementedError("no embeddings here")


def test_a_model_without_input_embeddings():
    model = oracle.tiny_llama(kind=(oracle.LlamaConfig, Embedless))
    profile = Profile.from_schedule("linear(2,0.5)", model)
    check_exact(model, model, profile)
    assert measure_tokens(model, IDS).layers == layout(model).layers


def test_a_model_of_images():
    model = ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8)).eval()
    assert layout(model).depths == {"encoder": SIZES["num_hidden_layers"]}
    model.main_input_name = "volumes"
    model.config.image_size = [32, 32]  # a change, after which it is examined anew
    with pytest.raises(ArchitectureError, match=r"takes 'volumes'.*sample="):
        layout(model)


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ("text", "this is str"),
        ([1, 2], "this is list"),
        ({}, r"a dict without a tensor \(empty\)"),
        ({"input_ids": [[1, 2]]}, r"a dict without a tensor \(input_ids\)"),
        ({1: torch.ones(2)}, "keys that are no names"),
        ({"input_ids": torch.tensor(1)}, "a dict without a tensor"),
    ],
)
def test_a_sample_that_is_none(sample, said):
    model = oracle.tiny_llama()
    with pytest.raises(InputError, match=f"keyword arguments of a forward call.*{said}"):
        check_sample(sample)
    if isinstance(sample, dict) and all(isinstance(name, str) for name in sample):
        with pytest.raises(InputError, match=said):
            layout(model, sample)


def test_a_sample_that_the_model_refuses():
    with pytest.raises(ArchitectureError, match=r"the sample \(pixels\): .*of input_ids, att"):
        layout(oracle.tiny_llama(), {"pixels": torch.ones(2, 3)})
