"""Colours, each with one meaning in all figures, and the settings of a figure.

Warm is hot (T above 1, many hypotheses alive), blue is cold (T below 1, few alive); the middle
of the scale is quiet. The untempered model is drawn in ink. Patterns have hues that are neither
warm nor blue, in the order they appear. Each colour has a counterpart for dark pages: figures are
drawn with the light one, and in the HTML report CSS variables replace the hex codes.
"""

from __future__ import annotations

from typing import Any

from matplotlib.colors import LinearSegmentedColormap, ListedColormap, to_hex

STEPS = 21  # of the heat scale: more can't be told apart, and each is a CSS variable

_ENDS = {
    "light": ("#1c4e9c", "#6fa3dc", "#eceae4", "#ee9a4d", "#b3370f"),
    "dark": ("#4f8fe8", "#2f5f9e", "#34373c", "#b8672a", "#f58a55"),
}
_NAMES = ("ink", "quiet", "line", "page", "card", "cold", "hot", "s0", "s1", "s2", "s3", "s4", "s5")
_PLAIN = {
    "light": (
        "#1d2126", "#5d6670", "#d5d9dd", "#fbfbf9", "#ffffff", "#2562b0", "#bf4a12",
        "#0b7a62", "#7b4cc0", "#b32d74", "#6b7a12", "#5a6b7c", "#8a6a52",
    ),
    "dark": (
        "#e7e9ec", "#a3abb4", "#3a4047", "#131519", "#1b1e23", "#6ea6f0", "#f09060",
        "#3cc4a2", "#b394f0", "#ee7ab3", "#b6c64a", "#9db0c4", "#c9a58a",
    ),
}  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P")


def _heat(theme: str) -> list[str]:
    scale = LinearSegmentedColormap.from_list("heat", _ENDS[theme])
    return [to_hex(scale(i / (STEPS - 1))) for i in range(STEPS)]


def palette(theme: str) -> dict[str, str]:
    """Name -> hex of every colour of a "light" or "dark" page; h0 (cold) to h20 (hot) is heat."""
    heat = {f"h{i}": colour for i, colour in enumerate(_heat(theme))}
    return dict(zip(_NAMES, _PLAIN[theme])) | heat


LIGHT = palette("light")
INK, QUIET, LINE, CARD = (LIGHT[name] for name in ("ink", "quiet", "line", "card"))
COLD, HOT = LIGHT["cold"], LIGHT["hot"]
HEAT = ListedColormap([LIGHT[f"h{i}"] for i in range(STEPS)], name="heat")


def series(i: int) -> dict[str, Any]:
    """Colour, marker and dash of the i-th pattern; the untempered model is ink and uncounted."""
    return {
        "color": LIGHT[f"s{i % 6}"],
        "marker": _MARKERS[i % 6],
        "linestyle": ("-", "--", ":")[i // 6 % 3],
    }


# On a phone one unit of the SVG is one CSS pixel, so these are the sizes that are seen there.
WIDTH = 350 / 72
RC = {
    "font.family": "sans-serif",
    "font.size": 11.5,
    "axes.titlesize": 11.5,
    "axes.labelsize": 11.5,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.fontsize": 10.5,
    "text.parse_math": False,  # labels are a user's text, in which "$" is a character
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.unicode_minus": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.handlelength": 1.8,
    "figure.facecolor": CARD,
    "svg.fonttype": "none",  # text stays text: searchable, and in the reader's own font
    "svg.hashsalt": "tempering",  # the same record gives the same bytes
}


def heat(value: float) -> str:
    """The colour at `value` of the heat scale, 0 cold to 1 hot."""
    return LIGHT[f"h{min(STEPS - 1, max(0, int(value * STEPS)))}"]
