"""All that attends is tempered or refused: softmax under any name, and modules off the layout."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch import softmax as c_softmax
from torch.nn.functional import softmax
from transformers import BartConfig, BartForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from tempering.attention.control.self_check import self_check
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.profiles.profile import Profile
from tempering.errors import ArchitectureError, CheckError
from tests.integration import attention_oracle as oracle

HEADS, WIDTH = 4, 32
IDS = torch.arange(3, 23).reshape(2, 10)
T = oracle.random_temperatures(1, 2, HEADS)

c_product = F.scaled_dot_product_attention


class ToyConfig(PretrainedConfig):
    model_type = "toy"

    def __init__(self, **kwargs):
        self.num_attention_heads = HEADS
        super().__init__(**kwargs)


class ToyAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.fn = softmax
        self.hard = functools.partial(F.softmax, dim=-1)
        self.module = nn.Softmax(dim=-1)

    def mixed(self, q, k, v, mask):
        return self.weights(q @ k.mT + mask) @ v

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, HEADS, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = torch.full((s, s), float("-inf"), dtype=x.dtype).triu(1)
        return self.mixed(q, k, v, mask).transpose(1, 2).reshape(b, s, WIDTH)


class Toy(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config, kind):
        super().__init__(config)
        self.emb = nn.Embedding(99, WIDTH)
        self.layers = nn.ModuleList(kind() for _ in range(2))
        self.post_init()

    def get_input_embeddings(self):
        return self.emb

    def forward(self, input_ids, attention_mask=None, **kwargs):
        x = self.emb(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return CausalLMOutput(logits=x @ self.emb.weight.T)


def toy(kind=None, **methods):
    kind = kind or type("ToyAttention", (ToyAttention,), methods)
    torch.manual_seed(0)
    model = Toy(ToyConfig(), kind).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def exact(model, temperature):
    """The same model from its weights."""
    x = model.emb.weight[IDS]
    b, s, _ = x.shape
    for layer, row in zip(model.layers, temperature, strict=True):
        q, k, v = (t.view(b, s, HEADS, 8) for t in layer.qkv(x).chunk(3, -1))
        parts = []
        for head in range(HEADS):
            l = q[:, :, head] @ k[:, :, head].mT
            hidden = torch.ones(s, s).triu(1).bool()
            l = (l / row[head]).masked_fill(hidden, float("-inf"))
            weights = (l - l.logsumexp(-1, keepdim=True)).exp()
            parts.append(weights @ v[:, :, head])
        x = x + torch.cat(parts, -1)
    return x @ model.emb.weight.T


class OwnSoftmax(nn.Softmax):
    def forward(self, x):
        return super().forward(x)


TEMPERED = {
    "imported": lambda self, x: softmax(x, dim=-1),
    "kept on the instance": lambda self, x: self.fn(x, dim=-1),
    "partial": lambda self, x: self.hard(x),
    "a default argument": lambda self, x, fn=softmax: fn(x, -1),
    "method": lambda self, x: x.softmax(-1),
    "method, by keyword": lambda self, x: x.softmax(dim=-1, dtype=torch.float64),
    "special": lambda self, x: torch.special.softmax(x, -1),
    "module": lambda self, x: self.module(x),
    "subclass of the module": lambda self, x: OwnSoftmax(-1)(x),
    "torch": lambda self, x: torch.softmax(x, -1),
    "functional": lambda self, x: F.softmax(x, dim=-1),
}


@pytest.mark.parametrize("way", TEMPERED)
def test_a_softmax_under_any_name_is_tempered(way):
    model = toy(weights=TEMPERED[way])
    methods = torch.Tensor.softmax, torch.special.softmax
    with torch.no_grad():
        plain = model(IDS).logits
        with tempered(model, Profile.from_matrix(T)) as handle:
            assert (model(IDS).logits - exact(model, T)).abs().max() < 1e-10
            assert set(handle.calls().values()) == {1}
            # A function mode of the user's, under which PyTorch looks functions up once more.
            with torch.device("cpu"):
                assert (model(IDS).logits - exact(model, T)).abs().max() < 1e-10
        assert torch.equal(model(IDS).logits, plain)
    assert (torch.Tensor.softmax, torch.special.softmax) == methods
    assert "softmax" not in vars(torch.Tensor)


def by_hand(self, x):
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, -1)


REFUSED = {
    "C function by name": ({"weights": lambda self, x: c_softmax(x, -1)}, "without meeting"),
    "product by name": ({"mixed": lambda self, q, k, v, m: c_product(q, k, v, m)}, "without meet"),
    "by hand": ({"weights": by_hand}, "attends by exp"),
    "log": ({"weights": lambda self, x: x.log_softmax(-1).exp()}, "attends by _log_softmax"),
    "log, function": (
        {"weights": lambda self, x: F.log_softmax(x, dim=-1).exp()},
        "attends by _log_softmax",
    ),
    "scripted": ({"weights": lambda self, x: scripted(x)}, "attends by _softmax"),
    "gumbel": ({"weights": lambda self, x: F.gumbel_softmax(x)}, "attends by _softmax"),
    "product of three axes": (
        {"mixed": lambda self, q, k, v, m: F.scaled_dot_product_attention(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), m).view(q.shape)},
        "queries of shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", REFUSED)
def test_what_is_out_of_reach_is_refused_by_name(way):
    methods, reason = REFUSED[way]
    model = toy(**methods)
    with pytest.raises((ArchitectureError, CheckError), match=rf"layers\.0 .*{reason}"):
        self_check(model)
    assert not any("forward" in vars(module) for module in model.modules())


class Joint(nn.Module):
    """Half of its layers are named for attention, and hide a softmax of PyTorch's own."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=True)[0]


def test_one_layer_out_of_reach_among_others_is_refused():
    model = toy(weights=TEMPERED["functional"])
    hidden = {
        r"layers\.1\.attn calls softmax .* masks nothing there": Joint().double(),
        r"layers\.1 .* attends by exp": toy(weights=by_hand).layers[0],
    }
    for reason, layer in hidden.items():
        twin = copy.deepcopy(model)
        twin.layers[1] = layer
        with pytest.raises(ArchitectureError, match=reason):
            layout(twin)
    model.layers[1] = toy(weights=TEMPERED["torch"]).layers[0]
    assert layout(model).names == ("layers.0", "layers.1")


def test_another_way_later_is_an_error_at_that_moment():
    def weights(self, x):
        return c_softmax(x, -1) if getattr(self, "fast", False) else F.softmax(x, dim=-1)

    model = toy(weights=weights)
    with torch.no_grad(), tempered(model, Profile.from_matrix(T)):
        model(IDS)
        model.layers[1].fast = True
        with pytest.raises(ArchitectureError, match=r"layers\.1 .* ran without meeting its"):
            model(IDS)
    model(IDS)


def test_another_way_later_on_the_interface_too(monkeypatch):
    model = oracle.tiny_llama()
    attention = type(model.model.layers[0].self_attn)
    original = attention.forward

    def forward(self, hidden_states, *args, **kwargs):
        if hidden_states.shape[1] > 12:
            return hidden_states, None
        return original(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", forward)
    given = Profile.from_matrix(oracle.random_temperatures(1, oracle.LAYERS, oracle.HEADS))
    with torch.no_grad(), tempered(model, given):
        model(oracle.tokens(0, 2, 12))
        with pytest.raises(ArchitectureError, match=r"layers\.0\.self_attn .* without meeting"):
            model(oracle.tokens(0, 2, 13))


def test_unchecked_models_are_no_exception():
    model = toy(weights=REFUSED["C function by name"][0]["weights"])
    handle = tempered(model, Profile.from_matrix(T), check=False)
    with pytest.raises(ArchitectureError, match="ran without meeting"):
        model(IDS)
    handle.remove()


# -- modules off the layout


class TowerAttention(ToyAttention):
    weights = TEMPERED["functional"]


class ForImages(Toy):
    """Text goes through its layers; images through a tower besides."""

    def __init__(self, config, kind):
        super().__init__(config, kind)
        self.tower = TowerAttention()
        self.joint = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, input_ids, attention_mask=None, image=None, part="tower", **kwargs):
        if image is not None:
            x = self.tower(image) if part == "tower" else self.joint(image, image, image)[0]
            return CausalLMOutput(logits=x)
        return super().forward(input_ids)


@pytest.fixture
def with_tower():
    torch.manual_seed(0)
    model = ForImages(ToyConfig(), type("ToyAttention", (TowerAttention,), {})).eval()
    assert layout(model).unreached == ("tower", "joint")
    return model


@pytest.mark.parametrize("part", ["tower", "joint"])
def test_a_tower_that_text_did_not_reach_is_no_silent_exception(with_tower, part):
    image = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        plain = with_tower(IDS, image=image, part=part).logits
        with tempered(with_tower, Profile.neutral(with_tower)) as handle:
            assert torch.equal(with_tower(IDS, image=image, part=part).logits, plain)
            handle.update(Profile.from_matrix(T))
            with_tower(IDS)
            with pytest.raises(ArchitectureError, match=rf"{part} .* was not reached by the samp"):
                with_tower(IDS, image=image, part=part)
        assert torch.equal(with_tower(IDS, image=image, part=part).logits, plain)
    assert not any("forward" in vars(module) for module in with_tower.modules())


def test_attention_that_the_sample_did_not_ask_for(with_tower):
    """A module that runs, and attends to long inputs alone."""

    class LazyAttention(ToyAttention):
        weights = TEMPERED["functional"]

        def forward(self, x):
            return super().forward(x) if x.shape[1] > 11 else x

    model = copy.deepcopy(with_tower)
    model.other = LazyAttention()
    model.layers[1].register_forward_hook(lambda module, args, output: model.other(output))
    plan = layout(model)
    assert plan.outside == ("tower", "joint", "other") and plan.unreached == ("tower", "joint")
    with torch.no_grad(), tempered(model, Profile.from_matrix(T)):
        model(IDS)
        with pytest.raises(ArchitectureError, match=r"other .* called no softmax when"):
            model(torch.arange(3, 43).reshape(2, 20))


def test_cross_attention_that_the_sample_left_out():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "vocab_size": 61}
    model = BartForCausalLM(BartConfig(decoder_ffn_dim=48, **sizes)).eval()
    given = Profile.from_matrix(torch.full((2, 4), 0.5))
    with torch.no_grad(), tempered(model, given):
        model(IDS)
        with pytest.raises(ArchitectureError, match=r"layers\.0\.encoder_attn .* was not reached"):
            model(IDS, encoder_hidden_states=torch.randn(2, 4, 32))


def test_a_router_is_no_attention():
    """Its softmax stays as it is, in the attention's module or in one of its own."""

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(WIDTH, HEADS)

        def forward(self, x):
            return c_softmax(self.gate(x), -1)[..., :1]

    class Apart(ToyAttention):
        weights = TEMPERED["functional"]

        def __init__(self):
            super().__init__()
            self.router = Router()

        def forward(self, x):
            return super().forward(x) * self.router(x)

    class Within(Apart):
        def forward(self, x):
            return TowerAttention.forward(self, x) * Router.forward(self.router, x)

    assert self_check(toy(Apart)).share < 1e-6
    assert self_check(toy(Within)).share < 1e-6
