"""Weights that hide a part of their architecture: zeros, ties, equal heads, numbers that are none.

What folds is a fact about the architecture, so zeros in the weights change no verdict; that the
fold is right is a fact about the weights, so it is compared on them as they are.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.utils import prune

from tempering.attention import Profile
from tempering.attention.baking import fold_search
from tempering.attention.baking.bake import bake, foldable
from tempering.attention.baking.file_rows import locate
from tempering.attention.baking.folds import Fold
from tempering.attention.baking.isolated_layer import Isolated
from tempering.attention.baking.layer_calls import capture_calls
from tempering.attention.examining.layout_of import layout
from tempering.errors import BakeError
from tests.integration import attention_oracle as oracle
from tests.integration.bake_tiny import FOLDS, LAYERS, temperatures, tiny, tokens

PAIR = [2, 6]  # of a head's 8 dimensions, turned together by rotary positions
HEAD = slice(8, 16)  # the rows of head 1


def fill(part: str, rows: object, value: float):
    """Set rows of a parameter of each attention layer."""

    def change(model):
        for module in model.modules():
            if hasattr(module, part.split(".")[0]) and "Attention" in type(module).__name__:
                module.get_parameter(part)[rows] = value

    return change


def both(*changes):
    def change(model):
        for one in changes:
            one(model)

    return change


def norms_before_attention(model):
    for layer in model.model.layers:
        layer.input_layernorm.weight.fill_(0)


def all_equal(model):
    for parameter in model.parameters():
        parameter.fill_(0.1)


def equal_after_layer_norm(model):
    """A norm of mean 0, then equal weights: queries are rounding of 0."""
    for layer in model.transformer.h:
        layer.ln_1.weight.fill_(1)
        layer.ln_1.bias.fill_(0)
        layer.attn.c_attn.weight.fill_(0.3)
        layer.attn.c_attn.bias.fill_(0)


def equal_heads(model):
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight
        weight[HEAD] = weight[:8]


def large_keys(model):
    """Biases of keys as large as Qwen2.5's: logits of thousands, the same for every key."""
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias[7] = 3000.0


EVERYTHING = slice(None)
HIDDEN = {
    "a pair of k_norm, 1+w": ("gemma3_text", fill("k_norm.weight", PAIR, -1)),
    "a pair of both norms, 1+w": (
        "gemma3_text",
        both(fill("k_norm.weight", PAIR, -1), fill("q_norm.weight", PAIR, -1)),
    ),
    "all of both norms, 1+w": (
        "gemma3_text",
        both(fill("k_norm.weight", EVERYTHING, -1), fill("q_norm.weight", EVERYTHING, -1)),
    ),
    "a pair of k_norm": ("qwen3", fill("k_norm.weight", PAIR, 0)),
    "a head's part of a wide norm": ("olmo2", fill("k_norm.weight", HEAD, 0)),
    "a pair of keys": ("llama", fill("k_proj.weight", PAIR, 0)),
    "all keys": ("llama", fill("k_proj.weight", EVERYTHING, 0)),
    "a pruned head": ("llama", fill("q_proj.weight", HEAD, 0)),
    "a row of queries": ("llama", fill("q_proj.weight", 3, 0)),
    "all queries": ("llama", fill("q_proj.weight", EVERYTHING, 0)),
    "a head of little weight": ("llama", fill("q_proj.weight", HEAD, 1e-12)),
    "a head's outputs": ("llama", fill("o_proj.weight", (EVERYTHING, HEAD), 0)),
    "all outputs": ("llama", fill("o_proj.weight", EVERYTHING, 0)),
    "the values": ("llama", fill("v_proj.weight", EVERYTHING, 0)),
    "biases": ("qwen2", both(fill("q_proj.bias", EVERYTHING, 0), fill("k_proj.bias", HEAD, 0))),
    "sinks": ("gpt_oss", fill("sinks", EVERYTHING, 0)),
    "columns of a transposed weight": ("gpt2", fill("c_attn.weight", (EVERYTHING, HEAD), 0)),
    "rows of an interleaved one": ("gpt_neox", fill("query_key_value.weight", HEAD, 0)),
    "latent queries": ("deepseek_v3", fill("q_a_layernorm.weight", EVERYTHING, 0)),
    "the norm before": ("llama", norms_before_attention),
    "everything equal": ("llama", all_equal),
    "everything equal after a norm": ("gpt2", equal_after_layer_norm),
    "equal heads": ("llama", equal_heads),
    "weights of 1e-25": ("llama", fill("q_proj.weight", EVERYTHING, 1e-25)),
    "weights of 1e17": ("llama", fill("q_proj.weight", EVERYTHING, 1e17)),
    "large biases": ("qwen2", large_keys),
}


@pytest.mark.parametrize("case", HIDDEN)
@torch.no_grad()
def test_what_folds_is_the_same(case):
    name, change = HIDDEN[case]
    model = tiny(name)
    change(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = foldable(model)
    _, verdict, parameters = FOLDS[name]
    assert [layer.verdict for layer in found.plan] == [verdict] * LAYERS
    for index, layer in enumerate(found.plan):
        own = {
            fold.parameter.split(f".{index}.", 1)[1]: (fold.axis, fold.form) for fold in layer.folds
        }
        assert own == parameters
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "case",
    [
        "a pair of both norms, 1+w",
        "a pair of k_norm",
        "a pruned head",
        "all keys",
        "a head's outputs",
        "biases",
        "sinks",
        "equal heads",
    ],
)
@torch.no_grad()
def test_what_is_folded_is_right(case):
    """Against attention with each softmax input divided by T, on the weights as they are."""
    name, change = HIDDEN[case]
    model = tiny(name)
    change(model)
    T = temperatures(FOLDS[name][1])
    ids = tokens()
    with oracle.softmax_divided(list(T)):
        exact = model(ids, use_cache=False).logits
    baked = bake(model, Profile.from_matrix(T))
    assert (baked(ids, use_cache=False).logits - exact).abs().max() <= 1e-4 * exact.std()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_other_dtypes_hide_nothing_either(dtype):
    for name, part in (("gemma3_text", "k_norm.weight"), ("llama", "q_proj.weight")):
        model = tiny(name)
        fill(part, PAIR, -1 if name == "gemma3_text" else 0)(model)
        found = foldable(model.to(dtype))
        assert found.verdict == FOLDS[name][1], found.reason


def test_heads_pruned_by_torch():
    """`torch.nn.utils.prune` keeps the weight and a mask, whose zeros no jitter moves."""
    model = tiny("llama")
    mask = torch.ones(32, 32)
    mask[HEAD] = 0
    for layer in model.model.layers:
        prune.custom_from_mask(layer.self_attn.q_proj, "weight", mask)
    found = foldable(model)
    assert found.verdict == "per head", found.reason
    assert found.plan[0].folds[0].parameter == "model.layers.0.self_attn.q_proj.weight_orig"


def test_tied_weights_stay_tied():
    """A zero head in a weight that serves two parts of a layer is no reason to fold it."""
    model = tiny("llama")
    with torch.no_grad():
        fill("q_proj.weight", HEAD, 0)(model)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight = layer.self_attn.q_proj.weight
    found = foldable(model)
    assert found.verdict == "per layer"
    assert found.plan[0].folds[0].parameter == "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "nan"), (float("inf"), "inf")])
@pytest.mark.parametrize(
    "part", ["self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight"]
)
def test_numbers_that_are_none_are_named(value, word, part):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].get_parameter(part)[4, 5] = value
    found = foldable(model)
    assert found.verdict == "no"
    assert f"model.layers.1.{part} holds {word} at [4, 5]" in found.reason
    with pytest.raises(BakeError, match=rf"layers\.1\.{part} holds {word} at \[4, 5\]"):
        bake(model, Profile.from_matrix(temperatures("per head")))


@torch.no_grad()
def test_weights_too_large_for_float32_are_no_fold():
    model = tiny("llama")
    for part in ("q_proj.weight", "k_proj.weight"):
        fill(part, EVERYTHING, 1e25)(model)
    found = foldable(model)
    assert found.verdict == "no"
    assert "layers.0.self_attn: its output is NaN or infinite on a few tokens" in found.reason


@pytest.mark.parametrize(
    ("name", "dtype", "gain", "T", "match"),
    [
        (
            "llama",
            torch.float16,
            100,
            1e-3,
            r"q_proj\.weight would be infinite in float16 with the t",
        ),
        ("llama", torch.float16, 0.01, 1e3, r"q_proj\.weight would lose .* stored as float16"),
        ("gemma3_text", torch.bfloat16, 1, 100.0, r"q_norm\.weight would lose .* as bfloat16"),
    ],
)
@torch.no_grad()
def test_weights_that_their_dtype_can_not_hold(name, dtype, gain, T, match):
    model = tiny(name)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(gain)
    with pytest.raises(BakeError, match=match):
        bake(model.to(dtype), Profile.from_matrix(torch.full((LAYERS, 4), T)))


def test_a_fold_that_is_right_for_other_weights_alone_is_refused(monkeypatch):
    """The weights as they are have the last word."""
    model = tiny("llama")
    name = "model.layers.0.self_attn"
    calls = capture_calls(model, [name])[name]
    isolated = Isolated(model.get_submodule(name), layout(model).layers[0], calls)
    assert fold_search.search(isolated).verdict == "per head"
    right = fold_search._search

    def swapped(*given):
        found = right(*given)
        (fold,) = found.folds
        runs = ((0, 8, 1), (8, 16, 0), *fold.runs[2:])
        return replace(found, folds=(replace(fold, runs=runs),))

    monkeypatch.setattr(fold_search, "_search", swapped)
    found = fold_search.search(isolated)
    assert found.verdict == "no"
    assert "q_proj.weight as it is, temperatures give another output" in found.reason


def in_a_file(weights, order, beta, fold=None):
    """Where a file that keeps the rows in this order, among others, has them."""
    fold = fold or Fold.of("q_proj.weight", 0, torch.arange(2).repeat_interleave(4))
    stored = torch.cat([weights[order], torch.full((2, weights.shape[1]), 9.0)])
    shapes = {"attn_q": tuple(stored.shape)}
    return locate(fold, torch.tensor(beta), weights, ["q_proj.weight"], shapes, lambda name: stored)


PERMUTED = [0, 2, 1, 3, 4, 6, 5, 7]


def test_equal_heads_in_a_file_of_another_layout():
    """As GGUF permutes the rows of a head: which of two equal ones is whose can't be told."""
    half = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.cat([half, half])
    with pytest.raises(BakeError, match=r"heads 0 and 1 have equal slices in q_proj.weight, which"):
        in_a_file(weights, PERMUTED, [0.5, 2.0])
    (fold,) = in_a_file(weights, PERMUTED, [0.5, 0.5])
    assert fold.runs == ((0, 8, 0),)
    with pytest.raises(BakeError, match=r"head 1 and no head have equal slices"):
        own = Fold("q_proj.weight", 0, ((4, 8, 1),))
        in_a_file(weights, PERMUTED, [0.5, 0.5], own)


def test_rows_of_zeros_in_a_file_of_another_layout():
    weights = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    weights[4:] = 0
    (fold,) = in_a_file(weights, PERMUTED, [0.5, 2.0])
    assert fold.runs[0] == (0, 4, 0)
    weights[:] = 0
    (fold,) = in_a_file(weights, PERMUTED, [0.5, 2.0])
    assert fold.parameter == "attn_q"


def test_equal_heads_under_their_own_name_are_theirs():
    weights = torch.ones(8, 3)
    fold = Fold.of("q_proj.weight", 0, torch.arange(2).repeat_interleave(4))
    shapes = {"q_proj.weight": (8, 3)}
    found = locate(
        fold, torch.tensor([0.5, 2.0]), weights, ["q_proj.weight"], shapes, lambda name: weights
    )
    assert found == [fold]
