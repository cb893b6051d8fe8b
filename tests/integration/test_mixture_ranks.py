"""A mixture over the ranks of torch.distributed is that of one process, and errors reach all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing

from tempering.estimators import AnnealedMixture

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "mixture_torchrun.py"


def rows(count: int = 403) -> np.ndarray:
    """Four clusters that overlap, sorted: each rank sees other ones."""
    random = np.random.default_rng(0)
    centres = 2.5 * random.standard_normal((4, 3))
    return centres[np.sort(np.arange(count) % 4)] + random.standard_normal((count, 3))


def test_the_torchrun_example_is_the_fit_of_one_process(tmp_path):
    source, target = tmp_path / "rows.npy", tmp_path / "mixture.npz"
    np.save(source, rows())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(EXAMPLE), str(source), str(target)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "403 rows on 2 processes" in done.stdout
    alone = AnnealedMixture(4, random_state=0).fit(rows())
    found = np.load(target)
    np.testing.assert_allclose(found["weights"], alone.weights_, atol=1e-6)
    np.testing.assert_allclose(found["means"], alone.means_, atol=1e-6)
    np.testing.assert_allclose(found["covariances"], alone.covariances_, atol=1e-6)
    np.testing.assert_allclose(found["temperatures"], alone.temperature_path_, rtol=1e-6)
    assert float(found["lower_bound"]) == pytest.approx(alone.lower_bound_, abs=1e-9)


def on_a_rank(rank: int, folder: str) -> None:
    """All fits of the test below, by one of two processes."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    x, weights = rows(), np.random.default_rng(1).uniform(0, 2, 403)
    part = slice(0, 150) if rank == 0 else slice(150, None)
    kept = {}
    for kind in ("tied", "diag", "spherical"):
        model = AnnealedMixture(4, covariance_type=kind, random_state=rank, distributed=True)
        kept[kind] = model.fit(x[part], sample_weight=weights[part]).means_
    model = AnnealedMixture(6, criterion="held-out", random_state=0, distributed=True)
    kept["grown"] = model.fit(x[part]).means_
    kept["chunks"] = model.set_params(criterion=None).partial_fit(x[part][::2]).means_
    kept["chunks"] = model.partial_fit(x[part][1::2]).means_
    labels = np.eye(4)[np.sort(np.arange(403) % 4)]
    model = AnnealedMixture(4, distributed=True)
    kept["given"] = model.fit(x[part], responsibilities=labels[part]).means_
    kept["responsibilities"] = model.responsibilities_
    broken = x[part].copy()
    broken[5, 1] = np.nan if rank == 1 else broken[5, 1]
    errors = []
    for bad in (broken, x[part][:, : 2 + rank], x[part][:1]):
        try:
            AnnealedMixture(4, distributed=True).fit(bad)
        except ValueError as error:
            errors.append(str(error))
    try:
        model.fit(x[part], responsibilities=labels[part] * (2 if rank else 1))
    except ValueError as error:
        errors.append(str(error))
    weighted = weights[part] if rank else None
    for settings, given, others in (
        ({"kernel": ("gaussian", "laplace")[rank]}, x[part], {}),
        ({"n_components": (4, -1)[rank]}, x[part], {}),
        ({"means_init": np.zeros((4, 3)) + rank}, x[part], {}),
        ({}, x[part], {"sample_weight": weighted}),
        ({}, x[part] if rank == 0 else x[:0], {}),
    ):
        chosen = {"n_components": 4, "distributed": True} | settings
        try:
            AnnealedMixture(**chosen).fit(given, **others)
        except ValueError as error:
            errors.append(str(error))
    np.savez(f"{folder}/rank{rank}.npz", errors=np.array(errors), **kept)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_weights_growth_chunks_and_errors_on_two_ranks(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)  # where the spawned processes find this module
    torch.multiprocessing.spawn(on_a_rank, (str(tmp_path),), nprocs=2)
    first, second = (np.load(tmp_path / f"rank{rank}.npz") for rank in range(2))
    x, weights = rows(), np.random.default_rng(1).uniform(0, 2, 403)
    for kind in ("tied", "diag", "spherical"):
        model = AnnealedMixture(4, covariance_type=kind, random_state=0)
        alone = model.fit(x, sample_weight=weights)
        np.testing.assert_allclose(first[kind], alone.means_, atol=1e-6)
        np.testing.assert_array_equal(first[kind], second[kind])
    grown = AnnealedMixture(6, criterion="held-out", random_state=0).fit(x)
    np.testing.assert_allclose(first["grown"], grown.means_, atol=1e-6)
    given = AnnealedMixture(4).fit(x, responsibilities=np.eye(4)[np.sort(np.arange(403) % 4)])
    np.testing.assert_allclose(first["given"], given.means_, atol=1e-6)
    both = np.vstack([first["responsibilities"], second["responsibilities"]])
    np.testing.assert_allclose(both, given.responsibilities_, atol=1e-6)
    np.testing.assert_array_equal(first["chunks"], second["chunks"])
    mine, theirs = first["errors"].tolist(), second["errors"].tolist()
    assert mine[0].startswith("the rows of rank 1 can't be used: Input X contains NaN: row 5")
    assert theirs[0].startswith("Input X contains NaN: row 5, column 1")
    for told in (mine, theirs):
        assert "the ranks' rows have [2, 3] features" in told[1]
        assert "n_components = 4, but X has 2 distinct row(s)" in told[2]
        assert "responsibilities in row 0 are not a distribution" in told[3]
        assert told[4].startswith("rank 1 was given kernel = 'laplace', and rank 0 'gaussian'")
        assert "rank 1 was given n_components = -1, and rank 0 4; give" in told[5]
        assert "rank 1 was given means_init = [[1.0, 1.0, 1.0], " in told[6]
        assert "rank 1 was given sample_weight is None = False, and rank 0 True" in told[7]
        assert "Found array with 0 sample(s)" in told[8]
        assert len(told) == 9
