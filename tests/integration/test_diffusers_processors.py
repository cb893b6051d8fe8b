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

from diffusers.models import attention_processor as shipped  # noqa: E402

from tests.integration.denoisers_processors import (  # noqa: E402
    ELSEWHERE,
    HOSTS,
    REFUSED,
    RENAMED,
    UNCALLABLE,
    host_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


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
