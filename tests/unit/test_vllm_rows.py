"""A profile's rows find their layers and heads in vLLM, or are refused."""

from __future__ import annotations

import json
import math
import pickle
import re
from types import SimpleNamespace

import pytest
import torch

from tempering.attention.profiles.profile import Profile
from tempering.engines.vllm.layer_betas import RankLayer, layer_betas
from tempering.engines.vllm.settings import create_engine_config, named_profiles, settings_of
from tempering.engines.vllm.swap import agreed_answer, all_layers
from tempering.engines.vllm.worker import digest
from tempering.errors import DataError, InputError, ProfileError, RefusedError

NAMES = tuple(f"model.layers.{i}.self_attn" for i in range(3))
MATRIX = torch.tensor([[0.5, 1, 2, 4], [1, 1, 1, 1], [0.25, 0.8, 1.25, 3]])


def profile(names=NAMES, partial=False, matrix=MATRIX):
    return Profile(tuple(matrix.double()), names, partial=partial)


def slots(heads=4, rank=0, ranks=1, places=(0, 1, 2), form="model.layers.{}.self_attn.attn"):
    return [RankLayer(form.format(i), heads, rank, ranks) for i in places]


def test_each_rank_gets_its_own_heads():
    whole = torch.stack(layer_betas(profile(), slots()))
    assert torch.equal(whole, (1 / MATRIX.double()).float())
    parts = [torch.stack(layer_betas(profile(), slots(2, rank, 2))) for rank in range(2)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_the_order_of_layers_is_the_callers():
    turned = layer_betas(profile(), slots(places=(2, 0, 1)))
    assert torch.equal(torch.stack(turned), (1 / MATRIX[[2, 0, 1]].double()).float())


@pytest.mark.parametrize("form", ["language_model.model.layers.{}.self_attn.attn", "h.{}.attn"])
def test_other_names_match_by_layer_number(form):
    assert torch.equal(
        torch.stack(layer_betas(profile(), slots(form=form))),
        torch.stack(layer_betas(profile(), slots())),
    )


def test_bare_matrices_and_pipeline_stages():
    bare = Profile(tuple(MATRIX.double()))
    whole = layer_betas(profile(), slots())
    assert torch.equal(torch.stack(layer_betas(bare, slots())), torch.stack(whole))
    for some in (bare, profile()):
        stage = layer_betas(some, slots(places=(1, 2)), depth=3)
        assert torch.equal(torch.stack(stage), torch.stack(whole[1:]))
        assert layer_betas(some, [], depth=3) == []  # a stage without attention
    with pytest.raises(ProfileError, match=r"3 layers x 4 heads without names.*\[0, 2\]"):
        layer_betas(bare, slots(places=(0, 2)), depth=3)


@pytest.mark.parametrize(
    ("named", "depth", "message"),
    [
        (False, 2, "3 layers x 4 heads, the model has 2 layers"),
        (False, 4, "3 layers x 4 heads, the model has 4 layers"),
        (True, 2, "module model.layers.2.self_attn, the engine has 2 layers and no such layer"),
        (True, 4, "none for model.layers.3.self_attn.attn"),
    ],
)
def test_a_profile_of_another_depth_is_refused_in_every_form_of_stages(named, depth, message):
    """Whichever stage holds the layer in question, some stage refuses the profile."""
    given = profile() if named else Profile(tuple(MATRIX.double()))
    refused = []
    for places in ((0,), tuple(range(1, depth))):
        try:
            layer_betas(given, slots(places=places), depth=depth)
        except ProfileError as error:
            refused.append(str(error))
    assert refused and all(re.search(message, text) for text in refused)


def test_partial_profiles_leave_the_rest_alone():
    some = Profile.by_module({"model.layers.1.self_attn": 2.0, "model.layers.2.self_attn": [2] * 4})
    table = torch.stack(layer_betas(some, slots(2, 1, 2)))
    assert table.tolist() == [[1, 1], [0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("given", "places", "message"),
    [
        (profile(), slots(places=(0, 1)), "another model.*module model.layers.2.self_attn"),
        (profile(), slots(places=(0, 1, 2, 3)), "none for model.layers.3.self_attn.attn"),
        (profile(), slots(heads=5), "has 5 heads, the profile has 4"),
        (profile(), slots(heads=4, ranks=2), "has 8 heads, the profile has 4"),
        (Profile(tuple(MATRIX.double())), slots(places=(0, 1)), "the engine has 2 layers x 4"),
        (profile(("a", "b", "c")), slots(), "'a' has no layer number"),
        (
            profile(("m.0.self", "m.0.cross", "m.1.self")),
            slots(places=(0, 1)),
            "several rows for layer 0",
        ),
        (profile(), [], "no attention layer"),
    ],
)
def test_what_does_not_fit_is_refused(given, places, message):
    with pytest.raises(ProfileError, match=message):
        layer_betas(given, places)


def config(value):
    return SimpleNamespace(additional_config=value)


def test_settings_are_read_strictly(tmp_path):
    path = str(profile().save(tmp_path / "p.json"))
    for nothing in ({}, {"other": 1}, SimpleNamespace()):
        assert settings_of(config(nothing)) is None
    assert settings_of(SimpleNamespace()) is None
    given = config({"tempering": {"profile": path, "profiles": {"hot": path, "cold": path}}})
    settings = settings_of(given)
    assert settings.rows == {"hot": 1, "cold": 2}
    assert named_profiles(given) == ("hot", "cold")
    assert torch.equal(settings.profile.temperature, MATRIX.double())
    assert settings_of(config({"tempering": {"profile": None}})).profile is None
    for wrong, message in (
        ({"tempering": path}, 'is {"profile": "FILE"}'),
        ({"tempering": {"profil": path}}, "no setting 'profil'"),
        ({"tempering": {"profile": 3}}, "the path of a profile, not 3"),
        ({"tempering": {"profiles": {"hot": 3}}}, '{"NAME": "FILE"}'),
        ({"tempering": {"profiles": {"": path}}}, '{"NAME": "FILE"}'),
    ):
        with pytest.raises(InputError, match=message):
            settings_of(config(wrong))
    with pytest.raises(DataError, match=r"missing\.json"):
        settings_of(config({"tempering": {"profile": str(tmp_path / "missing.json")}}))


def test_profiles_are_read_once_and_travel_with_the_configuration(tmp_path):
    """What an engine serves is what it read, whatever becomes of the file meanwhile."""
    path = profile().save(tmp_path / "p.json")
    given = config({"tempering": {"profile": str(path), "profiles": {"hot": str(path)}}})
    made = create_engine_config(lambda self: given, None)
    assert made is given
    profile(matrix=MATRIX.double() + 1).save(path)
    sent = pickle.loads(pickle.dumps(given))  # to a worker's process
    for where in (given, sent):
        settings = settings_of(where)
        for read in (settings.profile, settings.profiles["hot"]):
            assert torch.equal(read.temperature, MATRIX.double())
    path.unlink()
    assert digest(settings_of(sent).profile) == digest(profile())
    with pytest.raises(DataError):  # a bad file is an error before any worker is started
        create_engine_config(lambda self: config({"tempering": {"profile": str(path)}}), None)


def test_digests_name_the_temperatures():
    assert digest(None) == "untempered"
    assert digest(profile()) == digest(Profile.from_json(profile().to_json()))
    warm = MATRIX.clone()
    warm[0, 0] = math.nextafter(0.5, 1)
    assert digest(profile()) != digest(profile(matrix=warm.double() + 1e-9))


def test_workers_must_agree():
    assert agreed_answer([("", "abc"), ["", "abc"]]) == "abc"
    with pytest.raises(RefusedError, match=r"differently: abc, abd.*restart"):
        agreed_answer([("", "abc"), ("", "abd")])
    with pytest.raises(ProfileError, match="29 layers"):
        agreed_answer([("", "abc"), ("ProfileError", "the profile has 29 layers")])


def test_layers_of_all_stages_in_order_of_depth():
    def answer(*places, heads=4):
        return "", json.dumps([[f"model.layers.{i}.self_attn.attn", heads, 2] for i in places])

    whole = [[f"model.layers.{i}.self_attn.attn", 4, 2] for i in (0, 1, 2, 10)]
    for answers in (
        [answer(0, 1, 2, 10)],
        [answer(0, 1, 2, 10), answer(0, 1, 2, 10)],  # two ranks
        [answer(0, 1), answer(2, 10)],  # two stages
        [answer(2, 10), answer(2, 10), answer(0, 1), answer(0, 1)],  # two stages of two ranks
        [answer(), answer(10, 2, 1, 0)],
    ):
        assert all_layers(answers) == whole
    with pytest.raises(RefusedError, match=r"model\.layers\.1.* has 4 heads on one rank, 2"):
        all_layers([answer(0, 1), answer(1, heads=2)])
    with pytest.raises(InputError, match="started without"):
        all_layers([answer(0), ("InputError", "started without tempering")])
