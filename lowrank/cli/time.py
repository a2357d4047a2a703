"""Command ``time``: latency of a network here, in onnxruntime and in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from lowrank._kernels import _core
from lowrank._typing import Ints
from lowrank.cli import latency
from lowrank.cli.console import (
    Algorithm,
    AsJson,
    Size,
    app,
    example,
    parse_algorithm,
    parse_size,
    print_json,
    print_table,
    share_bars,
    typer,
)
from lowrank.cli.scripts import check_reference
from lowrank.core import tables
from lowrank.interop.batches import Input
from lowrank.interop.onnx.data import inputs_of
from lowrank.interop.onnx.files import load

_KINDS = ".onnx, or SCRIPT.py:FUNCTION that returns a PyTorch module and an example input"


@app.command(
    epilog=example(
        "time model.onnx small.onnx --threads 1",
        "time network.py:build --input 224x224",
    )
)
def time(
    model: Annotated[str, typer.Argument(help=f"Network: {_KINDS}.")],
    compressed: Annotated[
        str | None,
        typer.Argument(help="Its compressed version, of the same kind."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Batch size; that of the network or the example if not given."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Threads; all if not given.")
    ] = None,
    size: Size = None,
    algorithm: Algorithm = "auto",
    repeat: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rounds, of 0.1 s per row or longer.")
    ] = 11,
    as_json: AsJson = False,
) -> None:
    """Measure the latency of a network on lowrank's engine, in onnxruntime and in PyTorch.

    Every row is a process of its own; the processes alternate.  PyTorch runs with folded batch
    norms, in the faster of its two layouts.  Speed-ups are relative to the fastest other runtime
    with the dense network.
    """
    algorithm = parse_algorithm(algorithm)
    threads = threads or _core.max_threads()
    given = {"dense": model} | ({} if compressed is None else {"compressed": compressed})
    jobs = []
    for label, network in given.items():
        settings = _settings(network, batch, parse_size(size))
        jobs += [
            latency.Job(label, runtime, network, threads, algorithm, **settings)
            for runtime in latency.PACKAGES
            if runtime != "PyTorch" or not settings["inputs"]
        ]
    with share_bars() as step:
        rows = latency.measure(jobs, repeat, step)
    measured = [row for row in rows if row.times]
    if not measured:
        raise ValueError("; ".join(dict.fromkeys(row.missing for row in rows)))
    others = [r for r in measured if r.job.label == "dense" and r.job.runtime != "lowrank"]
    best = min((row.median for row in others), default=None)
    about = {"input": measured[0].shapes, "threads": threads, "rounds": repeat}
    if as_json:
        print_json(about | {"rows": [_as_dict(row, best) for row in rows]})
        return
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    head = ("network", "runtime", "version", "median", "quartiles", "speed-up")
    print_table(head, [_cells(row, best) for row in rows], left=2)
    notes = [f"{row.job.runtime}, {row.job.label}: {row.missing}" for row in rows if row.missing]
    if jobs[0].inputs:
        notes.append("PyTorch runs no .onnx file: give SCRIPT.py:FUNCTION to time it")
    for note in notes:
        print(f"note: {note}")


def _settings(network: str, batch: int | None, size: Ints | None) -> dict[str, Any]:
    """Return the settings of a job that depend on the kind of the network."""
    if ".py:" in network:
        check_reference("MODEL", network)
        if size is not None:
            raise ValueError("--input is for .onnx files: a script returns an example input")
        return {"batch": batch, "inputs": ()}
    if not network.lower().endswith(".onnx"):
        raise ValueError(f"MODEL must be {_KINDS}, got {network!r}")
    inputs = inputs_of(load(network))
    return {"inputs": [(i.name, i.dtype.name, _fix(i, batch, size)) for i in inputs]}


def _fix(given: Input, batch: int | None, size: Ints | None) -> Ints:
    """Return the shape of an input, its free sizes taken from --batch and --input."""
    wanted: list[int | None] = [None] * len(given.shape)
    if wanted:
        wanted[0] = batch or given.shape[0] or 1
    if size is not None and len(wanted) == len(size) + 2:
        wanted[2:] = size
    shape = [w if n is None else n for n, w in zip(given.shape, wanted)]
    if None in shape:
        raise ValueError(f"--input must give the free sizes of {given}, such as 224x224")
    if any(w not in (None, n) for n, w in zip(shape, wanted)):
        raise ValueError(
            f"--batch and --input must agree with {given}, got {batch} and {size}: the network "
            "fixes its sizes"
        )
    return tuple(n for n in shape if n is not None)


def _as_dict(row: latency.Latency, best: float | None) -> dict[str, Any]:
    return {
        "network": row.job.label,
        "runtime": row.job.runtime,
        "layout": row.layout or None,
        "version": row.version or None,
        "seconds": row.median if row.times else None,
        "quartiles": row.quartiles if row.times else None,
        "speedup": best / row.median if best and row.times else None,
        "missing": row.missing or None,
    }


def _cells(row: latency.Latency, best: float | None) -> Sequence[str]:
    runtime = f"{row.job.runtime} {row.layout}".rstrip()
    if not row.times:
        return row.job.label, runtime, "-", "-", "-", "-"
    low, high = map(tables.format_seconds, row.quartiles)
    gain = f"{best / row.median:.2f}x" if best else "-"
    median = tables.format_seconds(row.median)
    return row.job.label, runtime, row.version, median, f"{low}-{high}", gain
