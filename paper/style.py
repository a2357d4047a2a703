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
#: Families that a facet compares, in its colours: no facet has two of one colour.
GROUPS = {
    "matrices": (
        "channel_svd output",
        "channel_svd input",
        "spatial_svd",
        "jaderberg",
        "kronecker",
    ),
    "depthwise terms": ("network_decoupling", "filter_basis", "cp3", "cp"),
    "tensors": ("tucker", "tucker_full", "tucker_cp", "tensor_train"),
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
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


def facets(axes, curves, labels):
    """Draw curves of families on one row of axes per group, those of other groups in grey.

    Parameters
    ----------
    axes : ndarray of Axes, shape (groups, columns)
        Panels.
    curves : sequence of dict of str to ((x, y), ...)
        Points of each family, per column.
    labels : bool
        Whether the last column has legends at its right.
    """
    for row, (group, names) in zip(axes, GROUPS.items()):
        for panel, some in zip(row, curves):
            for name, points in some.items():
                if name not in names:
                    panel.plot(*zip(*sorted(points)), color="0.85", linewidth=0.6, zorder=1)
            for name, colour in zip(names, COLOURS):
                points = sorted(some.get(name, []))
                if points:
                    every = max(1, len(points) // 10)
                    panel.plot(*zip(*points), color=colour, marker="o", markevery=every, label=name)
            panel.set(xscale="log", ylim=(0, 1))
            panel.grid(alpha=0.25, linewidth=0.4)
            panel.minorticks_off()
        row[0].set_ylabel(f"{group}\nrelative error")
        if labels:
            known = {}
            for panel in row:
                known |= dict(zip(*reversed(panel.get_legend_handles_labels())))
            row[-1].legend(known.values(), known, frameon=False, loc="center left",
                           bbox_to_anchor=(1, 0.5))  # fmt: skip
