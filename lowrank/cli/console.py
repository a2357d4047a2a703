"""What all commands share: tables, JSON, progress, and options that are read alike."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

try:
    import typer as typer
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.table import Table
except ImportError:  # the library works without; the command does not
    raise SystemExit("the command needs typer and rich: pip install 'lowrank[cli]'") from None

from lowrank._typing import Ints

app = typer.Typer(
    help="Separable and low-rank convolution: what it costs and what it saves.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)

# Click's base of all usage errors; newer typers carry a copy of click of their own.
USAGE: Any = typer.BadParameter.__mro__[2]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Size = Annotated[
    str | None, typer.Option("--input", metavar="HxW", help="Spatial size of the input, as 56x56.")
]


def fail(message: str) -> None:
    """One line, and exit code 2."""
    print(f"lowrank: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def size_of(text: str | None) -> Ints | None:
    """Of ``--input``."""
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]+(x[0-9]+){0,2}", text) or "0" in text.split("x"):
        raise ValueError(f"--input must be 1 to 3 sizes, as 56x56, got {text!r}")
    return tuple(map(int, text.split("x")))


def numbers_of(option: str, text: str | None) -> int | list[int] | None:
    """One number, or one an axis."""
    if text is None:
        return None
    try:
        numbers = [int(n) for n in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option} must be one number or one an axis, as 2,1, got {text!r}"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def padding_of(text: str | None) -> int | str | list[Any] | None:
    """Of ``--padding``."""
    if text is None or text in ("same", "valid"):
        return text
    try:
        parts = [[int(n) for n in part.split(":")] for part in text.split(",")]
    except ValueError:
        parts = [[]]
    if any(len(p) not in (1, 2) for p in parts):
        raise ValueError(
            f"--padding must be as 1 or 1,0 or 0:1,0:1 (before:after), same or valid, got {text!r}"
        )
    pairs = [[p[0], p[-1]] for p in parts]
    return pairs if len(pairs) > 1 or len(parts[0]) > 1 else parts[0][0]


def rank_of(text: str) -> int | Sequence[int]:
    """Of ``--rank``."""
    try:
        ranks = tuple(int(r) for r in text.split(","))
    except ValueError:
        raise ValueError(f"--rank must be integers, as 8 or 8,12, got {text!r}") from None
    return ranks[0] if len(ranks) == 1 else ranks


def budget_of(text: str | None) -> float | str | None:
    """A share, or an amount with its unit."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text


def print_json(value: Any) -> None:
    """What ``--json`` asks for."""
    print(json.dumps(value, indent=1, allow_nan=False))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A table as wide as it needs: a narrow terminal wraps lines, but no number is cut."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    wide = Console(width=1000)
    need = wide.measure(table).maximum
    Console(width=max(need, wide.options.min_width), highlight=False).print(table)


class _Left(ProgressColumn):
    """Time left, from the first step on: rich's own waits for more of them, which are minutes."""

    def render(self, task: Task) -> str:
        """Of one thing."""
        share = task.completed / (task.total or 1.0)
        if not 0 < share < 1 or task.elapsed is None:
            return ""
        seconds = round(task.elapsed * (1 - share) / share)
        return f"{seconds // 60}:{seconds % 60:02d} left"


@contextmanager
def share_bars() -> Iterator[Any]:
    """Bars on stderr of how much is done and how long the rest takes, one for each thing."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:20}"), BarColumn(), TaskProgressColumn(),
        TimeElapsedColumn(), _Left(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def step(name: str, share: float) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=1.0)
            bar.update(tasks[name], completed=share)

        yield step


@contextmanager
def progress_bar(total: int) -> Iterator[Any]:
    """A bar on stderr, gone when done; calling what it gives begins the next part."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("reading", total=total)
        started = False

        def step(name: str) -> None:
            nonlocal started
            bar.update(task, description=name, advance=int(started))
            started = True

        yield step
