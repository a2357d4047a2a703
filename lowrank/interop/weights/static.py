"""Models that are read from a file and cannot be run, and their calibration data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.compress.model import Call, Chains, Layer, Samples
from lowrank.factorization import Factorization
from lowrank.interop.weights.tensors import read_weights

_BATCH = 64  # examples per batch


class Calibration:
    """Inputs of layers, read from an ``.npz`` file.

    Parameters
    ----------
    path : path or None
        File of arrays named after layers, (batch, channels, \\*spatial); for layers with one
        spatial axis (batch, channels) is enough.
    convs : mapping of str to Factorization
        Layers that the arrays must fit, by name.

    Raises
    ------
    ValueError
        If an array does not fit its layer.

    Examples
    --------
    >>> from lowrank.interop.weights.static import Calibration
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
        for name, array in read_weights(path).items():
            if name not in convs:
                raise ValueError(f"{path}: no layer {name!r} among {', '.join(convs)}")
            f = convs[name]
            if array.ndim == 2 and f.ndim == 1:
                array = array[..., None]
            if array.dtype.kind != "f" or not np.isfinite(array).all():
                raise ValueError(f"{path}: {name!r} must hold finite floating-point numbers")
            if array.ndim != f.ndim + 2 or array.shape[1] != f.in_channels or not array.size:
                raise ValueError(
                    f"{path}: {name!r} must have shape (batch, {f.in_channels} channels, "
                    f"{f.ndim} spatial axes), got {array.shape}"
                )
            self.arrays[name] = array.astype(np.float32, copy=False)
        counts = {len(a) for a in self.arrays.values()}
        if len(counts) > 1:
            raise ValueError(f"{path}: arrays must have the same batch, got {sorted(counts)}")

    @property
    def batches(self) -> int:
        """Number of batches that :meth:`inputs` yields."""
        return -(-len(next(iter(self.arrays.values()))) // _BATCH) if self.arrays else 0

    def size(self, name: str) -> Ints | None:
        """Return the spatial size of the inputs of a layer.

        Parameters
        ----------
        name : str
            Name of the layer.

        Returns
        -------
        tuple of int or None
        """
        return self.arrays[name].shape[2:] if name in self.arrays else None

    def inputs(self, names: Sequence[str]) -> Iterator[Samples]:
        """Yield batches of the inputs of some layers.

        Parameters
        ----------
        names : sequence of str
            Names of the layers.

        Yields
        ------
        dict of str to tuple of ndarray

        Raises
        ------
        ValueError
            If there are calibration data, but none for one of the layers.
        """
        missing = [name for name in names if name not in self.arrays]
        if self.arrays and missing:
            raise ValueError(f"{self.path}: no inputs of {', '.join(missing)}")
        for i in range(self.batches):
            yield {n: (self.arrays[n][i * _BATCH : (i + 1) * _BATCH],) for n in names}


class StaticModel:
    """Base class of models that are read from a file and cannot be run.

    Every layer is fitted on inputs of the *original* network; there are no gradients, and no
    outputs to compare.

    Attributes
    ----------
    layers : tuple of Layer
        Layers that can be replaced.
    chains : dict of str to Factorization
        Layers that are chains of several stages already; they are not changed.
    left_out : dict of str to str
        Reasons why other layers are not among `layers`.
    left_out_macs : dict of str to int
        MACs per example of those of which the input size is known.
    """

    layers: tuple[Layer, ...]
    chains: dict[str, Factorization]
    left_out: dict[str, str]
    left_out_macs: dict[str, int]
    _calibration: Calibration

    @property
    def batches(self) -> int:
        """Number of calibration batches, 0 without calibration data."""
        return self._calibration.batches

    def inputs(self, names: Sequence[str], chains: Chains) -> Iterator[Samples]:
        """Yield inputs of layers in the original network, 64 examples at a time.

        Parameters
        ----------
        names : sequence of str
            Names of the layers.
        chains : mapping of str to Factorization
            Ignored: the model is not run.

        Yields
        ------
        dict of str to tuple of ndarray

        Raises
        ------
        ValueError
            If there are calibration data, but none for one of the layers.
        """
        return self._calibration.inputs(names)

    def gradients(self, names: Sequence[str], seed: int) -> Iterator[Samples] | None:
        """Return None: the model is not run, so it cannot be differentiated.

        Returns
        -------
        None
        """
        return None

    def outputs(self, chains: Chains) -> Iterator[tuple[Array, ...]]:
        """Return an empty iterator: the model is not run.

        Returns
        -------
        iterator
            No batches.
        """
        return iter(())

    def fingerprint(self) -> str:
        """Return nothing: the network as a whole is not timed.

        Returns
        -------
        str
        """
        return ""

    def call(self, chains: Chains, runtime: str, batch: int, threads: int) -> Call | None:
        """Return None: the model is not run, so that its layers are timed alone.

        Returns
        -------
        None
        """
        return None
