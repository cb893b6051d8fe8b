"""The same temperature from every place that logits may lie in, a chunk at a time."""

from __future__ import annotations

import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempering.errors import DataError
from tempering.estimators import TemperatureScaler
from tempering.estimators.calibration.files import open_logits, open_vector
from tempering.estimators.calibration.source import CHUNK, ArrayLogits, Part, TensorLogits, strata


def draw(n=3000, k=6, dtype=np.float32):
    rng = np.random.default_rng(0)
    z = (2 * rng.standard_normal((n, k))).astype(dtype)
    return z, (z / 1.7 + rng.gumbel(size=(n, k))).argmax(1)


def parquet_columns(z, path):
    pq.write_table(pa.table({f"c{i}": z[:, i] for i in range(z.shape[1])}), path)
    return path


def parquet_lists(z, path):
    flat = pa.FixedSizeListArray.from_arrays(pa.array(z.ravel()), z.shape[1])
    row = pa.array(np.arange(len(z)))
    pq.write_table(pa.table({"row": row, "logits": flat}), path, row_group_size=700)
    return path


def csv(z, path, header=None, between=",", mark="", end="\n"):
    lines = [] if header is None else [between.join(header)]
    lines += [between.join(repr(float(value)) for value in row) for row in z]
    path.write_bytes((mark + end.join(lines) + end).encode())
    return path


def saved(save, name):
    def write(z, folder):
        save(folder / name, z)
        return folder / name

    return write


PLACES = {
    "tensor": lambda z, _: torch.from_numpy(z),
    "tensor that trains": lambda z, _: torch.from_numpy(z).requires_grad_(),
    "data frame": lambda z, _: pytest.importorskip("pandas").DataFrame(z),
    "list": lambda z, _: z.tolist(),
    "read-only array": lambda z, _: np.frombuffer(z.tobytes(), z.dtype).reshape(z.shape),
    "column order": lambda z, _: np.asfortranarray(z),
    "backwards twice": lambda z, _: np.ascontiguousarray(z[::-1])[::-1],
    "other byte order": lambda z, _: z.astype(">f4"),
    "long double": lambda z, _: z.astype(np.longdouble),
    ".npy": saved(np.save, "z.npy"),
    "memory map": lambda z, folder: np.load(saved(np.save, "z.npy")(z, folder), mmap_mode="r"),
    ".npz": saved(lambda path, z: np.savez(path, logits=z, other=z[:1]), "z.npz"),
    "compressed .npz": saved(lambda path, z: np.savez_compressed(path, anything=z), "z.npz"),
    "parquet columns": lambda z, folder: parquet_columns(z, folder / "z.parquet"),
    "parquet lists": lambda z, folder: parquet_lists(z, folder / "z.parquet"),
    ".csv": lambda z, folder: csv(z, folder / "z.csv"),
    ".csv of a spreadsheet": lambda z, folder: csv(
        z, folder / "z.csv", [f"class {i}" for i in range(6)], ";", "\ufeff", "\r\n"
    ),
    "path as text": lambda z, folder: str(saved(np.save, "z.npy")(z, folder)),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_place_gives_the_same_temperature(place, tmp_path):
    z, y = draw()
    expected = TemperatureScaler().fit(z, y)
    x = PLACES[place](z, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler = TemperatureScaler().fit(x, torch.from_numpy(y))
        p = scaler.predict_proba(x)
    assert scaler.temperature_ == pytest.approx(expected.temperature_, rel=1e-6)
    assert isinstance(p, torch.Tensor) == isinstance(x, torch.Tensor)
    np.testing.assert_allclose(np.asarray(p), expected.predict_proba(z), atol=1e-6)
    assert (scaler.predict(x) == z.argmax(1)).all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-7), (torch.float32, 1e-7), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)],
)
def test_dtypes_agree(dtype, tolerance):
    z, y = draw(dtype=np.float64)
    exact = TemperatureScaler().fit(z, y).temperature_
    half = torch.from_numpy(z).to(dtype)
    scaler = TemperatureScaler().fit(half, y)
    assert scaler.temperature_ == pytest.approx(exact, rel=tolerance)
    same = TemperatureScaler().fit(half.double(), y)
    assert scaler.temperature_ == pytest.approx(same.temperature_, rel=1e-6)
    assert scaler.predict_proba(half).dtype == torch.promote_types(dtype, torch.float32)


def test_integers_are_logits_too():
    z, y = draw()
    whole = np.rint(z).astype(np.int16)
    expected = TemperatureScaler().fit(whole.astype(np.float64), y)
    assert TemperatureScaler().fit(whole, y).temperature_ == expected.temperature_


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("per", ["global", "class", "input"])
def test_cuda_tensors_stay_there(per):
    z, y = draw()
    scaler = TemperatureScaler(per=per).fit(torch.from_numpy(z).cuda(), torch.from_numpy(y).cuda())
    expected = TemperatureScaler(per=per).fit(z, y)
    np.testing.assert_allclose(scaler.temperature_, expected.temperature_, rtol=1e-5)
    p = scaler.predict_proba(torch.from_numpy(z).cuda())
    assert p.device.type == "cuda"
    np.testing.assert_allclose(p.cpu().numpy(), expected.predict_proba(z), atol=1e-5)


@pytest.mark.parametrize("columns", [2, 1000, CHUNK, 3 * CHUNK])
def test_chunks_are_small_and_cover_every_row(columns):
    z = torch.arange(5.0)[:, None].expand(5, columns)
    rows = 5
    if columns == 2:
        z, rows = torch.arange(200000.0)[:, None].expand(-1, 2), 200000
    seen = 0
    for first, chunk in TensorLogits(z).chunks():
        assert first == seen
        assert chunk.numel() <= CHUNK or len(chunk) == 1
        assert chunk[0, 0] == first
        seen += len(chunk)
    assert seen == rows


@given(n=st.integers(1, 5000), size=st.integers(1, 600), seed=st.integers(0, 99))
def test_a_sample_takes_one_row_of_each_stratum(n, size, seed):
    rows = strata(n, size, seed)
    assert (np.diff(rows) > 0).all()
    assert len(rows) == min(n, size)
    if size < n:
        edges = np.linspace(0, n, size + 1).astype(int)
        assert ((rows >= edges[:-1]) & (rows < edges[1:])).all()


@pytest.mark.parametrize("place", [".npz", "parquet lists", ".npy", "tensor"])
def test_a_sample_is_rows_of_the_table(place, tmp_path):
    z, _ = draw()
    x = PLACES[place](z, tmp_path)
    logits = TensorLogits(x) if place == "tensor" else open_logits(x)
    rows, sample = logits.sample(100, seed=3)
    np.testing.assert_array_equal(sample.numpy(), z[rows])


def test_a_part_of_a_table():
    z, _ = draw(40000)
    keep = np.random.default_rng(0).random(40000) < 0.3
    part = Part(ArrayLogits(z), keep)
    assert part.n_rows == keep.sum()
    np.testing.assert_array_equal(torch.cat([c for _, c in part.chunks()]).numpy(), z[keep])


def truncated(z, path):
    np.save(path, z)
    path.write_bytes(path.read_bytes()[:-100])


def archive(path, **arrays):
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("none.npy", lambda p: None, "there is no such file"),
        ("z.tsv", lambda p: p.write_text("1,2"), r"ends in \.npy, \.npz, \.parquet, \.csv"),
        ("z.csv", lambda p: p.write_text("a,b\n1.5,x\n"), "column 'b' holds string, not numbers"),
        (
            "z.csv",
            lambda p: p.write_text("a,b\n1.5,\n2,2.5\n"),
            "row 0 of column 'b' is empty",
        ),
        ("z.csv", lambda p: p.write_text("id,b\n1,2.5\n"), "the columns 'id' hold integers"),
        ("z.csv", lambda p: p.write_text("1.5,2\n3\n"), r"can't be read as \.csv"),
        ("z.npy", lambda p: p.write_text("hello"), r"can't be read as \.npy"),
        ("z.npy", lambda p: truncated(np.ones((9, 3)), p), r"can't be read as \.npy"),
        ("z.npz", lambda p: p.write_text("hello"), r"can't be read as \.npz"),
        ("z.parquet", lambda p: p.write_text("hello"), r"can't be read as \.parquet"),
        ("z.npy", lambda p: np.save(p, np.ones((3, 1, 1))), r"got shape \(3, 1, 1\)"),
        ("z.npy", lambda p: np.save(p, np.array([["a"]])), "real dtype"),
        ("z.npy", lambda p: np.save(p, np.array([[None]]), allow_pickle=True), "can't be read"),
        ("z.npz", lambda p: archive(p, a=np.ones((2, 2)), b=np.ones(2)), "holds the arrays a, b"),
        ("z.npz", lambda p: archive(p, a=np.asfortranarray(np.ones((2, 3)))), "stored by column"),
        (
            "z.parquet",
            lambda p: pq.write_table(pa.table({"x": [0.1, 0.2], "label": [0, 1]}), p),
            "the columns label hold integers",
        ),
        (
            "z.parquet",
            lambda p: pq.write_table(pa.table({"x": ["a"]}), p),
            r"expected one column of lists.*it has x \(string\)",
        ),
        (
            "z.parquet",
            lambda p: pq.write_table(pa.table({"x": [0.1, None], "y": [1.0, 2.0]}), p),
            "row 1 of column 'x' is null",
        ),
        (
            "z.parquet",
            lambda p: pq.write_table(pa.table({"x": [[0.1, 1.0], [2.0]]}), p),
            "row 1 has 1 logits, the first row has 2",
        ),
        (
            "z.parquet",
            lambda p: pq.write_table(pa.table({"x": [[0.1, 1.0], [2.0, None]]}), p),
            "a null among the logits",
        ),
    ],
)
def test_files_that_hold_no_logits(name, write, message, tmp_path):
    write(tmp_path / name)
    with pytest.raises(DataError, match=message):
        TemperatureScaler().fit(tmp_path / name, [0, 1])


def test_an_archive_cut_short(tmp_path):
    z, y = draw()
    np.savez(tmp_path / "z.npz", logits=z)
    data = bytearray((tmp_path / "z.npz").read_bytes())
    data[30000:30100] = bytes(100)  # the checksum no longer holds
    (tmp_path / "z.npz").write_bytes(data)
    with pytest.raises(DataError, match=r"can't be read as \.npz"):
        TemperatureScaler().fit(tmp_path / "z.npz", y)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("y.npy", np.save),
        ("y.npz", lambda p, y: np.savez(p, labels=y, more=y)),
        ("y.parquet", lambda p, y: pq.write_table(pa.table({"labels": y, "more": y}), p)),
        ("y.parquet", lambda p, y: pq.write_table(pa.table({"label": y}), p)),
        ("y.txt", lambda p, y: p.write_text("\n".join(map(str, y)) + "\n")),
    ],
)
def test_labels_from_files(name, write, tmp_path):
    write(tmp_path / name, np.array([3, 0, 2]))
    assert open_vector(tmp_path / name, "labels").tolist() == [3, 0, 2]


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("none.npy", lambda p: None, "there is no such file; give the labels"),
        ("y.tsv", lambda p: p.write_text("1"), r"ends in \.npy, \.npz, \.parquet, \.csv or"),
        ("y.npy", lambda p: p.write_text("hello"), r"can't be read as \.npy"),
        ("y.npy", lambda p: np.save(p, np.eye(3)), r"labels have shape \(3, 3\)"),
        (
            "y.npz",
            lambda p: archive(p, a=np.ones(2), b=np.ones(2)),
            "holds a, b; expected",
        ),
        (
            "y.parquet",
            lambda p: pq.write_table(pa.table({"y": [1, None]}), p),
            "row 1 of column 'y' is empty",
        ),
    ],
)
def test_files_that_hold_no_labels(name, write, message, tmp_path):
    write(tmp_path / name)
    with pytest.raises(DataError, match=message):
        open_vector(tmp_path / name, "labels")


def test_names_in_a_text_file(tmp_path):
    (tmp_path / "g.txt").write_text("north\nsouth\nnorth\n")
    assert open_vector(tmp_path / "g.txt", "groups").tolist() == ["north", "south", "north"]


def test_names_that_read_as_one_number_stay_apart(tmp_path):
    names = ["1_12", "11_2", "112", "007", "7"]
    (tmp_path / "g.txt").write_text("\n".join(names))
    assert open_vector(tmp_path / "g.txt", "groups").tolist() == names
    (tmp_path / "y.txt").write_text("3\n-1 \n 12\n")
    assert open_vector(tmp_path / "y.txt", "labels").tolist() == [3, -1, 12]
    (tmp_path / "g.csv").write_text("groups\n" + "\n".join(["007", "7", "7"]))
    assert open_vector(tmp_path / "g.csv", "groups").tolist() == ["007", "7", "7"]
    (tmp_path / "far.txt").write_text("1" + "0" * 30 + "\n1\n")
    assert open_vector(tmp_path / "far.txt", "groups").tolist() == ["1" + "0" * 30, "1"]


def test_the_header_that_pandas_writes_is_no_row(tmp_path):
    z, y = draw(200, 5)
    header = ",".join(map(str, range(5)))
    np.savetxt(tmp_path / "z.csv", z, delimiter=",", header=header, comments="", fmt="%.9g")
    np.savetxt(tmp_path / "plain.csv", z, delimiter=",", fmt="%.9g")
    fitted = TemperatureScaler().fit(tmp_path / "z.csv", y)
    assert fitted.temperature_ == TemperatureScaler().fit(tmp_path / "plain.csv", y).temperature_
    (tmp_path / "two.csv").write_text("0,1\n0.5,0.5\n")
    with pytest.raises(DataError, match="may be names of columns"):
        open_logits(tmp_path / "two.csv")
    (tmp_path / "index.csv").write_text(",a,b\n0,0.5,0.5\n1,0.25,0.75\n")
    with pytest.raises(DataError, match="write it with index=False"):
        open_logits(tmp_path / "index.csv")


def test_a_fit_that_fails_leaves_the_one_before_whole():
    z, y = draw(200, 5)
    fitted = TemperatureScaler().fit(z, y)
    before = fitted.predict_proba(z)
    with pytest.raises(DataError):
        fitted.fit(z[:, :3], y)
    np.testing.assert_array_equal(fitted.predict_proba(z), before)


def test_a_table_without_rows_is_named(tmp_path):
    z, y = draw(200, 5)
    np.save(tmp_path / "none.npy", z[:0])
    with pytest.raises(DataError, match=r"none\.npy has n_samples = 0"):
        TemperatureScaler().fit(z, y).predict_proba(tmp_path / "none.npy")
