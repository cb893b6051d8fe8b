"""TemperatureScaler on tables drawn to break it: scales 1e-150 to 1e150, ties, gaps, weights.

    python benchmarks/calibration_fuzz.py              500 tables
    python benchmarks/calibration_fuzz.py --draws 50   fewer

Each table must be fitted with a temperature inside its bounds, and then give each row the
probabilities that the row has alone, or be refused with a reason that is true of it.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.calibration_draws import check, draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    ends: Counter[str] = Counter()
    faults, slowest = [], 0.0
    for seed in range(given.seed, given.seed + given.draws):
        start = time.perf_counter()
        try:
            # Refusals of one kind differ in row and value.
            ends[re.sub(r"-?[0-9][0-9.e+-]*", "#", check(draw(seed)))[:70]] += 1
        except Exception as error:
            faults.append(f"{draw(seed).text}: {type(error).__name__} {error}")
        slowest = max(slowest, time.perf_counter() - start)
    for reason, count in ends.most_common():
        print(f"{count:5d}  {reason}")
    print(f"{len(faults):5d}  faults; the slowest table took {slowest:.2f} s")
    for fault in faults:
        print(fault)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
