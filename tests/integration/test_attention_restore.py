"""A model is given back exactly as it was, whatever happened in between."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import threading
import weakref

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tempering.attention.control.tempered import tempered
from tempering.attention.profiles.profile import Profile
from tempering.errors import ProfileError
from tests.integration import attention_oracle as oracle

INPUTS = {False: ["input_ids"], True: ["input_ids", "decoder_input_ids"]}
LAYERS, HEADS = oracle.LAYERS, oracle.HEADS


def tiny_bloom():
    """Attention code of its own: no attention interface."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    return BloomForCausalLM(config).eval()


def tiny_t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=61,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        initializer_factor=2.0,
    )
    return T5ForConditionalGeneration(config).eval()


def temperatures(seed):
    return oracle.random_temperatures(seed, LAYERS, HEADS)


def profile(seed):
    return Profile.from_matrix(temperatures(seed))


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def everything(model):
    """All that a handle could leave behind: on modules, in transformers and in torch."""
    modules = {}
    for name, module in model.named_modules():
        plain = {k: id(v) for k, v in vars(module).items() if not isinstance(v, dict)}
        nested = {
            k: list(map(id, v.values())) for k, v in vars(module).items() if isinstance(v, dict)
        }
        modules[name] = (type(module), plain, nested, module.training)
    return {
        "modules": modules,
        "interface": {name: id(f) for name, f in ALL_ATTENTION_FUNCTIONS.items()},
        "lookup": ALL_ATTENTION_FUNCTIONS.get_interface.__func__,
        "lookup is of the instance": "get_interface" in vars(ALL_ATTENTION_FUNCTIONS),
        "class": {k: id(v) for k, v in vars(type(ALL_ATTENTION_FUNCTIONS)).items()},
        "softmax": (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax),
        "sdpa": torch.nn.functional.scaled_dot_product_attention,
        "modes": len(torch.overrides._get_current_function_mode_stack()),
        "implementation": model.config._attn_implementation,
    }


@pytest.fixture(params=["llama eager", "llama sdpa", "t5", "bloom"])
def subject(request):
    if request.param == "bloom":
        model = tiny_bloom()
        return model, lambda: logits(model, oracle.tokens(0, 2, 7))
    if request.param == "t5":
        model = tiny_t5()
        ids = oracle.tokens(0, 2, 7)
        return model, lambda: logits(model, ids, decoder_input_ids=ids[:, :5])
    model = oracle.tiny_llama(attention=request.param.split()[1])
    return model, lambda: logits(model, oracle.tokens(0, 2, 9))


def some_profile(model):
    rows = [1 + 0.5 * row.sqrt() for row in Profile.neutral(model).rows]
    return Profile.from_matrix(torch.stack(rows), model)


def test_block_restores(subject):
    model, run = subject
    some = some_profile(model)  # the layout is remembered: before the picture is taken
    before, plain = everything(model), run()
    with tempered(model, some):
        assert not torch.equal(run(), plain)
    assert everything(model) == before
    assert torch.equal(run(), plain)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_softmax_is_left_alone_where_attention_goes_through_the_interface(implementation):
    """PyTorch's functions are replaced for models that call them themselves, and for no other."""
    model = oracle.tiny_llama(attention=implementation)
    own = tiny_bloom()
    some, own_profile = some_profile(model), some_profile(own)

    def softmaxes():
        functional = torch.nn.functional
        return (
            functional.softmax,
            functional.scaled_dot_product_attention,
            torch.softmax,
            torch.special.softmax,
            torch.Tensor.softmax,
        )

    plain = softmaxes()
    with tempered(model, some) as handle:
        assert softmaxes() == plain
        logits(model, oracle.tokens(0, 2, 9))
        handle.update(some.scaled(0.5))
        with tempered(own, own_profile):
            assert not any(one is other for one, other in zip(softmaxes(), plain, strict=True))
        assert softmaxes() == plain
    assert softmaxes() == plain


def test_exceptions_restore(subject):
    model, run = subject
    some = some_profile(model)
    before, plain = everything(model), run()
    with pytest.raises(ZeroDivisionError), tempered(model, some):
        run()
        raise ZeroDivisionError
    assert everything(model) == before
    with pytest.raises(KeyboardInterrupt), tempered(model, some):
        raise KeyboardInterrupt
    assert everything(model) == before
    with pytest.raises((IndexError, RuntimeError)), tempered(model, some):
        beyond = torch.full((1, 4), 10_000)
        model(**dict.fromkeys(INPUTS[model.config.is_encoder_decoder], beyond))
    assert everything(model) == before
    assert torch.equal(run(), plain)


def test_exceptions_inside_attention_restore(subject):
    model, run = subject
    some = some_profile(model)
    plain = run()

    def fail(*args):
        raise ZeroDivisionError

    deep = [
        m
        for n, m in model.named_modules()
        if n.endswith(("o_proj", "SelfAttention.o", "attention.dense"))
    ][-1]
    before = everything(model)
    handle = tempered(model, some)
    hook = deep.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        run()
    hook.remove()
    assert not torch.equal(run(), plain)
    handle.remove()
    assert everything(model) == before
    assert torch.equal(run(), plain)


def test_refusals_leave_the_model_alone(subject):
    model, run = subject
    wrong = Profile.from_matrix([[1.0, 2.0], [3.0, 4.0], [1.0, 1.0]])
    Profile.neutral(model)
    before, plain = everything(model), run()
    with pytest.raises(ProfileError):
        tempered(model, wrong)
    with pytest.raises(ProfileError):
        tempered(model, [Profile.neutral(model), wrong])
    assert everything(model) == before
    assert torch.equal(run(), plain)


@pytest.mark.parametrize("training", [True, False])
def test_training_flags_are_kept(subject, training):
    model, _ = subject
    model.train(training)
    next(model.children()).train(not training)
    flags = [module.training for module in model.modules()]
    with tempered(model, some_profile(model)):
        assert [module.training for module in model.modules()] == flags
    assert [module.training for module in model.modules()] == flags


def test_nested_temperatures_multiply():
    model = oracle.in_double(oracle.tiny_llama())
    ids = oracle.tokens(1, 2, 9)
    A, B = temperatures(1), temperatures(2)
    with tempered(model, Profile.from_matrix(A)):
        with tempered(model, Profile.from_matrix(B)):
            exact = oracle.forward(model, ids, A * B).logits
            assert (logits(model, ids) - exact).abs().max() < 1e-10
        assert (logits(model, ids) - oracle.forward(model, ids, A).logits).abs().max() < 1e-10


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_nested_handles_leave_in_any_order(order):
    model = oracle.in_double(oracle.tiny_llama())
    ids = oracle.tokens(2, 2, 7)
    T = [temperatures(seed) for seed in (3, 4)]
    T.append(oracle.random_temperatures(5, 2, LAYERS, HEADS))
    Profile.neutral(model)
    before, plain = everything(model), logits(model, ids)
    handles = {i: tempered(model, Profile.from_matrix(T[i])) for i in range(2)}
    handles[2] = tempered(model, [Profile.from_matrix(row) for row in T[2]])
    for gone in order:
        handles.pop(gone).remove()
        product = torch.ones(2, LAYERS, HEADS, dtype=torch.float64)
        for i in handles:
            product = product * T[i]
        exact = oracle.forward(model, ids, product).logits
        assert (logits(model, ids) - exact).abs().max() < 1e-10
    assert everything(model) == before
    assert torch.equal(logits(model, ids), plain)


def test_inverse_temperatures_cancel():
    model = oracle.in_double(oracle.tiny_llama())
    ids = oracle.tokens(3, 2, 7)
    plain = logits(model, ids)
    T = temperatures(6)
    with tempered(model, Profile.from_matrix(T)), tempered(model, Profile.from_matrix(1 / T)):
        assert (logits(model, ids) - plain).abs().max() < 1e-12


def test_removing_twice_is_harmless_and_final():
    model = oracle.tiny_llama()
    ids = oracle.tokens(4, 1, 7)
    outer = tempered(model, profile(7))
    inner = tempered(model, profile(8))
    inner.remove()
    inner.remove()
    expected = oracle.forward(model, ids, temperatures(7)).logits
    assert (logits(model, ids) - expected).abs().max() < 2e-5
    outer.remove()
    outer.remove()
    plain = oracle.tiny_llama()
    assert torch.equal(logits(model, ids), logits(plain, ids))


def test_nested_rows_that_do_not_fit_are_refused():
    model = oracle.tiny_llama()
    ids = oracle.tokens(5, 3, 7)
    with tempered(model, [profile(9)] * 3):
        expected = logits(model, ids)
        with pytest.raises(ProfileError), tempered(model, [profile(10)] * 2):
            logits(model, ids)
        assert torch.equal(logits(model, ids), expected)


def test_update_acts_in_place():
    model = oracle.tiny_llama()
    ids = oracle.tokens(6, 2, 9)
    before = everything(model)
    with tempered(model, profile(11)) as handle:
        for seed in (12, 13):
            handle.update(profile(seed))
            exact = oracle.forward(model, ids, temperatures(seed)).logits
            assert (logits(model, ids) - exact).abs().max() < 2e-5
        T = oracle.random_temperatures(14, 2, LAYERS, HEADS)
        handle.update([Profile.from_matrix(row) for row in T])
        exact = oracle.forward(model, ids, T).logits
        assert (logits(model, ids) - exact).abs().max() < 2e-5
        with pytest.raises(ProfileError):
            handle.update(Profile.from_matrix([[1.0, 2.0]]))
        assert (logits(model, ids) - exact).abs().max() < 2e-5
        handle.update(Profile.neutral(model))
        assert torch.equal(logits(model, ids), logits(oracle.tiny_llama(), ids))
    after = everything(model)
    assert after["interface"] == before["interface"]


def test_two_models_do_not_share_state():
    one, two = oracle.tiny_llama(0), oracle.tiny_llama(1)
    three = oracle.tiny_llama(0)
    ids = oracle.tokens(7, 2, 9)
    T, U = temperatures(15), temperatures(16)
    with tempered(one, Profile.from_matrix(T)), tempered(two, Profile.from_matrix(U)):
        assert (logits(one, ids) - oracle.forward(one, ids, T).logits).abs().max() < 2e-5
        assert (logits(two, ids) - oracle.forward(two, ids, U).logits).abs().max() < 2e-5
        plain = logits(three, ids)
        assert (plain - oracle.forward(three, ids).logits).abs().max() < 2e-5
    assert torch.equal(logits(one, ids), plain)


@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
def test_copies_are_untempered(subject, copier, tmp_path):
    model, _ = subject
    plain_state = {k: v.clone() for k, v in model.state_dict().items()}
    some = some_profile(model)
    with tempered(model, some):
        assert list(model.state_dict()) == list(plain_state)
        twin = copy.deepcopy(model) if copier == "deepcopy" else pickle.loads(pickle.dumps(model))
        ids = oracle.tokens(0, 2, 9)
        kwargs = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
        mine, its = logits(model, ids, **kwargs), logits(twin, ids, **kwargs)
        with tempered(twin, some):
            assert torch.equal(logits(twin, ids, **kwargs), mine)
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(model, ids, **kwargs), its)
    assert not torch.equal(mine, its)
    kept = model.config._attn_implementation
    saved = type(model).from_pretrained(tmp_path, attn_implementation=kept).eval()
    assert torch.equal(logits(saved, ids, **kwargs), its)
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain_state[name])


def test_a_forgotten_model_is_freed_and_leaves_nothing():
    before = everything(oracle.tiny_llama())
    model = oracle.tiny_llama()
    handle = tempered(model, profile(17))
    gone = weakref.ref(model)
    del model, handle
    gc.collect()
    assert gone() is None
    after = everything(oracle.tiny_llama())
    for part in ("interface", "class", "lookup is of the instance"):
        assert after[part] == before[part]


def test_threads_meet_their_models_for_the_first_time():
    """Finding the layout of one model must not disturb another that runs meanwhile."""
    ids = oracle.tokens(9, 2, 9)
    T = temperatures(22)
    wrong, barrier = [], threading.Barrier(3)
    models = {(i, turn): oracle.tiny_llama(10 * i + turn) for i in range(3) for turn in range(6)}

    def work(i):
        try:
            for turn in range(6):
                model = models[i, turn]
                exact = oracle.forward(model, ids, None if i == 2 else T).logits
                barrier.wait()
                if i == 2:
                    for _ in range(20):
                        if (logits(model, ids) - exact).abs().max() > 2e-5:
                            wrong.append((i, "the untempered model moved"))
                    continue
                with tempered(model, Profile.from_matrix(T), check=turn % 2 == 0):
                    error = float((logits(model, ids) - exact).abs().max())
                    if error > 5e-5:
                        wrong.append((i, turn, error))
        except BaseException as error:
            wrong.append((i, repr(error)))
            barrier.abort()

    before = everything(oracle.tiny_llama())
    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    after = everything(oracle.tiny_llama())
    for part in ("interface", "class", "lookup is of the instance"):
        assert after[part] == before[part]


def test_threads_do_not_disturb_each_other():
    """Handles come and go in one thread while another model runs in the next."""
    ids = oracle.tokens(8, 2, 9)
    models = [oracle.tiny_llama(seed) for seed in range(3)]
    T = [temperatures(20), temperatures(21), torch.ones(LAYERS, HEADS)]
    exact = [oracle.forward(m, ids, t).logits for m, t in zip(models, T, strict=True)]
    plain = [logits(m, ids) for m in models]
    for model in models:
        with tempered(model, Profile.neutral(model)):
            pass
    wrong, barrier = [], threading.Barrier(3)

    def work(i):
        try:
            barrier.wait()
            for _ in range(12):
                if i == 2:
                    if not torch.equal(logits(models[i], ids), plain[i]):
                        wrong.append((i, "the untempered model moved"))
                    continue
                with tempered(models[i], Profile.from_matrix(T[i])):
                    if (logits(models[i], ids) - exact[i]).abs().max() > 2e-5:
                        wrong.append((i, "tempered"))
                if not torch.equal(logits(models[i], ids), plain[i]):
                    wrong.append((i, "restored"))
        except BaseException as error:
            wrong.append((i, repr(error)))

    before = everything(models[0])
    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    assert everything(models[0]) == before
