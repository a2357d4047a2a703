"""Single layers: what a file of weights holds, and what one of them can be turned into."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from lowrank import io, selection
from lowrank._typing import Ints
from lowrank.cli.console import (
    AsJson,
    Size,
    app,
    budget_of,
    numbers_of,
    padding_of,
    print_json,
    print_table,
    progress_bar,
    rank_of,
    size_of,
    typer,
)
from lowrank.core import tables
from lowrank.core.cost import Cost
from lowrank.core.geometry import PADDING_MODES
from lowrank.factorization import Factorization, dense
from lowrank.families import FAMILIES, applicable
from lowrank.interop.weights import StoredLayer, layers
from lowrank.report import figures


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help=".safetensors, .npz, .npy, .pt or .pth")],
    input: Size = None,
    as_json: AsJson = False,
) -> None:
    """List the convolutions of a weights file: shape, cost, and how separable each is.

    The last columns are the relative error that is left when a layer keeps half of its
    multiply-adds (of its parameters, where no input size is known), by the best spatially
    separable, depthwise separable and channel-wise form.

    With --input every layer is priced at that size; without it, each at the size that the
    description NAME.json beside the file gives.
    """
    size = size_of(input)
    found = layers(file)
    rows = []
    with progress_bar(len(found)) as step:
        for layer in found:
            step(layer.name)
            rows.append(_inspected(layer, size or layer.input_size))
    if as_json:
        print_json({"file": str(file), "layers": rows})
        return
    if not rows:
        print(f"{file}: no convolutions")
        return
    head = ("layer", "weight", "geometry", "input", "params", "macs", *_SEPARABLE)
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
                *("-" if errors.get(k) is None else f"{errors[k]:.3f}" for k in _SEPARABLE),
            )
        )
    params, macs = (sum(r[k] or 0 for r in rows) for k in ("params", "macs"))
    table.append(("total", "", "", "", f"{params:,}", f"{macs:,}" if macs else "-", "", "", ""))
    print(f"{file.name}: {len(rows)} convolutions; errors are at half of the cost")
    print_table(head, table, left=3)
    if not macs:
        print("Give --input, as 56x56, to see multiply-adds.")


#: Columns of `inspect`, and the families behind each.
_SEPARABLE = {
    "spatial_svd": ("spatial_svd",),
    "depthwise": ("network_decoupling",),
    "channel": ("channel_svd", "channel_svd"),
}


def _inspected(layer: StoredLayer, size: Ints | None) -> dict[str, Any]:
    """One row of `inspect`."""
    conv = layer.conv
    cost: Cost | None = None
    if size is not None:
        try:
            cost = conv.cost(size)
        except ValueError as why:
            raise ValueError(f"layer {layer.name!r}: {why}") from None
    errors: dict[str, float | None] = {}
    if conv.family == "dense":
        axis = "params" if size is None else "macs"
        at = size or tuple(conv.geometry.extent(conv.stages[0].kernel))
        half = getattr(conv.cost(at), axis) / 2
        known = applicable(conv)
        for column, wanted in _SEPARABLE.items():
            families = [f for f in wanted if f in known]
            if not families:
                errors[column] = None
                continue
            front = selection.frontier(conv, at, families, axis=axis)
            below = [c.error for c in front if getattr(c.cost, axis) <= half]
            errors[column] = min(below, default=None)  # None: no chain costs so little
    return {
        "layer": layer.name,
        "family": conv.family,
        "stages": [list(s.weight.shape) for s in conv.stages],
        "geometry": _geometry(conv),
        "input": None if size is None else list(size),
        "output": None if size is None else list(conv.output_shape(size)),
        "params": conv.params,
        "macs": None if cost is None else cost.macs,
        "error_at_half": errors,
    }


def _geometry(conv: Factorization) -> str:
    """Stride, padding and so on, in as few letters as say it."""
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


@app.command()
def approximate(
    file: Annotated[Path, typer.Argument(help=".safetensors, .npz, .npy, .pt or .pth")],
    layer: Annotated[
        str | None, typer.Option(help="Name of the layer, as inspect lists it.")
    ] = None,
    input: Size = None,
    max_error: Annotated[
        float | None, typer.Option(help="Pick the cheapest chain within this relative error.")
    ] = None,
    rank: Annotated[
        str | None, typer.Option(help="Pick the best chain of this rank, as 8 or 8,12.")
    ] = None,
    seconds: Annotated[
        str | None, typer.Option(help="Pick the best within this time: 2ms, 300us or 50%.")
    ] = None,
    macs: Annotated[
        str | None, typer.Option(help="Pick the best within these multiply-adds: 0.25 or 20M.")
    ] = None,
    params: Annotated[
        str | None, typer.Option(help="Pick the best within these parameters: 0.25 or 30k.")
    ] = None,
    families: Annotated[
        str | None, typer.Option(help=f"Only these, by commas: {', '.join(FAMILIES)}.")
    ] = None,
    axis: Annotated[
        str | None,
        typer.Option(
            help=f"Cost to compare: {', '.join(selection.COSTS)}. If not given the budget's, macs for "
            "a rank, else seconds."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Examples at a time, for seconds.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads, for seconds.")] = None,
    runtime: Annotated[
        str, typer.Option(help="What is to run it: lowrank, torch or 'torch channels-last'.")
    ] = "lowrank",
    stride: Annotated[str | None, typer.Option(help="As 2 or 2,1.")] = None,
    padding: Annotated[
        str | None, typer.Option(help="As 1 or 1,0 or 0:1,0:1 (before:after), same or valid.")
    ] = None,
    dilation: Annotated[str | None, typer.Option(help="As 2 or 2,1.")] = None,
    groups: Annotated[int | None, typer.Option(help="Groups of the layer.")] = None,
    padding_mode: Annotated[str | None, typer.Option(help=", ".join(PADDING_MODES) + ".")] = None,
    transposed: Annotated[bool | None, typer.Option(help="A transposed convolution.")] = None,
    output_padding: Annotated[str | None, typer.Option(help="Of a transposed one.")] = None,
    rows: Annotated[int, typer.Option(help="Rows of the table, at most; 0 for all.")] = 24,
    plot: Annotated[
        Path | None, typer.Option(help="Draw error against cost: .svg, .png or .pdf.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Save the pick: .safetensors.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a layer can be turned into, and pick one.

    The table holds the chains that nothing beats on both error and cost.  With one of
    --max-error, --rank, --seconds, --macs and --params one of them is picked and built.

    Seconds are predicted; 'lowrank calibrate' measures this machine for that.
    """
    chosen = _layer(file, layer)
    size = size_of(input) or chosen.input_size
    if size is None:
        raise ValueError(f"the input size of layer {chosen.name!r} is not known: give --input HxW")
    given = {
        "stride": numbers_of("--stride", stride),
        "padding": padding_of(padding),
        "dilation": numbers_of("--dilation", dilation),
        "groups": groups,
        "padding_mode": padding_mode,
        "transposed": transposed,
        "output_padding": numbers_of("--output-padding", output_padding),
    }
    conv = _overridden(chosen, {k: v for k, v in given.items() if v is not None})
    if plot is not None:
        figures.check_path(plot)
    if save is not None and save.suffix != ".safetensors":
        raise ValueError(f"--save: {save} must end in .safetensors")
    if save is not None and not save.parent.is_dir():
        raise FileNotFoundError(f"--save: {save}: there is no folder {save.parent}")
    wanted: dict[str, Any] = {
        "max_error": max_error,
        "rank": None if rank is None else rank_of(rank),
        "seconds": budget_of(seconds),
        "macs": budget_of(macs),
        "params": budget_of(params),
    }
    wanted = {k: v for k, v in wanted.items() if v is not None}
    if len(wanted) > 1:
        options = ", ".join("--" + k.replace("_", "-") for k in wanted)
        raise ValueError(
            f"give one of --max-error, --rank, --seconds, --macs and --params, not {options}"
        )
    if save is not None and not wanted:
        raise ValueError(
            "--save needs a pick: give --max-error, --rank, --seconds, --macs or --params"
        )
    timed: dict[str, Any] = {"batch": batch, "threads": threads, "runtime": runtime}
    names = None if families is None else [f.strip() for f in families.split(",") if f.strip()]
    if names is not None and not names:
        raise ValueError(f"--families must name some of {', '.join(FAMILIES)}")
    pick: selection.Candidate | None = None
    with progress_bar(len(names or FAMILIES)) as step:
        if wanted:
            front, pick = selection.choose(
                conv, size, families=names, axis=axis, progress=step, **wanted, **timed
            )
            step("building the pick")
            f = pick.build()
            pick = pick.built(f)
        else:
            front = selection.frontier(
                conv, size, names, axis=axis or "seconds", progress=step, **timed
            )
    if plot is not None:
        figures.error_against_cost([front], plot, title=f"{file.stem}, {chosen.name}", pick=pick)
    if save is not None:
        io.save(save, {chosen.name: f})
    if as_json:
        print_json(
            {
                "layer": chosen.name,
                "input": list(front.input_shape),
                "axis": front.axis,
                "dense": front.dense.as_dict(),
                "front": [c.as_dict() for c in front],
                "pick": None if pick is None else pick.as_dict(),
                "left_out": front.left_out,
            }
        )
        return
    shown = list(front) if rows < 1 else tables.thinned(list(front), max(rows, 2))
    print(f"{chosen.name}: {conv!r}\n{tables.title(front, len(shown))}")
    print_table(tables.HEAD, [tables.row(c, front.dense) for c in shown])
    if any(not c.exact for c in shown):
        print(tables.NOTE)
    if pick is not None:
        if pick.family == "dense" and max_error is not None:
            print(f"pick: the dense kernel; {selection.nothing_within(front, max_error)}")
        else:
            print(f"pick: {_said(pick, front.dense)}")
        for stage, cost in zip(f.stages, f.stage_costs(size)):
            shape = "x".join(map(str, stage.weight.shape))
            tied = f", tied {stage.outer}x{stage.inner}" if stage.outer * stage.inner > 1 else ""
            print(f"  {stage.kind:9}  {shape:>16}  {tables.format_count(cost.macs):>6} macs{tied}")
    for path in (plot, save):
        if path is not None:
            print(f"wrote {path}")


def _said(pick: selection.Candidate, whole: selection.Candidate) -> str:
    """The pick in one sentence."""
    if pick.family == "dense":
        return "the dense kernel itself; nothing cheaper is as good as asked for"
    rank = ",".join(map(str, pick.rank))
    return (
        f"{pick.name} of rank {rank}: error {pick.error:.4f} (at least {pick.bound:.4f} "
        f"for any of its kind), {whole.cost.macs / pick.cost.macs:.2f} times fewer multiply-adds, "
        f"{whole.cost.params / pick.cost.params:.2f} times fewer parameters, predicted "
        f"{tables.format_seconds(pick.seconds)}, {whole.seconds / pick.seconds:.2f} times faster"
    )


def _layer(file: Path, name: str | None) -> StoredLayer:
    found = layers(file, only=name)
    names = [x.name for x in found]
    if not found and name is None:
        raise ValueError(f"{file}: no convolutions")
    if name is None:
        if len(found) == 1:
            return found[0]
        raise ValueError(f"--layer must be one of {', '.join(names)}")
    if not found:
        names = [x.name for x in layers(file)]
        raise ValueError(f"--layer must be one of {', '.join(names)}, got {name!r}")
    return found[0]


def _overridden(layer: StoredLayer, given: dict[str, Any]) -> Factorization:
    """The layer with the geometry that options ask for."""
    conv = layer.conv
    if conv.family != "dense":
        raise ValueError(f"the layer is a chain already: {conv!r}")
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
    } | given
    return dense(conv.stages[0].weight, layer.bias, **options)
