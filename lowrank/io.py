"""Chains in ``.safetensors`` files, and tensors in general."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core.files import atomic_write
from lowrank.core.geometry import Geometry
from lowrank.core.stage import Stage
from lowrank.factorization import Factorization

#: Version of the metadata record; the reader refuses all others.
FORMAT = 1
_RECORD = "lowrank"

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
#: bfloat16 as stored, for tensors that are copied unread.
BFLOAT16 = np.dtype([("bfloat16", "<u2")])
_NAMES = {np.dtype(v): k for k, v in _DTYPES.items() if k != "BF16"} | {BFLOAT16: "BF16"}
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the reference reader
#: Weights compress little: archives that claim to expand by a larger factor (beyond 64 MiB) are
#: refused.
_EXPANSION, _SPARE = 100, 1 << 26


def save(path: str | os.PathLike[str], chains: Mapping[str, Factorization]) -> None:
    """Write chains to a ``.safetensors`` file.

    Any reader of that format sees the tensors ``NAME.0.weight``, ``NAME.1.weight``, ...,
    ``NAME.bias``.  Geometries and groups are in the metadata, under ``"lowrank"``.

    Parameters
    ----------
    path : path
        Output file; an existing one is replaced atomically.
    chains : mapping of str to Factorization
        Chains by name, such as that of a layer.

    Raises
    ------
    TypeError
        If `chains` is not a mapping of names to chains.
    OSError
        If the file cannot be written.

    References
    ----------
    .. [1] safetensors, "Format", https://huggingface.co/docs/safetensors

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> import lowrank
    >>> f = lowrank.spatial_svd(lowrank.dense(np.ones((4, 2, 3, 3)), padding=1), rank=1)
    >>> path = pathlib.Path(tempfile.mkdtemp(), "edges.safetensors")
    >>> lowrank.save(path, {"edges": f})
    >>> lowrank.load(path)["edges"]
    <Factorization spatial_svd h-w rank 1: 1x2x3x1 -> 4x1x1x3, 18 params>
    """
    tensors: dict[str, Array] = {}
    layers = {}
    if not isinstance(chains, Mapping):
        raise TypeError(f"chains must be a dict of names to chains, got {type(chains).__name__}")
    for name, f in chains.items():
        if not isinstance(name, str) or not isinstance(f, Factorization):
            raise TypeError(f"chains must be a dict of names to chains, got {name!r}: {f!r}")
        layers[name] = {
            "family": f.family,
            "variant": f.variant,
            "rank": list(f.rank),
            "groups": f.groups,
            "geometry": geometry_record(f.geometry),
            "stages": [
                {
                    "groups": s.groups,
                    "left": s.outer,
                    "right": s.inner,
                    "shuffle": list(s.shuffle),
                    "transposed": s.transposed,
                    "geometry": geometry_record(s.geometry),
                }
                for s in f.stages
            ],
        }
        for i, stage in enumerate(f.stages):
            tensors[f"{name}.{i}.weight"] = stage.weight
        if f.bias is not None:
            tensors[f"{name}.bias"] = f.bias
    record = json.dumps({"format": FORMAT, "layers": layers}, separators=(",", ":"))
    write_tensors(path, tensors, {_RECORD: record})


def load(path: str | os.PathLike[str]) -> dict[str, Factorization]:
    """Read the chains that :func:`save` wrote.

    Parameters
    ----------
    path : path
        A ``.safetensors`` file.

    Returns
    -------
    dict of str to Factorization
        Chains by name, in the order of :func:`save`, with the same bits.

    Raises
    ------
    ValueError
        If the file is damaged, or was not written by :func:`save`, or by a newer version.
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> import lowrank
    >>> path = pathlib.Path(tempfile.mkdtemp(), "sobel.safetensors")
    >>> lowrank.save(path, {"sobel": lowrank.filters.separate(lowrank.filters.sobel())})
    >>> list(lowrank.load(path))
    ['sobel']
    """
    tensors, metadata = read_tensors(path)
    if _RECORD not in metadata:
        raise ValueError(
            f"{path}: has tensors, but no chains saved by lowrank; "
            "lowrank.dense(weight) makes a convolution of a tensor"
        )
    try:
        record = json.loads(metadata[_RECORD], object_pairs_hook=_as_object)
        version, layers = record["format"], record["layers"].items()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path}: the metadata of the chains is damaged") from None
    if version != FORMAT:
        raise ValueError(
            f"{path}: format must be {FORMAT} for this version of lowrank, got format {version!r}"
        )
    return {name: _parse_chain(path, name, entry, tensors) for name, entry in layers}


def holds_chains(metadata: Mapping[str, str]) -> bool:
    """Return whether a file with this metadata was written by :func:`save`."""
    return _RECORD in metadata


def _parse_chain(path: Any, name: str, entry: Any, tensors: Mapping[str, Array]) -> Factorization:
    try:
        stages = tuple(
            Stage(
                tensors[f"{name}.{i}.weight"],
                _parse_geometry(s["geometry"]),
                _as_integer("groups", s["groups"]),
                _as_integer("left", s["left"]),
                _as_integer("right", s["right"]),
                _as_pair(s["shuffle"]),
                _as_flag("transposed", s["transposed"]),
            )
            for i, s in enumerate(entry["stages"])
        )
        bias = tensors.get(f"{name}.bias")
        f = Factorization(
            stages,
            _parse_geometry(entry["geometry"]),
            _as_integer("groups", entry["groups"]),
            bias,
            str(entry["family"]),
            str(entry["variant"]),
            tuple(_as_integer("rank", r) for r in entry["rank"]),
        )
    except KeyError as key:
        raise ValueError(f"{path}: chain {name!r} lacks {key}") from None
    except (ValueError, TypeError, AttributeError) as why:
        raise ValueError(f"{path}: chain {name!r} is damaged: {why}") from None
    for weight in (*(s.weight for s in stages), *(() if bias is None else (bias,))):
        if weight.dtype.kind != "f" or not np.isfinite(weight).all():
            raise ValueError(f"{path}: chain {name!r} has weights that are not finite")
    return f


def geometry_record(g: Geometry) -> dict[str, Any]:
    """Return a geometry as a JSON object."""
    return {
        "stride": list(g.stride),
        "padding": [list(p) for p in g.padding],
        "dilation": list(g.dilation),
        "padding_mode": g.padding_mode,
        "value": g.value,
        "output_padding": list(g.output_padding),
    }


def _parse_geometry(record: Any) -> Geometry:
    return Geometry.of(
        len(record["stride"]),
        record["stride"],
        record["padding"],
        record["dilation"],
        record["padding_mode"],
        record["value"],
        record["output_padding"],
    )


def _as_pair(values: Any) -> tuple[int, int]:
    a, b = (_as_integer("shuffle", v) for v in values)
    return a, b


def _as_integer(name: str, value: Any) -> int:
    if type(value) is not int:  # true is no number
        raise TypeError(f"{name} must be an integer, got {value!r:.80}")
    return value


def _as_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r:.80}")
    return value


def read_tensors(
    path: str | os.PathLike[str], raw: bool = False
) -> tuple[dict[str, Array], dict[str, str]]:
    """Read the tensors and the metadata of a ``.safetensors`` file.

    bfloat16 becomes float32 unless `raw`.  Sizes, names and offsets are checked before use: the
    file is not trusted.
    """
    data = Path(path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _LONGEST_HEADER):
        raise ValueError(f"{path}: not a safetensors file, or cut short")
    try:
        header = json.loads(data[8 : 8 + length].decode(), object_pairs_hook=_as_object)
    except (ValueError, RecursionError) as why:
        why_not = str(why) if isinstance(why, _RepeatedKeyError) else "its header is not JSON"
        raise ValueError(f"{path}: not a safetensors file: {why_not}") from None
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: not a safetensors file: its header is not a JSON object")
    body = memoryview(data)[8 + length :]
    tensors = {}
    end = 0
    for name, entry in sorted(header.items(), key=_data_offsets):
        dtype, shape, (first, last) = _parse_entry(path, name, entry)
        if first != end or last > len(body):
            raise ValueError(f"{path}: tensor {name!r} is outside the data, or overlaps another")
        end = last
        try:
            tensors[name] = _decode(body[first:last], dtype, shape, raw)
        except (ValueError, OverflowError) as why:  # too many axes, or too long ones without values
            raise ValueError(f"{path}: tensor {name!r}: {why}") from None
    if end != len(body):
        raise ValueError(f"{path}: {len(body) - end} bytes belong to no tensor")
    # In the order of the header: that of the data follows from alignment.
    return {name: tensors[name] for name in header}, {str(k): str(v) for k, v in metadata.items()}


class _RepeatedKeyError(ValueError):
    """A key that a JSON object has twice, of which readers take different values."""


def _as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise _RepeatedKeyError(f"its header has {twice!r:.80} twice")
    return found


def _data_offsets(item: tuple[str, Any]) -> tuple[int, int]:
    """Return the data offsets of a header entry; (0, 0) if it is damaged, to be refused later."""
    try:
        first, last = item[1]["data_offsets"]
        return _as_integer("data_offsets", first), _as_integer("data_offsets", last)
    except (LookupError, TypeError, ValueError):
        return 0, 0


def _parse_entry(path: Any, name: str, entry: Any) -> tuple[str, Ints, tuple[int, int]]:
    """Return dtype, shape and offsets of a tensor, checked against each other."""
    try:
        dtype, shape = entry["dtype"], tuple(_as_integer("shape", n) for n in entry["shape"])
        first, last = (_as_integer("data_offsets", n) for n in entry["data_offsets"])
    except (LookupError, TypeError, ValueError):
        raise ValueError(f"{path}: the header's entry of tensor {name!r} is damaged") from None
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{path}: tensor {name!r} has dtype {dtype!s:.80}, which cannot be read")
    size = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
    if min(shape, default=0) < 0 or not 0 <= first <= last or last - first != size:
        raise ValueError(
            f"{path}: tensor {name!r} of shape {shape} must have {size} bytes, got {last - first}"
        )
    return dtype, shape, (first, last)


def _decode(data: memoryview, dtype: str, shape: Ints, raw: bool) -> Array:
    flat = np.frombuffer(data, _DTYPES[dtype])
    if dtype == "BF16":  # the upper half of a float32
        flat = flat.view(BFLOAT16) if raw else (flat.astype("<u4") << 16).view("<f4")
    return flat.reshape(shape)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Array], metadata: Mapping[str, str]
) -> None:
    """Write a ``.safetensors`` file atomically."""
    # Largest elements first, as the format recommends: every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        dtype = _NAMES.get(tensor.dtype.newbyteorder("<"))
        if dtype is None:
            raise TypeError(f"tensor {name!r} has dtype {tensor.dtype}, which cannot be written")
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as part, open(part, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name]
            file.write(tensor.astype(tensor.dtype.newbyteorder("<"), order="C").tobytes())


def check_expansion(path: Path, size: int) -> None:
    """Raise if an archive claims to expand to more bytes than weights can."""
    limit = _EXPANSION * path.stat().st_size + _SPARE
    if size > limit:
        raise ValueError(f"the archive must expand to at most {limit} bytes, got {size}")
