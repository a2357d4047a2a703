"""Parts shared by all commands: the application, parsers of options, tables and progress."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_type_hints

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

from lowrank import engine, perfmodel
from lowrank._typing import Ints
from lowrank.families import FAMILIES
from lowrank.interop import files
from lowrank.selection import parse_budget

app = typer.Typer(
    help="Separable and low-rank approximation of convolutions.",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    rich_markup_mode=None,
)

# Base class of usage errors in Click; recent versions of typer contain a copy of Click.
USAGE_ERROR: Any = typer.BadParameter.__mro__[2]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Size = Annotated[
    str | None,
    typer.Option("--input", metavar="HxW", help="Spatial size of the input, such as 56x56."),
]
_BUDGET = "share such as 0.5 or 50%, or amount such as"
Macs = Annotated[
    str | None, typer.Option(metavar="SHARE|COUNT", help=f"MAC budget: {_BUDGET} 20M.")
]
Params = Annotated[
    str | None, typer.Option(metavar="SHARE|COUNT", help=f"Parameter budget: {_BUDGET} 100k.")
]
Seconds = Annotated[
    str | None,
    typer.Option(
        "--time", "--seconds", metavar="SHARE|TIME", help=f"Time budget per call: {_BUDGET} 3ms."
    ),
]
Bytes = Annotated[
    str | None, typer.Option(metavar="SHARE|SIZE", help=f"Budget of weight bytes: {_BUDGET} 1M.")
]
Families = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[,NAME...]",
        help=f"Families to try, separated by commas: {', '.join(FAMILIES)}.",
    ),
]
Batch = Annotated[int | None, typer.Option(min=1, metavar="N", help="Examples per call. [1]")]
Threads = Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads; all if not given.")]
#: Runtimes of convolutions on the CPU.
RUNTIMES = ("lowrank", "onnxruntime", "torch", "torch-channels-last")
Runtime = Annotated[
    str | None,
    typer.Option(metavar="|".join(RUNTIMES), help="Runtime that times are for. [lowrank]"),
]
NoMeasure = Annotated[
    bool,
    typer.Option("--no-measure", help="Only predict times; measure nothing."),
]
Algorithm = Annotated[
    str,
    typer.Option(
        metavar="|".join(engine.ALGORITHMS),
        help="auto, or direct: no Winograd or Toom-Cook algorithm in lowrank.",
    ),
]


#: Messages that name a wrong value and the known ones, in either order.
_CHOICES = (
    re.compile(r"\b(?:one|out) of (?P<known>.+?), got '(?P<given>[^']*)'"),
    re.compile(r"'(?P<given>[^']*)' among (?P<known>.+)"),
    re.compile(r"'(?P<given>[^']*)'; layers are (?P<known>.+)"),
)


def fail(message: str) -> None:
    """Print one line to stderr, with a similar name for a misspelt one, and exit with code 2."""
    print_line(" ".join(message.split()) + _suggestion(message))
    raise SystemExit(2)


def print_line(text: str) -> None:
    """Print an error, a warning or a note to stderr, with the name of the program."""
    print(f"lowrank: {text}", file=sys.stderr)


def _suggestion(message: str) -> str:
    """Return the known name that is most similar to a wrong one, if any is similar."""
    found = next((m for pattern in _CHOICES if (m := pattern.search(message))), None)
    if found is None or "did you mean" in message.lower():
        return ""
    known = re.split(r",? (?:or )?", found["known"])
    near = get_close_matches(found["given"], known, 1)
    return f": did you mean {near[0]}?" if near else ""


def example(*lines: str) -> str:
    """Return the examples of a command as the end of its help: lines that are not joined."""
    return "Examples:\n\n\b\n" + "\n".join(f"  lowrank {line}" for line in lines)


def parse_size(text: str | None) -> Ints | None:
    """Parse ``--input``: sizes joined by x."""
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]+(x[0-9]+){0,2}", text) or "0" in text.split("x"):
        raise ValueError(f"--input must be 1 to 3 positive sizes, such as 56x56, got {text!r}")
    return tuple(map(int, text.split("x")))


def parse_numbers(option: str, text: str | None, number: Callable[[str], Any] = int) -> Any:
    """Parse one number, by default an integer, or a list of one per axis."""
    if text is None:
        return None
    try:
        numbers = [number(n) for n in text.split(",")]
    except ValueError:
        kind = "integer" if number is int else "number"
        raise ValueError(
            f"{option} must be one {kind}, or one per axis such as 2,1, got {text!r}"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def parse_padding(text: str | None) -> int | str | list[Any] | None:
    """Parse ``--padding``: amounts per axis, before:after pairs, same or valid."""
    if text is None or text in ("same", "valid"):
        return text
    try:
        parts = [[int(n) for n in part.split(":")] for part in text.split(",")]
    except ValueError:
        parts = [[]]
    if any(len(p) not in (1, 2) for p in parts):
        raise ValueError(
            f"--padding must be same, valid, 1, 1,0 or 0:1,0:1 (before:after), got {text!r}"
        )
    pairs = [[p[0], p[-1]] for p in parts]
    return pairs if len(pairs) > 1 or len(parts[0]) > 1 else parts[0][0]


def parse_rank(text: str) -> int | Sequence[int]:
    """Parse ``--rank``: integers separated by commas."""
    try:
        ranks = tuple(int(r) for r in text.split(","))
    except ValueError:
        raise ValueError(f"--rank must be integers, such as 8 or 8,12, got {text!r}") from None
    return ranks[0] if len(ranks) == 1 else ranks


def parse_families(text: str | None) -> list[str] | None:
    """Parse ``--families``: names separated by commas."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--families must name some of {', '.join(FAMILIES)}, got {text!r}")
    return names


def check_budgets(seconds: str | None = None, **counts: str | None) -> None:
    """Raise ValueError, with the name of the option, unless all budgets can be parsed."""
    for axis, text in {"seconds": seconds, **counts}.items():
        if text is not None:
            parse_budget(axis, text, "--time" if axis == "seconds" else f"--{axis}")


def parse_runtime(text: str | None) -> str:
    """Parse ``--runtime``."""
    if text is None:
        return "lowrank"
    if text not in RUNTIMES:
        raise ValueError(f"--runtime must be one of {', '.join(RUNTIMES)}, got {text!r}")
    return text


def calibrate_quickly(runtime: str) -> None:
    """Calibrate a runtime for five seconds unless this machine has coefficients of it."""
    here = perfmodel.current()
    if not here.calibrated or runtime not in here.coefficients:
        print(
            f"lowrank: no calibration of {runtime} on this machine: measuring for 5 s "
            "('lowrank calibrate' is more accurate)",
            file=sys.stderr,
        )
        try:
            perfmodel.calibrate(quick=True, runtimes=[runtime])
        except OSError as error:  # a cache folder that cannot be written must not stop a command
            warnings.warn(
                f"the calibration is not kept ({error.filename}: {error.strerror}): times are "
                "those of the machine on which lowrank was made",
                stacklevel=2,
            )


def parse_algorithm(text: str) -> engine.Algorithm:
    """Parse ``--algorithm``."""
    if text not in engine.ALGORITHMS:
        raise ValueError(f"--algorithm must be {' or '.join(engine.ALGORITHMS)}, got {text!r}")
    return text


def check_output(
    option: str, path: Path | None, *others: Path | None, endings: tuple[str, ...] = ()
) -> None:
    """Check that an output path is writable in principle and is no other file of the command."""
    if path is None:
        return
    if endings and path.suffix.lower() not in endings:
        raise ValueError(f"{option}: {path} must end in {endings[0]}")
    if path.is_dir():
        raise IsADirectoryError(f"{option}: {path} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option}: {path}: there is no folder {path.parent}")
    for other in others:
        if other is not None and files.same_file(path, other):
            raise ValueError(f"{option}: {path} is also another file of this command")


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Declare one command-line option per field of each dataclass parameter of a command."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    records: dict[str, type[Any]] = {}
    for p in inspect.signature(command).parameters.values():
        if dataclasses.is_dataclass(hints[p.name]):
            records[p.name] = hints[p.name]
            types = get_type_hints(records[p.name], include_extras=True)
            parameters += [
                inspect.Parameter(
                    f.name, p.KEYWORD_ONLY, default=f.default, annotation=types[f.name]
                )
                for f in dataclasses.fields(records[p.name])
            ]
        else:
            parameters.append(p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name]))

    def expanded(**values: Any) -> None:
        for name, record in records.items():
            names = [f.name for f in dataclasses.fields(record)]
            values[name] = record(**{n: values.pop(n) for n in names})
        command(**values)

    expanded.__name__, expanded.__doc__ = command.__name__, command.__doc__
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {p.name: p.annotation for p in parameters}
    return expanded


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=1, allow_nan=False))


def print_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, optional: Sequence[str] = ()
) -> None:
    """Print a table without cutting cells.

    Optional columns are dropped, in the given order, while the table is wider than the terminal;
    a column "of" goes with the one before it.  A table that is still wider wraps its lines.
    """
    width = shutil.get_terminal_size((1000, 24)).columns
    wide = Console(width=1000)
    dropped: list[str] = []
    for name in (None, *optional):
        if name is not None:
            dropped.append(name)
        owners = [head[i - 1] if title == "of" else title for i, title in enumerate(head)]
        shown = [i for i, owner in enumerate(owners) if owner not in dropped]
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
        for i in shown:
            table.add_column(head[i], justify="left" if i < left else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(row[i] for i in shown))
        need = wide.measure(table).maximum
        if need <= width:
            break
    Console(width=max(need, wide.options.min_width), highlight=False).print(table)
    if dropped:
        print(f"Columns that do not fit in {width} characters: {', '.join(dropped)}.")


class _TimeLeft(ProgressColumn):
    """Estimated time left.

    Rich's own column needs several updates, which are minutes apart here.
    """

    def render(self, task: Task) -> str:
        """Return the time left of one task."""
        share = task.completed / (task.total or 1.0)
        if not 0 < share < 1 or task.elapsed is None:
            return ""
        seconds = round(task.elapsed * (1 - share) / share)
        return f"{seconds // 60}:{seconds % 60:02d} left"


@contextmanager
def share_bars() -> Iterator[Any]:
    """Show one progress bar per task on stderr; yield ``step(name, share)``."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:20}"), BarColumn(), TaskProgressColumn(),
        TimeElapsedColumn(), _TimeLeft(),
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
    """Show a transient progress bar on stderr; yield ``step(name)``, which starts the next part."""
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
