"""One look for all figures: the journal's column width, the families' colours of the library."""

from pathlib import Path

import matplotlib

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
#: A colour and a mark a contestant.
WHO = {
    "lowrank": ("#0072b2", "o"),
    "PyTorch": ("#d55e00", "s"),
    "PyTorch, channels last": ("#e69f00", "^"),
    "SciPy": ("#009e73", "D"),
    "OpenCV": ("#cc79a7", "v"),
    "onnxruntime": ("#56b4e9", "D"),
}


def within(limits, value):
    """Whether a tick is in sight."""
    low, high = limits
    return low <= value <= high


def save(figure, target):
    """The same table gives the same file, byte for byte."""
    figure.savefig(target, dpi=200, metadata=figures.STEADY[Path(target).suffix])
