"""tempering bake on GGUF files: by path, by the name of an embedded model, and back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from tempering.attention import Profile
from tempering.cli import _run
from tempering.engines.loading.gguf_files import embedded_gguf
from tests.integration.test_bake_gguf import T, write_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("gguf") / "cold.gguf", ["Q4_1", "Q8_0"])


def call(*arguments: object) -> int:
    return _run([str(item) for item in arguments], debug=False)


def values(path: Path) -> dict[str, np.ndarray]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}


def same_but_for(own: dict, other: dict, changed: str, tolerance: float) -> bool:
    """Equal tensors, but for rounding in those with `changed` in their name."""
    return own.keys() == other.keys() and all(
        np.array_equal(item, other[name])
        or (changed in name and np.abs(item - other[name]).max() <= tolerance * np.abs(item).max())
        for name, item in own.items()
    )


def test_bake_check_and_undo(source, tmp_path, capsys):
    profile = Profile.from_matrix(T).save(tmp_path / "tuned.json")
    assert call("bake", source, "--check", "--profile", profile) == 0
    assert capsys.readouterr().out.startswith(f"{source}: folds per head\n{profile}: 2 layers x 4")
    warm = tmp_path / "warm.gguf"
    assert call("bake", source, "--profile", profile, "--out", warm) == 0
    out = capsys.readouterr().out
    assert f"wrote {warm}: 2 layers x 4 heads folded (per head)" in out
    assert "tensors changed in their own type: 1 Q4_1, 1 Q8_0; in a wider one: none" in out
    assert not same_but_for(values(source), values(warm), "attn_q", 0.05)
    assert call("bake", warm, "--check") == 0
    assert "does not fold: this model's weights were baked" in capsys.readouterr().out
    plain = tmp_path / "plain.gguf"
    assert call("bake", warm, "--undo", "--out", plain, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(plain), "tensors": 2}
    assert same_but_for(values(source), values(plain), "attn_q", 3e-3)


def test_in_place_scales(source, tmp_path, capsys):
    profile = Profile.from_matrix(T).save(tmp_path / "tuned.json")
    file, warm = tmp_path / "model.gguf", tmp_path / "warm.gguf"
    file.write_bytes(source.read_bytes())
    assert call("bake", file, "--profile", profile, "--in-place-scales", "--out", warm) == 0
    out = capsys.readouterr().out
    assert "tensors changed in their own type: 1 Q4_1, 1 Q8_0; in a wider one: none" in out
    said = re.search(r"\nrounding: at most (\S+) of a head's weights\n", out)
    # Scales and minima are off by 2^-11 at most each; they cancel in the weights, so it is more.
    assert said and 2.0**-13 < float(said[1]) < 2.0**-10
    assert f"{warm}.tempering.json says how to undo it: keep it beside the file" in out
    assert file.read_bytes() == source.read_bytes()
    assert call("bake", file, "--profile", profile, "--in-place-scales", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["path"], result["mark"]) == (str(file), f"{file}.tempering.json")
    assert file.read_bytes() == warm.read_bytes()
    assert len(file.read_bytes()) == len(source.read_bytes())
    assert call("bake", file, "--profile", profile, "--in-place-scales") == 1
    assert "was baked with a temperature profile already" in capsys.readouterr().err
    assert call("bake", file, "--undo", "--out", tmp_path / "plain.gguf") == 0
    assert same_but_for(values(source), values(tmp_path / "plain.gguf"), "attn_q", 3e-3)
    for arguments, words in (
        ((file, "--undo", "--in-place-scales", "--out", warm), "--undo needs no --in-place-scales"),
        (("smollm2", "--profile", profile, "--in-place-scales"), "give tempering bake MODEL"),
        ((file, "--profile", profile), "give tempering bake MODEL"),
        ((file, "--in-place-scales"), "give tempering bake MODEL"),
        ((file, "--check", "--in-place-scales"), "--check"),
    ):
        assert call("bake", *arguments) == 2
        assert words in capsys.readouterr().err


def test_refusals_write_nothing(source, tmp_path, capsys):
    profile = Profile.from_matrix(T).save(tmp_path / "tuned.json")
    wrong = Profile.from_matrix(torch.ones(2, 3)).save(tmp_path / "wrong.json")
    kept = tmp_path / "kept.gguf"
    kept.write_bytes(b"kept")
    before = sorted(tmp_path.iterdir())
    for arguments, code, words in (
        ((source, "--profile", wrong, "--out", tmp_path / "a.gguf"), 2, "2 layers x 3 heads"),
        ((source, "--profile", profile, "--out", kept), 1, "exists; name a place that doesn't"),
        ((source, "--undo", "--out", tmp_path / "a.gguf"), 1, "carries no mark of a bake"),
        ((tmp_path / "no.gguf", "--profile", profile, "--out", tmp_path / "a.gguf"), 1, "no GGUF"),
        ((kept, "--profile", profile, "--out", tmp_path / "a.gguf"), 1, "as a GGUF file"),
    ):
        assert call("bake", *arguments) == code
        assert words in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert kept.read_bytes() == b"kept"


@pytest.mark.model
@pytest.mark.slow
def test_the_embedded_model_as_gguf(smollm2, tmp_path, capsys):
    share = torch.rand(30, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = Profile.from_matrix(torch.exp((share * 2 - 1) * 0.4), smollm2[0])
    profile, warm = chosen.save(tmp_path / "heads.json"), tmp_path / "warm.gguf"
    assert call("bake", "smollm2", "--profile", profile, "--out", warm, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["verdict"], result["kept"], result["widened"]) == ("per head", {"Q4_1": 30}, {})
    # 2^-12 of a weight on average, from the scales in float16, after 30 layers
    assert result["deviation"] <= 1e-4 < result["stored"] <= 0.02
    assert call("bake", warm, "--undo", "--out", tmp_path / "plain.gguf") == 0
    own = embedded_gguf("smollm2")
    assert own.stat().st_size <= warm.stat().st_size <= 1.001 * own.stat().st_size
    assert same_but_for(values(own), values(tmp_path / "plain.gguf"), "attn_q", 3e-3)
