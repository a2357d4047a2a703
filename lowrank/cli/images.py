"""Filters of pictures, volumes and series."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from lowrank import filters
from lowrank._typing import Array
from lowrank.cli.console import AsJson, app, numbers_of, print_json, typer
from lowrank.interop.weights import read_weights
from lowrank.report import figures


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
        "size": numbers_of("--size", size),
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
        figures.check_path(plot)
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
        figures.filter_and_form(correlated, chain, plot, title=kernel)
    macs, whole = chain.cost(shape).macs, taps.size * math.prod(shape)
    spectrum = np.linalg.svd(taps, compute_uv=False) if taps.ndim == 2 else None
    said = {
        "image": str(image),
        "shape": list(picture.shape),
        "kernel": kernel,
        "taps": list(taps.shape),
        "method": ways.choice.method,
        "family": chain.family,
        "variant": chain.variant,
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
        print_json(said)
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
