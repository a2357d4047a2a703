"""Plain text tables: how a frontier prints itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from lowrank.search import Frontier

T = TypeVar("T")

ROWS = 24  # of a long frontier, evenly chosen, its ends among them


def table(front: Frontier) -> str:
    """A frontier as people read it: one candidate a line, the dense kernel last."""
    whole = front.dense.cost
    rows = []
    for c in thinned(list(front)):
        rows.append(
            (
                c.name + ("" if c.exact else " *"),
                ",".join(map(str, c.rank)) or "-",
                f"{c.error:.4f}",
                f"{c.bound:.4f}",
                amount(c.cost.macs),
                f"{whole.macs / c.cost.macs:.2f}x",
                amount(c.cost.params),
                amount(c.cost.traffic),
                amount(c.cost.fused),
            )
        )
    head = ("family", "rank", "error", "bound", "macs", "fewer", "params", "traffic", "fused")
    lines = columns([head, *rows])
    shown = f", {len(rows)} shown" if len(rows) < len(front) else ""
    spatial = "x".join(map(str, front.input_shape[1:]))
    title = f"{len(front)} candidates{shown}, by {front.axis}, {front.input_shape[0]} channels"
    notes = []
    if any(not c.exact for c in front):
        notes.append("* fitted by iteration: refined when built")
    return "\n".join([f"{title}, input {spatial}", *lines, *notes])


def thinned(items: Sequence[T], most: int = ROWS) -> list[T]:
    """At most `most` of `items`, evenly spaced, first and last included."""
    if len(items) <= most:
        return list(items)
    step = (len(items) - 1) / (most - 1)
    return [items[round(i * step)] for i in range(most)]


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text, first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def amount(n: float) -> str:
    """A count with three digits and a unit."""
    for unit in ("", "k", "M", "G", "T"):
        if n < 1000 or unit == "T":
            return f"{n:.3g}{unit}" if unit or n % 1 else f"{int(n)}"
        n /= 1000
    raise AssertionError
