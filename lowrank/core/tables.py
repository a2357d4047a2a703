"""Plain-text and HTML tables, and numbers with units in them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TypeVar

T = TypeVar("T")

ROWS = 24  # of a long frontier, evenly chosen, its ends among them


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
    """Describe the median error of predicted seconds."""
    if error != error:
        return "coefficients of another machine: 'lowrank calibrate' measures this one"
    return f"median error of predictions {error:.0%}"


def format_count(n: float) -> str:
    """Return a count with three digits and an SI prefix."""
    for unit in ("", "k", "M", "G", "T"):
        if n < 999.5 or unit == "T":
            return f"{n:.3g}{unit}" if unit or n % 1 else f"{int(n)}"
        n /= 1000
    raise AssertionError
