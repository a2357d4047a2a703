"""Command that filters pictures, volumes and series."""

from __future__ import annotations

import math
from collections.abc import Callable
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from lowrank import filters
from lowrank._typing import Array, Ints
from lowrank.cli.console import (
    AsJson,
    app,
    check_output,
    example,
    parse_numbers,
    print_json,
    typer,
)
from lowrank.cli.pictures import (
    TIFF_ENDINGS,
    Picture,
    check_format,
    is_writable,
    read_picture,
    write_picture,
)
from lowrank.cli.samples import (
    SAMPLE_TYPES,
    Scale,
    as_samples,
    kept_dtype,
    scaled_alpha,
    work_dtype,
)
from lowrank.filters import boxes, multirate, request
from lowrank.interop.weights import read_weights
from lowrank.report import figures


class Name(StrEnum):
    """Filters with a name on the command line."""

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


@app.command(
    "filter",
    epilog=example(
        "filter photo.png --kernel gauss --sigma 3",
        "filter photo.jpg --kernel disk --radius 9.5 --tolerance 0.05",
        "filter stack.tif --kernel gauss --ndim 3 --sigma 1,2,2",
    ),
)
def filter_image(
    image: Annotated[Path, typer.Argument(help="Picture, TIFF stack, or .npy file.")],
    kernel: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE", help=f"{', '.join(Name)}, or a .npy kernel over 1 to 3 axes."
        ),
    ],
    sigma: Annotated[
        str,
        typer.Option(
            metavar="X[,X...]",
            help="Standard deviation in samples; for gauss, dog, unsharp also one per axis (2,6).",
        ),
    ] = "2",
    ratio: Annotated[
        float, typer.Option(metavar="X", help="Ratio of the wide to the narrow sigma: dog.")
    ] = 1.6,
    amount: Annotated[float, typer.Option(metavar="X", help="Gain of the detail: unsharp.")] = 1.0,
    size: Annotated[
        str,
        typer.Option(metavar="N[,N...]", help="Size in samples, one or one per axis (3,5): box."),
    ] = "5",
    radius: Annotated[float, typer.Option(metavar="X", help="Radius in samples: disk.")] = 5.0,
    length: Annotated[int, typer.Option(metavar="N", help="Length in samples: motion.")] = 15,
    wavelength: Annotated[
        float, typer.Option(metavar="X", help="Wavelength in samples: gabor.")
    ] = 6.0,
    angle: Annotated[
        float, typer.Option(metavar="DEGREES", help="Angle in degrees: gauss, gabor, motion.")
    ] = 0.0,
    axis: Annotated[
        int, typer.Option(metavar="N", help="Axis of the derivative: sobel, prewitt, scharr.")
    ] = -1,
    connectivity: Annotated[
        int, typer.Option(metavar="N", help="Axes along which a neighbour may differ: laplacian.")
    ] = 1,
    ndim: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Number of axes of the kernel, 2 for gabor and motion; a disk over 3 is a ball.",
        ),
    ] = 2,
    rank: Annotated[
        int | None,
        typer.Option(metavar="N", help="Number of separable terms to run instead of the kernel."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(metavar="ERROR", help="Largest relative error of the kernel [round-off]."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="METHOD",
            help="auto (predicted to be fastest), direct, separable, fft, or multirate: Gaussians "
            "of sigma 6 or more in a time that does not depend on sigma; --tolerance admits it.",
        ),
    ] = "auto",
    mode: Annotated[
        str, typer.Option(metavar="MODE", help=f"Border mode: {', '.join(filters.MODES)}.")
    ] = "reflect",
    cval: Annotated[float, typer.Option(metavar="X", help="Border value of mode constant.")] = 0.0,
    axes: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]",
            help="Axes that the kernel runs along, such as 1,2 "
            "[those of the page, and of the pages if the kernel has 3; the first ones of .npy]",
        ),
    ] = None,
    origin: Annotated[
        str,
        typer.Option(
            metavar="N[,N...]", help="Shift of the kernel in samples, one or one per axis (0,-1)."
        ),
    ] = "0",
    filter_alpha: Annotated[
        bool, typer.Option("--filter-alpha", help="Filter alpha as well; else it is kept.")
    ] = False,
    convolve: Annotated[bool, typer.Option("--convolve", help="Flip the kernel.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Output file [IMAGE.KERNEL, in the format of IMAGE]"),
    ] = None,
    output_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help=f"Sample type, which holds the values themselves: {', '.join(SAMPLE_TYPES)} "
            "(.png and .pgm: uint8, uint16; .jpg and others: uint8) [that of IMAGE]",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Figure of the filter and its separable form: .svg, .png or .pdf."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Filter a picture or a stack by the fastest method within a tolerance, and list the methods.

    The output keeps the sample type, the pages and alpha.  A filter that sums to zero, such as
    sobel, has negative results: a .tif or .npy file of unsigned samples then becomes floating
    point, and other pictures are centred at mid-grey.
    """
    parameters: dict[str, Any] = {
        "sigma": parse_numbers("--sigma", sigma, float),
        "ratio": ratio,
        "amount": amount,
        "size": parse_numbers("--size", size),
        "radius": radius,
        "length": length,
        "wavelength": wavelength,
        "angle": math.radians(angle),
        "axis": axis,
        "connectivity": connectivity,
        "ndim": ndim,
    }
    taps = _kernel(kernel, parameters)
    picture = read_picture(image)
    values = picture.values
    if not values.size:
        raise ValueError(f"{image}: must have at least one sample, got shape {values.shape}")
    along = _axes(axes, picture, taps.ndim)
    if out is None:
        out = _default_out(image, Path(kernel).stem)
    check_output("--out", out, plot)
    check_format(out, picture)
    if plot is not None:
        figures.check_path(plot)
    sums_to_zero = abs(float(taps.sum())) < 1e-6 * float(np.abs(taps).sum())
    kept = kept_dtype(out, values, output_dtype, sums_to_zero)
    work = values.astype(values.dtype if values.dtype == kept else work_dtype(values), copy=False)
    alpha, samples = (None if filter_alpha else picture.alpha), picture.axes.find("S")
    if alpha is not None:
        work = np.delete(work, alpha, samples)
    shape = tuple(values.shape[a] for a in along)
    correlated = np.flip(taps) if convolve else taps
    shift = parse_numbers("--origin", origin)
    options: dict[str, Any] = {
        "rank": rank, "tolerance": tolerance, "mode": mode, "cval": cval, "origin": shift
    }  # fmt: skip
    unplanned = _unplanned(work, taps, convolve, along, method, options)
    planned = options | {"method": "auto" if method == "multirate" else method}
    dtype = np.float64 if work_dtype(work) == np.float64 else np.float32
    batch = work.size // max(math.prod(shape), 1)
    plan = filters.plan_filter(correlated, shape, dtype=dtype, batch=batch, **planned)
    chain = plan.choice.chain
    run = filters.convolve if convolve else filters.correlate
    result = run(work, taps, axes=along, **(options | {"method": method}))
    notes = [*picture.notes]
    if kept is None:
        scale = Scale.of(out, values, result, sums_to_zero)
        notes.append(str(scale))
        result = scale.apply(result)
    else:
        result = as_samples(result, kept)
    if alpha is not None:
        notes.append("alpha kept")
        opacity = np.take(values, alpha, samples)
        opacity = (scaled_alpha if kept is None else as_samples)(opacity, result.dtype)
        result = np.insert(result, alpha, opacity, samples)
    write_picture(out, result, picture)
    if plot is not None:
        figures.filter_and_chain(correlated, chain, plot, title=kernel)
    macs, dense_macs = chain.cost(shape).macs, taps.size * math.prod(shape)
    spectrum = np.linalg.svd(taps, compute_uv=False) if taps.ndim == 2 else None
    record = {
        "image": str(image),
        "shape": list(values.shape),
        "kernel": kernel,
        "taps": list(taps.shape),
        "method": unplanned.method if unplanned else plan.choice.method,
        "family": None if unplanned else chain.family,
        "variant": None if unplanned else chain.variant,
        "rank": None if unplanned or chain.family == "dense" else chain.rank[0],
        "kernel_rank": None if spectrum is None else int((spectrum > 1e-6 * spectrum[0]).sum()),
        "error": unplanned.error if unplanned else chain.error(correlated[None, None]),
        "stages": [] if unplanned else [list(s.weight.shape) for s in chain.stages],
        "macs": None if unplanned else macs,
        "dense_macs": dense_macs,
        "methods": [
            {
                "method": m.name,
                "rank": list(m.rank),
                "error": m.error,
                "grey": m.grey,
                "seconds": m.seconds,
            }
            for m in plan.methods
        ],
        "axes": list(along),
        "dtype": str(values.dtype),
        "output_dtype": str(result.dtype),
        "notes": notes,
        "out": str(out),
    }
    if as_json:
        print_json(record)
        return
    size = "x".join(map(str, taps.shape))
    is_page = len(along) == values.ndim - (samples >= 0) and samples not in along
    where = "" if is_page else f" along axes {','.join(map(str, along))}"
    where += f", origin {origin}" if np.any(shift) else ""
    done = f"{kernel} {size}{where}, {unplanned or plan.choice.name}"
    print(f"{image}: {picture}, {values.dtype} -> {out}, {result.dtype}: {done}", *notes, sep="; ")
    if spectrum is not None:
        print(f"rank of the kernel: {record['kernel_rank']}")
    if not unplanned:
        print(plan)
    if not unplanned and chain.family != "dense":
        passes = " -> ".join("x".join(map(str, s.weight.shape)) for s in chain.stages)
        print(f"passes: {passes}, {dense_macs / macs:.2f}x fewer MACs")
    if plot is not None:
        print(f"wrote {plot}")


#: Function of each name, and the command-line options that it takes.
_NAMED: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
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


def _kernel(kernel: str, options: dict[str, Any]) -> Any:
    if kernel in _NAMED:
        make, names = _NAMED[kernel]
        if kernel == Name.disk and options["ndim"] == 3:
            make = filters.ball
        elif "ndim" not in names and options["ndim"] != 2:
            raise ValueError(f"--ndim must be 2 for {kernel}, got {options['ndim']}")
        try:
            return make(**{name: options[name] for name in names})
        except (ValueError, TypeError) as why:  # the message begins with the name of the option
            raise ValueError(f"--{why}") from None
    if not kernel.endswith(".npy"):
        near = [n for n in Name if n in kernel] or get_close_matches(kernel, list(Name), 1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"--kernel must be one of {', '.join(Name)}, or a .npy file, got {kernel!r}{hint}"
        )
    (taps,) = read_weights(kernel).values()
    return taps


class _Unplanned(NamedTuple):
    """Method that runs without a plan, and the relative error of the kernel that it runs."""

    method: str
    error: float

    def __str__(self) -> str:
        return f"{self.method}, kernel error {self.error:.2g}" if self.error else self.method


def _unplanned(
    work: Array, taps: Any, convolve: bool, along: Ints, method: str, options: dict[str, Any]
) -> _Unplanned | None:
    """Return the method that filters an image without a plan, or None if the plan runs."""
    call, _ = request.as_call(
        taps, work.ndim, work.dtype, work.dtype, convolve, options["rank"], options["tolerance"],
        method, options["mode"], options["cval"], options["origin"], along, "same", None,
    )  # fmt: skip
    outer = call.as_outer_product(taps)
    if multirate.is_chosen(work, outer, call) and outer is not None:
        return _Unplanned("multirate", multirate.kernel_error(outer.factors) or 0.0)
    window = call.window
    if outer is not None and boxes.takes_image(
        work, window.along, window.taps, window.origins, window.border, call.cval, outer.equal_tap,
        call.work,
    ):  # fmt: skip
        return _Unplanned("sums of windows", 0.0)
    return None


def _axes(axes: str | None, picture: Picture, ndim: int) -> Ints:
    """Return the axes that a kernel runs along: those given, or those of the page first."""
    count = picture.values.ndim
    if ndim > count:
        raise ValueError(f"--kernel must have at most the {count} axes of the image, got {ndim}")
    if axes is None:
        return picture.kernel_axes(ndim)
    given = parse_numbers("--axes", axes)
    given = given if isinstance(given, list) else [given]
    wrapped = tuple(a % count for a in given)
    if len(given) != ndim:
        raise ValueError(f"--axes must be {ndim}, one per axis of the kernel, got {axes!r}")
    if any(not -count <= a < count for a in given) or len({*wrapped}) < ndim:
        raise ValueError(
            f"--axes must be different and between {-count} and {count - 1}, got {axes!r}"
        )
    return wrapped


def _default_out(image: Path, kernel: str) -> Path:
    """Return the default output: in the current folder, in the format of the image."""
    is_kept = is_writable(image.suffix) and image.suffix.lower() != ".gif"  # of 256 colours
    ending = image.suffix if is_kept else ".png"
    stem = image.stem
    if ending.lower() in TIFF_ENDINGS and stem.lower().endswith(".ome"):
        stem, ending = stem[:-4], stem[-4:] + ending
    return Path(f"{stem}.{kernel}{ending}")
