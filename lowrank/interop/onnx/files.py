"""ONNX files: read models from files that are not trusted, and write them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.core.files import atomic_write_all
from lowrank.engine.onnx import library as library
from lowrank.interop.common import check_exists, one_line

#: Bytes of weights above which they are written to a second file: protobuf is limited to 2 GiB.
LARGEST = 1_800_000_000
_PROTOBUF = 2**31 - 1
#: External tensors of up to this many bytes are read with the model: shape inference needs the
#: values of shapes.
_SMALL = 65_536
_PAGE = 4096  # bytes; external tensors are aligned to pages so that they can be memory-mapped
_HALVES = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}  # bits of packed types


def load(path: str | os.PathLike[str]) -> Any:
    """Read an ONNX model without its large external tensors.

    Parameters
    ----------
    path : path
        ``.onnx`` file.  External data must be in its folder.

    Returns
    -------
    onnx.ModelProto
        Valid model; external initializers of more than 64 KiB still refer to their files.

    Raises
    ------
    ValueError
        If the file is not an ONNX model or truncated, or if its external data are outside its
        folder or truncated.
    OSError
        If the file cannot be read.
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
    ValueError: ...net.onnx: not an ONNX model, or truncated
    """
    onnx = library()
    path = Path(path)
    check_exists(path)
    if path.stat().st_size > _PROTOBUF:
        raise ValueError(f"{path}: larger than 2 GiB, the limit of an ONNX file")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception:  # protobuf's DecodeError, under names that vary between its versions
        raise ValueError(f"{path}: not an ONNX model, or truncated") from None
    if not model.graph.node:
        raise ValueError(f"{path}: not an ONNX model, or truncated: it has no nodes")
    try:
        check_external(model, path.parent)
        check(model)
    except ValueError as why:
        raise ValueError(f"{path}: {why}") from None
    return model


def check(model: Any, full: bool = False) -> None:
    """Raise a ValueError unless a model, without its large weights, passes onnx's checker.

    Outputs need no shape: onnxruntime runs such models, which the checker refuses.
    """
    onnx = library()
    light = without_large_weights(model)
    for value in light.graph.input:
        if value.type.WhichOneof("value") == "tensor_type" and not has_shape(value):
            raise ValueError(
                f"input {value.name!r} must have a type and a shape, whose sizes may be symbols, "
                "got none: declare it in the model"
            )
    try:
        if not all(map(has_shape, light.graph.output)):
            light = onnx.shape_inference.infer_shapes(light)
            for value in light.graph.output:
                kind = value.type.tensor_type
                if not has_shape(value) and value.type.WhichOneof("value") in (
                    None,
                    "tensor_type",
                ):
                    kind.elem_type = kind.elem_type or onnx.TensorProto.FLOAT
                    kind.shape.SetInParent()
        onnx.checker.check_model(light, full_check=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as why:
        raise ValueError(f"not a valid ONNX model: {one_line(why)}") from None


def has_shape(value: Any) -> bool:
    """Return whether a ValueInfoProto has the type and the rank of a tensor."""
    kind = value.type.tensor_type
    return bool(kind.elem_type and kind.HasField("shape"))


def is_external(tensor: Any) -> bool:
    """Whether the values of a TensorProto are in another file."""
    return bool(tensor.data_location == library().TensorProto.EXTERNAL)


def check_external(model: Any, folder: Path | None) -> None:
    """Check the files of all external tensors, and read the small ones into `model`.

    Tensors that are not initializers of the main graph are read whatever their size.
    """
    for tensor in filter(is_external, model.graph.initializer):
        if external_range(tensor, folder)[2] <= _SMALL:
            read_external(tensor, folder)
    for tensor in (*_tensors(model, "graph"), *_tensors(model.graph, "initializer")):
        if is_external(tensor):
            read_external(tensor, folder)


def _tensors(message: Any, skip: str = "") -> Iterator[Any]:
    """Yield every TensorProto in a message, except those in the field `skip`."""
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


def external_range(tensor: Any, folder: Path | None) -> tuple[Path, int, int]:
    """Return file, offset and size in bytes of an external tensor, after checking all three."""
    what = f"external data of tensor {tensor.name!r}"
    if folder is None:
        raise ValueError(f"{what} are in another file: the argument folder is required")
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    # Protobuf gives text in another encoding than UTF-8 as bytes: a file may have such a name.
    raw = location.encode("utf-8", "surrogateescape") if isinstance(location, str) else location
    location = os.fsdecode(raw)
    parts = {*PurePosixPath(location).parts, *PureWindowsPath(location).parts}
    absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor
    if not location or "\0" in location or absolute or ".." in parts:
        raise ValueError(
            f"{what} are at {location!r}, which is not a path inside the model's folder"
        )
    root = folder.resolve()
    file = (root / location).resolve()
    if not file.is_relative_to(root):
        raise ValueError(f"{what} are at {location!r}, a link out of the model's folder")
    if not file.is_file():
        raise ValueError(f"{what} are in {location!r}, which is not a file")
    size = _nbytes(tensor)
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or size)
    except ValueError:
        raise ValueError(f"{what} have an offset or a length that is not a number") from None
    if offset < 0 or length != size:
        raise ValueError(
            f"{what} are {length} bytes from {offset}, but its shape {list(tensor.dims)} "
            f"takes {size}"
        )
    if offset + size > file.stat().st_size:
        raise ValueError(f"{what} go beyond the end of {location!r}, which is truncated")
    return file, offset, size


def _nbytes(tensor: Any) -> int:
    """Return the size in bytes of a tensor of its shape and type."""
    onnx = library()
    types = onnx.TensorProto.DataType.items()
    kind = next((n for n, v in types if v == tensor.data_type), "UNDEFINED")
    if kind in ("UNDEFINED", "STRING") or min(tensor.dims, default=0) < 0:
        raise ValueError(
            f"tensor {tensor.name!r} has invalid type {kind} or shape {list(tensor.dims)}"
        )
    bits = _HALVES.get(kind)
    if bits is None:
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-math.prod(map(int, tensor.dims)) * int(bits) // 8)


def read_external(tensor: Any, folder: Path | None) -> None:
    """Read the values of an external tensor into the message.

    The field ``external_data`` is kept: readers ignore it, and :func:`save` then writes the
    weights to a second file again.
    """
    file, offset, size = external_range(tensor, folder)
    with open(file, "rb") as data:
        data.seek(offset)
        tensor.raw_data = data.read(size)
    tensor.data_location = library().TensorProto.DEFAULT


def values(tensor: Any, folder: Path | None) -> Array:
    """Return the array of a TensorProto, also of an external one."""
    onnx = library()
    if is_external(tensor):
        loaded = onnx.TensorProto()
        loaded.CopyFrom(tensor)
        read_external(loaded, folder)
        tensor = loaded
    try:
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    except (ValueError, TypeError, MemoryError) as why:
        raise ValueError(
            f"tensor {tensor.name!r} does not fit its shape {list(tensor.dims)[:8]}: "
            f"{one_line(why)}"
        ) from None


def _stored_bytes(tensor: Any) -> int:
    """Return the size of a tensor as a message, which may exceed the limit of protobuf."""
    try:
        return int(tensor.ByteSize())
    except Exception:  # protobuf's EncodeError, under names that vary between its versions
        return _PROTOBUF + 1


def _copy_without(message: Any, skip: str) -> Any:
    """Return a copy of a message without one field, which may be too large to copy."""
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


def without_large_weights(model: Any) -> Any:
    """Return `model` with its large weights as inputs, for checks and shape inference."""
    onnx = library()
    new = _copy_without(model, "graph")
    new.graph.CopyFrom(_copy_without(model.graph, "initializer"))
    inputs = {i.name for i in model.graph.input}
    for tensor in model.graph.initializer:
        if not is_external(tensor) and _stored_bytes(tensor) <= _SMALL:
            new.graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            new.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return new


def save(model: Any, path: str | os.PathLike[str]) -> bool:
    """Write an ONNX model, atomically.

    Parameters
    ----------
    model : onnx.ModelProto
        Model with all its weights in memory, such as :meth:`OnnxModel.replaced` returns.
    path : path
        File that is written or replaced.  Weights are written to ``NAME.data`` beside it if they
        exceed 1.8 GB, or if they were in other files in the original model.

    Returns
    -------
    bool
        Whether ``NAME.data`` was written.

    Raises
    ------
    ValueError
        If the model does not pass onnx's full check, or if some of its values are in other files.
    OSError
        If a file cannot be written.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import pytest
    >>> onnx = pytest.importorskip("onnx")
    >>> from lowrank.interop.onnx.files import load, save
    >>> graph = onnx.parser.parse_graph("g (float[N, 3] x) => (float[N, 3] y) {y = Relu(x)}")
    >>> path = pathlib.Path(tempfile.mkdtemp(), "relu.onnx")
    >>> save(onnx.helper.make_model(graph), path)
    False
    >>> load(path).graph.node[0].op_type
    'Relu'
    """
    onnx = library()
    path = Path(path)
    tensors = list(model.graph.initializer)
    if any(map(is_external, tensors)):
        raise ValueError(f"{path}: values of the model are in other files: read them first")
    external = any(t.external_data for t in tensors)
    if sum(map(_stored_bytes, tensors)) > LARGEST:
        external = True
    new = _copy_without(model, "graph")
    new.graph.CopyFrom(_copy_without(model.graph, "initializer"))
    with atomic_write_all(path.with_name(path.name + ".data"), path) as (data_file, file):
        if external:
            with open(data_file, "xb") as data:
                for tensor in tensors:
                    new.graph.initializer.append(_as_external(tensor, data, data_file.name))
        else:
            for tensor in tensors:
                new.graph.initializer.append(tensor)
        file.write_bytes(new.SerializeToString())
        try:
            if all(map(has_shape, new.graph.output)):
                onnx.checker.check_model(str(file), full_check=True)  # with the second file
            else:
                check(model, full=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as why:
            raise ValueError(f"{path}: not a valid ONNX model: {one_line(why)}") from None
        except ValueError as why:
            raise ValueError(f"{path}: {why}") from None
    return external


def _as_external(tensor: Any, data: Any, location: str) -> Any:
    """Append a tensor's values to the open file `data`; return a tensor that refers to them.

    A tensor of less than 1 KiB keeps its values.
    """
    onnx = library()
    if tensor.data_type == onnx.TensorProto.STRING:
        return tensor
    if tensor.HasField("raw_data"):
        raw = tensor.raw_data
    else:
        raw = onnx.numpy_helper.from_array(values(tensor, None)).raw_data
    new = _copy_without(tensor, "raw_data")
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
