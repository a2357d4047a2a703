"""Batches of a network's inputs: calibration data in ``.npz`` files and in memory."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.interop.common import check_exists, damaged_errors

Feed = dict[str, Array]
#: Sizes of the free axes of an input, for all inputs or by name.
InputSize = Sequence[int] | Mapping[str, Sequence[int]]
_ZEROS = 2**26  # elements of the largest input of zeros that is made to find shapes


class Input(NamedTuple):
    """One input of a network.

    Attributes
    ----------
    name : str
        Name of the tensor.
    dtype : dtype
        Type of its elements.
    shape : tuple of (int or None)
        Sizes of its axes, None for a free size such as that of the batch.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.interop.batches import Input
    >>> str(Input("image", np.dtype(np.float32), (None, 3, 32, 32)))
    "'image', float32 of shape (any, 3, 32, 32)"
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        sizes = ", ".join("any" if n is None else str(n) for n in self.shape)
        return f"{self.name!r}, {self.dtype} of shape ({sizes})"


def read_batches(
    path: str | os.PathLike[str], inputs: Sequence[Input], batch: int = 64
) -> list[Feed]:
    """Read calibration data.

    Parameters
    ----------
    path : path
        ``.npz`` file with one array per input, named after it, with examples along the first
        axis; the array for a network with a single input may have any name.
    inputs : sequence of Input
        Inputs of the network, such as of :class:`lowrank.interop.onnx.OnnxModel`.
    batch : int
        Number of examples per batch, unless the network fixes it.

    Returns
    -------
    list of dict of str to ndarray
        Batches, of the inputs' types.  If the network fixes the batch, the remainder of the
        examples is not used.

    Raises
    ------
    ValueError
        If the file is damaged, or an array is missing, not finite, or of another shape or an
        incompatible type.
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from lowrank.interop.batches import Input, read_batches
    >>> path = pathlib.Path(tempfile.mkdtemp(), "images.npz")
    >>> np.savez(path, image=np.zeros((100, 3, 8, 8)))
    >>> takes = [Input("image", np.dtype(np.float32), (None, 3, 8, 8))]
    >>> [b["image"].shape for b in read_batches(path, takes)]
    [(64, 3, 8, 8), (36, 3, 8, 8)]
    """
    path = Path(path)
    check_exists(path)
    shapes = _npz_shapes(path)
    names = {i.name: i.name for i in inputs}
    if len(inputs) == len(shapes) == 1:
        names = {inputs[0].name: next(iter(shapes))}
    if missing := [n for n in names.values() if n not in shapes]:
        raise ValueError(
            f"{path}: the network takes {', '.join(map(str, inputs))}; no array "
            f"{missing[0]!r} among {', '.join(map(repr, shapes)) or 'none'}"
        )
    for i in inputs:  # before any values are read
        if not fits(shapes[names[i.name]], (*(None,) * bool(i.shape), *i.shape[1:])):
            raise ValueError(
                f"{path}: the network takes {i}, but array {names[i.name]!r} has shape "
                f"{shapes[names[i.name]]}"
            )
    each = {i.name: i.shape[0] or batch for i in inputs if i.shape}
    fixed = any(i.shape and i.shape[0] for i in inputs)
    lengths = {n: shapes[names[n]][0] for n in each}
    counts = {n: m // each[n] if fixed else -(-m // each[n]) for n, m in lengths.items()}
    if min(counts.values(), default=1) < 1:
        raise ValueError(
            f"{path}: too few examples, {lengths}; the network takes {each[min(counts)]} at once"
        )
    if len(set(counts.values())) > 1 or (not fixed and len(set(lengths.values())) > 1):
        raise ValueError(f"{path}: arrays of different numbers of examples: {lengths}")
    with damaged_errors(path, "unusable"), np.load(path, allow_pickle=False) as file:
        arrays = {i.name: cast(i, file[names[i.name]]) for i in inputs}
    return [
        {n: a[k * each[n] : (k + 1) * each[n]] if n in each else a for n, a in arrays.items()}
        for k in range(max(counts.values(), default=1))
    ]


def _npz_shapes(path: Path) -> dict[str, Ints]:
    """Return the shapes of the arrays in an ``.npz`` file, checked against their sizes in bytes."""
    shapes = {}
    with (
        damaged_errors(path, "not an .npz file of arrays, or damaged"),
        zipfile.ZipFile(path) as archive,
    ):
        for info in archive.infolist():
            with archive.open(info) as file:
                version = np.lib.format.read_magic(file)
                header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = header(file)
                if dtype.hasobject:
                    raise ValueError("it holds Python objects, which are not loaded")
                if math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
                    raise ValueError(f"{info.filename} is not as long as its shape {shape}")
            shapes[info.filename.removesuffix(".npy")] = tuple(shape)
    return shapes


def fits(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    """Return whether a shape has the expected sizes, of which None is any."""
    return len(shape) == len(expected) and all(e in (None, n) for n, e in zip(shape, expected))


def check_batch(inputs: Sequence[Input], batch: Any) -> Feed:
    """Return one batch in the types of the network's inputs; see :func:`read_batches`."""
    if not isinstance(batch, Mapping):
        if len(inputs) != 1:
            raise ValueError(
                f"the network takes {', '.join(map(str, inputs))}: a batch must be a dict of "
                "arrays by name"
            )
        batch = {inputs[0].name: batch}
    feed = {}
    for i in inputs:
        if i.name not in batch:
            raise ValueError(f"the network takes {i}, which is not among {sorted(batch)}")
        array = np.asarray(batch[i.name])
        if not fits(array.shape, i.shape):
            raise ValueError(f"the network takes {i}, got shape {array.shape}")
        feed[i.name] = cast(i, array)
    return feed


def example_of_zeros(inputs: Sequence[Input], input_size: InputSize | None) -> Feed | None:
    """Return one example of zeros.

    Parameters
    ----------
    inputs : sequence of Input
        Inputs of the network.
    input_size : sequence of int or mapping, optional
        Sizes of the free axes of the inputs, without that of the batch; by name if inputs have
        different ones.

    Returns
    -------
    dict of str to ndarray or None
        None if a free size is not given, or the example is large.

    Raises
    ------
    ValueError
        If the sizes do not fit the inputs.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.interop.batches import Input, example_of_zeros
    >>> takes = [Input("image", np.dtype(np.float32), (None, 3, None, None))]
    >>> example_of_zeros(takes, (8, 9))["image"].shape
    (1, 3, 8, 9)
    """
    free = {i.name: sum(n is None for n in i.shape[1:]) for i in inputs}
    if input_size is not None:
        by_name = input_size if isinstance(input_size, Mapping) else None
        unknown = set(by_name or ()) - free.keys()
        if unknown or not any(free.values()):
            known = ", ".join(map(str, inputs))
            what = f"no input {min(unknown)!r}" if unknown else "the network fixes all sizes"
            raise ValueError(f"input size must be for free sizes of {known}; {what}")
    feed = {}
    for i in inputs:
        count = free[i.name]
        given: Any = input_size.get(i.name) if isinstance(input_size, Mapping) else input_size
        if count and given is None:
            return None
        if count and not (
            isinstance(given, tuple | list)
            and len(given) == count
            and all(type(n) is int and n > 0 for n in given)
        ):
            sizes = "1 positive number" if count == 1 else f"{count} positive numbers"
            raise ValueError(f"input size must be {sizes} for the free sizes of {i}, got {given!r}")
        fill = iter(given or ())
        shape = [n if n is not None else next(fill) for n in i.shape[1:]]
        shape = [i.shape[0] or 1, *shape] if i.shape else shape
        if math.prod(shape) > _ZEROS:
            return None
        feed[i.name] = np.zeros(shape, i.dtype)
    return feed


def _is_floating(dtype: np.dtype[Any]) -> bool:
    """Return whether a type is floating-point, also one that NumPy does not know, as bfloat16."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def cast(i: Input, array: Array) -> Array:
    """Return `array` in the type of an input; raise a ValueError if that changes its values."""
    floating = _is_floating(i.dtype)
    kinds = "fiu" if floating else "iu" if i.dtype.kind in "iu" else "b"
    if array.dtype.kind not in kinds and not (floating and _is_floating(array.dtype)):
        raise ValueError(f"the network takes {i}, got {array.dtype}")
    with np.errstate(over="ignore"):
        new = np.asarray(array, i.dtype, order="C")
    if not new.size:
        raise ValueError(f"values for {i}, must not be empty")
    if floating and not np.isfinite(new).all():
        raise ValueError(f"values for {i}, are NaN, infinite or too large")
    if not floating and not np.array_equal(new, array):
        raise ValueError(f"values for {i}, are out of its range")
    return new
