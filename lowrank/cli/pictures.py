"""Picture files as arrays, and arrays as picture files: PNG, TIFF, others by Pillow, ``.npy``."""

from __future__ import annotations

import io
import logging
import os
import struct
import tempfile
import tokenize
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core.files import atomic_write
from lowrank.interop.weights import read_weights

TIFF_ENDINGS = (".tif", ".tiff")
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by the number of samples per pixel
_GREY_ALPHA, _RGBA = 4, 6  # of these colour types
_UNCOMPRESSED, _SEPARATE = 1, 2  # TIFF's compression, and its planes of one sample each
_ALPHA = (1, 2)  # TIFF's extra samples that are alpha: premultiplied or not


@dataclass(frozen=True, slots=True)
class Picture:
    """Samples of a picture, a stack or an array, with what its file tells of them.

    Attributes
    ----------
    values : ndarray
        Samples, in native byte order.
    axes : str
        One letter per axis by the names of TIFF: Y, X, S for the samples of a pixel, Z, T, C, I,
        Q for those of pages.  Empty for an array, whose axes have no names.
    alpha : int or None
        Index of the alpha sample along S.
    notes : tuple of str
        Conversions that reading took.
    metadata : dict
        Options of the writer of the same format.
    """

    values: Array
    axes: str = ""
    alpha: int | None = None
    notes: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shape = self.values.shape
        if not self.axes:
            return "x".join(map(str, shape))
        sizes = dict(zip(self.axes, shape))
        text = f"{sizes['Y']}x{sizes['X']}"
        samples = sizes.get("S", 0)
        if samples == 2 and self.alpha is not None:
            text += " grey with alpha"
        elif samples:
            is_named = samples == 3 or (samples == 4 and self.alpha is not None)
            text += " " + {3: "RGB", 4: "RGBA"}[samples] if is_named else f" of {samples} samples"
        pages = [f"{n} {axis}" for axis, n in zip(self.axes, shape) if axis not in "YXS"]
        if len(pages) > 1:
            return f"{' x '.join(pages)} pages of {text}"
        return f"{pages[0][:-2]} pages of {text}" if pages else text

    def kernel_axes(self, ndim: int) -> Ints:
        """Return the axes that a kernel runs along by default: those of the page, then of pages."""
        if not self.axes:
            return tuple(range(ndim))
        page = self.axes.index("Y"), self.axes.index("X")
        if ndim == 2:
            return page
        depth = [i for i, axis in enumerate(self.axes) if axis not in "YXSC"]
        depth = [self.axes.index("Z")] if "Z" in self.axes else depth
        if ndim == 3 and len(depth) == 1:
            return tuple(sorted((*depth, *page)))
        raise ValueError(
            f"--axes must be given for a kernel over {ndim} axes and a picture with axes "
            f"{','.join(self.axes)}"
        )


def read_picture(path: Path) -> Picture:
    """Read a picture, a stack of pages or a ``.npy`` file; raise ValueError if it is damaged."""
    if path.suffix == ".npy":
        try:
            (values,) = read_weights(path).values()
        except (SyntaxError, tokenize.TokenError) as why:  # of NumPy's parser of the header
            raise ValueError(f"{path}: not a valid .npy file: {why}") from None
        return Picture(_as_native(values))
    with path.open("rb") as file:
        start = file.read(26)
    is_tiff = start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    try:
        if is_tiff or path.suffix.lower() in TIFF_ENDINGS:
            return _read_tiff(path)
        depth, colour_type = start[24:26] if start.startswith(_PNG) and len(start) == 26 else (8, 0)
        return _read_plain(path, depth, colour_type)
    except (ImportError, MemoryError):
        raise
    except Exception as why:  # decoders raise any error for a damaged file
        raise ValueError(f"{path}: damaged, or not a readable picture: {why}") from None


def _as_native(values: Array) -> Array:
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("pictures need Pillow: pip install 'lowrank[cli]'") from None
    return Image


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError:
        raise ImportError("TIFF files need tifffile: pip install 'lowrank[cli]'") from None
    return tifffile


def _read_plain(path: Path, depth: int, colour_type: int) -> Picture:
    """Read a picture by Pillow; `depth` and `colour_type` are those of a PNG."""
    image = _pillow()
    notes = []
    with image.open(path) as opened:
        mode, info = opened.mode, dict(opened.info)
        if opened.format == "MPO":
            notes.append("previews in the file left out")
        elif getattr(opened, "n_frames", 1) > 1:
            raise ValueError(f"{opened.n_frames} frames: stacks must be TIFF or .npy files")
        has_key, is_ppm = "transparency" in info, opened.format == "PPM"
        if is_ppm and mode == "RGB" and opened.tile[0][0] == "ppm" and opened.tile[0][3][1] > 255:
            notes.append("16 bits read as 8")
        if depth == 16 and len(opened.getbands()) > 1:
            values = _read_png16(path, colour_type)
        elif mode == "P":
            is_clear = has_key or (opened.palette and opened.palette.mode == "RGBA")
            mode, has_key = "RGBA" if is_clear else "RGB", False
            notes.append(f"palette converted to 8-bit {mode}")
            values = np.array(opened.convert(mode))
        elif mode == "1":
            notes.append("1 bit converted to 8-bit grey")
            values = np.array(opened.convert("L"))
        elif mode in ("L", "LA", "RGB", "RGBA", "I", "F") or mode.startswith("I;16"):
            values = np.array(opened)
        else:
            notes.append(f"{mode} converted to 8-bit RGB")
            values = np.array(opened.convert("RGB"))
            info.pop("icc_profile", None)  # of the other colour space
    if depth == 16 or (is_ppm and mode == "I"):
        values = values.astype(np.uint16, copy=False)
    if has_key and values.dtype.kind == "u":
        notes.append("transparent colour converted to alpha")
        pixels = values.reshape(*values.shape[:2], -1)
        is_opaque = (pixels != info["transparency"]).any(axis=2, keepdims=True)
        alpha = is_opaque * np.iinfo(values.dtype).max
        values = np.concatenate([pixels, alpha.astype(values.dtype)], axis=2)
    samples = values.shape[2] if values.ndim == 3 else 1
    metadata = {k: info[k] for k in ("icc_profile", "exif", "dpi") if k in info}
    return Picture(
        _as_native(values),
        "YXS" if values.ndim == 3 else "YX",
        samples - 1 if samples in (2, 4) else None,
        tuple(notes),
        metadata,
    )


def _read_png16(path: Path, colour_type: int) -> Array:
    """Read 16 bits of several samples per pixel, of which Pillow keeps 8."""
    image = _pillow()
    if colour_type == _GREY_ALPHA:  # read as 8-bit RGBA: a pixel has as many bytes
        data = bytearray(path.read_bytes())
        data[24:26] = 8, _RGBA
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        with image.open(io.BytesIO(data)) as opened:
            return np.array(opened).view(">u2")
    halves = []
    for order in "BL":  # the high bytes, then the low ones
        with image.open(path) as opened:
            opened.tile = [(*opened.tile[0][:3], f"{opened.mode};16{order}")]
            halves.append(np.array(opened).astype(np.uint16))
    return halves[0] << 8 | halves[1]


@contextmanager
def _strict_log(name: str) -> Iterator[None]:
    """Raise for logged damage of the pages of a TIFF, which would be left out; warn of the rest."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tifffile")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
    for message in dict.fromkeys(records):
        if "TiffPages" in message or "series" in message:
            raise ValueError(message)
        warnings.warn(f"{name}: {message}", stacklevel=2)


def _read_tiff(path: Path) -> Picture:
    tifffile = _tifffile()
    with _strict_log(str(path)), tifffile.TiffFile(path) as tiff:
        if len(tiff.series) != 1:
            raise ValueError(
                f"pages must have one size and sample type, got {len(tiff.series)} kinds of pages"
            )
        series = tiff.series[0]
        page = series.keyframe
        try:
            values = series.asarray()
        except ValueError as why:
            if "imagecodecs" not in str(why):
                raise
            values = _decode_by_pillow(path, series, str(why))
        metadata = _tiff_metadata(tiff, page)
        photometric, colormap, extra = page.photometric.name, page.colormap, page.extrasamples
        axes = series.axes
    notes = []
    values = _as_native(values)
    if photometric == "PALETTE":
        notes.append("palette converted to 8-bit RGB")
        values = (colormap >> 8).astype(np.uint8).T[values]
        axes, photometric = axes + "S", "RGB"
    if photometric == "MINISWHITE":
        notes.append("0 is white")
    if values.dtype == bool:
        notes.append("1 bit converted to 8-bit grey")
        values = values.astype(np.uint8) * np.uint8(255)
    if not {"Y", "X"} <= {*axes}:
        raise ValueError(f"pages must have axes Y and X, got {axes}")
    alpha = None
    if "S" in axes:
        first = values.shape[axes.index("S")] - len(extra)
        alpha = next((first + i for i, e in enumerate(extra) if e in _ALPHA), None)
    metadata["photometric"] = "RGB" if photometric == "YCBCR" else photometric
    metadata["extrasamples"] = [e.name for e in extra]
    return Picture(values, axes, alpha, tuple(notes), metadata)


@contextmanager
def _strict_libtiff() -> Iterator[None]:
    """Raise for damage that libtiff prints to the standard error stream, and decodes all the same.

    Pillow has no other access to these messages.
    """
    with tempfile.TemporaryFile() as printed:
        try:
            stream = os.dup(2)
        except OSError:  # closed, so that nothing is printed
            yield
            return
        try:
            os.dup2(printed.fileno(), 2)
            yield
        finally:
            os.dup2(stream, 2)
            os.close(stream)
            printed.seek(0)
            lines = printed.read().decode(errors="replace").splitlines()
        if lines:
            raise ValueError(lines[0].removeprefix("tempfile.tif: ").rstrip("."))


def _decode_by_pillow(path: Path, series: Any, why: str) -> Array:
    """Decode the pages that tifffile cannot, if Pillow keeps their sample type."""
    image = _pillow()
    pages = []
    with _strict_libtiff(), image.open(path) as opened:
        for index in range(opened.n_frames):
            opened.seek(index)
            pages.append(np.array(opened))
    if pages[0].dtype != series.dtype or len(pages) * pages[0].size != series.size:
        raise ValueError(f"{why}: pip install imagecodecs")
    return np.stack(pages).reshape(series.shape)


def _tiff_metadata(tiff: Any, page: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {"is_ome": tiff.is_ome, "is_imagej": tiff.is_imagej}
    if page.planarconfig == _SEPARATE:
        metadata["planarconfig"] = "SEPARATE"
    if page.compression != _UNCOMPRESSED:
        metadata["compression"] = "zlib"  # without loss, and no further library
    if "XResolution" in page.tags:
        metadata["resolution"] = page.resolution
        metadata["resolutionunit"] = page.resolutionunit
    if "InterColorProfile" in page.tags:
        metadata["iccprofile"] = page.tags["InterColorProfile"].value
    if tiff.is_imagej:
        kept = ("spacing", "unit", "finterval", "fps", "mode", "Labels", "LUTs")
        known = tiff.imagej_metadata or {}
        metadata["imagej"] = {k: known[k] for k in kept if k in known}
    return metadata


def is_writable(ending: str) -> bool:
    """Return whether a picture can be written to a file with this ending."""
    if ending == ".npy" or ending.lower() in TIFF_ENDINGS:
        return True
    image = _pillow()
    return image.registered_extensions().get(ending.lower()) in image.SAVE


def check_format(path: Path, picture: Picture) -> None:
    """Raise if `path` cannot hold a picture of this kind, before any work is done."""
    ending, shape = path.suffix.lower(), picture.values.shape
    if not is_writable(path.suffix):
        raise ValueError(f"--out: {path}: pictures cannot be written as {path.suffix!r}")
    if path.suffix == ".npy":
        return
    if ending in TIFF_ENDINGS:
        is_known = len(shape) >= 2
    else:
        is_known = _letters(picture) in ("YX", "YXS", "SYX") and _samples(picture) <= 4
    if not is_known:
        raise ValueError(
            f"--out: {path}: must be a {'.npy' if len(shape) < 2 else '.tif or .npy'} file for "
            f"an array of shape {shape}, got {path.suffix!r}"
        )
    if ending in TIFF_ENDINGS:
        _tifffile()


def _letters(picture: Picture) -> str:
    """Return the axes of a picture; an array with three samples per pixel is RGB."""
    if picture.axes or picture.values.ndim < 2:
        return picture.axes
    is_rgb = picture.values.ndim == 3 and picture.values.shape[2] == 3
    return "YXS" if is_rgb else "Q" * (picture.values.ndim - 2) + "YX"


def _samples(picture: Picture) -> int:
    """Return the number of samples per pixel."""
    axes = _letters(picture)
    return picture.values.shape[axes.index("S")] if "S" in axes else 1


def write_picture(path: Path, values: Array, source: Picture) -> None:
    """Write an array in the format of the ending; on failure an existing file stays as it was.

    Parameters
    ----------
    path : Path
        Output file.
    values : ndarray
        Samples.
    source : Picture
        Picture that the samples were computed from.
    """
    picture = Picture(values, source.axes, source.alpha, (), source.metadata)
    try:
        with atomic_write(path) as part, part.open("w+b") as file:
            if path.suffix == ".npy":
                np.save(file, values)
            elif path.suffix.lower() in TIFF_ENDINGS:
                _write_tiff(file, picture)
            else:
                file.write(_encode(path.suffix.lower(), picture))
    except OSError as why:
        raise OSError(f"--out: {path}: cannot be written: {why.strerror or why}") from None


def _encode(ending: str, picture: Picture) -> bytes:
    """Return a PNG or a file of another format of Pillow.

    Pillow does not notice that a disk is full in the middle of a file, so it writes to memory.
    """
    values, metadata = picture.values, picture.metadata
    if _letters(picture) == "SYX":
        values = np.moveaxis(values, 0, -1)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if metadata.get("photometric") == "MINISWHITE" and values.ndim == 2:
        values = ~values
    if ending == ".png" and values.dtype == np.uint16:
        return _encode_png16(values, metadata)
    image, buffer = _pillow(), io.BytesIO()
    kept = {k: metadata[k] for k in ("icc_profile", "exif", "dpi") if k in metadata}
    name = image.registered_extensions()[ending]
    converted = image.fromarray(np.ascontiguousarray(values))
    converted.save(buffer, format=name, quality=95, lossless=True, **kept)
    return buffer.getvalue()


def _encode_png16(values: Array, metadata: dict[str, Any]) -> bytes:
    """Return a PNG of 16 bits per sample, of which Pillow writes only grey ones."""
    height, width, samples = (*values.shape, 1)[:3]
    rows = values.astype(">u2").view(np.uint8).reshape(height, -1)
    lines = np.empty((height, 1 + rows.shape[1]), np.uint8)
    lines[:, 0] = 2  # filter "up": differences to the row above
    lines[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=lines[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 16, _PNG_COLOUR_TYPES[samples], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")]
    if metadata.get("icc_profile"):
        chunks.insert(1, (b"iCCP", b"ICC profile\0\0" + zlib.compress(metadata["icc_profile"])))
    return _PNG + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def _write_tiff(file: BinaryIO, picture: Picture) -> None:
    values, metadata = picture.values, dict(picture.metadata)
    kept = ("planarconfig", "compression", "resolution", "resolutionunit", "iccprofile")
    options: dict[str, Any] = {k: metadata[k] for k in kept if k in metadata}
    colours = _samples(picture) - (picture.alpha is not None)
    options["photometric"] = metadata.get("photometric", "RGB" if colours == 3 else "MINISBLACK")
    if "S" in _letters(picture):
        alpha = [] if picture.alpha is None else ["UNASSALPHA"]
        options["extrasamples"] = metadata.get("extrasamples", alpha)
        options.setdefault("planarconfig", "CONTIG")
    if picture.axes:
        options["metadata"] = {"axes": picture.axes}
    if metadata.get("is_imagej") and values.dtype.name in ("uint8", "uint16", "float32"):
        options |= {"imagej": True, "metadata": options["metadata"] | metadata["imagej"]}
        options.pop("extrasamples", None)
    _tifffile().imwrite(file, values, ome=bool(metadata.get("is_ome")), **options)
