"""The command ``lowrank``: what a weights file holds, how cheap it can be; filters of images."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np

try:
    import typer
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError:  # the library works without; the command does not
    raise SystemExit("the command needs typer and rich: pip install 'lowrank[cli]'") from None

from lowrank import filters, io, machine, plots, report, search
from lowrank._typing import Array, Ints
from lowrank.cost import Cost
from lowrank.factorization import Factorization, dense
from lowrank.families import FAMILIES, applicable
from lowrank.geometry import PADDING_MODES
from lowrank.weights import Layer, layers, read_weights

app = typer.Typer(
    help="Separable and low-rank convolution: what it costs and what it saves.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)

# Click's base of all usage errors; newer typers carry a copy of click of their own.
_UsageError: Any = typer.BadParameter.__mro__[2]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Size = Annotated[
    str | None, typer.Option("--input", metavar="HxW", help="Spatial size of the input, as 56x56.")
]


class Name(StrEnum):
    """Filters that the command knows by name."""

    gauss = "gauss"
    box = "box"
    sobel = "sobel"
    prewitt = "prewitt"
    scharr = "scharr"
    laplacian = "laplacian"
    log = "log"
    dog = "dog"
    unsharp = "unsharp"
    gabor = "gabor"
    disk = "disk"
    motion = "motion"


def main() -> None:
    """Run the command; a mistake of the caller's gets one line and exit code 2."""
    try:
        status = app(standalone_mode=False)
        raise SystemExit(status if isinstance(status, int) else 0)
    except _UsageError as why:
        _fail(why.format_message())
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as why:
        _fail(f"{why.filename}: {why.strerror}" if why.strerror else str(why))
    except (ValueError, TypeError, ImportError) as why:
        _fail(str(why))
    except MemoryError as why:
        _fail(f"not enough memory: {why}")
    except (KeyboardInterrupt, typer.Abort):
        raise SystemExit(130) from None


def _fail(message: str) -> None:
    print(f"lowrank: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lowrank {version('lowrank')}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None: ...


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
    size = _size(input)
    found = layers(file)
    rows = []
    with _progress(len(found)) as step:
        for layer in found:
            step(layer.name)
            rows.append(_inspected(layer, size or layer.input_size))
    if as_json:
        _print_json({"file": str(file), "layers": rows})
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
    _print_table(head, table, left=3)
    if not macs:
        print("Give --input, as 56x56, to see multiply-adds.")


#: Columns of `inspect`, and the families behind each.
_SEPARABLE = {
    "spatial": ("spatial",),
    "depthwise": ("decouple",),
    "channel": ("encode", "decode"),
}


def _inspected(layer: Layer, size: Ints | None) -> dict[str, Any]:
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
            front = search.frontier(conv, at, families, axis=axis)
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
            help=f"Cost to compare: {', '.join(search.COSTS)}. If not given the budget's, macs for "
            "a rank, else seconds."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Examples at a time, for seconds.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads, for seconds.")] = None,
    engine: Annotated[
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
    size = _size(input) or chosen.input_size
    if size is None:
        raise ValueError(f"the input size of layer {chosen.name!r} is not known: give --input HxW")
    given = {
        "stride": _numbers("--stride", stride),
        "padding": _padding(padding),
        "dilation": _numbers("--dilation", dilation),
        "groups": groups,
        "padding_mode": padding_mode,
        "transposed": transposed,
        "output_padding": _numbers("--output-padding", output_padding),
    }
    conv = _overridden(chosen, {k: v for k, v in given.items() if v is not None})
    if plot is not None:
        plots.check_path(plot)
    if save is not None and save.suffix != ".safetensors":
        raise ValueError(f"--save: {save} must end in .safetensors")
    if save is not None and not save.parent.is_dir():
        raise FileNotFoundError(f"--save: {save}: there is no folder {save.parent}")
    wanted: dict[str, Any] = {
        "max_error": max_error,
        "rank": None if rank is None else _rank(rank),
        "seconds": _budget(seconds),
        "macs": _budget(macs),
        "params": _budget(params),
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
    timed: dict[str, Any] = {"batch": batch, "threads": threads, "engine": engine}
    names = None if families is None else [f.strip() for f in families.split(",") if f.strip()]
    if names is not None and not names:
        raise ValueError(f"--families must name some of {', '.join(FAMILIES)}")
    pick: search.Candidate | None = None
    with _progress(len(names or FAMILIES)) as step:
        if wanted:
            front, pick = search.choose(
                conv, size, families=names, axis=axis, progress=step, **wanted, **timed
            )
            step("building the pick")
            f = pick.build()
            pick = pick.built(f)
        else:
            front = search.frontier(
                conv, size, names, axis=axis or "seconds", progress=step, **timed
            )
    if plot is not None:
        plots.error_against_cost([front], plot, title=f"{file.stem}, {chosen.name}", pick=pick)
    if save is not None:
        io.save(save, {chosen.name: f})
    if as_json:
        _print_json(
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
    shown = list(front) if rows < 1 else report.thinned(list(front), max(rows, 2))
    print(f"{chosen.name}: {conv!r}\n{report.title(front, len(shown))}")
    _print_table(report.HEAD, [report.row(c, front.dense) for c in shown])
    if any(not c.exact for c in shown):
        print(report.NOTE)
    if pick is not None:
        if pick.family == "dense" and max_error is not None:
            print(f"pick: the dense kernel; {search.nothing_within(front, max_error)}")
        else:
            print(f"pick: {_said(pick, front.dense)}")
        for stage, cost in zip(f.stages, f.stage_costs(size)):
            shape = "x".join(map(str, stage.weight.shape))
            tied = f", tied {stage.left}x{stage.right}" if stage.left * stage.right > 1 else ""
            print(f"  {stage.kind:9}  {shape:>16}  {report.amount(cost.macs):>6} macs{tied}")
    for path in (plot, save):
        if path is not None:
            print(f"wrote {path}")


def _said(pick: search.Candidate, whole: search.Candidate) -> str:
    """The pick in one sentence."""
    if pick.family == "dense":
        return "the dense kernel itself; nothing cheaper is as good as asked for"
    rank = ",".join(map(str, pick.rank))
    return (
        f"{pick.name} of rank {rank}: error {pick.error:.4f} (at least {pick.bound:.4f} "
        f"for any of its kind), {whole.cost.macs / pick.cost.macs:.2f} times fewer multiply-adds, "
        f"{whole.cost.params / pick.cost.params:.2f} times fewer parameters, predicted "
        f"{report.time(pick.seconds)}, {whole.seconds / pick.seconds:.2f} times faster"
    )


def _layer(file: Path, name: str | None) -> Layer:
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


def _overridden(layer: Layer, given: dict[str, Any]) -> Factorization:
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


@app.command()
def calibrate(
    engine: Annotated[
        list[str] | None,
        typer.Option(help=f"Measure only this, of {', '.join(machine.ENGINES)}; may be repeated."),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Measure nothing; show what is kept.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure this machine, so that times are predicted; takes less than a minute.

    Run it when the machine has nothing else to do.  The result is kept in the cache folder.
    """
    if engine and set(engine) - set(machine.ENGINES):
        raise ValueError(f"--engine must be one of {', '.join(machine.ENGINES)}, got {engine}")
    if show:
        here = machine.current()
    else:
        with _share() as step:
            here = machine.calibrate(step, engine)
    if as_json:
        print(here.to_json())
        return
    print(f"{here.cpu}, {here.isa}, 1 and {here.threads} threads")
    rows = [(n, f"{r.error:.1%}", f"{r.spread:.1%}") for n, r in here.rates.items()]
    _print_table(("engine", "median error", "90th percentile"), rows)
    print("Errors of predicted seconds, on work that was left out of the fit.")
    if here.calibrated:
        print(f"kept in {machine.path()}")
    else:
        print("These rates came with lowrank: run 'lowrank calibrate' for those of this machine.")


@app.command("filter")
def filter_image(
    image: Annotated[Path, typer.Argument(help="A picture, or a .npy: image, volume or series.")],
    kernel: Annotated[
        str, typer.Option(help=f"{', '.join(Name)}, or a .npy with a kernel over 1 to 3 axes.")
    ],
    sigma: Annotated[
        str, typer.Option(help="Samples: gauss, dog and unsharp, also as 2,6; log, gabor.")
    ] = "2",
    ratio: Annotated[float, typer.Option(help="Of the wide sigma to the narrow one: dog.")] = 1.6,
    amount: Annotated[float, typer.Option(help="Of what is added: unsharp.")] = 1.0,
    size: Annotated[str, typer.Option(help="Samples, also as 3,5: box.")] = "5",
    radius: Annotated[float, typer.Option(help="Samples: disk.")] = 5.0,
    length: Annotated[int, typer.Option(help="Samples: motion.")] = 15,
    wavelength: Annotated[float, typer.Option(help="Samples: gabor.")] = 6.0,
    angle: Annotated[float, typer.Option(help="Degrees: gauss, gabor, motion.")] = 0.0,
    axis: Annotated[int, typer.Option(help="Of the slope: sobel, prewitt, scharr.")] = -1,
    connectivity: Annotated[
        int, typer.Option(help="Axes that a neighbour is off along: laplacian.")
    ] = 1,
    ndim: Annotated[
        int, typer.Option(help="Axes of the kernel, 2 for gabor and motion; a disk over 3: a ball.")
    ] = 2,
    rank: Annotated[int | None, typer.Option(help="Use the best sum of so many terms.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Use the fastest form within this relative error.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="auto: what is predicted to be fastest; direct, separable or fft.")
    ] = "auto",
    mode: Annotated[str, typer.Option(help=f"Border: {', '.join(filters.MODES)}.")] = "reflect",
    cval: Annotated[float, typer.Option(help="Value outside, for mode constant.")] = 0.0,
    convolve: Annotated[bool, typer.Option("--convolve", help="Flip the kernel.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Filtered picture, or .npy [IMAGE.KERNEL.png here]")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the filter and its form: .svg, .png or .pdf.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Filter a picture the fastest way within a tolerance, and say which ways there are.

    A filter that sums to zero, such as sobel, has results below zero: its picture is drawn
    around mid-grey.  A .npy holds the values as they are.
    """
    shape_of: dict[str, Any] = {
        "sigma": _reals("--sigma", sigma),
        "ratio": ratio,
        "amount": amount,
        "size": _numbers("--size", size),
        "radius": radius,
        "length": length,
        "wavelength": wavelength,
        "angle": math.radians(angle),
        "axis": axis,
        "connectivity": connectivity,
        "ndim": ndim,
    }
    taps = _kernel(kernel, shape_of)
    picture = _image(image)
    if taps.ndim > picture.ndim:
        raise ValueError(
            f"--kernel: a kernel over {taps.ndim} axes does not fit {image} of shape "
            f"{picture.shape}"
        )
    if out is None:
        name = f"{image.stem}.{Path(kernel).stem}"
        out = Path(name + (".npy" if image.suffix == ".npy" else ".png"))
    _check_out(out)
    if plot is not None:
        plots.check_path(plot)
    shape = picture.shape[: taps.ndim]
    correlated = np.flip(taps) if convolve else taps
    work = picture.astype(np.float32) if picture.dtype.kind in "iub" else picture
    options: dict[str, Any] = {
        "rank": rank, "tolerance": tolerance, "method": method, "mode": mode, "cval": cval
    }  # fmt: skip
    dtype = np.float64 if work.dtype == np.float64 else np.float32
    batch = work.size // max(math.prod(shape), 1)
    ways = filters.plan_filter(correlated, shape, dtype=dtype, batch=batch, **options)
    chain = ways.choice.chain
    result = filters.correlate(work, taps, convolve=convolve, **options)
    centred = abs(float(taps.sum())) < 1e-6 * float(np.abs(taps).sum())
    _write_image(out, result, picture, centred)
    if plot is not None:
        plots.filter_and_form(correlated, chain, plot, title=kernel)
    macs, whole = chain.cost(shape).macs, taps.size * math.prod(shape)
    spectrum = np.linalg.svd(taps, compute_uv=False) if taps.ndim == 2 else None
    said = {
        "image": str(image),
        "shape": list(picture.shape),
        "kernel": kernel,
        "taps": list(taps.shape),
        "method": ways.choice.method,
        "family": chain.family,
        "form": chain.form,
        "rank": None if chain.family == "dense" else chain.rank[0],
        "kernel_rank": None if spectrum is None else int((spectrum > 1e-6 * spectrum[0]).sum()),
        "error": chain.error(correlated[None, None]),
        "stages": [list(s.weight.shape) for s in chain.stages],
        "macs": macs,
        "dense_macs": whole,
        "options": [
            {
                "way": o.name,
                "rank": list(o.rank),
                "error": o.error,
                "grey": o.grey,
                "seconds": o.seconds,
            }
            for o in ways.options
        ],
        "out": str(out),
    }
    if as_json:
        _print_json(said)
        return
    print(f"{kernel}: {'x'.join(map(str, taps.shape))} taps", end="")
    print("" if spectrum is None else f", rank {said['kernel_rank']}")
    print(ways)
    if chain.family != "dense":
        passes = " -> ".join("x".join(map(str, s.weight.shape)) for s in chain.stages)
        print(f"passes: {passes}, {whole / macs:.2f} times fewer multiply-adds")
    print(f"wrote {out}" + (f"\nwrote {plot}" if plot is not None else ""))


#: The function behind every name, and the options that it takes.
_NAMED: dict[str, tuple[Callable[..., Array], tuple[str, ...]]] = {
    Name.gauss: (filters.gauss, ("sigma", "angle", "ndim")),
    Name.box: (filters.box, ("size", "ndim")),
    Name.sobel: (filters.sobel, ("axis", "ndim")),
    Name.prewitt: (filters.prewitt, ("axis", "ndim")),
    Name.scharr: (filters.scharr, ("axis", "ndim")),
    Name.laplacian: (filters.laplacian, ("connectivity", "ndim")),
    Name.log: (filters.log, ("sigma", "ndim")),
    Name.dog: (filters.dog, ("sigma", "ratio", "ndim")),
    Name.unsharp: (filters.unsharp, ("sigma", "amount", "ndim")),
    Name.gabor: (filters.gabor, ("sigma", "wavelength", "angle")),
    Name.disk: (filters.disk, ("radius",)),
    Name.motion: (filters.motion, ("length", "angle")),
}


def _kernel(kernel: str, options: dict[str, Any]) -> Array:
    if kernel in _NAMED:
        make, wanted = _NAMED[kernel]
        if kernel == Name.disk and options["ndim"] == 3:
            make = filters.ball
        elif "ndim" not in wanted and options["ndim"] != 2:
            raise ValueError(f"--ndim must be 2 for {kernel}, got {options['ndim']}")
        try:
            return make(**{name: options[name] for name in wanted})
        except (ValueError, TypeError) as why:  # begins with the argument, which is the option
            raise ValueError(f"--{why}") from None
    if not kernel.endswith(".npy"):
        raise ValueError(f"--kernel must be one of {', '.join(Name)}, or a .npy, got {kernel!r}")
    (taps,) = read_weights(kernel).values()
    return taps


def _reals(option: str, text: str) -> float | list[float]:
    try:
        reals = [float(n) for n in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option} must be one number or one an axis, as 2,6, got {text!r}"
        ) from None
    return reals[0] if len(reals) == 1 else reals


def _image(path: Path) -> Array:
    if path.suffix == ".npy":
        (picture,) = read_weights(path).values()
        return picture
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ImportError("pictures need Pillow: pip install 'lowrank[cli]'") from None
    try:
        with Image.open(path) as opened:
            plain = opened.mode in ("L", "RGB", "I;16", "I", "F")
            return np.asarray(opened if plain else opened.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not a picture that can be read") from None


def _check_out(path: Path) -> None:
    """Refuse an output that cannot be written; before the work, not after it."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out: {path}: there is no folder {path.parent}")
    if path.suffix != ".npy":
        from PIL import Image

        known = Image.registered_extensions()
        if path.suffix.lower() not in known or known[path.suffix.lower()] not in Image.SAVE:
            raise ValueError(f"--out: {path}: a picture cannot end in {path.suffix!r}")


def _write_image(path: Path, result: Array, picture: Array, centred: bool) -> None:
    """Values as they are into a .npy, 8-bit grey or colour into a picture."""
    if path.suffix == ".npy":
        np.save(path, result)
        return
    from PIL import Image

    flat = result.ndim == 2 or (result.ndim == 3 and result.shape[2] == 3)
    if not flat:
        raise ValueError(f"--out: {path} cannot hold shape {result.shape}; give a .npy")
    low, high = 0.0, 1.0
    if picture.dtype.kind in "iu":
        high = np.iinfo(picture.dtype).max
    elif picture.dtype.kind == "f" and picture.size:
        low, high = min(0.0, float(picture.min())), max(0.0, float(picture.max()))
    if centred:
        high = max(float(np.abs(result).max(initial=0)), 1e-30)
        low = -high
    shown = (result.astype(np.float64) - low) * (255 / (high - low or 1))
    Image.fromarray(np.clip(np.rint(shown), 0, 255).astype(np.uint8)).save(path)


def _size(text: str | None) -> Ints | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]+(x[0-9]+){0,2}", text) or "0" in text.split("x"):
        raise ValueError(f"--input must be 1 to 3 sizes, as 56x56, got {text!r}")
    return tuple(map(int, text.split("x")))


def _numbers(option: str, text: str | None) -> int | list[int] | None:
    if text is None:
        return None
    try:
        numbers = [int(n) for n in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option} must be one number or one an axis, as 2,1, got {text!r}"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def _padding(text: str | None) -> int | str | list[Any] | None:
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


def _rank(text: str) -> int | Sequence[int]:
    try:
        ranks = tuple(int(r) for r in text.split(","))
    except ValueError:
        raise ValueError(f"--rank must be integers, as 8 or 8,12, got {text!r}") from None
    return ranks[0] if len(ranks) == 1 else ranks


def _budget(text: str | None) -> float | str | None:
    """A share, or an amount with its unit."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A table as wide as it needs: a narrow terminal wraps lines, but no number is cut."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    wide = Console(width=1000)
    need = wide.measure(table).maximum
    Console(width=max(need, wide.options.min_width), highlight=False).print(table)


@contextmanager
def _share() -> Iterator[Any]:
    """A bar on stderr of how much is done, a line for each thing."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:20}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def step(name: str, share: float) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=1.0)
            bar.update(tasks[name], completed=share)

        yield step


@contextmanager
def _progress(total: int) -> Iterator[Any]:
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


if __name__ == "__main__":
    main()
