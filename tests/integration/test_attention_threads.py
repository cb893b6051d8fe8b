"""A temperature belongs to the thread or task that set it: exact there, and nowhere else."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tempering.attention.control.self_check import self_check
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.hooks.ownership import STATE
from tempering.attention.profiles.profile import Profile
from tempering.errors import ProfileError, RefusedError
from tests.integration import attention_oracle as oracle
from tests.integration.test_attention_restore import everything, temperatures, tiny_bloom

LAYERS, HEADS = oracle.LAYERS, oracle.HEADS
IDS = oracle.tokens(1, 2, 9)


def profile(seed):
    return Profile.from_matrix(temperatures(seed))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def exact(model, seed=None):
    return oracle.forward(model, IDS, None if seed is None else temperatures(seed)).logits


def off(found, expected):
    return float((found - expected).abs().max())


@pytest.fixture(scope="module")
def model():
    made = oracle.in_double(oracle.tiny_llama())
    with tempered(made, Profile.neutral(made)):  # checked once, for all tests
        pass
    return made


def in_thread(function, *args):
    """What a function gives in a thread of its own, or the error that it raises there."""
    found = []

    def run():
        try:
            found.append(function(*args))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return found[0]


def meanwhile(model, seed):
    """A thread that holds a profile until it is told to go."""
    ready, go = threading.Event(), threading.Event()

    def hold():
        with tempered(model, profile(seed)):
            ready.set()
            go.wait(60)

    thread = threading.Thread(target=hold, name="holder")
    thread.start()
    assert ready.wait(60)
    return lambda: (go.set(), thread.join(60))


def in_threads(count, work):
    """The errors of so many threads that start together."""
    errors, barrier = [], threading.Barrier(count)

    def run(index):
        try:
            barrier.wait(60)
            work(index)
        except Exception as error:
            errors.append(f"{index}: {error!r}")

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    return errors


# -- each thread its own


@pytest.mark.parametrize("kind", ["interface", "softmax"])
def test_many_threads_are_each_exact(kind, model):
    """The form that a release runs with 1,000 turns each: benchmarks/attention_threads.py."""
    model = model if kind == "interface" else tiny_bloom()
    shape = (len(layout(model).layers), HEADS)
    given = [oracle.random_temperatures(seed, *shape) for seed in range(32)]
    expected, plain = [], logits(model)
    for T in given:
        with tempered(model, Profile.from_matrix(T)):
            expected.append(logits(model))
    if kind == "interface":
        for seed, found in enumerate(expected):
            assert off(found, exact(model, seed)) < 1e-10
    before = everything(model)

    def work(index):
        for turn in range(4):
            with tempered(model, Profile.from_matrix(given[index])) as handle:
                assert torch.equal(logits(model), expected[index])
                other = (index + turn + 1) % 32
                handle.update(Profile.from_matrix(given[other]))
                assert torch.equal(logits(model), expected[other])
                if turn % 2:
                    with tempered(model, Profile.from_matrix(1 / given[other])):
                        assert off(logits(model), plain) < 1e-4
            assert torch.equal(logits(model), plain)

    assert in_threads(32, work) == []
    assert everything(model) == before
    assert torch.equal(logits(model), plain)


def test_a_profile_for_each_row_in_each_thread(model):
    def work(index):
        rows = [profile(2 * index), profile(2 * index + 1)]
        expected = torch.stack([exact(model, 2 * index)[0], exact(model, 2 * index + 1)[1]])
        for _ in range(3):
            with tempered(model, rows):
                assert off(logits(model), expected) < 2e-5

    assert in_threads(4, work) == []


def test_removals_meet_in_every_order(model):
    before, plain = everything(model), logits(model)
    shuffled = random.Random(0)
    for _ in range(30):
        handles, barrier = [], threading.Barrier(4)

        def attach(index, handles=handles, barrier=barrier):
            handles.append(tempered(model, profile(index), check=False))
            barrier.wait(60)

        assert in_threads(4, attach) == []
        shuffled.shuffle(handles)
        # Whoever removes them, twice each, at once.
        assert in_threads(8, lambda index, handles=handles: handles[index // 2].remove()) == []
        assert everything(model) == before
    assert torch.equal(logits(model), plain)


def test_handles_hold_rows_of_other_numbers_in_other_threads(model):
    """What does not fit together is refused where it is nested, and only there."""
    done = meanwhile(model, 1)
    with tempered(model, [profile(2)] * 3), pytest.raises(ProfileError):
        tempered(model, [profile(3)] * 2)
    done()
    assert not any(hasattr(module, STATE) for module in model.modules())


# -- threads that have set nothing


def test_a_stranger_is_refused_and_told_what_to_do(model):
    plain = logits(model)
    with tempered(model, profile(1)):
        found = in_thread(logits, model)
        assert isinstance(found, RefusedError)
        assert "layers.0.self_attn is tempered by thread 'MainThread'" in str(found)
        assert "Profile.neutral(model)" in str(found) and "copy_context" in str(found)

        def without():
            with tempered(model, Profile.neutral(model)):
                return logits(model)

        assert torch.equal(in_thread(without), plain)
        # What a thread of a streamer is started with.
        expected = logits(model)
        assert torch.equal(in_thread(contextvars.copy_context().run, logits, model), expected)
        with ThreadPoolExecutor(1) as pool:
            with pytest.raises(RefusedError):
                pool.submit(logits, model).result()
            context = contextvars.copy_context()
            assert torch.equal(pool.submit(context.run, logits, model).result(), expected)
    assert torch.equal(in_thread(logits, model), plain)


def test_temperature_1_disturbs_nobody(model):
    plain = logits(model)
    with tempered(model, Profile.neutral(model)) as handle:
        assert torch.equal(in_thread(logits, model), plain)
        handle.update(profile(1))
        assert isinstance(in_thread(logits, model), RefusedError)


def test_who_has_removed_a_handle_wants_none(model):
    plain = logits(model)
    with tempered(model, profile(1)):
        pass
    done = meanwhile(model, 2)
    assert torch.equal(logits(model), plain)
    done()


def test_the_self_check_touches_nobody():
    models = [oracle.tiny_llama(seed, num_hidden_layers=2) for seed in range(3)]
    models += [tiny_bloom()]
    for subject in models:
        plain, stop, found = logits(subject), threading.Event(), []

        def loop(subject=subject, plain=plain, stop=stop, found=found):
            while not stop.is_set():
                try:
                    found.append(torch.equal(logits(subject), plain))
                except Exception as error:
                    found.append(repr(error))

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            for _ in range(3):
                assert self_check(subject).share < 1e-3
        finally:
            stop.set()
            thread.join(60)
        assert found and set(found) == {True}


def test_the_self_check_draws_no_random_numbers(monkeypatch):
    """And writes no flag of a model in evaluation mode: both belong to all threads."""
    models = [oracle.tiny_llama(3, num_hidden_layers=2), tiny_bloom()]

    def touched(*args, **kwargs):
        raise AssertionError("the generator of all threads was touched")

    before = torch.get_rng_state()
    for name in ("manual_seed", "set_rng_state", "seed"):
        monkeypatch.setattr(torch, name, touched)
    for subject in models:
        monkeypatch.setattr(type(subject), "train", touched)
        assert self_check(subject).share < 1e-3
    assert torch.equal(torch.get_rng_state(), before)


def test_random_numbers_of_other_threads_go_on_meanwhile():
    subject, drawn = oracle.tiny_llama(4, num_hidden_layers=2).train(), []
    begun, stop = threading.Event(), threading.Event()

    def draw():
        torch.manual_seed(3)
        begun.set()
        while not stop.is_set() or len(drawn) < 9:
            drawn.append(torch.rand(3))

    thread = threading.Thread(target=draw)
    thread.start()
    assert begun.wait(60)
    self_check(subject)
    stop.set()
    thread.join(60)
    torch.manual_seed(3)
    assert all(torch.equal(numbers, torch.rand(3)) for numbers in drawn)


def test_a_model_that_draws_random_numbers_takes_none_from_its_user():
    subject, drawn = oracle.tiny_llama(4, num_hidden_layers=2), []

    def noise(module, args):
        drawn.append(torch.rand(3))

    subject.model.layers[0].mlp.register_forward_pre_hook(noise)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    self_check(subject)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(drawn) >= 2
    # Each forward is seeded alike.
    assert all(torch.equal(numbers, drawn[0]) for numbers in drawn)


def test_threads_that_meet_one_model_for_the_first_time():
    subject = oracle.tiny_llama(7, attention="eager", attention_dropout=0.5, num_hidden_layers=2)
    subject.train()

    def work(index):
        for _ in range(3):
            assert self_check(subject).share < 1e-3

    assert in_threads(3, work) == []
    assert all(module.training for module in subject.modules())


def test_a_check_while_another_thread_is_tempered():
    subject = oracle.tiny_llama(5)
    done = meanwhile(subject, 1)
    assert self_check(subject).share < 1e-3
    with tempered(subject, profile(2)):
        assert off(logits(subject), exact(subject, 2)) < 2e-5
    done()


# -- handles that change hands


def test_update_and_removal_from_another_thread(model):
    plain = logits(model)
    handle = tempered(model, profile(1))
    assert in_thread(handle.update, profile(2)) is None
    assert off(logits(model), exact(model, 2)) < 2e-5
    assert handle.calls() == dict.fromkeys(layout(model).names, 1)
    assert in_thread(handle.remove) is None
    assert torch.equal(logits(model), plain)
    assert not any(hasattr(module, STATE) for module in model.modules())


def test_a_forgotten_handle_acts_until_its_thread_ends(model):
    plain = logits(model)

    def forget():
        tempered(model, profile(1))
        gc.collect()
        return off(logits(model), exact(model, 1))

    assert in_thread(forget) < 2e-5
    gc.collect()
    assert torch.equal(logits(model), plain)
    assert not any(hasattr(module, STATE) for module in model.modules())


def test_a_handle_that_outlives_its_thread_is_refused_until_removed(model):
    plain = logits(model)
    handle = in_thread(tempered, model, profile(1))
    assert isinstance(in_thread(logits, model), RefusedError)
    handle.remove()
    assert torch.equal(in_thread(logits, model), plain)


def test_a_forward_of_its_own_comes_back():
    """As other libraries put one on an instance (offloading, adapters)."""
    subject = oracle.tiny_llama(6)
    attention = subject.model.layers[0].self_attn
    own = attention.forward
    seen = []

    def forward(*args, **kwargs):
        seen.append(threading.get_ident())
        return own(*args, **kwargs)

    attention.forward = forward

    def work(index):
        for _ in range(5):
            with tempered(subject, profile(index), check=False):
                assert off(logits(subject), exact(subject, index)) < 2e-5

    assert in_threads(4, work) == []
    assert attention.forward is forward and len(seen) >= 20
    with tempered(subject, profile(1), check=False):
        around = attention.forward
        attention.forward = lambda *args, **kwargs: around(*args, **kwargs)
    assert off(logits(subject), exact(subject)) < 2e-5
    with tempered(subject, profile(2), check=False):
        assert off(logits(subject), exact(subject, 2)) < 2e-5


# -- tasks


def test_tasks_of_one_thread_are_each_exact(model):
    plain = logits(model)

    async def request(seed):
        for _ in range(3):
            with tempered(model, profile(seed)):
                await asyncio.sleep(0)
                assert off(logits(model), exact(model, seed)) < 2e-5
                # A task that it starts, and a thread that asyncio starts, go on with it.
                inner = asyncio.create_task(asyncio.to_thread(logits, model))
                assert off(await inner, exact(model, seed)) < 2e-5
            await asyncio.sleep(0)
            assert torch.equal(logits(model), plain)

    async def stranger():
        with pytest.raises(RefusedError, match="in a task of its own"):
            for _ in range(20):
                logits(model)
                await asyncio.sleep(0)

    async def main():
        await asyncio.gather(*(request(seed) for seed in range(4)), stranger())

    contextvars.Context().run(asyncio.run, main())  # which has set nothing before
    assert torch.equal(logits(model), plain)


def test_what_a_task_leaves_behind_is_its_threads(model):
    """A notebook runs each cell in a task, and a handle of one serves the next."""

    async def main():
        async def attach():
            return tempered(model, profile(1))

        handle = await asyncio.create_task(attach())
        with tempered(model, profile(2)):
            product = oracle.forward(model, IDS, temperatures(1) * temperatures(2)).logits
            assert off(logits(model), product) < 2e-5
        assert off(logits(model), exact(model, 1)) < 2e-5
        assert isinstance(await asyncio.to_thread(in_thread, logits, model), RefusedError)
        handle.remove()

    contextvars.Context().run(asyncio.run, main())
    assert off(logits(model), exact(model)) < 2e-5


def test_a_handle_before_the_loop_serves_every_task(model):
    async def call():
        return off(logits(model), exact(model, 1))

    with tempered(model, profile(1)):
        assert asyncio.run(call()) < 2e-5
        assert contextvars.Context().run(logits, model).equal(logits(model))


# -- gradients


def test_checkpointed_layers_are_computed_again_with_their_temperatures(model, monkeypatch):
    """On a GPU by threads of autograd's, which have a context of their own."""
    with tempered(model, profile(1)):
        context = contextvars.copy_context()
        held = {"context": context}
        monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 0)
        monkeypatch.setattr(torch._C, "_is_key_in_tls", held.__contains__)
        monkeypatch.setattr(torch._C, "_get_obj_in_tls", held.__getitem__)
        assert off(in_thread(logits, model), exact(model, 1)) < 2e-5
        held.clear()
        assert isinstance(in_thread(logits, model), RefusedError)
