"""Loss against position, the headline of `length_tuning.py`."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

SHOWN = 0.17  # nats; what is further from the plain model leaves the frame
NAMES = {
    "none": "no scaling",
    "yarn": "YaRN",
    "dynamic": "dynamic NTK",
    "linear": "linear scaling",
}


def figure(results: list[dict[str, Any]], trained: int, path: Path) -> None:
    """Loss above the plain model against position, one panel a length and scaling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [item for item in results if item["length"] == max(r["length"] for r in results)]
    panels = [item for item in results if item["length"] == trained] + panels
    panels = list({(p["scaling"], p["length"]): p for p in panels}.values()) or results
    fig, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
    labels = list(dict.fromkeys(label for p in panels for label in p["by position"]))
    for axis, item in zip(axes[0], panels, strict=True):
        middles = [math.sqrt(max(a, 1) * b) for a, b in itertools.pairwise(item["edges"])]
        plain = item["by position"]["plain"]
        for label, curve in item["by position"].items():
            if label != "plain":
                above = [x - y for x, y in zip(curve, plain, strict=True)]
                axis.plot(middles, above, f"C{labels.index(label)}", label=label, linewidth=1.2)
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_ylim(-SHOWN, SHOWN)
        axis.set_xscale("log", base=2)
        axis.set_title(f"{item['length']} tokens, {NAMES[item['scaling']]}", fontsize=9)
        axis.set_xlabel("position")
    axes[0][0].set_ylabel("loss above the plain model, nats")
    known = {
        label: line
        for axis in axes[0]
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    fig.tight_layout(rect=(0, 0.1, 1, 1))
    fig.legend(known.values(), known.keys(), loc="lower center", ncols=4, fontsize=7, frameon=False)
    fig.savefig(path)
    plt.close(fig)
