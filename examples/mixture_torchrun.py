"""One mixture, fitted by several processes that each hold a part of the rows.

    torchrun --nproc-per-node 2 examples/mixture_torchrun.py rows.npy mixture.npz

Every process reads its part of rows.npy [rows, features] and no other; only sums travel. All come
to the same mixture, that of one process that holds all rows; the first one writes it.
"""

from __future__ import annotations

import sys

import numpy as np
import torch.distributed

from tempering.estimators import AnnealedMixture


def main(source: str, target: str, components: int = 4, kind: str = "full") -> None:
    torch.distributed.init_process_group("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = np.load(source, mmap_mode="r")
    ends = np.linspace(0, len(rows), ranks + 1).astype(int)
    part = np.array(rows[ends[rank] : ends[rank + 1]])
    fitted = AnnealedMixture(
        components, covariance_type=kind, random_state=0, distributed=True
    ).fit(part)
    if rank == 0:
        np.savez(
            target,
            weights=fitted.weights_,
            means=fitted.means_,
            covariances=fitted.covariances_,
            temperatures=fitted.temperature_path_,
            lower_bound=fitted.lower_bound_,
        )
        print(f"{len(rows)} rows on {ranks} processes: {fitted.lower_bound_:.6f} nats a row")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]), *sys.argv[4:5])
