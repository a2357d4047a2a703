"""Command that filters pictures, volumes and series."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from lowrank import filters
from lowrank._typing import Array
from lowrank.cli.console import AsJson, app, parse_numbers, print_json, typer
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


@app.command("filter")
def filter_image(
    image: Annotated[Path, typer.Argument(help="Picture, or .npy file: image, volume or series.")],
    kernel: Annotated[
        str, typer.Option(help=f"{', '.join(Name)}, or a .npy kernel over 1 to 3 axes.")
    ],
    sigma: Annotated[
        str,
        typer.Option(
            help="Standard deviation in samples; for gauss, dog, unsharp also one per axis (2,6)."
        ),
    ] = "2",
    ratio: Annotated[float, typer.Option(help="Ratio of the wide to the narrow sigma: dog.")] = 1.6,
    amount: Annotated[float, typer.Option(help="Gain of the detail: unsharp.")] = 1.0,
    size: Annotated[
        str, typer.Option(help="Size in samples, one or one per axis (3,5): box.")
    ] = "5",
    radius: Annotated[float, typer.Option(help="Radius in samples: disk.")] = 5.0,
    length: Annotated[int, typer.Option(help="Length in samples: motion.")] = 15,
    wavelength: Annotated[float, typer.Option(help="Wavelength in samples: gabor.")] = 6.0,
    angle: Annotated[float, typer.Option(help="Angle in degrees: gauss, gabor, motion.")] = 0.0,
    axis: Annotated[int, typer.Option(help="Axis of the derivative: sobel, prewitt, scharr.")] = -1,
    connectivity: Annotated[
        int, typer.Option(help="Axes along which a neighbour may differ: laplacian.")
    ] = 1,
    ndim: Annotated[
        int,
        typer.Option(
            help="Number of axes of the kernel, 2 for gabor and motion; a disk over 3 is a ball."
        ),
    ] = 2,
    rank: Annotated[
        int | None, typer.Option(help="Number of separable terms to run instead of the kernel.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative error of the kernel [round-off].")
    ] = None,
    method: Annotated[
        str, typer.Option(help="auto (predicted to be fastest), direct, separable or fft.")
    ] = "auto",
    mode: Annotated[
        str, typer.Option(help=f"Border mode: {', '.join(filters.MODES)}.")
    ] = "reflect",
    cval: Annotated[float, typer.Option(help="Border value of mode constant.")] = 0.0,
    convolve: Annotated[bool, typer.Option("--convolve", help="Flip the kernel.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Output picture or .npy file [IMAGE.KERNEL.png]")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Figure of the filter and its separable form: .svg, .png or .pdf."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Filter a picture by the fastest method within a tolerance, and list the methods.

    A filter that sums to zero, such as sobel, has negative results: the output picture is centred
    at mid-grey.  A .npy file holds the values themselves.
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
    picture = _image(image)
    if taps.ndim > picture.ndim:
        raise ValueError(
            f"--kernel must have at most the {picture.ndim} axes of {image}, got {taps.ndim}"
        )
    if out is None:
        name = f"{image.stem}.{Path(kernel).stem}"
        out = Path(name + (".npy" if image.suffix == ".npy" else ".png"))
    _check_out(out)
    if plot is not None:
        figures.check_path(plot)
    shape = picture.shape[: taps.ndim]
    correlated = np.flip(taps) if convolve else taps
    work = picture.astype(np.float32) if picture.dtype.kind in "iub" else picture
    options: dict[str, Any] = {
        "rank": rank, "tolerance": tolerance, "method": method, "mode": mode, "cval": cval
    }  # fmt: skip
    axes = range(taps.ndim)
    dtype = np.float64 if work.dtype == np.float64 else np.float32
    batch = work.size // max(math.prod(shape), 1)
    plan = filters.plan_filter(correlated, shape, dtype=dtype, batch=batch, **options)
    chain = plan.choice.chain
    run = filters.convolve if convolve else filters.correlate
    result = run(work, taps, axes=axes, **options)
    centred = abs(float(taps.sum())) < 1e-6 * float(np.abs(taps).sum())
    _write_image(out, result, picture, centred)
    if plot is not None:
        figures.filter_and_chain(correlated, chain, plot, title=kernel)
    macs, dense_macs = chain.cost(shape).macs, taps.size * math.prod(shape)
    spectrum = np.linalg.svd(taps, compute_uv=False) if taps.ndim == 2 else None
    record = {
        "image": str(image),
        "shape": list(picture.shape),
        "kernel": kernel,
        "taps": list(taps.shape),
        "method": plan.choice.method,
        "family": chain.family,
        "variant": chain.variant,
        "rank": None if chain.family == "dense" else chain.rank[0],
        "kernel_rank": None if spectrum is None else int((spectrum > 1e-6 * spectrum[0]).sum()),
        "error": chain.error(correlated[None, None]),
        "stages": [list(s.weight.shape) for s in chain.stages],
        "macs": macs,
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
        "out": str(out),
    }
    if as_json:
        print_json(record)
        return
    print(f"{kernel}: {'x'.join(map(str, taps.shape))} taps", end="")
    print("" if spectrum is None else f", rank {record['kernel_rank']}")
    print(plan)
    if chain.family != "dense":
        passes = " -> ".join("x".join(map(str, s.weight.shape)) for s in chain.stages)
        print(f"passes: {passes}, {dense_macs / macs:.2f}x fewer MACs")
    print(f"wrote {out}" + (f"\nwrote {plot}" if plot is not None else ""))


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
        raise ValueError(
            f"--kernel must be one of {', '.join(Name)}, or a .npy file, got {kernel!r}"
        )
    (taps,) = read_weights(kernel).values()
    return taps


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
        raise ValueError(f"{path}: not a readable picture") from None


def _check_out(path: Path) -> None:
    """Raise if the output cannot be written, before any work is done."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out: {path}: folder {path.parent} does not exist")
    if path.suffix != ".npy":
        from PIL import Image

        known = Image.registered_extensions()
        if path.suffix.lower() not in known or known[path.suffix.lower()] not in Image.SAVE:
            raise ValueError(f"--out: {path}: pictures cannot be written as {path.suffix!r}")


def _write_image(path: Path, result: Array, picture: Array, centred: bool) -> None:
    """Write values to a .npy file, or 8-bit grey or colour to a picture."""
    if path.suffix == ".npy":
        np.save(path, result)
        return
    from PIL import Image

    flat = result.ndim == 2 or (result.ndim == 3 and result.shape[2] == 3)
    if not flat:
        raise ValueError(
            f"--out: a picture must be grey or RGB, got shape {result.shape}: write a .npy file"
        )
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
