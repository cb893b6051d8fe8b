"""Every attention processor that diffusers ships: exact, refused by name, or without a softmax."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tempering import Profile, layout, tempered
from tempering.attention.denoisers import LINEAR
from tempering.errors import ArchitectureError, NoSoftmaxError
from tests.integration import denoisers_tiny as tiny

diffusers = pytest.importorskip("diffusers")

from diffusers.configuration_utils import ConfigMixin, register_to_config  # noqa: E402
from diffusers.models import attention_processor as shipped  # noqa: E402
from diffusers.models.modeling_utils import ModelMixin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BASE = {"query_dim": 16, "heads": 2, "dim_head": 8}
CROSS = {**BASE, "cross_attention_dim": tiny.TEXT_WIDTH}
JOINT = {**BASE, "added_kv_proj_dim": tiny.TEXT_WIDTH, "out_dim": 16, "context_pre_only": False}
ADDED = {**BASE, "added_kv_proj_dim": tiny.TEXT_WIDTH, "norm_num_groups": 4, "bias": True}


class Host(ModelMixin, ConfigMixin):
    """A model of one attention module, whose inputs are those of its processor."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, attention: dict[str, Any], kind: str = "Attention") -> None:
        super().__init__()
        settings = dict(attention)
        if kind == "MochiAttention":
            settings["processor"] = shipped.MochiAttnProcessor2_0()
        self.attn = getattr(shipped, kind)(**settings)

    def forward(self, return_dict: bool = True, **inputs: Any) -> tuple[Any, ...]:
        given = self.attn(**inputs)
        return given if isinstance(given, tuple) else (given,)


def tokens(rows=2, width=16, count=9):
    return {"hidden_states": tiny.draw(rows, count, width)}


def with_text(rows=2, width=tiny.TEXT_WIDTH, **more):
    return {**tokens(rows), "encoder_hidden_states": tiny.draw(rows, tiny.TEXT, width), **more}


def places():
    return {**with_text(), "hidden_states": tiny.draw(2, 16, 9)}


def custom(name):
    return lambda: getattr(shipped, name)(hidden_size=16, cross_attention_dim=tiny.TEXT_WIDTH)


def image_prompt(name):
    return lambda: getattr(shipped, name)(16, tiny.TEXT_WIDTH)


IMAGE_PROMPT = {
    **with_text(),
    "encoder_hidden_states": (tiny.text(), [tiny.draw(2, 1, 4, tiny.TEXT_WIDTH)]),
}
MASK = torch.ones(2, tiny.TEXT, dtype=torch.bool)
# name -> (arguments of Attention, inputs, and what makes the processor if its class alone doesn't)
HOSTS: dict[str, tuple[Any, ...]] = {
    "AttnProcessor": (CROSS, with_text()),
    "AttnProcessor2_0": (CROSS, with_text()),
    "XFormersAttnProcessor": (CROSS, with_text()),
    "SlicedAttnProcessor": (CROSS, with_text(), lambda: shipped.SlicedAttnProcessor(1)),
    "SlicedAttnAddedKVProcessor": (
        ADDED,
        places(),
        lambda: shipped.SlicedAttnAddedKVProcessor(1),
    ),
    "CustomDiffusionAttnProcessor": (CROSS, with_text(), custom("CustomDiffusionAttnProcessor")),
    "CustomDiffusionAttnProcessor2_0": (
        CROSS,
        with_text(),
        custom("CustomDiffusionAttnProcessor2_0"),
    ),
    "CustomDiffusionXFormersAttnProcessor": (
        CROSS,
        with_text(),
        custom("CustomDiffusionXFormersAttnProcessor"),
    ),
    "AttnAddedKVProcessor": (ADDED, places()),
    "AttnAddedKVProcessor2_0": (ADDED, places()),
    "XFormersAttnAddedKVProcessor": (ADDED, places()),
    "JointAttnProcessor2_0": (JOINT, with_text()),
    "PAGJointAttnProcessor2_0": (JOINT, with_text()),
    "PAGCFGJointAttnProcessor2_0": (JOINT, with_text(3)),
    "FusedJointAttnProcessor2_0": (JOINT, with_text()),
    "XFormersJointAttnProcessor": (JOINT, with_text()),
    "SD3IPAdapterJointAttnProcessor2_0": (
        JOINT,
        with_text(ip_hidden_states=tiny.draw(2, 3, 6), temb=tiny.draw(2, 10)),
        lambda: shipped.SD3IPAdapterJointAttnProcessor2_0(16, 6, 8, 10),
    ),
    "AllegroAttnProcessor2_0": (BASE, tokens()),
    "AuraFlowAttnProcessor2_0": (JOINT, with_text()),
    "FusedAuraFlowAttnProcessor2_0": (JOINT, with_text()),
    "CogVideoXAttnProcessor2_0": (BASE, with_text(width=16)),
    "FusedCogVideoXAttnProcessor2_0": (BASE, with_text(width=16)),
    "MochiVaeAttnProcessor2_0": (BASE, tokens()),
    "StableAudioAttnProcessor2_0": ({**BASE, "kv_heads": 1}, tokens()),
    "HunyuanAttnProcessor2_0": (CROSS, with_text()),
    "FusedHunyuanAttnProcessor2_0": (BASE, tokens()),
    "PAGHunyuanAttnProcessor2_0": (BASE, tokens()),
    "PAGCFGHunyuanAttnProcessor2_0": (BASE, tokens(3)),
    "LuminaAttnProcessor2_0": (
        {**CROSS, "kv_heads": 1},
        with_text(attention_mask=MASK),
    ),
    "FusedAttnProcessor2_0": (BASE, tokens()),
    "IPAdapterAttnProcessor": (CROSS, IMAGE_PROMPT, image_prompt("IPAdapterAttnProcessor")),
    "IPAdapterAttnProcessor2_0": (CROSS, IMAGE_PROMPT, image_prompt("IPAdapterAttnProcessor2_0")),
    "IPAdapterXFormersAttnProcessor": (
        CROSS,
        IMAGE_PROMPT,
        image_prompt("IPAdapterXFormersAttnProcessor"),
    ),
    "PAGIdentitySelfAttnProcessor2_0": (BASE, tokens()),
    "PAGCFGIdentitySelfAttnProcessor2_0": (BASE, tokens(3)),
    "SanaLinearAttnProcessor2_0": (BASE, tokens()),
    "PAGIdentitySanaLinearAttnProcessor2_0": (BASE, tokens()),
    "PAGCFGSanaLinearAttnProcessor2_0": (BASE, tokens(3)),
    "MochiAttnProcessor2_0": (
        {"query_dim": 16, "added_kv_proj_dim": tiny.TEXT_WIDTH, "heads": 2, "dim_head": 8},
        with_text(attention_mask=tiny.padding()),
    ),
    "SanaMultiscaleAttnProcessor2_0": (
        {"in_channels": 16, "out_channels": 16},
        {"hidden_states": tiny.draw(2, 16, 8, 8)},
    ),
}
KINDS = {
    "MochiAttnProcessor2_0": "MochiAttention",
    "SanaMultiscaleAttnProcessor2_0": "SanaMultiscaleLinearAttention",
}
REFUSED = {
    "SlicedAttnProcessor",
    "SlicedAttnAddedKVProcessor",
    "XFormersAttnProcessor",
    "XFormersAttnAddedKVProcessor",
    "XFormersJointAttnProcessor",
    "CustomDiffusionXFormersAttnProcessor",
    "IPAdapterXFormersAttnProcessor",
}
# Processors for hardware that is not here, which say so themselves; deprecated classes that give
# another one's object; and classes without a call.
ELSEWHERE = {"AttnProcessorNPU", "XLAFlashAttnProcessor2_0"}
RENAMED = {
    "FluxAttnProcessor2_0": "FluxAttnProcessor",
    "FluxSingleAttnProcessor2_0": "FluxAttnProcessor",
    "FusedFluxAttnProcessor2_0": "FluxAttnProcessor",
    "FluxIPAdapterJointAttnProcessor2_0": "FluxIPAdapterAttnProcessor",
    "FluxAttnProcessor2_0_NPU": "FluxAttnProcessor",
    "FusedFluxAttnProcessor2_0_NPU": "FluxAttnProcessor",
    "XLAFluxFlashAttnProcessor2_0": "FluxAttnProcessor",
}
UNCALLABLE = {
    "LoRAAttnProcessor",
    "LoRAAttnProcessor2_0",
    "LoRAXFormersAttnProcessor",
    "LoRAAttnAddedKVProcessor",
}


def processors_in(module: Any) -> list[str]:
    return [
        name
        for name, item in vars(module).items()
        if inspect.isclass(item)
        and item.__module__ == module.__name__
        and "Processor" in name
        and ("Attn" in name or "Attention" in name)
    ]


@torch.library.custom_op("tempering_tests::flash_fwd", mutates_args=())
def flash_fwd(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A fused kernel from elsewhere, as xformers calls them: no softmax in sight."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value).clone()


@torch.library.custom_op("tempering_tests::kernel", mutates_args=())
def kernel(tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).clone()


def memory_efficient_attention(query, key, value, attn_bias=None, op=None, scale=None):
    if query.ndim == 4:
        turned = (item.transpose(1, 2) for item in (query, key, value))
        return flash_fwd(*turned).transpose(1, 2)
    return flash_fwd(query, key, value)


@pytest.fixture
def xformers(monkeypatch):
    ops = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(shipped, "xformers", SimpleNamespace(ops=ops))


def host_of(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Any]]:
    settings, inputs, *maker = HOSTS[name]
    torch.manual_seed(0)
    host = Host(settings, KINDS.get(name, "Attention")).eval()
    processor = maker[0]() if maker else getattr(shipped, name)()
    host.attn.processor = processor
    if name.startswith("Fused"):
        host.attn.fuse_projections()
    with torch.no_grad():
        for parameter in host.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
    return host.to(dtype), tiny.to(inputs, dtype)


def test_every_shipped_processor_has_a_verdict():
    known = {*HOSTS, *ELSEWHERE, *RENAMED, *UNCALLABLE}
    assert set(processors_in(shipped)) <= known


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_exact_refused_or_without_a_softmax(name, xformers):
    # This one relies on the memory order of the kernel for single precision.
    single = name == "SD3IPAdapterJointAttnProcessor2_0"
    host, sample = host_of(name, torch.float32 if single else torch.float64)
    if name in LINEAR:
        with pytest.raises(NoSoftmaxError, match="no softmax attention"):
            layout(host, sample)
        return
    if name in REFUSED:
        said = r"^attn \(Attention\) (attends by flash_fwd|calls softmax over \[1, 9, \d+\])"
        with pytest.raises(ArchitectureError, match=said):
            layout(host, sample)
        return
    plan = layout(host, sample)
    assert plan.names == ("attn",)
    rows = tiny.random_rows(plan)
    plain = tiny.output(host, sample)
    with tiny.attention_divided(host, {"attn": rows[0]}) as called:
        exact = tiny.output(host, sample)
    assert called
    with tempered(host, Profile.from_rows(rows, plan), sample=sample):
        ours = tiny.output(host, sample)
    assert (ours - exact).abs().max() < (1e-4 if single else 1e-6) * exact.abs().max()
    assert (ours - plain).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_processors_of_other_hardware_refuse_themselves(name):
    with pytest.raises((ImportError, NameError, ValueError)):
        getattr(shipped, name)()


@pytest.mark.parametrize("name", sorted(RENAMED))
def test_deprecated_classes_give_others(name):
    if name.endswith("NPU") or "XLA" in name or "IPAdapter" in name:
        arguments = {"hidden_size": 16, "cross_attention_dim": 12} if "IPAdapter" in name else {}
    else:
        arguments = {}
    try:
        made = getattr(shipped, name)(**arguments)
    except (ImportError, ValueError):
        assert "XLA" in name or "NPU" in name
        return
    assert type(made).__name__ == RENAMED[name]


@pytest.mark.parametrize("name", sorted(UNCALLABLE))
def test_classes_without_a_call(name):
    assert not callable(getattr(shipped, name)())


# Names by which a processor reaches a softmax that this package reaches.
REACHED = {
    "dispatch_attention_fn",
    "scaled_dot_product_attention",
    "get_attention_scores",
    "softmax",
}


def own_processors() -> list[tuple[str, str]]:
    """(module, class) of all processors that the models of diffusers define for themselves."""
    found = []
    for package in ("transformers", "unets", "autoencoders", "controlnets"):
        folder = Path(diffusers.__file__).parent / "models" / package
        for item in pkgutil.iter_modules([str(folder)]):
            path = folder / f"{item.name}.py"
            if not path.exists():
                continue
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                name = getattr(node, "name", "")
                if isinstance(node, ast.ClassDef) and "Processor" in name and "Att" in name:
                    found.append((f"diffusers.models.{package}.{item.name}", name))
    return found


@pytest.mark.parametrize(("module", "name"), own_processors())
def test_processors_of_the_models_call_what_is_reached(module, name):
    """One that calls none of it must be in the table of linear attention, or it is refused."""
    kind = getattr(importlib.import_module(module), name)
    if "__new__" in vars(kind):
        return  # a deprecated name of another class
    used: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith("diffusers."):
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            used |= {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(tree)}
    assert used & REACHED or name in LINEAR


class Fused:
    """A processor of somebody else's, on a kernel of their own."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return memory_efficient_attention(hidden_states, hidden_states, hidden_states)


class ByHand:
    """A processor that writes its softmax out."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        weights = torch.exp(hidden_states @ hidden_states.transpose(1, 2))
        return weights / weights.sum(-1, keepdim=True) @ hidden_states


class OneOfTwo(ByHand):
    """A processor whose first softmax is reached, and whose second is not."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        query = hidden_states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        return super().__call__(attn, mixed.transpose(1, 2).flatten(2))


class Flex(OneOfTwo):
    """A processor whose second softmax is in flex attention, an operator of higher order."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        from torch.nn.attention.flex_attention import flex_attention

        query = hidden_states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        return flex_attention(mixed, mixed, mixed).transpose(1, 2).flatten(2)


class Unnamed(Fused):
    """A processor on a kernel whose name says nothing."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return kernel(hidden_states)


SAID = {
    Fused: "attends by flash_fwd, out of reach",
    Unnamed: "attends by Unnamed, which calls no softmax that can be reached",
    ByHand: "attends by exp, out of reach",
    OneOfTwo: "attends by exp, out of reach",
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", SAID)
def test_a_processor_from_elsewhere_is_refused_by_name(kind):
    host, sample = host_of("AttnProcessor2_0")
    host.attn.set_processor(kind())
    with pytest.raises(ArchitectureError, match=rf"^attn \(Attention\) {SAID[kind]}"):
        layout(host, sample)


def test_flex_attention_is_refused_where_it_runs():
    """PyTorch compiles it, which is no forward that can be watched."""
    host, sample = host_of("AttnProcessor2_0")
    host.attn.set_processor(Flex())
    with pytest.raises(ArchitectureError, match=r"\(in attn, Attention\)|attends by flex_att"):
        layout(host, sample)


def test_a_processor_that_is_exchanged_under_a_profile_raises():
    host, sample = host_of("AttnProcessor2_0")
    plan = layout(host, sample)
    with tempered(host, Profile.from_rows(tiny.random_rows(plan), plan), sample=sample):
        host.attn.set_processor(ByHand())
        with pytest.raises(ArchitectureError, match="ran without meeting its temperature"):
            tiny.output(host, sample)


def test_a_processor_that_is_exchanged_before_is_noticed():
    host, sample = host_of("AttnProcessor2_0")
    plan = layout(host, sample)
    host.attn.set_processor(ByHand())
    with pytest.raises(ArchitectureError, match="attn"):
        tempered(host, Profile.from_rows(tiny.random_rows(plan), plan))
