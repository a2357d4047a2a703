"""ONNX models out of files that are not trusted, and into files."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from lowrank._typing import Array

#: Bytes of weights above which they go to a file of their own: protobuf ends at 2 GiB.
LARGEST = 1_800_000_000
_PROTOBUF = 2**31 - 1
#: External tensors up to this many bytes are read with the model: shapes and the like, whose
#: values shape inference needs.
_SMALL = 65_536
_PAGE = 4096  # bytes: external tensors begin at pages, so that they can be mapped
_HALVES = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}  # bits of packed types


def library() -> Any:
    """The package onnx, or what to install."""
    try:
        import onnx
    except ImportError:
        raise ImportError(
            "ONNX models need onnx and onnxruntime: pip install 'lowrank[onnx]'"
        ) from None
    return onnx


def load(path: str | os.PathLike[str]) -> Any:
    """Read an ONNX model; large external tensors stay where they are.

    Parameters
    ----------
    path : path
        An ``.onnx`` file.  External data are looked for in its folder and nowhere else.

    Returns
    -------
    onnx.ModelProto
        Checked; external initializers of more than 64 KiB still refer to their files.

    Raises
    ------
    ValueError
        If it is no ONNX model or cut short, or if its external data lie outside its folder or
        are shorter than it says.
    OSError
        If it cannot be read.
    ImportError
        If onnx is not installed.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import pytest
    >>> onnx = pytest.importorskip("onnx")
    >>> from lowrank.interop.onnx.files import load
    >>> path = pathlib.Path(tempfile.mkdtemp(), "net.onnx")
    >>> _ = path.write_bytes(b"no network at all")
    >>> load(path)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ...net.onnx: not an ONNX model, or cut short
    """
    onnx = library()
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, not an ONNX model")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.stat().st_size > _PROTOBUF:
        raise ValueError(f"{path}: larger than the 2 GiB that an ONNX file can have")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception:  # protobuf's DecodeError, under names that vary between its versions
        raise ValueError(f"{path}: not an ONNX model, or cut short") from None
    if not model.graph.node:
        raise ValueError(f"{path}: not an ONNX model, or cut short: it has no nodes")
    try:
        resolve(model, path.parent)
        check(model)
    except ValueError as why:
        raise ValueError(f"{path}: {why}") from None
    return model


def check(model: Any, full: bool = False) -> None:
    """onnx's checker on everything but the values of large weights; ValueError if it objects."""
    onnx = library()
    try:
        onnx.checker.check_model(shell(model), full_check=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as why:
        raise ValueError(f"not a valid ONNX model: {line_of(why)}") from None


def line_of(why: BaseException) -> str:
    """What went wrong, on one line of bearable length."""
    return " ".join(str(why).split())[:300]


def is_external(tensor: Any) -> bool:
    """Whether a TensorProto's values lie in another file."""
    return bool(tensor.data_location == library().TensorProto.EXTERNAL)


def resolve(model: Any, folder: Path | None) -> None:
    """Check where the external tensors of `model` lie, and read the small ones in.

    Those that are no initializers of the main graph are read in, whatever their size.
    """
    for tensor in filter(is_external, model.graph.initializer):
        if place(tensor, folder)[2] <= _SMALL:
            read_in(tensor, folder)
    for tensor in (*_tensors(model, "graph"), *_tensors(model.graph, "initializer")):
        if is_external(tensor):
            read_in(tensor, folder)


def _tensors(message: Any, skip: str = "") -> Iterator[Any]:
    """Every TensorProto in a message, but for those in the field `skip`."""
    kind = library().TensorProto
    for field, value in message.ListFields():
        if field.name == skip or isinstance(value, (str, bytes, int, float)):
            continue
        for part in (value,) if hasattr(value, "ListFields") else value:
            if isinstance(part, kind):
                yield part
            elif hasattr(part, "ListFields"):
                yield from _tensors(part)
            else:
                break  # numbers or text


def place(tensor: Any, folder: Path | None) -> tuple[Path, int, int]:
    """File, offset and bytes of an external tensor, all checked: nothing is read."""
    what = f"external data of tensor {tensor.name!r}"
    if folder is None:
        raise ValueError(f"{what} lie outside the model: say in which folder")
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    parts = {*PurePosixPath(location).parts, *PureWindowsPath(location).parts}
    absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor
    if not location or "\0" in location or absolute or ".." in parts:
        raise ValueError(f"{what} are at {location!r}, which is no path inside the model's folder")
    root = folder.resolve()
    file = (root / location).resolve()
    if not file.is_relative_to(root):
        raise ValueError(f"{what} are at {location!r}, a link out of the model's folder")
    if not file.is_file():
        raise ValueError(f"{what} are in {location!r}, which is not there")
    size = _nbytes(tensor)
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or size)
    except ValueError:
        raise ValueError(f"{what} have an offset or a length that is no number") from None
    if offset < 0 or length != size:
        raise ValueError(
            f"{what} are {length} bytes from {offset}, but its shape {list(tensor.dims)} "
            f"takes {size}"
        )
    if offset + size > file.stat().st_size:
        raise ValueError(f"{what} go beyond the end of {location!r}, which is cut short")
    return file, offset, size


def _nbytes(tensor: Any) -> int:
    """Bytes that a tensor's shape and type say."""
    onnx = library()
    known = onnx.TensorProto.DataType.items()
    kind = next((n for n, v in known if v == tensor.data_type), "UNDEFINED")
    if kind in ("UNDEFINED", "STRING") or min(tensor.dims, default=0) < 0:
        raise ValueError(f"tensor {tensor.name!r} of type {kind} and shape {list(tensor.dims)}")
    bits = _HALVES.get(kind)
    if bits is None:
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-math.prod(map(int, tensor.dims)) * int(bits) // 8)


def read_in(tensor: Any, folder: Path | None) -> None:
    """Bring an external tensor's values into the message.

    Its field ``external_data`` keeps saying where they lay, which readers ignore and
    :func:`save` takes as the wish that they lie outside again.
    """
    file, offset, size = place(tensor, folder)
    with open(file, "rb") as data:
        data.seek(offset)
        tensor.raw_data = data.read(size)
    tensor.data_location = library().TensorProto.DEFAULT


def values(tensor: Any, folder: Path | None) -> Array:
    """The array of a TensorProto, wherever its values lie."""
    onnx = library()
    if is_external(tensor):
        held = onnx.TensorProto()
        held.CopyFrom(tensor)
        read_in(held, folder)
        tensor = held
    try:
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    except (ValueError, TypeError, MemoryError) as why:
        raise ValueError(
            f"tensor {tensor.name!r} does not hold what its shape {list(tensor.dims)[:8]} says: "
            f"{line_of(why)}"
        ) from None


def _copied(message: Any, skip: str) -> Any:
    """A copy of a message without one of its fields, which may be too large to copy."""
    new = type(message)()
    for field, value in message.ListFields():
        if field.name == skip:
            continue
        if hasattr(value, "ListFields"):
            getattr(new, field.name).CopyFrom(value)
        elif hasattr(value, "extend"):
            getattr(new, field.name).extend(value)
        else:
            setattr(new, field.name, value)
    return new


def shell(model: Any) -> Any:
    """`model` with its large weights as inputs: all that checks and shape inference look at."""
    onnx = library()
    new = _copied(model, "graph")
    new.graph.CopyFrom(_copied(model.graph, "initializer"))
    inputs = {i.name for i in model.graph.input}
    for tensor in model.graph.initializer:
        if not is_external(tensor) and tensor.ByteSize() <= _SMALL:
            new.graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            new.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return new


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Write an ONNX model, whole or not at all.

    Parameters
    ----------
    model : onnx.ModelProto
        With all its weights in memory, such as :meth:`OnnxModel.replaced` gives it.
    path : path
        Replaced if it is there.  Weights go to ``NAME.data`` beside it where the model would
        exceed 1.8 GB, or where they lay outside the model that it was made from.

    Raises
    ------
    ValueError
        If the checker objects, in full; or if values of the model lie in other files.
    OSError
        If it cannot be written.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import pytest
    >>> onnx = pytest.importorskip("onnx")
    >>> from lowrank.interop.onnx.files import load, save
    >>> graph = onnx.parser.parse_graph("g (float[N, 3] x) => (float[N, 3] y) {y = Relu(x)}")
    >>> path = pathlib.Path(tempfile.mkdtemp(), "relu.onnx")
    >>> save(onnx.helper.make_model(graph), path)
    >>> load(path).graph.node[0].op_type
    'Relu'
    """
    onnx = library()
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    tensors = list(model.graph.initializer)
    if any(map(is_external, tensors)):
        raise ValueError(f"{path}: values of the model lie in other files: read them in first")
    outside = any(t.external_data for t in tensors)
    if sum(t.ByteSize() for t in tensors) > LARGEST:
        outside = True
    new = _copied(model, "graph")
    new.graph.CopyFrom(_copied(model.graph, "initializer"))
    # In a folder beside the target: what is on the same disk can be moved as a whole.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as part:
        file, beside = Path(part, path.name), Path(part, path.name + ".data")
        if outside:
            with open(beside, "xb") as data:
                for tensor in tensors:
                    new.graph.initializer.append(_written(tensor, data, beside.name))
        else:
            for tensor in tensors:
                new.graph.initializer.append(tensor)
        file.write_bytes(new.SerializeToString())
        try:
            onnx.checker.check_model(str(file), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as why:
            raise ValueError(f"{path}: not a valid ONNX model: {line_of(why)}") from None
        if outside:
            os.replace(beside, path.with_name(beside.name))
        os.replace(file, path)


def _written(tensor: Any, data: Any, location: str) -> Any:
    """A tensor that refers to its values in the open file `data`, or the same if it is short."""
    onnx = library()
    if tensor.data_type == onnx.TensorProto.STRING:
        return tensor
    if tensor.HasField("raw_data"):
        raw = tensor.raw_data
    else:
        raw = onnx.numpy_helper.from_array(values(tensor, None)).raw_data
    new = _copied(tensor, "raw_data")
    for field in ("external_data", "float_data", "int32_data", "int64_data", "double_data",
                  "uint64_data"):  # fmt: skip
        new.ClearField(field)
    if len(raw) < 1024:
        new.raw_data = raw
        return new
    data.write(bytes(-data.tell() % _PAGE))
    for key, value in (("location", location), ("offset", data.tell()), ("length", len(raw))):
        new.external_data.add(key=key, value=str(value))
    new.data_location = onnx.TensorProto.EXTERNAL
    data.write(raw)
    return new
