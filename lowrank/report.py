"""Plain text tables: how a frontier prints itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from lowrank.search import Candidate, Frontier

T = TypeVar("T")

ROWS = 24  # of a long frontier, evenly chosen, its ends among them


HEAD = ("family", "rank", "error", "bound", "macs", "fewer", "params", "traffic", "fused")


def table(front: Frontier) -> str:
    """A frontier as people read it: one candidate a line, the dense kernel last."""
    shown = thinned(list(front))
    lines = columns([HEAD, *(row(c, front.dense.cost.macs) for c in shown)])
    notes = []
    if any(not c.exact for c in front):
        notes.append(NOTE)
    return "\n".join([title(front, len(shown)), *lines, *notes])


#: What the star behind a name says.
NOTE = "* not optimal in theory: refined, where it can be, when built"


def title(front: Frontier, shown: int) -> str:
    """What a table of a frontier is about."""
    part = f", {shown} shown" if shown < len(front) else ""
    spatial = "x".join(map(str, front.input_shape[1:]))
    channels = front.input_shape[0]
    return (
        f"{len(front)} candidates{part}, by {front.axis}, input of {channels} channels x {spatial}"
    )


def row(c: Candidate, whole: int) -> tuple[str, ...]:
    """A candidate under :data:`HEAD`; `whole` is the dense kernel's multiply-adds."""
    return (
        c.name + ("" if c.exact else " *"),
        ",".join(map(str, c.rank)) or "-",
        f"{c.error:.4f}",
        f"{c.bound:.4f}",
        amount(c.cost.macs),
        f"{whole / c.cost.macs:.2f}x",
        amount(c.cost.params),
        amount(c.cost.traffic),
        amount(c.cost.fused),
    )


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
        if n < 999.5 or unit == "T":
            return f"{n:.3g}{unit}" if unit or n % 1 else f"{int(n)}"
        n /= 1000
    raise AssertionError
