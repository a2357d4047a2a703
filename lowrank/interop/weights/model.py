"""Networks known by their weights alone: tensors in a file, and a manifest of the layers."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank import io
from lowrank._typing import Array, Ints
from lowrank.compress.model import Chains, Layer
from lowrank.core.cost import stage_costs
from lowrank.core.files import atomic_write_all
from lowrank.factorization import Factorization
from lowrank.interop.common import check_chains
from lowrank.interop.weights.manifest import layer_name, read_manifest
from lowrank.interop.weights.static import Calibration, StaticModel
from lowrank.interop.weights.tensors import layers, read_weights

ENDINGS = (".safetensors", ".npz")


class WeightsModel(StaticModel):
    """Compressible model of a ``.safetensors`` or ``.npz`` file.

    Such a file does not say how the layers are connected, so the network cannot be run: every
    layer is fitted on inputs of the *original* network, there are no gradients, and no outputs
    to compare.

    Parameters
    ----------
    path : path
        ``.safetensors`` or ``.npz`` file.
    manifest : path, optional
        Description of the layers, see :func:`lowrank.interop.weights.layers`; by default
        ``NAME.json`` beside the file.
    calibration : path, optional
        ``.npz`` file of inputs of layers: arrays named after the layers, of shape
        (batch, channels, \\*spatial), all with the same batch.

    Attributes
    ----------
    layers : tuple of Layer
        Layers of one dense kernel whose input size is known from the manifest or from the
        calibration data.
    chains : dict of str to Factorization
        Layers that are chains of several stages already; they are not changed.
    left_out : dict of str to str
        Reasons why other layers are not among `layers`.
    left_out_macs : dict of str to int
        MACs per example of those of which the input size is known.
    batches : int
        Number of calibration batches, 0 without calibration data.

    Raises
    ------
    ValueError
        If a file is damaged, or the files do not fit each other.
    OSError
        If a file cannot be read.

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
        stored = layers(self.path, about=manifest)
        repeated = {x.name for x in stored if sum(x.name == y.name for y in stored) > 1}
        if repeated:
            raise ValueError(f"{path}: two layers have the name {min(repeated)!r}")
        self._calibration = Calibration(calibration, {x.name: x.conv for x in stored})
        self.chains = {}
        self.left_out = {}
        self.left_out_macs = {}
        replaceable = []
        for layer in stored:
            size = layer.input_size or self._calibration.size(layer.name)
            if layer.conv.family != "dense" or len(layer.conv.stages) > 1:
                self.chains[layer.name] = layer.conv
                self.left_out[layer.name] = "it is a chain already"
            elif layer.bias is not None and layer.conv.bias is None:
                self.left_out[layer.name] = "its bias does not fit its weight"
            elif size is None:
                self.left_out[layer.name] = (
                    "its input size is not known: give calibration data, or in_size in the manifest"
                )
            else:
                replaceable.append(Layer(layer.name, layer.conv, size))
            if layer.name in self.left_out and size is not None:
                self.left_out_macs[layer.name] = layer.conv.cost(size).macs
        self.layers = tuple(replaceable)

    def replaced(self, chains: Chains) -> WeightsFile:
        """Return the contents of the file with chains in place of layers.

        Parameters
        ----------
        chains : mapping of str to Factorization
            Chains by the name of the layer that they replace.

        Returns
        -------
        WeightsFile
            The weight of layer NAME is replaced by the tensors ``NAME.0.weight``,
            ``NAME.1.weight``, ..., each with an entry in the manifest; all other tensors are
            unchanged.

        Raises
        ------
        ValueError
            If there is no such layer, a chain does not fit it, or the name of a new tensor
            already exists.

        Examples
        --------
        >>> from lowrank import demo, spatial_svd
        >>> from lowrank.interop.weights import WeightsModel
        >>> model = WeightsModel(demo.WEIGHTS)
        >>> file = model.replaced({"conv2": spatial_svd(model.layers[1].conv, rank=4)})
        >>> [name for name in file.tensors if name.startswith("conv2.")]
        ['conv2.0.weight', 'conv2.1.weight', 'conv2.bias']
        """
        by_name = {layer.name: layer for layer in self.layers}
        check_chains(chains, by_name)
        tensors, metadata = dict(self._file.tensors), dict(self._file.metadata)
        manifest = json.loads(json.dumps(self._file.manifest))
        chain_entries = manifest.setdefault("chains", {})
        entries: list[Any] = []
        used: set[str | None] = set()  # a replaced layer may share tensors with another layer
        replaced: set[str | None] = set()
        for entry in manifest["conv_layers"]:
            names = replaced if layer_name(entry) in chains else used
            names |= {entry["weight"], entry.get("bias")}
        for unused in replaced - used:
            tensors.pop(unused or "", None)
        for entry in manifest["conv_layers"]:
            name = layer_name(entry)
            if name not in chains:
                entries.append(entry)
                continue
            f = chains[name]
            bias = entry.get("bias") or f"{name}.bias"
            bias = f"{name}.bias" if bias in tensors else bias
            is_matrix = self._file.tensors[entry["weight"]].ndim == 2
            new = {
                f"{name}.{i}.weight": stage.weight[..., 0] if is_matrix else stage.weight
                for i, stage in enumerate(f.stages)
            }
            if f.bias is not None:
                new[bias] = f.bias
            for tensor in new:
                if tensor in tensors:
                    raise ValueError(
                        f"{self.path}: the chain for layer {name!r} needs the tensor name "
                        f"{tensor!r}, which already exists"
                    )
            tensors |= new
            new_entries = _entries(name, f, by_name[name].input_size, bias)
            entries += [e | {"shape": list(new[e["weight"]].shape)} for e in new_entries]
            chain_entries[name] = {
                "family": f.family,
                "variant": f.variant,
                "rank": list(f.rank),
                "groups": f.groups,
                **io.geometry_record(f.geometry),
            }
        manifest["conv_layers"] = entries
        if "parameters" in manifest:
            # Update by the difference: the count includes parameters that are no tensors here.
            size = sum(t.size for t in tensors.values())
            manifest["parameters"] += size - sum(t.size for t in self._file.tensors.values())
        if "total_conv_macs" in manifest:
            manifest["total_conv_macs"] = sum(e.get("macs") or 0 for e in entries)
        return WeightsFile(tensors, manifest, metadata)


@dataclass(frozen=True, slots=True, eq=False)
class WeightsFile:
    """Contents of a weights file: tensors, manifest and metadata.

    Attributes
    ----------
    tensors : dict of str to ndarray
        Tensors by name; bfloat16 as :data:`lowrank.io.BFLOAT16`.
    manifest : dict
        Contents of the JSON file, see :func:`lowrank.interop.weights.layers`.
    metadata : dict of str to str
        Metadata of a ``.safetensors`` file.

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
            ``.safetensors`` or ``.npz`` file; it and the manifest are replaced atomically.

        Raises
        ------
        ValueError
            If the ending is another one.
        OSError
            If a file cannot be written.

        Examples
        --------
        >>> import pathlib, tempfile
        >>> from lowrank import demo, spatial_svd
        >>> from lowrank.interop.weights import WeightsModel, layers
        >>> net = WeightsModel(demo.WEIGHTS)
        >>> path = pathlib.Path(tempfile.mkdtemp(), "small.safetensors")
        >>> net.replaced({"conv2": spatial_svd(net.layers[1].conv, rank=4)}).save(path)
        >>> layers(path)[1].conv
        <Factorization spatial_svd h-w rank 4: 4x32x3x1 -> 64x4x1x3, 1216 params>
        """
        path = Path(path)
        ending = _check_ending(path)
        manifest = path.with_suffix(".json")
        with atomic_write_all(manifest, path) as (text, body):
            text.write_text(json.dumps(self.manifest, indent=1, allow_nan=False), "utf-8")
            if ending == ".safetensors":
                io.write_tensors(body, self.tensors, self.metadata)
            else:
                _write_npz(body, self.tensors)


def _check_ending(path: Path) -> str:
    """Return the ending of a weights file; raise if there is no such format."""
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"{path}: the ending must be {' or '.join(ENDINGS)}, got {ending!r}")
    return ending


def _read(path: Path, manifest: str | os.PathLike[str] | None) -> WeightsFile:
    """Read a weights file and its manifest; make a manifest if there is none."""
    ending = _check_ending(path)
    tensors = read_weights(path)
    metadata: dict[str, str] = {}
    if ending == ".safetensors":
        tensors, metadata = io.read_tensors(path, raw=True)
    about = path.with_suffix(".json") if manifest is None else Path(manifest)
    if io.holds_chains(metadata) or (manifest is None and not about.exists()):
        return WeightsFile(tensors, _default_manifest(path, tensors, metadata), metadata)
    return WeightsFile(tensors, read_manifest(about), metadata)


def _default_manifest(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> Any:
    """Return a manifest of the layers that are found by the shapes of their tensors."""
    if io.holds_chains(metadata):
        return {"conv_layers": []}
    by_name = {n.removesuffix("weight").rstrip(".") or path.stem: n for n in tensors}
    entries = []
    for layer in layers(path):
        weight = by_name[layer.name]
        bias = weight.removesuffix("weight") + "bias" if layer.conv.bias is not None else None
        (entry,) = _entries(layer.name, layer.conv, None, bias)
        del entry["of"]
        shape = list(tensors[weight].shape)
        entries.append(entry | {"name": layer.name, "weight": weight, "shape": shape})
    return {"conv_layers": entries}


def _entries(name: str, f: Factorization, size: Ints | None, bias: str | None) -> list[Any]:
    """Return the entries of a manifest for the stages of a chain."""
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
    """Write an ``.npz`` file; unlike ``numpy.savez`` with any tensor names."""
    with zipfile.ZipFile(path, "x") as archive:
        for name, tensor in tensors.items():
            if tensor.dtype == io.BFLOAT16:
                raise ValueError(f"tensor {name!r} is bfloat16, which .npz does not support")
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(tensor), allow_pickle=False)
