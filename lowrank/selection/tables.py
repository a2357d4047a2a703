"""Tables of a frontier, as text and for notebooks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lowrank.core import tables
from lowrank.core.tables import format_count, format_seconds

if TYPE_CHECKING:
    from lowrank.selection.candidates import Candidate
    from lowrank.selection.front import Frontier

HEAD = (
    "family", "rank", "error", "bound", "macs", "fewer", "time", "faster", "efficiency", "params",
    "traffic", "fused",
)  # fmt: skip

#: Columns that a narrow table drops, in this order.
OPTIONAL = ("fused", "traffic", "bound", "params", "efficiency")

#: Signs of predicted times and of options slower than the dense kernel.
PREDICTED, SLOWER = "~", "!"


def text_table(front: Frontier) -> str:
    """Format a frontier as text: one candidate per line, the dense kernel last."""
    shown = tables.thinned(list(front))
    lines = tables.align_columns([HEAD, *(row(c, front.dense) for c in shown)])
    return "\n".join([title(front, len(shown)), *lines, *notes(front)])


def html_table(front: Frontier) -> str:
    """Format a frontier as an HTML table."""
    shown = tables.thinned(list(front))
    rows = [HEAD, *(row(c, front.dense) for c in shown)]
    return tables.html_table(rows, [title(front, len(shown)), *notes(front)])


def notes(front: Frontier) -> list[str]:
    """Return the legend of a table."""
    legend = []
    if any(not c.exact for c in front):
        legend.append("* fitted by iteration: not optimal in theory, refined when built")
    if any(c.is_slower(front.dense) for c in front):
        legend.append(f"{SLOWER} slower than the dense kernel")
    if front.dense.is_measured and not all(c.is_measured for c in front):
        legend.append(f"{PREDICTED} predicted, scaled to the measured times")
    elif not front.dense.is_measured:
        legend.append(f"{PREDICTED} predicted: {tables.model(front.error)}")
    return legend


def title(front: Frontier, shown: int) -> str:
    """Return the line above a table."""
    part = f", {shown} shown" if shown < len(front) else ""
    spatial = "x".join(map(str, front.input_shape[1:]))
    channels = front.input_shape[0]
    batch = f", batch {front.batch}" if front.batch > 1 else ""
    threads = f", threads: {front.threads}" if front.threads else ""
    runtime = f", runtime {front.runtime}" if front.runtime != "lowrank" else ""
    return (
        f"{len(front)} candidates{part}, by {front.axis}, input of {channels} channels x "
        f"{spatial}{batch}{threads}{runtime}"
    )


def row(c: Candidate, dense: Candidate) -> tuple[str, ...]:
    """Return the cells of a candidate under :data:`HEAD`."""
    return (
        c.name + ("" if c.exact else " *"),
        ",".join(map(str, c.rank)) or "-",
        f"{c.error:.4f}",
        f"{c.bound:.4f}",
        format_count(c.cost.macs),
        f"{dense.cost.macs / c.cost.macs:.2f}x",
        format_time(c),
        format_speed_up(c, dense),
        format_efficiency(c.efficiency(dense)),
        format_count(c.cost.params),
        format_count(c.cost.traffic),
        format_count(c.cost.fused),
    )


def format_time(c: Candidate) -> str:
    """Return the seconds of a candidate, with a sign if they are predicted."""
    return ("" if c.is_measured else PREDICTED) + format_seconds(c.seconds)


def format_speed_up(c: Candidate, dense: Candidate) -> str:
    """Return the speed-up over the dense kernel, with a sign if the candidate is slower."""
    mark = f" {SLOWER}" if c.is_slower(dense) else ""
    return f"{dense.seconds / c.seconds:.2f}x{mark}"


def format_efficiency(efficiency: float) -> str:
    """Return a speed-up efficiency as a percentage, or a dash if no MACs were saved."""
    # Adding 0 turns a rounded -0 into 0.
    return f"{round(efficiency, 2) + 0.0:.0%}" if math.isfinite(efficiency) else "-"
