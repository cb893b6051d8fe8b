"""The README's picture: keys alive by layer, untouched and under the demo's pattern.

python benchmarks/picture.py runs/demo-....json      from a record that `tempering demo` wrote
"""

from __future__ import annotations

import sys
from pathlib import Path

from tempering.reports import Record, figure_support_by_layer, save_figure

TARGET = Path(__file__).parents[1] / "docs/images/support.svg"

if __name__ == "__main__":
    print(save_figure(figure_support_by_layer(Record.load(sys.argv[1])), TARGET))
