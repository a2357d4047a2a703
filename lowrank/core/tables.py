"""Plain text tables: how a frontier prints itself."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from lowrank.selection import Candidate, Frontier

T = TypeVar("T")

ROWS = 24  # of a long frontier, evenly chosen, its ends among them


HEAD = (
    "family", "rank", "error", "bound", "macs", "fewer", "params", "traffic", "fused", "predicted",
    "faster", "realised",
)  # fmt: skip


def table(front: Frontier) -> str:
    """A frontier as people read it: one candidate a line, the dense kernel last."""
    shown = thinned(list(front))
    lines = align_columns([HEAD, *(row(c, front.dense) for c in shown)])
    return "\n".join([title(front, len(shown)), *lines, *notes(front)])


def html(front: Frontier) -> str:
    """The same for notebooks."""
    shown = thinned(list(front))
    rows = [HEAD, *(row(c, front.dense) for c in shown)]
    return html_table(rows, [title(front, len(shown)), *notes(front)])


def html_table(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """Return an HTML table of text, its first row as header, below lines of notes."""
    lines = []
    for i, line in enumerate(rows):
        tag = "td" if i else "th"
        cells = (
            f'<{tag} style="text-align:{"right" if j else "left"}">{escape(cell)}</{tag}>'
            for j, cell in enumerate(line)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div><p>{'<br>'.join(map(escape, notes))}</p><table>{''.join(lines)}</table></div>"


def notes(front: Frontier) -> list[str]:
    """What has to be said below a table."""
    star = [NOTE] if any(not c.exact for c in front) else []
    return [*star, f"predicted: {model(front.error)}"]


#: What the star behind a name says.
NOTE = "* not optimal in theory: refined, where it can be, when built"


def title(front: Frontier, shown: int) -> str:
    """What a table of a frontier is about."""
    part = f", {shown} shown" if shown < len(front) else ""
    spatial = "x".join(map(str, front.input_shape[1:]))
    channels = front.input_shape[0]
    batch = f", batch {front.batch}" if front.batch > 1 else ""
    threads = f", threads: {front.threads}" if front.threads else ""
    runtime = f", run by {front.runtime}" if front.runtime != "lowrank" else ""
    return (
        f"{len(front)} candidates{part}, by {front.axis}, input of {channels} channels x "
        f"{spatial}{batch}{threads}{runtime}"
    )


def row(c: Candidate, dense: Candidate) -> tuple[str, ...]:
    """A candidate under :data:`HEAD`, beside the dense kernel."""
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


def thinned(items: Sequence[T], most: int = ROWS) -> list[T]:
    """Return at most `most` evenly spaced items, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    step = (len(items) - 1) / (most - 1)
    return [items[round(i * step)] for i in range(most)]


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of a text table, the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def format_seconds(seconds: float) -> str:
    """Return a time with three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def model(error: float) -> str:
    """How far predicted seconds are off, in the middle."""
    if error != error:
        return "rates of another machine: 'lowrank calibrate' measures this one"
    return f"half of such predictions are within {error:.0%}"


def format_count(n: float) -> str:
    """Return a count with three digits and an SI prefix."""
    for unit in ("", "k", "M", "G", "T"):
        if n < 999.5 or unit == "T":
            return f"{n:.3g}{unit}" if unit or n % 1 else f"{int(n)}"
        n /= 1000
    raise AssertionError
