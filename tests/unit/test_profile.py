"""Profiles: how they are made, what they fit, what they refuse. No model."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempering.attention.layout import AttentionLayer, Layout
from tempering.attention.profiles.profile import Profile
from tempering.errors import DepthWarning, ProfileError, ScheduleError, TemperatureError

# three layers are few for two stages, and enough for a test
pytestmark = pytest.mark.filterwarnings("ignore::tempering.errors.DepthWarning")


def plan(heads=(4, 4, 4), stack="decoder", depth=None, places=None, untempered=()):
    places = range(len(heads)) if places is None else places
    layers = tuple(
        AttentionLayer(f"model.layers.{place}.self_attn", stack, place, count, count)
        for place, count in zip(places, heads, strict=True)
    )
    return Layout(layers, untempered, {stack: len(heads) if depth is None else depth})


def both_stacks():
    names = [("encoder", 4)] * 2 + [("decoder", 6)] * 3 + [("cross", 6)] * 3
    index = [0, 1, 0, 1, 2, 0, 1, 2]
    layers = tuple(
        AttentionLayer(f"{stack}.{i}", stack, i, heads, heads)
        for (stack, heads), i in zip(names, index, strict=True)
    )
    return Layout(layers, (), {"encoder": 2, "decoder": 3, "cross": 3})


# from a schedule


@pytest.mark.parametrize("depth", [2, 5, 30])
def test_a_schedule_is_read_at_l_over_l_minus_1(depth):
    T = Profile.from_schedule("linear(1.5,0.5)", plan((3,) * depth)).temperature
    for layer in range(depth):
        assert T[layer].tolist() == pytest.approx([1.5 - layer / (depth - 1)] * 3, rel=1e-12)


def test_throb_at_its_stages():
    T = Profile.from_schedule("throb(12,3,1,12)|amplitude(1.2)", plan((2,) * 10)).temperature
    # log 12 is mapped onto log 1.2 and log 1 onto -log 1.2
    at = [1.2 ** (2 * math.log(n) / math.log(12) - 1) for n in (12, 3, 1, 12)]
    assert T[[0, 3, 6, 9], 0].tolist() == pytest.approx(at, rel=1e-12)


def test_one_layer():
    assert Profile.from_schedule(1.5, plan((2,))).temperature.tolist() == [[1.5, 1.5]]
    with pytest.raises(ScheduleError, match="2 stages"):
        Profile.from_schedule("linear(1.5,0.5)", plan((2,)))


def test_layers_without_softmax_keep_their_place_on_the_clock():
    hybrid = plan((4, 4), depth=7, places=(2, 5), untempered=("model.layers.0",))
    T = Profile.from_schedule("linear(1,7)", hybrid).temperature
    assert T[:, 0].tolist() == pytest.approx([3.0, 6.0])


def test_restricted_to_layers_and_heads():
    T = Profile.from_schedule("linear(3,1)", plan(), layers=[0, 2], heads=(1, 3)).temperature
    expected = torch.ones(3, 4, dtype=torch.float64)
    expected[0, [1, 3]] = 3.0
    assert torch.equal(T, expected)
    T = Profile.from_schedule(2.0, plan((4, 2)), heads=[3]).temperature
    assert T[0].tolist() == [1, 1, 1, 2]
    assert T[1, :2].tolist() == [1, 1]
    assert T[1, 2:].isnan().all()


def test_each_stack_has_the_whole_pattern():
    T = Profile.from_schedule("linear(2,1)", both_stacks()).temperature[:, 0]
    assert T.tolist() == [2, 1, 2, 1.5, 1, 2, 1.5, 1]
    T = Profile.from_schedule("linear(2,1)", both_stacks(), stack="cross").temperature[:, 0]
    assert T.tolist() == [1, 1, 1, 1, 1, 2, 1.5, 1]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"layers": [0, 3]}, "layer 3: the model has layers 0 to 2"),
        ({"layers": [-1]}, "layer -1: the model has layers 0 to 2"),
        ({"layers": []}, r"layer \(none\)"),
        ({"heads": [4, 9]}, "head 4, 9: the model has heads 0 to 3"),
        ({"heads": []}, r"head \(none\)"),
        ({"stack": "cross"}, "no stack 'cross'; it has decoder"),
    ],
)
def test_restrictions_the_model_does_not_have(settings, said):
    with pytest.raises(ProfileError, match=said):
        Profile.from_schedule("linear(2,1)", plan(), **settings)


def test_too_shallow_for_the_pattern():
    with pytest.raises(ScheduleError, match="stages"):
        Profile.from_schedule("throb(12,3,1,12)", plan())
    with pytest.warns(DepthWarning):
        Profile.from_schedule("throb(12,3,1,12)|amplitude(1.1)", plan((2,) * 5))


def test_patterns_beyond_what_attention_takes():
    with pytest.raises(TemperatureError, match=r"model\.layers\.2\.self_attn, head 0.*0 \(the lim"):
        Profile.from_schedule("linear(1,0)", plan())


# from numbers


def test_from_a_matrix():
    matrix = [[1.0, 2.0], [0.5, 1.0], [3.0, 1.0]]
    profile = Profile.from_matrix(matrix)
    assert profile.temperature.tolist() == matrix
    assert profile.temperature.dtype == torch.float64
    source = torch.tensor(matrix)
    profile = Profile.from_matrix(source)
    source.fill_(9.0)
    assert profile.temperature.tolist() == matrix
    assert profile.describe() == "3 layers x 2 heads"


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (0, 3), (2, 2, 2)])
def test_what_is_no_matrix(shape):
    with pytest.raises(ProfileError, match=r"shape \[layers, heads\]"):
        Profile.from_matrix(torch.ones(shape))


def test_one_temperature_a_layer_needs_the_model():
    with pytest.raises(ProfileError, match=r"from_matrix\(T, model\)"):
        Profile.from_matrix([1.0, 2.0])


@pytest.mark.parametrize("matrix", [[[1.0, 2.0], [3.0]], "hot", [["a", "b"]], [[None]]], ids=str)
def test_what_is_no_number(matrix):
    with pytest.raises(ProfileError):
        Profile.from_matrix(matrix)


@pytest.mark.parametrize(
    "value, said",
    [
        (0.0, r"0 \(the limits 0 and inf are refused in attention\)"),
        (math.inf, r"inf \(the limits"),
        (-1.0, "-1; give one between 0.001 and 1000"),
        (math.nan, "nan; give one between"),
        (1e-4, "0.0001; give one"),
        (1e4, "10000; give one"),
    ],
)
def test_temperatures_that_attention_does_not_take(value, said):
    matrix = torch.ones(3, 2)
    matrix[1, 1] = value
    with pytest.raises(TemperatureError, match=f"layer 1, head 1: temperature {said}"):
        Profile.from_matrix(matrix)
    with pytest.raises(TemperatureError, match=f"model.a, head 1: temperature {said}"):
        Profile.by_module({"model.a": [1.0, value]})


def test_by_module():
    names = ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    profile = Profile.by_module({names[1]: [1.0, 2.0, 3.0, 4.0], names[0]: 0.5})
    rows = [row.tolist() for row in profile.resolve(plan())]
    assert rows == [[0.5] * 4, [1.0] * 4, [1.0, 2.0, 3.0, 4.0]]
    with pytest.raises(ProfileError, match="no module was named"):
        Profile.by_module({})
    # as users call it: the tests' own check of annotations would speak first
    by_module = inspect.unwrap(Profile.by_module.__func__)
    with pytest.raises(ProfileError, match="model.a: temperatures are numbers, not 'hot'"):
        by_module(Profile, {"model.a": "hot"})
    with pytest.raises(ProfileError, match="model.a"):
        Profile.by_module({"model.a": []})


# what fits what


def test_another_shape_names_both():
    said = "2 layers x 4 heads.*3 layers x 4 heads"
    with pytest.raises(ProfileError, match=said):
        Profile.from_matrix(torch.ones(2, 4)).resolve(plan())
    with pytest.raises(ProfileError, match="3 layers x 2 heads.*3 layers x 4 heads"):
        Profile.from_matrix(torch.ones(3, 2)).resolve(plan())
    with pytest.raises(ProfileError, match="3 layers x 8 heads.*3 layers x 4 heads"):
        Profile.neutral(plan((8, 8, 8))).resolve(plan())
    with pytest.raises(ProfileError, match="4 layers x 4 heads.*3 layers x 4 heads"):
        Profile.neutral(plan((4,) * 4)).resolve(plan())
    with pytest.raises(ProfileError, match="2 layers x 4 heads.*3 layers x 4 heads"):
        Profile.neutral(plan((4, 4))).resolve(plan())


def test_modules_the_model_does_not_have():
    with pytest.raises(ProfileError, match=r"no attention module 'model\.x'.*model\.layers\.0"):
        Profile.by_module({"model.x": 2.0}).resolve(plan())
    with pytest.raises(ProfileError, match="4 heads, the profile has 3"):
        Profile.by_module({"model.layers.1.self_attn": [1.0, 2.0, 3.0]}).resolve(plan())
    hybrid = plan((4,), places=(1,), depth=2, untempered=("model.layers.0",))
    with pytest.raises(ProfileError, match="has no temperature: it has no softmax"):
        Profile.by_module({"model.layers.0.mixer": 2.0}).resolve(hybrid)


def test_rows_and_names_belong_together():
    row = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ProfileError):
        Profile((row, row), ("a",))
    with pytest.raises(ProfileError):
        Profile((row, row), ("a", "a"))
    with pytest.raises(ProfileError):
        Profile(())


# changing one


positive = st.lists(st.floats(0.1, 10), min_size=2, max_size=5)


@given(positive, st.floats(-2, 2))
def test_scaled_is_a_power(values, room):
    profile = Profile.from_matrix([values, values])
    scaled = profile.scaled(room).temperature
    assert scaled[0].tolist() == pytest.approx([v**room for v in values], rel=1e-12)


def test_scaled_at_its_marks():
    profile = Profile.from_matrix([[0.5, 3.0]])
    assert profile.scaled(0.0).temperature.tolist() == [[1.0, 1.0]]
    assert torch.equal(profile.scaled(1.0).temperature, profile.temperature)
    assert profile.scaled(-1.0).temperature[0].tolist() == pytest.approx([2.0, 1 / 3])
    assert profile.temperature.tolist() == [[0.5, 3.0]]
    with pytest.raises(TemperatureError):
        profile.scaled(100.0)
    with pytest.raises(TemperatureError):
        profile.scaled(math.nan)


def test_shuffled_keeps_the_values():
    matrix = torch.arange(1.0, 13.0).view(3, 4)
    profile = Profile.from_matrix(matrix)
    shuffled = profile.shuffled(0).temperature
    assert not torch.equal(shuffled, profile.temperature)
    assert torch.equal(shuffled.flatten().sort().values, profile.temperature.flatten())
    assert torch.equal(profile.shuffled(0).temperature, shuffled)
    assert not torch.equal(profile.shuffled(1).temperature, shuffled)


def test_neutral():
    assert torch.equal(Profile.neutral(plan()).temperature, torch.ones(3, 4, dtype=torch.float64))
