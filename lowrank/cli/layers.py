"""Commands for single layers: ``inspect`` and ``approximate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from lowrank import io, selection
from lowrank._typing import Ints
from lowrank.cli.console import (
    AsJson,
    Batch,
    Families,
    Macs,
    NoMeasure,
    Params,
    Runtime,
    Seconds,
    Size,
    Threads,
    app,
    calibrate_quickly,
    check_budgets,
    check_output,
    example,
    expand_options,
    parse_families,
    parse_numbers,
    parse_padding,
    parse_rank,
    parse_runtime,
    parse_size,
    print_json,
    print_table,
    progress_bar,
    typer,
)
from lowrank.core import tables
from lowrank.core.cost import Cost
from lowrank.core.geometry import PADDING_MODES
from lowrank.factorization import Factorization, dense
from lowrank.families import FAMILIES, applicable
from lowrank.interop.files import ENDINGS, read_layers
from lowrank.interop.weights import ENDINGS as WEIGHTS
from lowrank.interop.weights import StoredLayer
from lowrank.report import figures
from lowrank.selection import tables as selection_tables
from lowrank.selection.front import check_error

_ENDINGS = ", ".join(dict.fromkeys((*ENDINGS, *WEIGHTS)))
LayersFile = Annotated[Path, typer.Argument(help=f"Network or weights: {_ENDINGS}.")]


@app.command(epilog=example("inspect model.onnx", "inspect weights.safetensors --json"))
def inspect(
    file: LayersFile,
    input: Size = None,
    as_json: AsJson = False,
) -> None:
    """List the layers of a network or a weights file with their costs and low-rank errors.

    The last columns are relative errors of the best chains with half of the MACs (of the
    parameters, if the input size is unknown), by family.

    Costs are for the input sizes of the network, or in NAME.json beside a weights file; --input is
    the size of a network's input if the network leaves it free, or that of the layers of a weights
    file.
    """
    found, left_out = read_layers(file, input_size=parse_size(input))
    rows = []
    with progress_bar(len(found)) as step:
        for layer in found:
            step(layer.name)
            rows.append(_inspect_layer(layer))
    if as_json:
        print_json({"file": str(file), "layers": rows, "left_out": left_out})
        return
    if not rows:
        print(f"{file}: no layers")
    else:
        _print_layers(file, rows)
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")


def _print_layers(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Print the table of `inspect`."""
    head = (
        "layer",
        "weight",
        "geometry",
        "input",
        "params",
        "macs",
        *(FAMILIES[k].label.replace(" ", "\n") for k in _COLUMNS),
    )
    table = []
    for row in rows:
        errors = row["error_at_half"]
        table.append(
            (
                row["layer"],
                " -> ".join("x".join(map(str, s)) for s in row["stages"]),
                row["geometry"],
                "x".join(map(str, row["input"] or ())) or "-",
                f"{row['params']:,}",
                "-" if row["macs"] is None else f"{row['macs']:,}",
                *("-" if errors.get(k) is None else f"{errors[k]:.3f}" for k in _COLUMNS),
            )
        )
    params, macs = (sum(r[k] or 0 for r in rows) for k in ("params", "macs"))
    total = ("total", "", "", "", f"{params:,}", f"{macs:,}" if macs else "-")
    table.append((*total, *("" for _ in _COLUMNS)))
    count = f"{len(rows)} layer{'s' if len(rows) > 1 else ''}"
    print(f"{file.name}: {count}; errors at half of the cost")
    print_table(head, table, left=3, optional=("input", "geometry"))
    if not macs:
        print("Give --input, such as 56x56, to see MACs.")


#: Families shown by `inspect`: those of one SVD, fast enough for every layer of a file.
_COLUMNS = [name for name, family in FAMILIES.items() if family.exact and family.has_fast_sweep]


def _inspect_layer(layer: StoredLayer) -> dict[str, Any]:
    """Return one row of `inspect`."""
    conv, size = layer.conv, layer.input_size
    cost: Cost | None = None
    if size is not None:
        try:
            cost = conv.cost(size)
        except ValueError as error:
            raise ValueError(f"layer {layer.name!r}: {error}") from None
    errors: dict[str, float | None] = {}
    if conv.family == "dense":
        axis = "params" if size is None else "macs"
        at = size or tuple(conv.geometry.extent(conv.stages[0].kernel))
        half = getattr(conv.cost(at), axis) / 2
        known = applicable(conv)
        for name in _COLUMNS:
            if name not in known:
                errors[name] = None
                continue
            front = selection.frontier(conv, at, [name], axis=axis)
            below = [c.error for c in front if getattr(c.cost, axis) <= half]
            errors[name] = min(below, default=None)  # None: no chain is that cheap
    return {
        "layer": layer.name,
        "family": conv.family,
        "stages": [list(s.weight.shape) for s in conv.stages],
        "geometry": _geometry(conv),
        "input": None if size is None else list(size),
        "output": None if size is None else list(conv.output_shape(size)),
        "params": conv.params,
        "macs": None if cost is None else round(cost.macs * layer.times),
        "error_at_half": errors,
    }


def _geometry(conv: Factorization) -> str:
    """Return the geometry in short: s stride, p padding, d dilation, g groups."""
    g = conv.geometry
    short = {
        "s": g.stride if set(g.stride) != {1} else (),
        "p": [a if a == b else f"{a}:{b}" for a, b in g.padding]
        if any(map(any, g.padding))
        else (),
        "d": g.dilation if set(g.dilation) != {1} else (),
        "g": (conv.groups,) if conv.groups > 1 else (),
    }
    words = [k + ",".join(map(str, v if len(set(v)) > 1 else v[:1])) for k, v in short.items() if v]
    if g.padding_mode != "zeros":
        words.append(g.padding_mode)
    return " ".join([*words, *(["transposed"] if conv.transposed else [])])


@dataclass(frozen=True)
class GeometryOptions:
    """Options that override the geometry stored in the file."""

    stride: Annotated[
        str | None, typer.Option(metavar="N[,N...]", help="Stride, such as 2 or 2,1.")
    ] = None
    padding: Annotated[
        str | None,
        typer.Option(
            metavar="PADDING", help="Padding: same, valid, 1, 1,0 or 0:1,0:1 (before:after)."
        ),
    ] = None
    dilation: Annotated[
        str | None, typer.Option(metavar="N[,N...]", help="Dilation, such as 2 or 2,1.")
    ] = None
    groups: Annotated[int | None, typer.Option(metavar="N", help="Number of groups.")] = None
    padding_mode: Annotated[
        str | None, typer.Option(metavar="MODE", help=f"Padding mode: {', '.join(PADDING_MODES)}.")
    ] = None
    transposed: Annotated[bool | None, typer.Option(help="Transposed convolution.")] = None
    output_padding: Annotated[
        str | None,
        typer.Option(metavar="N[,N...]", help="Output padding of a transposed convolution."),
    ] = None

    def apply(self, layer: StoredLayer) -> Factorization:
        """Return the convolution of a layer with the given options."""
        conv = layer.conv
        if conv.family != "dense":
            raise ValueError(f"layer {layer.name!r} must be dense, got a chain: {conv!r}")
        given = {
            "stride": parse_numbers("--stride", self.stride),
            "padding": parse_padding(self.padding),
            "dilation": parse_numbers("--dilation", self.dilation),
            "groups": self.groups,
            "padding_mode": self.padding_mode,
            "transposed": self.transposed,
            "output_padding": parse_numbers("--output-padding", self.output_padding),
        }
        given = {k: v for k, v in given.items() if v is not None}
        if not given:
            return conv
        g = conv.geometry
        options: dict[str, Any] = {
            "stride": g.stride,
            "padding": g.padding,
            "dilation": g.dilation,
            "groups": conv.groups,
            "padding_mode": g.padding_mode,
            "value": g.value,
            "transposed": conv.transposed,
            "output_padding": g.output_padding,
        }
        return dense(conv.stages[0].weight, layer.bias, **(options | given))


@dataclass(frozen=True)
class CriterionOptions:
    """Options of which at most one picks a candidate."""

    max_error: Annotated[
        float | None,
        typer.Option(
            metavar="ERROR", help="Pick the cheapest chain within this relative error, below 1."
        ),
    ] = None
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="R[,R...]", help="Pick the best chain of this rank, such as 8 or 8,12."
        ),
    ] = None
    seconds: Seconds = None
    macs: Macs = None
    params: Params = None

    def criterion(self) -> dict[str, Any]:
        """Return the argument of :func:`lowrank.selection.choose`, or nothing."""
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) > 1:
            options = ", ".join(_OPTIONS[k] for k in given)
            raise ValueError(f"give only one of {_CRITERIA}, got {options}")
        check_budgets(seconds=self.seconds, macs=self.macs, params=self.params)
        if self.max_error is not None:
            check_error(self.max_error, "--max-error")
        if self.rank is not None:
            given["rank"] = parse_rank(self.rank)
        return given


_OPTIONS = {
    "max_error": "--max-error", "rank": "--rank", "seconds": "--time", "macs": "--macs",
    "params": "--params",
}  # fmt: skip
_CRITERIA = "--max-error, --rank, --time, --macs and --params"


@app.command(
    epilog=example(
        "approximate weights.safetensors --layer conv3 --macs 0.4",
        "approximate kernel.npy --input 56x56 --max-error 0.1",
    )
)
@expand_options
def approximate(
    file: LayersFile,
    criteria: CriterionOptions,
    geometry: GeometryOptions,
    layer: Annotated[
        str | None, typer.Option(metavar="LAYER", help="Name of the layer, as inspect lists it.")
    ] = None,
    input: Size = None,
    families: Families = None,
    axis: Annotated[
        str | None,
        typer.Option(
            metavar="AXIS",
            help=f"Cost to compare: {', '.join(selection.COSTS)}.  Default: that of the budget; "
            "macs with --rank; else seconds.",
        ),
    ] = None,
    batch: Batch = None,
    threads: Threads = None,
    runtime: Runtime = None,
    no_measure: NoMeasure = False,
    rows: Annotated[
        int, typer.Option(metavar="N", help="Maximum number of table rows; 0 for all.")
    ] = 24,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw error against cost: .svg, .png or .pdf."),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the pick: .safetensors.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the Pareto-optimal factorizations of a layer, and pick one.

    One of --max-error, --rank, --time, --macs and --params picks a factorization and builds it.
    With --time the pick is measured on the runtime; other times are predicted.
    """
    stored = _find_layer(file, layer)
    size = parse_size(input) or stored.input_size
    if size is None:
        raise ValueError(f"input size of layer {stored.name!r} is unknown: give --input HxW")
    conv = geometry.apply(stored)
    if len(size) != conv.ndim:
        count = "1 size" if conv.ndim == 1 else f"{conv.ndim} sizes"
        raise ValueError(f"--input must be {count} for layer {stored.name!r}, got {input}")
    if plot is not None:
        figures.check_path(plot)
    check_output("--save", save, endings=(".safetensors",))
    criterion = criteria.criterion()
    if save is not None and not criterion:
        raise ValueError(f"--save needs a pick: give one of {_CRITERIA}")
    names = parse_families(families)
    timing: dict[str, Any] = {
        "batch": batch or 1, "threads": threads, "runtime": parse_runtime(runtime)
    }  # fmt: skip
    if "seconds" in criterion:
        calibrate_quickly(timing["runtime"])
    pick: selection.Candidate | None = None
    with progress_bar(len(names or FAMILIES)) as step:
        if criterion:
            front, pick = selection.choose(
                conv, size, families=names, axis=axis, measure=not no_measure, progress=step,
                **criterion, **timing,
            )  # fmt: skip
            step("building the pick")
            chain = pick.build()
            pick = pick.with_stages(chain.stages, chain.rank)
        else:
            front = selection.frontier(
                conv, size, names, axis=axis or "seconds", progress=step, **timing
            )
    if plot is not None:
        figures.error_against_cost([front], plot, title=f"{file.stem}, {stored.name}", pick=pick)
    if save is not None:
        io.save(save, {stored.name: chain})
    if as_json:
        print_json(
            {
                "layer": stored.name,
                "input": list(front.input_shape),
                "axis": front.axis,
                "dense": front.dense.as_dict(front.dense),
                "front": [c.as_dict(front.dense) for c in front],
                "pick": None if pick is None else pick.as_dict(front.dense),
                "left_out": front.left_out,
            }
        )
        return
    print(f"{stored.name}: {conv!r}")
    _print_front(front, rows)
    if pick is not None:
        if pick.family == "dense" and criteria.max_error is not None:
            why = selection.explain_dense_pick(front, criteria.max_error)
            print(f"pick: the dense kernel; {why}")
        else:
            print(f"pick: {_describe(pick, front.dense)}")
        _print_stages(chain, size)
    for path in (plot, save):
        if path is not None:
            print(f"wrote {path}")


def _print_front(front: selection.Frontier, rows: int) -> None:
    """Print a frontier, thinned to a number of rows."""
    shown = list(front) if rows < 1 else tables.thinned(list(front), max(rows, 2))
    print(selection_tables.title(front, len(shown)))
    cells = [selection_tables.row(c, front.dense) for c in shown]
    print_table(selection_tables.HEAD, cells, optional=selection_tables.OPTIONAL)
    print("\n".join(selection_tables.notes(front)))


def _print_stages(chain: Factorization, size: Ints) -> None:
    """Print one line per stage: kind, weight shape, MACs and replication."""
    for stage, cost in zip(chain.stages, chain.stage_costs(size)):
        shape = "x".join(map(str, stage.weight.shape))
        is_replicated = stage.outer * stage.inner > 1
        copies = f", replicated {stage.outer}x{stage.inner}" if is_replicated else ""
        print(f"  {stage.kind:9}  {shape:>16}  {tables.format_count(cost.macs):>6} MACs{copies}")


def _describe(pick: selection.Candidate, dense: selection.Candidate) -> str:
    """Describe a pick in comparison with the dense kernel."""
    if pick.family == "dense":
        return "the dense kernel; no cheaper chain meets the request"
    rank = ",".join(map(str, pick.rank))
    speed_up = f"{dense.seconds / pick.seconds:.2f}x"
    faster = "as fast: slower than the dense kernel" if pick.is_slower(dense) else "faster"
    return (
        f"{pick.name} of rank {rank}, error {pick.error:.4f} (lower bound {pick.bound:.4f})\n"
        f"  {dense.cost.macs / pick.cost.macs:.2f}x fewer MACs, "
        f"{dense.cost.params / pick.cost.params:.2f}x fewer parameters, "
        f"{'measured' if pick.is_measured else 'predicted'} "
        f"{tables.format_seconds(pick.seconds)} ({speed_up} {faster})"
    )


def _find_layer(file: Path, name: str | None) -> StoredLayer:
    """Return the layer of a name, or the only one."""
    found = read_layers(file, name).layers
    if len(found) == 1:
        return found[0]
    found, left_out = read_layers(file)
    if name in left_out:
        raise ValueError(f"layer {name!r} cannot be read: {left_out[name]}")
    if not found:
        raise ValueError(f"{file}: no layers")
    names = ", ".join(x.name for x in found)
    raise ValueError(f"--layer must be one of {names}" + (f", got {name!r}" if name else ""))
