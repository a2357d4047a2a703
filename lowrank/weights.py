"""Trained weights out of files: the tensors of a checkpoint, and the convolutions among them."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lowrank import io
from lowrank._typing import Array, Ints
from lowrank.factorization import Factorization, dense
from lowrank.geometry import integers

ENDINGS = (".npy", ".npz", ".safetensors", ".pt", ".pth")


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One convolution of a weights file.

    Attributes
    ----------
    name : str
        As the file or its description calls it.
    conv : Factorization
        One dense stage, or a chain that lowrank saved.
    input_size : tuple of int or None
        Spatial size of its input in the network, where the description says so.
    bias : ndarray or None
        As the file holds it; `conv` is without it where its length does not fit, such as that
        of a transposed convolution that nothing describes.

    Examples
    --------
    >>> from lowrank import demo
    >>> from lowrank.weights import layers
    >>> [(x.name, x.input_size) for x in layers(demo.WEIGHTS)]
    [('conv1', (8, 8)), ('conv2', (8, 8)), ('conv3', (4, 4))]
    """

    name: str
    conv: Factorization
    input_size: Ints | None
    bias: Array | None


def read_weights(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read all tensors of a weights file.

    Parameters
    ----------
    path : path
        ``.safetensors``, ``.npz``, ``.npy`` (one tensor, named after the file), or a PyTorch
        state dict, ``.pt`` or ``.pth``, for which PyTorch must be installed.

    Returns
    -------
    dict of str to ndarray
        bfloat16 becomes float32.

    Raises
    ------
    ValueError
        If the file is not what its ending says, or holds objects other than tensors.
    OSError
        If it cannot be read.
    ImportError
        If PyTorch is needed and missing.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from lowrank.weights import read_weights
    >>> path = pathlib.Path(tempfile.mkdtemp(), "layers.npz")
    >>> np.savez(path, conv1=np.zeros((8, 3, 3, 3)))
    >>> {name: w.shape for name, w in read_weights(path).items()}
    {'conv1': (8, 3, 3, 3)}
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"{path}: weights come from {', '.join(ENDINGS)}, not {ending!r}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, not a weights file")
    if ending == ".safetensors":
        return io.read_tensors(path)[0]
    if ending in (".pt", ".pth"):
        return _state_dict(path)
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            if ending == ".npz":
                raise ValueError("it is a single array")
            return {path.stem: found}
        with found:
            return {name: found[name] for name in found.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as why:
        if "pickle" in str(why):
            raise ValueError(
                f"{path}: not a plain NumPy file, or one with Python objects, which are not "
                "loaded: save the arrays alone, with numpy.save or numpy.savez"
            ) from None
        raise ValueError(f"{path}: not a file that {ending} promises: {why}") from None


def layers(path: str | os.PathLike[str], only: str | None = None) -> list[Layer]:
    """Find the convolutions of a weights file.

    Parameters
    ----------
    path : path
        See :func:`read_weights`.  A file ``NAME.json`` beside ``NAME.safetensors`` describes the
        layers: ``{"conv_layers": [{"name", "weight", "bias", "stride", "padding", "dilation",
        "groups", "transposed", "in_size", "out_size"}]}``, of which all but the weight's tensor
        name may be missing; ``padding`` is one number or a [before, after] pair an axis, and
        the output of a transposed convolution is cut or grown at the end to ``out_size``.
    only : str, optional
        The layer of this name alone, if there is one; the others are not looked at.

    Returns
    -------
    list of Layer
        As described; without a description every floating-point tensor of 3 to 5 axes, with
        stride 1 and a padding that keeps the size, one group, and the bias that is named so.
        For a file that :func:`lowrank.save` wrote, its chains.

    Raises
    ------
    ValueError, OSError, ImportError
        As :func:`read_weights`; and if the description does not fit the weights.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from lowrank.weights import layers
    >>> path = pathlib.Path(tempfile.mkdtemp(), "net.npz")
    >>> np.savez(path, **{"conv1.weight": np.zeros((8, 3, 3, 3)), "fc.weight": np.zeros((10, 8))})
    >>> [(layer.name, layer.conv.output_shape((32, 32))) for layer in layers(path)]
    [('conv1', (8, 32, 32))]
    """
    path = Path(path)
    if path.suffix.lower() == ".safetensors" and path.is_file():
        tensors, metadata = io.read_tensors(path)
        if io.holds_chains(metadata):
            chains = io.load(path).items()
            return [Layer(n, f, None, f.bias) for n, f in chains if only in (None, n)]
    else:
        tensors = read_weights(path)
    about = path.with_suffix(".json")
    if about.exists():
        return _described(about, tensors, only)
    found = []
    for name, tensor in tensors.items():
        if tensor.ndim in (3, 4, 5) and tensor.dtype.kind == "f" and tensor.size:
            stem = name.removesuffix("weight")
            short = stem.rstrip(".") or path.stem
            if only not in (None, short):
                continue
            bias = tensors.get(stem + "bias") if stem != name else None
            fits = bias is not None and bias.shape == tensor.shape[:1]
            conv = _conv(f"{path}: {name}", tensor, bias if fits else None, {"padding": "same"})
            found.append(Layer(short, conv, None, bias))
    return found


def _described(about: Path, tensors: Mapping[str, Array], only: str | None) -> list[Layer]:
    """Layers as the file `about` describes them."""
    try:
        entries = json.loads(about.read_text())["conv_layers"]
        names = [(str(e.get("name", e["weight"])), e) for e in entries]
    except (ValueError, LookupError, TypeError, AttributeError) as why:
        raise ValueError(
            f"{about}: does not describe layers, {{'conv_layers': [{{'weight': ...}}]}}: {why!r}"
        ) from None
    found = []
    for name, entry in names:
        if only not in (None, name):
            continue
        for key in ("weight", "bias"):
            if entry.get(key) is not None and entry[key] not in tensors:
                raise ValueError(
                    f"{about}: layer {name!r} wants a tensor {entry[key]!r}, not there"
                )
        bias = None if entry.get("bias") is None else tensors[entry["bias"]]
        options = {
            key: entry[key]
            for key in (
                "stride", "padding", "dilation", "groups", "transposed", "output_padding",
                "padding_mode", "value",
            )
            if entry.get(key) is not None
        }  # fmt: skip
        conv = _conv(f"{about}: layer {name!r}", tensors[entry["weight"]], bias, options)
        size, wanted = (
            _entry_size(about, name, entry, k, conv.ndim) for k in ("in_size", "out_size")
        )
        if size and wanted and conv.transposed:
            conv = _fitted(conv, size, wanted)
        found.append(Layer(name, conv, size, conv.bias))
    return found


def _entry_size(about: Path, name: str, entry: Any, key: str, ndim: int) -> Ints | None:
    if entry.get(key) is None:
        return None
    try:
        return integers(key, entry[key], ndim)
    except (ValueError, TypeError) as why:
        raise ValueError(f"{about}: layer {name!r}: {why}") from None


def _fitted(conv: Factorization, size: Ints, wanted: Ints) -> Factorization:
    """A transposed convolution whose output is cut or grown at the end: TensorFlow's SAME."""
    spare = [n - m for n, m in zip(conv.output_shape(size)[1:], wanted)]
    g = conv.geometry
    geometry = replace(
        g,
        padding=tuple((a, b + max(n, 0)) for (a, b), n in zip(g.padding, spare)),
        output_padding=tuple(o + max(-n, 0) for o, n in zip(g.output_padding, spare)),
    )
    stage = replace(conv.stages[0], geometry=geometry)
    return replace(conv, stages=(stage,), geometry=geometry)


def _conv(what: str, weight: Array, bias: Array | None, options: dict[str, Any]) -> Factorization:
    try:
        return dense(weight, bias, **options)
    except (ValueError, TypeError) as why:
        raise type(why)(f"{what}: {why}") from None


def _state_dict(path: Path) -> dict[str, Array]:
    """Tensors of a PyTorch state dict, which is read without running what a pickle may hold."""
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{path}: reading {path.suffix} needs PyTorch: pip install 'lowrank[torch]', "
            "or save the weights as .safetensors"
        ) from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as why:
        if "weights" in str(why).lower() and "unpickl" in type(why).__name__.lower():
            raise ValueError(
                f"{path}: a pickle with more than weights in it, which could run any code, is not "
                "loaded: where you trust it, torch.save(model.state_dict(), 'weights.pt')"
            ) from None
        raise ValueError(f"{path}: not a PyTorch state dict ({type(why).__name__})") from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if isinstance(found, torch.Tensor):
        found = {path.stem: found}
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not a state dict")
    tensors = {str(k): v for k, v in found.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    return {
        name: (t.float() if t.dtype == torch.bfloat16 else t).detach().numpy()
        for name, t in tensors.items()
    }
