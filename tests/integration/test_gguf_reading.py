"""The quick reader of GGUF files gives what gguf's own gives, field by field and part by part."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from gguf import GGUFEndian, GGUFReader, GGUFValueType, GGUFWriter

from tempering.engines.loading.gguf_model import _restore_vocabulary_size
from tempering.engines.loading.gguf_reading import QuickReader, WeightsReader, quick_gguf

# Real vocabularies hold all of these.
TOKENS = ["<pad>", "", "▁the", "\n\n", "  ", "👩‍👩‍👧", "<0x0A>", "a" * 300, "ß"]


def written(path: Path, endian: GGUFEndian = GGUFEndian.LITTLE) -> Path:
    writer = GGUFWriter(path, "toy", endianess=endian)
    writer.add_array("toy.tokens", TOKENS)
    writer.add_array("toy.scores", [-1.5, 0.0, 3e30])
    writer.add_array("toy.counts", list(range(-2, 5)))
    writer.add_array("toy.flags", [True, False, True])
    for kind, values in (
        (GGUFValueType.UINT8, [0, 255]),
        (GGUFValueType.INT16, [-300, 300]),
        (GGUFValueType.UINT64, [2**63]),
        (GGUFValueType.FLOAT64, [1e-300, 2.0]),
    ):
        writer.add_key_value(f"toy.{kind.name}", values, GGUFValueType.ARRAY, sub_type=kind)
    writer.add_float32("toy.scale", 0.5)
    writer.add_string("toy.text", "text")
    writer.add_array("toy.one", ["x"])
    writer.add_tensor("first.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("second.weight", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("endian", [GGUFEndian.LITTLE, GGUFEndian.BIG])
def test_every_field_and_part_is_the_same(tmp_path: Path, endian: GGUFEndian) -> None:
    path = written(tmp_path / "toy.gguf", endian)
    plain, quick = GGUFReader(path), QuickReader(path)
    assert list(plain.fields) == list(quick.fields)
    assert "toy.tokens" in plain.fields
    for name, field in plain.fields.items():
        other = quick.fields[name]
        assert (field.offset, field.data, field.types) == (other.offset, other.data, other.types)
        assert len(field.parts) == len(other.parts), name
        for one, two in zip(field.parts, other.parts, strict=True):
            assert one.tobytes() == two.tobytes()
            assert one.tolist() == two.tolist()
        assert field.contents() == other.contents()
    assert quick.fields["toy.tokens"].contents() == TOKENS
    assert quick.fields["toy.tokens"].contents(2) == "▁the"
    assert quick.fields["toy.counts"].contents(slice(1, 3)) == [-1, 0]
    for one, two in zip(plain.tensors, quick.tensors, strict=True):
        assert (one.name, one.data_offset) == (two.name, two.data_offset)
        assert one.data.tobytes() == two.data.tobytes()


def test_nested_arrays_are_the_same(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "nested.gguf", "toy")
    writer.add_array("toy.nested", [[1, 2], [3, 4, 5]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain = GGUFReader(tmp_path / "nested.gguf").fields["toy.nested"]
    quick = QuickReader(tmp_path / "nested.gguf").fields["toy.nested"]
    assert quick.data == plain.data
    assert [part.tolist() for part in quick.parts] == [part.tolist() for part in plain.parts]


@pytest.mark.parametrize("endian", [GGUFEndian.LITTLE, GGUFEndian.BIG])
@pytest.mark.parametrize("told", [None, 7])
def test_without_the_vocabulary_all_else_is_the_same(
    tmp_path: Path, endian: GGUFEndian, told: int | None
) -> None:
    writer = GGUFWriter(tmp_path / "toy.gguf", "toy", endianess=endian)
    writer.add_token_list([f"<{i}>" for i in range(2000)])
    writer.add_token_scores([0.5] * 2000)
    writer.add_array("toy.names", ["a", "b"])
    if told is not None:
        writer.add_vocab_size(told)
    writer.add_tensor("token_embd.weight", np.arange(6000, dtype=np.float32).reshape(2000, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain, light = GGUFReader(tmp_path / "toy.gguf"), WeightsReader(tmp_path / "toy.gguf")
    left_out = {"tokenizer.ggml.tokens", "tokenizer.ggml.scores"}
    assert set(plain.fields) - set(light.fields) == left_out
    for name, field in light.fields.items():
        assert field.contents() == plain.fields[name].contents()
    assert light.tensors[0].data.tobytes() == plain.tensors[0].data.tobytes()
    config = SimpleNamespace(vocab_size=7)
    _restore_vocabulary_size(config, tmp_path / "toy.gguf")
    assert config.vocab_size == (7 if told else 2000)


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    content = written(tmp_path / "toy.gguf").read_bytes()
    end = GGUFReader(tmp_path / "toy.gguf").data_offset
    cut = tmp_path / "cut.gguf"
    places = random.Random(0).sample(range(4, end - 40), 60)
    for place in places:
        cut.write_bytes(content[:place])
        with pytest.raises((ValueError, IndexError, KeyError)):
            QuickReader(cut)


@pytest.mark.parametrize("length", [2**63, 2**40, 10_000])
def test_a_length_beyond_the_file_ends_at_once(tmp_path: Path, length: int) -> None:
    content = bytearray(written(tmp_path / "toy.gguf").read_bytes())
    for name in (b"toy.tokens", b"toy.scores"):
        damaged = bytearray(content)
        place = damaged.index(name) + len(name) + 8
        damaged[place : place + 8] = length.to_bytes(8, "little")
        (tmp_path / "bad.gguf").write_bytes(damaged)
        with pytest.raises(ValueError, match="within its metadata"):
            QuickReader(tmp_path / "bad.gguf")


def test_transformers_is_given_the_quick_reader_and_loses_it_again() -> None:
    names = gguf.get_tensor_name_map
    with pytest.raises(KeyError), quick_gguf():
        assert gguf.GGUFReader is QuickReader
        with quick_gguf():
            assert gguf.GGUFReader is QuickReader
        assert gguf.GGUFReader is QuickReader
        raise KeyError
    assert gguf.GGUFReader is GGUFReader
    assert gguf.get_tensor_name_map is names

    def load() -> None:
        for _ in range(50):
            with quick_gguf():
                pass

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gguf.GGUFReader is GGUFReader
