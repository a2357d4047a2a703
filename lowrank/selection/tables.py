"""Tables of a frontier, as text and for notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank.core import tables
from lowrank.core.tables import format_count, format_seconds

if TYPE_CHECKING:
    from lowrank.selection.candidates import Candidate
    from lowrank.selection.front import Frontier

HEAD = (
    "family", "rank", "error", "bound", "macs", "fewer", "params", "traffic", "fused", "predicted",
    "faster", "realised",
)  # fmt: skip

#: Meaning of the star behind a name.
NOTE = "* fitted by iteration: not optimal in theory, refined when built"


def text_table(front: Frontier) -> str:
    """Format a frontier as text: one candidate per line, the dense kernel last."""
    shown = tables.thinned(list(front))
    lines = tables.align_columns([HEAD, *(row(c, front.dense) for c in shown)])
    return "\n".join([title(front, len(shown)), *lines, *_notes(front)])


def html_table(front: Frontier) -> str:
    """Format a frontier as an HTML table."""
    shown = tables.thinned(list(front))
    rows = [HEAD, *(row(c, front.dense) for c in shown)]
    return tables.html_table(rows, [title(front, len(shown)), *_notes(front)])


def _notes(front: Frontier) -> list[str]:
    """Return the lines below a table."""
    star = [NOTE] if any(not c.exact for c in front) else []
    return [*star, f"predicted: {tables.model(front.error)}"]


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
        format_count(c.cost.params),
        format_count(c.cost.traffic),
        format_count(c.cost.fused),
        format_seconds(c.seconds),
        f"{dense.seconds / c.seconds:.2f}x",
        f"{c.realised:.0%}",
    )
