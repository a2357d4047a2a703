"""Weights without a network: tensors in a file, and a manifest that says what convolves what."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank import io
from lowrank._typing import Array, Ints
from lowrank.compress.model import Chains, Layer, Samples
from lowrank.core.cost import stage_costs
from lowrank.factorization import Factorization
from lowrank.interop import weights

_BATCH = 64  # examples at a time


class WeightsModel:
    """The convolutions of a ``.safetensors`` or ``.npz`` file, as a :class:`lowrank.compress.Net`.

    How the layers hang together is not in such a file.  So nothing can be run through them:
    every layer is fitted on inputs of the *original* network, there are no gradients, and no
    outputs to compare.

    Parameters
    ----------
    path : path
        ``.safetensors`` or ``.npz``.
    manifest : path, optional
        What :func:`lowrank.interop.weights.layers` takes; ``NAME.json`` beside the file if not given.
    calibration : path, optional
        An ``.npz`` file with inputs of layers, in arrays that bear their names, of shape
        (batch, channels, \\*spatial); all with the same batch.

    Attributes
    ----------
    layers : tuple of Layer
        Those of one dense kernel and a known input size, which a manifest or else calibration
        data must give.
    chains : dict of str to Factorization
        Layers that are several stages already; they stay as they are.
    left_out : dict of str to str
        Why others are not among `layers`.
    batches : int
        Calibration batches.

    Raises
    ------
    ValueError
        If a file is damaged, or does not fit the others.
    OSError
        If it cannot be read.

    Examples
    --------
    >>> from lowrank import demo, spatial_svd
    >>> from lowrank.interop.weights import WeightsModel
    >>> net = WeightsModel(demo.WEIGHTS)
    >>> [layer.name for layer in net.layers]
    ['conv1', 'conv2', 'conv3']
    >>> new = net.replaced({"conv2": spatial_svd(net.layers[1].conv, rank=4)})
    >>> [name for name in new.tensors if name.startswith("conv2")]
    ['conv2.0.weight', 'conv2.1.weight', 'conv2.bias']
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        manifest: str | os.PathLike[str] | None = None,
        calibration: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = Path(path)
        self._file = _read(self.path, manifest)
        found = weights.layers(self.path, about=manifest)
        twice = {x.name for x in found if sum(x.name == y.name for y in found) > 1}
        if twice:
            raise ValueError(f"{path}: two layers have the name {min(twice)!r}")
        shapes = {x.name: x.conv for x in found}
        self._calibration = Calibration(calibration, shapes)
        self.chains: dict[str, Factorization] = {}
        self.left_out: dict[str, str] = {}
        layers = []
        for layer in found:
            size = layer.input_size or self._calibration.size(layer.name)
            if layer.conv.family != "dense" or len(layer.conv.stages) > 1:
                self.chains[layer.name] = layer.conv
                self.left_out[layer.name] = "it is a chain already"
            elif layer.bias is not None and layer.conv.bias is None:
                self.left_out[layer.name] = "its bias does not fit its weight"
            elif size is None:
                self.left_out[layer.name] = "its input size is not known: a manifest's in_size"
            else:
                layers.append(Layer(layer.name, layer.conv, size))
        self.layers = tuple(layers)

    @property
    def batches(self) -> int:
        """Calibration batches; 0 where there are no data."""
        return self._calibration.batches

    def inputs(self, names: Sequence[str], chains: Chains) -> Iterator[Samples]:
        """What layers get, 64 examples at a time; in the original network, whatever `chains` are.

        Parameters
        ----------
        names : sequence of str
            Layers.
        chains : mapping of str to Factorization
            Not looked at: the file does not say what follows what.

        Yields
        ------
        dict of str to tuple of ndarray

        Raises
        ------
        ValueError
            If there are no inputs of a layer.
        """
        return self._calibration.inputs(names)

    def gradients(self, names: Sequence[str], seed: int) -> Iterator[Samples] | None:
        """None: what cannot be run cannot be differentiated.

        Returns
        -------
        None
        """
        return None

    def outputs(self, chains: Chains) -> Iterator[tuple[Array, ...]]:
        """Nothing: the file does not say what follows what, so the network cannot be run.

        Returns
        -------
        iterator
            Of no batch at all.
        """
        return iter(())

    def replaced(self, chains: Chains) -> WeightsFile:
        """The same file with chains in place of layers.

        Parameters
        ----------
        chains : mapping of str to Factorization
            By the name of the layer.

        Returns
        -------
        WeightsFile
            Instead of the weight of layer NAME the tensors ``NAME.0.weight``, ``NAME.1.weight``,
            ..., with an entry of the manifest each; all other tensors as they were.

        Raises
        ------
        ValueError
            If there is no such layer, a chain does not fit it, or a tensor is in the way.
        """
        by_name = {layer.name: layer for layer in self.layers}
        check_chains(chains, by_name)
        tensors, metadata = dict(self._file.tensors), dict(self._file.metadata)
        manifest = json.loads(json.dumps(self._file.manifest))
        of = manifest.setdefault("chains", {})
        entries: list[Any] = []
        kept: set[str | None] = set()
        gone: set[str | None] = set()  # a tensor may serve another layer, too
        for entry in manifest["conv_layers"]:
            where = gone if _name(entry) in chains else kept
            where |= {entry["weight"], entry.get("bias")}
        for unused in gone - kept:
            tensors.pop(unused or "", None)
        for entry in manifest["conv_layers"]:
            name = _name(entry)
            if name not in chains:
                entries.append(entry)
                continue
            f = chains[name]
            bias = entry.get("bias") or f"{name}.bias"
            bias = f"{name}.bias" if bias in tensors else bias
            fresh = {f"{name}.{i}.weight": stage.weight for i, stage in enumerate(f.stages)}
            if f.bias is not None:
                fresh[bias] = f.bias
            for tensor in fresh:
                if tensor in tensors:
                    raise ValueError(
                        f"{self.path}: there is a tensor {tensor!r}, which layer {name!r} "
                        "would need for its chain"
                    )
            tensors |= fresh
            entries += _entries(name, f, by_name[name].input_size, bias)
            of[name] = {
                "family": f.family,
                "variant": f.variant,
                "rank": list(f.rank),
                "groups": f.groups,
                **io.geometry_record(f.geometry),
            }
        manifest["conv_layers"] = entries
        if "parameters" in manifest:
            # Beside the convolutions there are parameters that this is not to count anew.
            size = sum(t.size for t in tensors.values())
            manifest["parameters"] += size - sum(t.size for t in self._file.tensors.values())
        if "total_conv_macs" in manifest:
            manifest["total_conv_macs"] = sum(e.get("macs") or 0 for e in entries)
        return WeightsFile(tensors, manifest, metadata)


@dataclass(frozen=True, slots=True, eq=False)
class WeightsFile:
    """Tensors and what is said of them, to be written.

    Attributes
    ----------
    tensors : dict of str to ndarray
        By name; bfloat16 as :data:`lowrank.io.BFLOAT16`.
    manifest : dict
        What goes into the JSON file, see :func:`lowrank.interop.weights.layers`.
    metadata : dict of str to str
        Of a ``.safetensors`` file.

    Examples
    --------
    >>> from lowrank import demo
    >>> from lowrank.interop.weights import WeightsModel
    >>> WeightsModel(demo.WEIGHTS).replaced({}).manifest["conv_layers"][0]["name"]
    'conv1'
    """

    tensors: dict[str, Array]
    manifest: dict[str, Any]
    metadata: dict[str, str]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tensors, and ``NAME.json`` beside them.

        Parameters
        ----------
        path : path
            ``.safetensors`` or ``.npz``; it and the manifest are replaced as a whole, or not
            at all.

        Raises
        ------
        ValueError
            If the ending is another.
        OSError
            If a file cannot be written.

        Examples
        --------
        >>> import pathlib, tempfile
        >>> from lowrank import demo, spatial_svd
        >>> from lowrank.interop.weights import WeightsModel
        >>> from lowrank.interop.weights import layers
        >>> net = WeightsModel(demo.WEIGHTS)
        >>> path = pathlib.Path(tempfile.mkdtemp(), "small.safetensors")
        >>> net.replaced({"conv2": spatial_svd(net.layers[1].conv, rank=4)}).save(path)
        >>> layers(path)[1].conv
        <Factorization spatial_svd h-w rank 4: 4x32x3x1 -> 64x4x1x3, 1216 params>
        """
        path = Path(path)
        ending = path.suffix.lower()
        if ending not in (".safetensors", ".npz"):
            raise ValueError(f"{path}: weights are written as .safetensors or .npz, not {ending!r}")
        about = path.with_suffix(".json")
        for target in (path, about):
            if target.is_dir():
                raise IsADirectoryError(f"{target}: is a folder")
        # Both are written in full before either takes its place.
        with io.atomic_write(about) as text, io.atomic_write(path) as body:
            text.write_text(json.dumps(self.manifest, indent=1, allow_nan=False), "utf-8")
            if ending == ".safetensors":
                io.write_tensors(body, self.tensors, self.metadata)
            else:
                _write_npz(body, self.tensors)


class Calibration:
    """Inputs of layers, out of an ``.npz`` file.

    Parameters
    ----------
    path : path or None
        Arrays that bear the names of layers, (batch, channels, \\*spatial); for layers along one
        axis (batch, channels) will do.
    convs : mapping of str to Factorization
        What the arrays have to fit.

    Raises
    ------
    ValueError
        If they do not.

    Examples
    --------
    >>> from lowrank.interop.weights import Calibration
    >>> Calibration(None, {}).batches
    0
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, convs: Mapping[str, Factorization]
    ) -> None:
        self.path = path
        self.arrays: dict[str, Array] = {}
        if path is None:
            return
        if Path(path).suffix.lower() != ".npz":
            raise ValueError(f"{path}: calibration data come as .npz")
        for name, array in weights.read_weights(path).items():
            if name not in convs:
                raise ValueError(
                    f"{path}: no layer is called {name!r}; there are {', '.join(convs)}"
                )
            f = convs[name]
            if array.ndim == 2 and f.ndim == 1:
                array = array[..., None]
            if array.dtype.kind != "f" or not np.isfinite(array).all():
                raise ValueError(f"{path}: {name!r} is not made of finite floating-point numbers")
            if array.ndim != f.ndim + 2 or array.shape[1] != f.in_channels or not array.size:
                raise ValueError(
                    f"{path}: {name!r} must be (batch, {f.in_channels} channels, and {f.ndim} "
                    f"spatial axes), got {array.shape}"
                )
            self.arrays[name] = array.astype(np.float32, copy=False)
        counts = {len(a) for a in self.arrays.values()}
        if len(counts) > 1:
            raise ValueError(f"{path}: arrays must have the same batch, got {sorted(counts)}")

    @property
    def batches(self) -> int:
        """Batches that :meth:`inputs` yields."""
        return -(-len(next(iter(self.arrays.values()))) // _BATCH) if self.arrays else 0

    def size(self, name: str) -> Ints | None:
        """Spatial size of the inputs of a layer.

        Parameters
        ----------
        name : str
            The layer.

        Returns
        -------
        tuple of int or None
        """
        return self.arrays[name].shape[2:] if name in self.arrays else None

    def inputs(self, names: Sequence[str]) -> Iterator[Samples]:
        """Batches of the inputs of some layers.

        Parameters
        ----------
        names : sequence of str
            Layers.

        Yields
        ------
        dict of str to tuple of ndarray

        Raises
        ------
        ValueError
            If there are data, but none of a layer.
        """
        missing = [name for name in names if name not in self.arrays]
        if self.arrays and missing:
            raise ValueError(f"{self.path}: has no inputs of {', '.join(missing)}")
        for i in range(self.batches):
            yield {n: (self.arrays[n][i * _BATCH : (i + 1) * _BATCH],) for n in names}


def check_chains(chains: Chains, layers: Mapping[str, Layer]) -> None:
    """Refuse chains that do not stand for a layer: other channels, axes, or output size."""
    for name, f in chains.items():
        if name not in layers:
            raise ValueError(f"there is no layer {name!r}; there are {', '.join(layers)}")
        conv, size = layers[name].conv, layers[name].input_size
        same = f.ndim == conv.ndim and f.in_channels == conv.in_channels
        if not same or f.output_shape(size) != conv.output_shape(size):
            raise ValueError(f"the chain for layer {name!r} is of another shape: {f!r}")


def _name(entry: Any) -> str:
    """The layer that an entry of a manifest belongs to."""
    return str(entry.get("of") or entry.get("name", entry["weight"]))


def _read(path: Path, manifest: str | os.PathLike[str] | None) -> WeightsFile:
    """All that is in the files; a manifest is made up where there is none."""
    ending = path.suffix.lower()
    if ending not in (".safetensors", ".npz"):
        raise ValueError(f"{path}: weights come as .safetensors or .npz here, not {ending!r}")
    tensors = weights.read_weights(path)
    metadata: dict[str, str] = {}
    if ending == ".safetensors":
        tensors, metadata = io.read_tensors(path, raw=True)
    about = path.with_suffix(".json") if manifest is None else Path(manifest)
    if io.holds_chains(metadata) or (manifest is None and not about.exists()):
        return WeightsFile(tensors, _guessed(path, tensors, metadata), metadata)
    return WeightsFile(tensors, weights.manifest(about), metadata)


def _guessed(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> Any:
    """A manifest of the layers that are found without one."""
    if io.holds_chains(metadata):
        return {"conv_layers": []}
    by_name = {n.removesuffix("weight").rstrip(".") or path.stem: n for n in tensors}
    entries = []
    for layer in weights.layers(path):
        weight = by_name[layer.name]
        bias = weight.removesuffix("weight") + "bias" if layer.conv.bias is not None else None
        (entry,) = _entries(layer.name, layer.conv, None, bias)
        del entry["of"]
        entries.append(entry | {"name": layer.name, "weight": weight})
    return {"conv_layers": entries}


def _entries(name: str, f: Factorization, size: Ints | None, bias: str | None) -> list[Any]:
    """What a manifest says of the stages of a chain."""
    entries = []
    for i, stage in enumerate(f.stages):
        out = macs = None
        if size is not None:
            shape = (stage.in_channels, *size)
            out = stage.output_shape(shape)[1:]
            (macs,) = (cost.macs for cost in stage_costs((stage,), shape))
        entries.append(
            {
                "name": f"{name}.{i}",
                "of": name,
                "weight": f"{name}.{i}.weight",
                "bias": bias if f.bias is not None and i == len(f.stages) - 1 else None,
                "shape": list(stage.weight.shape),
                **io.geometry_record(stage.geometry),
                "groups": stage.groups,
                "left": stage.outer,
                "right": stage.inner,
                "shuffle": list(stage.shuffle),
                "transposed": stage.transposed,
                "in_size": None if size is None else list(size),
                "out_size": None if out is None else list(out),
                "macs": macs,
            }
        )
        size = out
    return entries


def _write_npz(path: Path, tensors: Mapping[str, Array]) -> None:
    """What ``numpy.savez`` writes, whatever the tensors are called."""
    with zipfile.ZipFile(path, "x") as archive:
        for name, tensor in tensors.items():
            if tensor.dtype == io.BFLOAT16:
                raise ValueError(f"tensor {name!r} is bfloat16, which .npz does not have")
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(tensor), allow_pickle=False)
