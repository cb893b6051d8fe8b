"""GGUF files baked in place: the same bytes but for scales, and a mark that costs none."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFWriter
from gguf.quants import dequantize

from tempering.attention import Profile, tempered
from tempering.attention.baking.comparison import ROUNDING
from tempering.attention.baking.folds import Fold
from tempering.attention.profiles.adaptive import adaptive_profile
from tempering.engines.checkpoints import gguf as engine
from tempering.engines.checkpoints.check import check_model
from tempering.engines.checkpoints.gguf import bake_gguf, undo_gguf
from tempering.engines.checkpoints.gguf_blocks import _SCALES, fold_in_type
from tempering.engines.checkpoints.gguf_write import write_in_place
from tempering.engines.loading.gguf_files import load_gguf, open_gguf
from tempering.engines.loading.gguf_mark import beside_of, is_baked
from tempering.errors import BakeError, ModelError, OutputError, ProfileError, RefusedError
from tests.integration.test_bake_gguf import DIM, HEADS, T, blocks, codes, tensors, write_llama

PROFILE = Profile.from_matrix(T)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("gguf") / "cold.gguf", ["Q4_1", "Q6_K"])


@pytest.fixture(scope="module")
def warm(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "warm.gguf"
    bake_gguf(source, PROFILE, out, in_place=True)
    return out


def copied(path: Path, target: Path) -> Path:
    shutil.copyfile(path, target)
    shutil.copyfile(beside_of(path), beside_of(target))
    return target


def metadata(path: Path) -> dict:
    reader = GGUFReader(path)
    return {name: item.contents() for name, item in reader.fields.items()}


def test_every_type_in_one_file(tmp_path):
    kinds = [*_SCALES, "IQ1_M", "F32", "F16", "BF16"]
    source, out = write_llama(tmp_path / "cold.gguf", kinds), tmp_path / "warm.gguf"
    generator = torch.Generator().manual_seed(1)
    runs = tuple((head * DIM, (head + 1) * DIM, head) for head in range(HEADS))
    parts = {}
    for layer in range(len(kinds)):
        beta = torch.exp(torch.rand(HEADS, generator=generator, dtype=torch.float64) - 0.5)
        name = f"blk.{layer}.attn_q.weight"
        parts[name] = [(Fold(name, 0, runs), beta)]
    written = write_in_place(GGUFReader(source), source, out, parts, ROUNDING)
    assert written.kept == dict.fromkeys(kinds, 1)
    assert written.widened == {}
    assert out.stat().st_size == source.stat().st_size
    assert metadata(out) == metadata(source)
    own, new = tensors(source), tensors(out)
    assert [*own] == [*new]
    worst = 0.0
    for name, tensor in own.items():
        kind = tensor.tensor_type
        assert (new[name].tensor_type, new[name].data_offset) == (kind, tensor.data_offset)
        if name not in parts:
            assert np.array_equal(new[name].data, tensor.data)
            continue
        if kind.name in _SCALES or kind.name == "IQ1_M":
            assert np.array_equal(codes(new[name].data, kind), codes(tensor.data, kind))
        a, b = (dequantize(x.data, kind).astype(np.float64) for x in (tensor, new[name]))
        for start, stop, head in runs:
            wanted = float(parts[name][0][1][head]) * a[start:stop]
            lost = np.linalg.norm(b[start:stop] - wanted) / np.linalg.norm(wanted)
            worst = max(worst, lost)
    # half a step of 8 bits at most, which BF16 has
    assert 0 < worst <= 2.0**-9
    assert written.rounding == pytest.approx(worst, rel=1e-3)


def test_the_folded_file_is_the_tempered_model(tmp_path):
    kinds = ["Q2_K", "IQ1_M", "IQ4_XS", "BF16"]
    source, out = write_llama(tmp_path / "cold.gguf", kinds), tmp_path / "warm.gguf"
    profile = Profile.from_matrix(torch.cat((T, T.flip(1))))
    before = source.read_bytes()
    result = bake_gguf(source, profile, out, in_place=True)
    assert result.kept == dict.fromkeys(kinds, 1)
    assert source.read_bytes() == before
    model, again = load_gguf(source)[0], load_gguf(out)[0]
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        plain = model(ids).logits
        with tempered(model, profile):
            wanted = model(ids).logits
        got = again(ids).logits
    assert result.deviation <= 1e-4
    assert (got - wanted).abs().max() <= 2 * result.stored * wanted.std()
    assert (plain - wanted).abs().max() > 20 * (got - wanted).abs().max()


def test_only_scales_and_the_order_of_pairs_differ(source, warm):
    before, after = (np.fromfile(path, dtype=np.uint8) for path in (source, warm))
    changed = np.flatnonzero(before != after)
    allowed = np.zeros(len(before), dtype=bool)
    reader = GGUFReader(source)
    allowed[24 : reader.tensors[0].field.offset] = True
    for tensor in reader.tensors:
        if "attn_q" in tensor.name:
            places = codes(np.full_like(tensor.data, 255), tensor.tensor_type) == 0
            start = int(tensor.data_offset)
            allowed[start : start + places.size] = places.reshape(-1)
    assert allowed[changed].all()
    assert len(changed) > 1000


def test_the_file_itself(source, tmp_path):
    file = tmp_path / "model.gguf"
    shutil.copyfile(source, file)
    file.chmod(0o640)
    result = bake_gguf(file, PROFILE, in_place=True)
    assert (result.path, result.mark) == (file, beside_of(file))
    assert file.stat().st_size == source.stat().st_size
    assert file.stat().st_mode & 0o777 == 0o640
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        "model.gguf",
        "model.gguf.tempering.json",
    ]


def test_the_mark_goes_where_the_file_goes(source, warm, tmp_path):
    alone = tmp_path / "renamed.gguf"
    shutil.copyfile(warm, alone)
    for in_place in (True, False):
        with pytest.raises(BakeError, match=r"renamed\.gguf was baked .* already"):
            bake_gguf(alone, PROFILE, tmp_path / "twice.gguf", in_place=in_place)
    assert "baked with a temperature profile already" in check_model(alone).reason
    with pytest.raises(RefusedError, match="baked with a temperature profile already"):
        tempered(load_gguf(alone)[0], PROFILE)
    assert not is_baked(GGUFReader(source))
    with pytest.raises(BakeError, match=r"renamed\.gguf\.tempering\.json, which can't be read"):
        undo_gguf(alone, tmp_path / "plain.gguf")
    assert [*tmp_path.iterdir()] == [alone]


def rewritten(path: Path, target: Path, order, more: int = 0) -> Path:
    """Metadata alone, with pairs in another order: what tools that copy a file do to it."""
    reader = GGUFReader(path)
    writer = GGUFWriter(target, "llama")
    fields = [item for item in reader.fields.values() if not item.name.startswith("GGUF.")]
    for item in order(fields[1:]):
        inner = item.types[-1] if item.types[0].name == "ARRAY" else None
        writer.add_key_value(item.name, item.contents(), item.types[0], sub_type=inner)
    for index in range(more):
        writer.add_uint32(f"quantize.more.{index}", index)
    writer.add_tensor("x", np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_the_order_is_no_accident(source, warm, tmp_path):
    assert is_baked(GGUFReader(rewritten(warm, tmp_path / "a.gguf", list)))
    assert is_baked(GGUFReader(rewritten(warm, tmp_path / "b.gguf", list, more=1)))
    orders = {
        "as it was": lambda fields: sorted(fields, key=lambda x: x.name),
        "reversed": lambda fields: fields[::-1],
        "by name, backwards": lambda fields: sorted(fields, key=lambda x: x.name)[::-1],
    }
    generator = np.random.default_rng(0)
    for seed in range(20):
        orders[str(seed)] = lambda fields: [fields[i] for i in generator.permutation(len(fields))]
    for name, order in orders.items():
        assert not is_baked(GGUFReader(rewritten(warm, tmp_path / "c.gguf", order))), name


def test_undo_gives_the_original_but_for_rounding(source, warm, tmp_path):
    assert undo_gguf(warm, tmp_path / "plain.gguf") == 2
    plain = tmp_path / "plain.gguf"
    start = GGUFReader(source).data_offset
    assert plain.stat().st_size == source.stat().st_size
    assert plain.read_bytes()[:start] == source.read_bytes()[:start]
    for name, tensor in tensors(source).items():
        after = tensors(plain)[name]
        own, got = (dequantize(x.data, x.tensor_type) for x in (tensor, after))
        assert np.allclose(own, got, rtol=0, atol=3e-3 * np.abs(own).max())
        assert np.array_equal(own, got) or "attn_q" in name
    assert not is_baked(open_gguf(plain))


def test_a_mark_that_does_not_fit(source, warm, tmp_path):
    file = copied(warm, tmp_path / "warm.gguf")
    with file.open("r+b") as stream:
        stream.seek(int(tensors(file)["blk.0.attn_q.weight"].data_offset))
        stream.write(b"\x00\x3c")
    with pytest.raises(BakeError, match=r"is the mark of other weights than those in .*warm"):
        undo_gguf(file, tmp_path / "plain.gguf")
    for text, words in (("{", "not JSON"), ("[]", "no.* object"), ("{}", "damaged: KeyError")):
        beside_of(file).write_text(text)
        with pytest.raises(BakeError, match=words):
            undo_gguf(file, tmp_path / "plain.gguf")
    other = tmp_path / "other.gguf"
    shutil.copyfile(source, other)
    beside_of(other).write_text("kept")
    with pytest.raises(OutputError, match=r"other\.gguf\.tempering\.json exists, which undoes"):
        bake_gguf(other, PROFILE, in_place=True)
    assert beside_of(other).read_text() == "kept"
    assert other.read_bytes() == source.read_bytes()


def q(beta: float, axis: int = 0, form: str = "w") -> list:
    return [(Fold("q", axis, ((0, 8, 0),), form), torch.tensor([beta], dtype=torch.float64))]


@pytest.mark.parametrize(
    ("kind", "parts", "size", "words"),
    [
        (
            "MXFP4",
            q(2),
            0.01,
            "its type, MXFP4, has no scales in float16.*tensor-type blk.0.attn_q=",
        ),
        ("NVFP4", q(2), 0.01, "its type, NVFP4, has no scales"),
        ("Q8_0", q(2, axis=1), 0.01, "lie across the blocks of Q8_0"),
        ("Q4_K", q(2, form="1+w"), 0.01, "1 is added to its weights"),
        ("Q4_K", q(1e6), 0.1, r"Q4_K it can't hold weights times 1/T = 1e\+06 .*overflows"),
        ("Q6_K", q(0.3), 2e-6, r"would lose 0\.0\d+ of itself \(allowed 0\.0039\)"),
        ("IQ1_M", q(1e-4), 0.01, "it can't hold weights times"),
    ],
)
def test_what_can_not_change_in_place_is_named(kind, parts, size, words):
    kind = GGMLQuantizationType[kind]
    data = blocks(kind, 16, size)
    kept = data.copy()
    with pytest.raises(
        BakeError, match=f"blk.0.attn_q.weight can't be changed in place: .*{words}"
    ):
        fold_in_type("blk.0.attn_q.weight", data, kind, parts, 2.0**-8)
    assert np.array_equal(data, kept)


def test_refusals_change_nothing(source, tmp_path):
    file = tmp_path / "model.gguf"
    shutil.copyfile(source, file)
    extreme = torch.ones(2, HEADS, dtype=torch.float64)
    extreme[1, 2] = 900.0
    other = replace(PROFILE, model={"architecture": "x", "shape": "y", "fingerprint": "0" * 16})
    ruled = adaptive_profile("support(8)", load_gguf(file)[0])
    for profile, error, words in (
        (Profile.from_matrix(extreme), BakeError, "blk.1.attn_q.weight can't be changed in place"),
        (Profile.from_matrix(torch.ones(3, 4)), ProfileError, "3 layers x 4 heads"),
        (other, ProfileError, "the profile was made for x with y"),
        (ruled, RefusedError, "this profile has rules"),
    ):
        with pytest.raises(error, match=words):
            bake_gguf(file, profile, in_place=True)
    link = tmp_path / "link.gguf"
    link.symlink_to(file)
    with pytest.raises(OutputError, match=r"link\.gguf is a link to .*model\.gguf"):
        bake_gguf(link, PROFILE, in_place=True)
    link.unlink()
    with pytest.raises(OutputError, match="name the file to write"):
        bake_gguf(file, PROFILE)
    assert file.read_bytes() == source.read_bytes()
    assert [*tmp_path.iterdir()] == [file]


def test_files_that_are_not_read(source, tmp_path):
    part = write_llama(tmp_path / "part.gguf", ["F32", "F32"], {"split.count": 3})
    with pytest.raises(BakeError, match="one part of a split model"):
        bake_gguf(part, PROFILE, in_place=True)
    big = tmp_path / "big.gguf"
    writer = GGUFWriter(big, "llama", endianess=GGUFEndian.BIG)
    writer.add_block_count(1)
    writer.add_tensor("x", np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BakeError, match=r"big\.gguf is big-endian.*gguf-convert-endian"):
        bake_gguf(big, PROFILE, in_place=True)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"can't read .*cut\.gguf as a GGUF file"):
        bake_gguf(cut, PROFILE, in_place=True)
    assert not any(item.suffix == ".json" for item in tmp_path.iterdir())


@pytest.mark.parametrize("place", ["load_gguf", "_check_weights", "write_atomic", "replace"])
def test_an_interrupted_write_leaves_the_file(source, tmp_path, monkeypatch, place):
    file = tmp_path / "model.gguf"
    shutil.copyfile(source, file)
    calls = []
    right = Path.replace if place == "replace" else getattr(engine, place)

    def interrupt(*arguments):
        calls.append(arguments)
        # the model as it was is loaded first, and the mark gets its name first
        if place not in ("load_gguf", "replace") or len(calls) == 2:
            raise KeyboardInterrupt
        return right(*arguments)

    if place == "replace":
        monkeypatch.setattr(Path, "replace", interrupt)
    else:
        monkeypatch.setattr(engine, place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        bake_gguf(file, PROFILE, in_place=True)
    monkeypatch.undo()
    assert calls
    assert file.read_bytes() == source.read_bytes()
    assert [*tmp_path.iterdir()] == [file]
    if place == "replace":
        assert json.loads(beside_of(bake_gguf(file, PROFILE, in_place=True).path).read_text())
