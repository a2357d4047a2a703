"""Compressible models of Keras, run by Keras."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.compress.model import Call, Chains, Layer, Samples
from lowrank.factorization import Factorization
from lowrank.interop.batches import (
    Input,
    InputSize,
    check_batch,
    example_of_zeros,
    read_batches,
)
from lowrank.interop.common import check_chains
from lowrank.interop.keras.convolutions import (
    as_convolution,
    as_output_samples,
    as_samples,
    is_convolution,
    large_shape,
)
from lowrank.interop.keras.costs import MacCounter, count_macs
from lowrank.interop.keras.files import library, load
from lowrank.interop.keras.graph import (
    as_array,
    is_graph,
    leaves,
    norm_gain,
    reason_to_leave_out,
    rebuild,
)
from lowrank.interop.keras.layers import Site, chain_layers, is_expressible
from lowrank.interop.keras.runs import Finished, Record, run

_UNKNOWN = "its input has no fixed size: give calibration data or the input size"


class KerasModel:
    """Compressible model of Keras 3, a file or in memory.

    Files are loaded in Keras's safe mode: no code in them is run.  Keras runs the model, so that
    layers are fitted to their inputs in the compressed model; there are gradients if Keras runs
    on PyTorch.

    Parameters
    ----------
    model : path or keras.Model
        ``.keras``, ``.h5`` or ``.hdf5`` file, or a model in memory, which is not changed:
        Sequential or functional, also with nested models and TimeDistributed layers.
    input_size : sequence of int or mapping, optional
        Sizes of the free axes of the inputs, without that of the batch, for a model without
        calibration data, such as ``(224, 224)``; by name if inputs have different ones.
    calibration : path or sequence, optional
        ``.npz`` file of inputs of the model: arrays named after the inputs, with examples along
        the first axis.  Or batches in memory: arrays, or dicts of arrays by input.
    custom_objects : mapping of str to object, optional
        Classes and functions in a file that are not Keras's own, by name.

    Attributes
    ----------
    layers : tuple of Layer
        Convolutions, depthwise and transposed convolutions, Dense and EinsumDense layers, in
        execution order; layers of a nested model are called MODEL/LAYER.
    chains : dict of str to Factorization
        Separable convolutions: chains of two stages already, which are not changed.
    left_out : dict of str to str
        Reasons why other layers with weights of that kind, and recurrent layers, are not among
        `layers`.
    left_out_macs : dict of str to int
        MACs per example of those that the model runs.
    unsized : dict of str to Factorization
        Those of them that could be replaced if the sizes of their inputs were known.

    Raises
    ------
    ValueError
        If a file is damaged or hostile, the model is a subclass with code of its own, or the
        calibration data do not fit.
    OSError
        If a file cannot be read.
    ImportError
        If Keras or a library that runs it is not installed.

    Examples
    --------
    >>> import os
    >>> import pytest
    >>> torch = pytest.importorskip("torch")
    >>> _ = os.environ.setdefault("KERAS_BACKEND", "torch")
    >>> keras = pytest.importorskip("keras")
    >>> import lowrank
    >>> from lowrank.interop.keras import KerasModel
    >>> model = keras.Sequential([keras.Input((20, 3)), keras.layers.Conv1D(8, 5, name="a")])
    >>> net = KerasModel(model)
    >>> net.layers[0].conv, net.layers[0].input_size
    (<Factorization dense: 8x3x5, 128 params>, (20,))
    >>> new = net.replaced({"a": lowrank.channel_svd(net.layers[0].conv, 1)})
    >>> [(type(x).__name__, x.name) for x in new.layers]
    [('Conv1D', 'a_0'), ('Conv1D', 'a')]
    """

    def __init__(
        self,
        model: Any,
        input_size: InputSize | None = None,
        calibration: str | os.PathLike[str] | Sequence[Any] | None = None,
        custom_objects: Mapping[str, Any] | None = None,
    ) -> None:
        where = ""
        if isinstance(model, (str, os.PathLike)):
            where = f"{Path(model)}: "
            model = load(model, custom_objects)
        try:
            self._open(model, input_size, calibration)
        except ValueError as why:
            raise ValueError(f"{where}{why}") from None

    def _open(self, model: Any, input_size: InputSize | None, calibration: Any) -> None:
        keras = library()
        if not isinstance(model, keras.Model):
            raise TypeError(f"model must be a path or a keras.Model, got {model!r:.80}")
        if not is_graph(model):
            raise ValueError(
                f"the model is of class {type(model).__name__} with code of its own: only "
                "Sequential and functional models are rebuilt with other layers"
            )
        if not getattr(model, "inputs", None):
            raise ValueError("the model is not built: call it once, or give its first layer Input")
        self._model = model
        self._inputs = tuple(Input(x.name, np.dtype(x.dtype), tuple(x.shape)) for x in model.inputs)
        if isinstance(calibration, (str, os.PathLike)):
            calibration = read_batches(calibration, self._inputs)
        self._feeds = [check_batch(self._inputs, b) for b in calibration or ()]
        self._keras: dict[str, Any] = {}
        self._sites: dict[str, Site] = {}
        self._made: dict[str, tuple[Factorization, list[Any]]] = {}
        self.chains: dict[str, Factorization] = {}
        self.left_out: dict[str, str] = {}
        self.left_out_macs: dict[str, int] = {}
        self.unsized: dict[str, Factorization] = {}
        self._zeros = None
        if not self._feeds:
            self._zeros = example_of_zeros(self._inputs, input_size)
        elif input_size is not None:
            raise ValueError("input size must be None with calibration data, which give it")
        self._find()
        self.layers = tuple(site.layer for site in self._sites.values())

    def _find(self) -> None:
        """Find all layers; the model is run once for the sizes of their inputs."""
        found: dict[str, Any] = {}
        others: dict[str, Any] = {}
        gains: dict[str, Array | None] = {}
        for name, layer, parent in leaves(self._model):
            if any(layer is other for other in (*found.values(), *others.values())):
                continue  # in two models
            if reason := reason_to_leave_out(layer):
                self.left_out[name], others[name] = reason, layer
            elif is_convolution(type(layer).__name__):
                found[name], gains[name] = layer, norm_gain(layer, parent)
        seen: dict[str, list[Ints]] = {}  # in execution order
        counters = {name: MacCounter(layer) for name, layer in others.items()}
        feed = self._feeds[0] if self._feeds else self._zeros
        if feed is not None and (found or others):
            batch = next((len(feed[i.name]) for i in self._inputs if i.shape), 1)

            def record(name: str, x: Any) -> None:
                seen.setdefault(name, []).append(tuple(x.shape))

            watched: list[tuple[Any, Record]] = [(x, partial(record, n)) for n, x in found.items()]
            watched += [w for counter in counters.values() for w in counter.watched]
            run(self._model, feed, inputs=watched)
            macs = {n: c.macs // batch for n, c in counters.items() if c.macs is not None}
            self.left_out_macs |= macs
        self._find_unsized({n: x for n, x in found.items() if n not in seen}, bool(seen))
        for name, shapes in seen.items():
            layer, kind = found[name], type(found[name]).__name__
            weights, config = [as_array(v) for v in layer.weights], layer.get_config()
            try:
                f, size = as_convolution(kind, config, weights, shapes[0])
            except ValueError as why:
                self.left_out[name] = str(why)
                self.left_out_macs[name] = sum(count_macs(layer, s) or 0 for s in shapes) // batch
                continue
            if len(f.stages) > 1:
                self.chains[name] = f
                self.left_out[name] = "it is a depthwise and a pointwise stage already"
                self.left_out_macs[name] = f.cost(size).macs * len(shapes)
                continue
            accepts = partial(is_expressible, f, size)
            sizes = tuple(as_convolution(kind, config, weights, shape)[1] for shape in shapes)
            several = sizes if any(s != size for s in sizes) else ()
            new = Layer(name, f, size, gains[name], len(shapes), accepts, several)
            self._keras[name] = layer
            self._sites[name] = Site(new, kind, config, weights[0].shape, shapes[0])

    def _find_unsized(self, found: Mapping[str, Any], has_run: bool) -> None:
        """Leave out layers that were not run, for which the sizes of their inputs are not known."""
        for name, layer in found.items():
            self.left_out[name] = "the model does not run it" if has_run else _UNKNOWN
            kind, config = type(layer).__name__, layer.get_config()
            depends = config.get("padding") == "same" and max(config.get("strides", (1,))) > 1
            if has_run or depends or kind == "EinsumDense":
                continue
            weights = [as_array(v) for v in layer.weights]
            try:
                f = as_convolution(kind, config, weights, large_shape(kind, config, weights[0]))[0]
            except ValueError as why:
                self.left_out[name] = str(why)
                continue
            if len(f.stages) == 1:
                self.unsized[name] = f

    @property
    def batches(self) -> int:
        """Number of calibration batches, 0 without calibration data."""
        return len(self._feeds)

    @property
    def batch_size(self) -> int:
        """Number of examples in the largest calibration batch, 1 without calibration data."""
        sizes = [len(feed[i.name]) for feed in self._feeds for i in self._inputs if i.shape]
        return max(sizes, default=1)

    def inputs(self, names: Sequence[str], chains: Chains) -> Iterator[Samples]:
        r"""Yield the inputs of layers, one batch at a time, with `chains` in place of layers.

        Parameters
        ----------
        names : sequence of str
            Names of the layers.
        chains : mapping of str to Factorization
            Chains by the name of the layer that they replace.

        Yields
        ------
        dict of str to tuple of ndarray
            One float32 array per run of the layer, (batch, channels, \*spatial); for a product with
            a matrix (batch, channels, vectors).

        Raises
        ------
        ValueError
            If there is no such layer, a chain does not fit, or Keras fails.
        """
        sites = self._chosen(names)
        replaced = self._replacements(chains)
        remaining = sum(site.layer.times for site in sites.values())
        for feed in self._feeds:
            seen: dict[str, list[Array]] = {name: [] for name in sites}

            def record(site: Site, seen: dict[str, list[Array]], x: Any) -> None:
                x = library().ops.convert_to_numpy(x)
                seen[site.layer.name].append(as_samples(site.kind, site.config, x))
                if sum(map(len, seen.values())) == remaining:
                    raise Finished

            watched = [(self._keras[n], partial(record, s, seen)) for n, s in sites.items()]
            if sites:
                run(self._model, feed, replaced, watched)
            yield {name: tuple(arrays) for name, arrays in seen.items()}

    def gradients(self, names: Sequence[str], seed: int) -> Iterator[Samples] | None:
        r"""Yield the gradients of random combinations of the outputs, one batch at a time.

        Parameters
        ----------
        names : sequence of str
            Names of the layers.
        seed : int
            Seed of the combinations.

        Returns
        -------
        iterator of dict of str to tuple of ndarray, or None
            One float32 array per run of the layer, ahead of its activation; None if Keras does not
            run on PyTorch.
        """
        if library().backend.backend() != "torch":
            return None
        return self._gradients(self._chosen(names), seed)

    def _gradients(self, sites: Mapping[str, Site], seed: int) -> Iterator[Samples]:
        import torch

        random = torch.Generator().manual_seed(seed)
        for feed in self._feeds:
            seen: dict[str, list[Any]] = {name: [] for name in sites}
            watched = [(self._keras[name], seen[name].append) for name in sites]
            outputs = [y for y in run(self._model, feed, linear=watched) if y.is_floating_point()]
            with torch.enable_grad():
                loss = sum(
                    (y * torch.randn(y.shape, generator=random).to(y)).float().sum()
                    for y in outputs
                )
            targets = [y for tensors in seen.values() for y in tensors]
            found = iter(torch.autograd.grad(loss, targets, allow_unused=True))
            yield {
                name: tuple(
                    as_output_samples(
                        sites[name].kind,
                        sites[name].config,
                        library().ops.convert_to_numpy(torch.zeros_like(y) if g is None else g),
                    )
                    for y, g in ((y, next(found)) for y in tensors)
                )
                for name, tensors in seen.items()
            }

    def outputs(self, chains: Chains) -> Iterator[tuple[Array, ...]]:
        """Yield the outputs of the model, one batch at a time.

        Parameters
        ----------
        chains : mapping of str to Factorization
            Chains by the name of the layer that they replace.

        Yields
        ------
        tuple of ndarray
            Outputs in order, float32.

        Raises
        ------
        ValueError
            If a chain does not fit, or Keras fails.
        """
        replaced = self._replacements(chains)
        for feed in self._feeds:
            values = map(library().ops.convert_to_numpy, run(self._model, feed, replaced))
            yield tuple(np.asarray(y, np.float32) for y in values)

    def replaced(self, chains: Chains) -> Any:
        """Return a new model with chains in place of layers.

        A chain becomes layers NAME_0, NAME_1, ..., of which the last keeps the layer's name, bias
        and activation.  A depthwise stage followed by a pointwise one becomes a separable
        convolution.  All of them are Keras's own.

        Parameters
        ----------
        chains : mapping of str to Factorization
            Chains by the name of the layer that they replace.

        Returns
        -------
        keras.Model
            New model, not compiled; :func:`lowrank.interop.keras.save` writes it.

        Raises
        ------
        ValueError
            If there is no such layer, a chain does not fit it, or Keras has no layers for it.
        """
        check_chains(chains, {name: site.layer for name, site in self._sites.items()})
        new = {id(self._keras[name]): self._make(name, f) for name, f in chains.items()}
        return rebuild(self._model, new)

    def fingerprint(self) -> str:
        """Return nothing: the network as a whole is not timed.

        Returns
        -------
        str
        """
        return ""

    def call(self, chains: Chains, runtime: str, batch: int, threads: int) -> Call | None:
        """Return None: no runtime of lowrank runs models of Keras, so layers are timed alone.

        Returns
        -------
        None
        """
        return None

    def _chosen(self, names: Sequence[str]) -> dict[str, Site]:
        for name in names:
            if name not in self._sites:
                raise ValueError(f"no layer {name!r} among {', '.join(self._sites)}")
        return {name: self._sites[name] for name in names}

    def _replacements(self, chains: Chains) -> list[tuple[Any, list[Any]]]:
        """Return layers and those that run in place of them; layers that are made are kept."""
        check_chains(chains, {name: site.layer for name, site in self._sites.items()})
        for name, f in chains.items():
            if name not in self._made or self._made[name][0] is not f:
                self._made[name] = f, self._make(name, f)
        return [(self._keras[name], self._made[name][1]) for name in chains]

    def _make(self, name: str, f: Factorization) -> list[Any]:
        """Return the Keras layers of a chain, with their weights."""
        site, old = self._sites[name], self._keras[name]
        kinds = chain_layers(site, f)
        beside = {x.name for _, x, _ in leaves(self._model)}
        shape, layers = (None, *site.shape[1:]), []
        for i, new in enumerate(kinds):
            unique = old.name
            if i < len(kinds) - 1:
                unique = f"{old.name}_{i}"
                while unique in beside:
                    unique += "_"
            layer = getattr(library().layers, new.kind).from_config({"name": unique, **new.config})
            layer.build(shape)
            layer.set_weights(new.weights)
            shape = layer.compute_output_shape(shape)
            layers.append(layer)
        return layers
