"""Style of all figures: column widths of the journal, colours and markers of the families."""

from pathlib import Path

import matplotlib

from lowrank import FAMILIES
from lowrank.report import figures

matplotlib.use("agg")
matplotlib.rcParams.update(
    {
        **figures.STYLE,
        "font.size": 8,
        "legend.fontsize": 7,
        "lines.linewidth": 0.9,
        "lines.markersize": 2.5,
        "figure.constrained_layout.use": True,
    }
)
COLUMN, PAGE = 3.4, 7.0  # inches
#: Colour and marker per library.
LIBRARIES = {
    "lowrank": ("#0072b2", "o"),
    "PyTorch": ("#d55e00", "s"),
    "PyTorch, channels last": ("#e69f00", "^"),
    "SciPy": ("#009e73", "D"),
    "OpenCV": ("#cc79a7", "v"),
    "onnxruntime": ("#56b4e9", "P"),
}
#: Colour and marker per curve.  The variants of channel_svd reduce different channels.
LOOK = {
    "dense": ("#555555", "*"),
    "channel_svd output": ("#0072b2", "o"),
    "channel_svd input": ("#0072b2", "s"),
    **{name: (f.color, f.marker) for name, f in FAMILIES.items() if name != "channel_svd"},
}


def curve(row):
    """Return the key of LOOK for a table row with the columns family and variant."""
    family = row["family"]
    return f"{family} {row['variant']}" if family == "channel_svd" else family


def within(limits, value):
    """Return whether a tick lies within the limits of its axis."""
    low, high = limits
    return low <= value <= high


def save(figure, target):
    """Write a figure; the same table gives the same bytes."""
    figure.savefig(target, dpi=200, metadata=figures.METADATA[Path(target).suffix])
