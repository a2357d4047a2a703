"""One look for all figures: the journal's column width, the families' colours of the library."""

from pathlib import Path

import matplotlib

from lowrank import plots

matplotlib.use("agg")
matplotlib.rcParams.update(
    {
        **plots.STYLE,
        "font.size": 8,
        "legend.fontsize": 7,
        "lines.linewidth": 0.9,
        "lines.markersize": 2.5,
        "figure.constrained_layout.use": True,
    }
)
COLUMN, PAGE = 3.4, 7.0  # inches


def save(figure, target):
    """The same table gives the same file, byte for byte."""
    figure.savefig(target, dpi=200, metadata=plots.STEADY[Path(target).suffix])
