"""A model is described once while it doesn't change, and anew where it does."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama import modeling_llama

import tempering.attention.examining.watch as watch
import tempering.attention.profiles.fingerprint as hashing
from tempering.attention.control.self_check import verdict_key
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import examined, layout
from tempering.attention.profiles.fingerprint import fingerprint
from tempering.attention.profiles.profile import Profile
from tempering.errors import ArchitectureError, CheckError, ProfileError, RefusedError
from tempering.evaluation.cost import Variant, measure_costs
from tests.integration import attention_oracle as oracle

IDS = oracle.tokens(1, 2, 9)


@pytest.fixture
def model():
    return oracle.tiny_llama()


@pytest.fixture
def counted(monkeypatch):
    """How often a model was run to be examined, and how often weights were hashed."""
    counts = {"examined": 0, "hashed": 0}

    def count(name, function):
        def counting(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return counting

    monkeypatch.setattr(watch, "observe", count("examined", watch.observe))
    monkeypatch.setattr(hashing, "_digest", count("hashed", hashing._digest))
    return counts


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_it_is_described_once(model, counted):
    profile = Profile.from_schedule("linear(1.3,0.7)", model)
    assert counted == {"examined": 1, "hashed": 1}
    for _ in range(3):
        with tempered(model, profile) as handle:
            logits(model)
            handle.update(profile.scaled(0.5))
            with tempered(model, Profile.from_schedule(1.1, model)):
                logits(model)
        layout(model)
    model.train()
    model.requires_grad_(False)
    measure_costs(model, IDS, [Variant("a", profile), Variant("b", profile.scaled(0.3))])
    assert counted == {"examined": 1, "hashed": 1}


def test_a_comparison_attaches_one_handle(model, monkeypatch):
    import tempering.evaluation.cost as cost

    attached, own = [], cost.tempered
    monkeypatch.setattr(cost, "tempered", lambda *a: attached.append(a) or own(*a))
    hot, cold = Profile.from_schedule(1.5, model), Profile.from_schedule("linear(1.3,0.7)", model)
    chunks = torch.cat([IDS, oracle.tokens(2, 1, 9)])
    costs, _ = measure_costs(model, chunks, [Variant("hot", hot), Variant("cold", cold)])
    assert len(attached) == 1
    for item, profile in zip(costs, (hot, cold), strict=True):
        exact = []
        for ids in chunks:
            out = oracle.forward(model, ids[None], profile.temperature).logits[0, :-1]
            exact.append(F.cross_entropy(out, ids[1:]).item())
        assert item.nll == pytest.approx(sum(exact) / 3, abs=1e-5)
    assert not any("_tempering" in module.__dict__ for module in model.modules())


# -- what changes what is run


def drop_layers(model):
    del model.model.layers[3:]
    model.config.num_hidden_layers = 3


def add_a_layer(model):
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    model.model.layers[-1].self_attn.layer_idx = 4
    model.config.num_hidden_layers = 5
    model.config.layer_types = ["full_attention"] * 5


def reorder(model):
    model.model.layers = torch.nn.ModuleList(reversed(model.model.layers))


def replace_attention(model):
    old = model.model.layers[1].self_attn
    new = modeling_llama.LlamaAttention(model.config, 1)
    new.load_state_dict(old.state_dict())
    model.model.layers[1].self_attn = new


def share_a_layer(model):
    model.model.layers[2] = model.model.layers[1]


def own_attention(self, hidden_states, position_embeddings=None, **kwargs):
    """The same attention, whose call is not the interface's."""
    rows, length, _ = hidden_states.shape
    q, k, v = (
        part(hidden_states).view(rows, length, -1, self.head_dim).transpose(1, 2)
        for part in (self.q_proj, self.k_proj, self.v_proj)
    )
    q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
    k, v = (item.repeat_interleave(self.num_key_value_groups, 1) for item in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
    return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1)), None


def patch_instances(model):
    for layer in model.model.layers:
        layer.self_attn.forward = types.MethodType(own_attention, layer.self_attn)


def change_the_class(model):
    class Own(modeling_llama.LlamaAttention):
        forward = own_attention

    for layer in model.model.layers:
        layer.self_attn.__class__ = Own


CHANGES = {
    "layers dropped": drop_layers,
    "a layer added": add_a_layer,
    "layers reordered": reorder,
    "attention replaced": replace_attention,
    "a layer shared": share_a_layer,
    "forward of instances": patch_instances,
    "another class": change_the_class,
    "another implementation": lambda model: model.set_attn_implementation("eager"),
    "a field of the configuration": lambda model: setattr(model.config, "rms_norm_eps", 1e-4),
    "another dtype": lambda model: model.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change, model, counted):
    with tempered(model, Profile.from_schedule(1.2, model)):
        pass
    before = examined(model)
    CHANGES[change](model)
    count = len(model.model.layers) - (change == "a layer shared")
    T = oracle.random_temperatures(5, count, oracle.HEADS)
    profile = Profile.from_matrix(T, model)
    assert examined(model) is not before
    examinations = counted["examined"]
    plain = logits(model)
    with tempered(model, profile) as handle:
        found = logits(model)
        handle.update(profile)
        assert all(handle.calls().values())
    assert counted["examined"] == examinations
    assert torch.equal(logits(model), plain)
    if change in ("a layer shared", "a field of the configuration"):
        assert not torch.equal(found, plain)
        return
    exact = oracle.forward(copy.deepcopy(model), IDS, T).logits
    assert (found - exact).abs().max() < 2e-5


def test_a_forward_patched_on_the_class_is_noticed(model, monkeypatch):
    with tempered(model, Profile.from_schedule(1.2, model)):
        pass
    twin = oracle.tiny_llama()
    profile = Profile.from_schedule("linear(2,0.5)", twin)
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", own_attention)
    for one in (model, twin):
        assert {layer.route for layer in layout(one).layers} == {"softmax"}
        with tempered(one, profile):
            exact = oracle.forward(one, IDS, profile.temperature).logits
            assert (logits(one) - exact).abs().max() < 2e-5
    monkeypatch.undo()
    assert {layer.route for layer in layout(model).layers} == {"interface"}


def deaf(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention that takes its scale from the module, and so no uniform temperature."""
    eager = modeling_llama.eager_attention_forward
    return eager(module, query, key, value, attention_mask, module.scaling, dropout, **kwargs)


def test_a_function_that_attention_calls_is_noticed(monkeypatch):
    """What the first examination proved says nothing about another function of the same name."""
    model = oracle.tiny_llama(attention="eager")
    profile = Profile.from_schedule(2.0, model)
    with tempered(model, profile):
        pass
    plain = modeling_llama.eager_attention_forward

    def eager_attention_forward(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
        return plain(module, query, key, value, mask, module.scaling, dropout, **kwargs)

    eager_attention_forward.__module__ = plain.__module__
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager_attention_forward)
    with pytest.raises(CheckError, match="disagrees with the reference"):
        tempered(model, profile)
    with pytest.raises(CheckError, match="disagrees with the reference"):
        tempered(oracle.tiny_llama(attention="eager"), profile)
    monkeypatch.undo()
    with tempered(model, profile):
        pass


def test_a_function_registered_anew_is_noticed(model, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    profile = Profile.from_schedule(2.0, model)
    with tempered(model, profile):
        pass
    deaf.__module__ = modeling_llama.__name__
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", deaf)
    with pytest.raises(CheckError, match="can't be controlled exactly"):
        tempered(model, profile)


def test_a_method_of_an_attention_module_is_noticed():
    """gpt2 upcasts in a method of its own, which a patch replaces with one without a softmax."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, reorder_and_upcast_attn=True)
    config._attn_implementation = "eager"
    model = GPT2LMHeadModel(config).eval()
    profile = Profile.from_schedule(2.0, model)
    with tempered(model, profile):
        pass
    for block in model.transformer.h:
        own = lambda query, key, value, *rest, **more: (value.transpose(1, 2), None)  # noqa: E731
        block.attn._upcast_and_reordered_attn = own
    with pytest.raises(ArchitectureError, match="attends without calling a softmax"):
        tempered(model, profile)


def test_copies_have_descriptions_of_their_own(model, counted):
    profile = Profile.from_schedule(1.2, model)
    with tempered(model, profile):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for one in copies:
        del one.model.layers[3:]
        assert len(layout(one).layers) == 3
    assert counted["examined"] == 3
    assert len(layout(model).layers) == 4
    assert counted["examined"] == 3


def test_a_description_doesn_t_keep_the_model():
    model = oracle.tiny_llama()
    patch_instances(model)
    with tempered(model, Profile.from_schedule(1.2, model)):
        pass
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_model_with_code_of_its_own_vouches_for_no_other(model):
    patch_instances(model)
    assert verdict_key(model) is None
    assert verdict_key(oracle.tiny_llama()) == verdict_key(oracle.tiny_llama(seed=3))


@pytest.mark.parametrize("change", [drop_layers, patch_instances])
def test_a_handle_on_a_changed_model_says_so(change, model):
    profile = Profile.from_schedule(1.2, model)
    with tempered(model, profile) as handle:
        change(model)
        with pytest.raises((RefusedError, ArchitectureError), match="anew|changed|attends"):
            handle.update(profile)
    with pytest.raises(RefusedError, match="removed"):
        handle.update(profile)


def test_a_model_that_is_tempered_is_examined_as_if_it_were_not(model):
    patch_instances(model)
    profile = Profile.from_schedule(1.2, model)
    handle = tempered(model, profile)
    del model.model.layers[3:]
    found = layout(model)
    handle.remove()
    assert found == layout(model)
    assert len(found.layers) == 3


# -- what changes the weights


def weight(model):
    return model.model.layers[1].self_attn.q_proj.weight


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()


def untie(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


def assign(model):
    other = oracle.tiny_llama(seed=4).state_dict()
    model.load_state_dict(other, assign=True)


def every_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def some_data(model):
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data += 0.1


WEIGHTS = {
    "copied into": lambda model: torch.no_grad()(lambda: weight(model).copy_(2 * weight(model)))(),
    "in place": lambda model: torch.no_grad()(lambda: weight(model).mul_(1.5))(),
    "replaced": lambda model: setattr(
        model.model.layers[1].self_attn.q_proj,
        "weight",
        torch.nn.Parameter(2 * weight(model).detach()),
    ),
    "its data replaced": lambda model: setattr(weight(model), "data", 2 * weight(model).data),
    "loaded": lambda model: model.load_state_dict(oracle.tiny_llama(seed=4).state_dict()),
    "assigned": assign,
    "trained": step,
    "all through .data": every_data,
    "some through .data": some_data,
}


@pytest.mark.parametrize("change", WEIGHTS)
def test_changed_weights_are_refused(change, model):
    profile = Profile.from_schedule(1.2, model)
    with tempered(model, profile) as handle:
        handle.update(profile)
        before = model.state_dict()["lm_head.weight"].clone()
        WEIGHTS[change](model)
        with pytest.raises(ProfileError, match=r"made for LlamaForCausalLM.*adopt\(model\)"):
            handle.update(profile)
    with pytest.raises(ProfileError, match=r"made for LlamaForCausalLM"):
        tempered(model, profile)
    fresh = oracle.tiny_llama()
    fresh.load_state_dict(model.state_dict())
    assert Profile.from_schedule(1.2, model).model["fingerprint"] == fingerprint(fresh)
    assert before.shape == model.lm_head.weight.shape
    with tempered(model, profile.adopt(model)):
        pass


def test_weights_that_only_move_are_the_same(model):
    profile = Profile.from_schedule(1.2, model)
    model.load_state_dict({name: item.clone() for name, item in model.state_dict().items()})
    with tempered(model, profile):
        pass
    with tempered(model.double(), profile):
        pass


def test_weights_that_are_tied_and_untied(counted):
    model = oracle.tiny_llama(tie_word_embeddings=True)
    tied = Profile.from_schedule(1.2, model)
    untie(model)
    with pytest.raises(ProfileError, match="made for"):
        tempered(model, tied)


def test_a_write_through_data_that_leaves_no_mark():
    """One weight of many, past the version counter: seen on demand, and from then on."""
    model = oracle.tiny_llama(num_hidden_layers=12)
    profile = Profile.from_schedule(1.2, model)
    for layer in model.model.layers:
        before = layer.mlp.up_proj.weight[0, 0].item()
        layer.mlp.up_proj.weight.data[0, 0] += 1.0
        with contextlib.suppress(ProfileError):
            tempered(model, profile).remove()
            break  # unnoticed, as documented
        layer.mlp.up_proj.weight.data[0, 0] = before
    assert fingerprint(model) != profile.model["fingerprint"]
    with pytest.raises(ProfileError, match="made for"):
        tempered(model, profile)


@pytest.mark.parametrize("layers", [2, 6, 12])
def test_the_watched_weights_are_spread(layers):
    """An adapter that is merged through `.data` into one matrix of every layer is seen."""
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        model = oracle.tiny_llama(num_hidden_layers=layers)
        profile = Profile.from_schedule(1.2, model)
        for layer in model.model.layers:
            layer.get_submodule(part).weight.data += 0.2
        with pytest.raises(ProfileError, match="made for"):
            tempered(model, profile)
