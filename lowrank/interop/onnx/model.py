"""Compressible models in ONNX's format, run by onnxruntime."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.compress.model import Chains, Layer, Samples, describe_reasons
from lowrank.factorization import Factorization
from lowrank.interop.batches import (
    Feed,
    InputSize,
    check_batch,
    example_of_zeros,
    read_batches,
)
from lowrank.interop.common import check_chains, one_line
from lowrank.interop.onnx.chain import Writer, conv_chain, linear_chain
from lowrank.interop.onnx.data import inputs_of
from lowrank.interop.onnx.engine import on_engine
from lowrank.interop.onnx.files import (
    check,
    check_external,
    has_shape,
    is_external,
    library,
    load,
    read_external,
    without_large_weights,
)
from lowrank.interop.onnx.gradients import Differentiable, differentiable, shapes_of
from lowrank.interop.onnx.graph import as_numpy, infer_shapes, prune, substitute, supported_opset
from lowrank.interop.onnx.layers import Site, Use, find
from lowrank.interop.onnx.runtime import open_any_session, open_session, session_call

_THREADS = 2  # maximum number of threads of onnxruntime


class OnnxModel:
    """Compressible model in ONNX's format.

    Its layers are the Conv, ConvTranspose, Gemm and MatMul nodes of the main graph whose weights
    are constant, or computed from constants, such as those behind DequantizeLinear.  Nodes that do
    the same with one weight are one layer.  Local functions are inlined.

    Parameters
    ----------
    model : onnx.ModelProto
        Model of opset 7 or newer; it is not changed.
    batches : sequence, optional
        Calibration data: dicts of arrays by input, or arrays for a network with one input.
    folder : path, optional
        Folder of the model's external data.
    input_size : sequence of int or mapping, optional
        Sizes of the free axes of the inputs, without that of the batch, for a model without
        calibration data, such as ``(224, 224)``; by name if inputs have different ones.

    Attributes
    ----------
    left_out : dict of str to str
        Reasons why other nodes with weights are not among the layers: those of other operators,
        such as LSTM, those in the bodies of an If or a Loop, and those whose padding or size
        depends on an input.
    left_out_macs : dict of str to int
        MACs per example of those of which they are known; of an If as if all branches ran.
    unsized : dict of str to Factorization
        Those of them that could be replaced if the sizes of their inputs were known.

    Raises
    ------
    ValueError
        If the model is invalid or has no such layer, of a known size or not, or if a batch or
        `input_size` does not fit the network.
    ImportError
        If onnx or onnxruntime is not installed.

    Notes
    -----
    Where onnxruntime has no kernels for the model's types, as for a Conv of float64 or bfloat16,
    onnx's reference evaluator runs it, with a warning.

    Examples
    --------
    >>> import pytest
    >>> onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    >>> import lowrank
    >>> from lowrank.interop.onnx import OnnxModel
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
    ...     net (float[N, 1, 8, 8] x) => (float[N, 1, 6, 6] y)
    ...     <float[1, 1, 3, 3] w = {1, 2, 1, 2, 4, 2, 1, 2, 1}> {y = Conv(x, w)}''')
    >>> net = OnnxModel(model)
    >>> [(layer.name, layer.input_size) for layer in net.layers]
    [('y', (8, 8))]
    >>> new = net.replaced({"y": lowrank.spatial_svd(net.layers[0].conv, rank=1)})
    >>> [(node.op_type, node.name) for node in new.graph.node]
    [('Conv', 'y.0'), ('Conv', 'y.1')]
    """

    def __init__(
        self,
        model: Any,
        batches: Sequence[Any] | None = None,
        folder: str | os.PathLike[str] | None = None,
        input_size: InputSize | None = None,
    ) -> None:
        onnx = library()
        self._folder = None if folder is None else Path(folder).resolve()
        self._model = onnx.ModelProto()
        self._model.CopyFrom(model)
        if model.functions:
            from onnx import inliner  # not loaded with onnx

            self._model = inliner.inline_local_functions(self._model)
        check_external(self._model, self._folder)
        check(self._model)
        self._opset = supported_opset(self._model)
        self._inputs = inputs_of(self._model)
        self._feeds = [check_batch(self._inputs, b) for b in batches or ()]
        self._zeros = None
        if not self._feeds:
            self._zeros = example_of_zeros(self._inputs, input_size)
        elif input_size is not None:
            raise ValueError("input size must be None with calibration data, which give it")
        self._sites: dict[str, Site] = {}  # `find` may run the network
        found = find(self._model, self._folder, [i.name for i in self._inputs], self._probe)
        self._sites = {site.layer.name: site for site in found.sites}
        self.left_out, self.left_out_macs = found.left_out, found.left_out_macs
        self.unsized = found.unsized
        if not (self._sites or self.unsized):
            reasons = describe_reasons(self.left_out)
            raise ValueError(
                "the network has no Conv, ConvTranspose, Gemm or MatMul that can be replaced"
                f"{f' ({reasons})' if reasons else ''}"
            )

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Layers that can be replaced, in execution order."""
        return tuple(site.layer for site in self._sites.values())

    @property
    def batches(self) -> int:
        """Number of calibration batches, 0 without calibration data."""
        return len(self._feeds)

    @property
    def batch_size(self) -> int:
        """Number of examples in the largest calibration batch, 1 without calibration data."""
        return max(map(self._batch_size, self._feeds), default=1)

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
            One float32 array per layer, (batch, channels, \*spatial); for a linear layer (batch,
            features, vectors).  Only nodes that the layers depend on are run.

        Raises
        ------
        ValueError
            If there is no such layer, a chain does not fit, or onnxruntime fails.

        Examples
        --------
        >>> import pytest
        >>> onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
        >>> import numpy as np
        >>> from lowrank.interop.onnx import OnnxModel
        >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
        ...     net (float[N, 1, 4] x) => (float[N, 1, 2] y)
        ...     <float[1, 1, 3] w = {1, 2, 1}> {r = Relu(x) y = Conv(r, w)}''')
        >>> net = OnnxModel(model, [np.array([[[1, -1, 2, -2]]], np.float32)])
        >>> next(net.inputs(["y"], {}))["y"][0].tolist()
        [[[1.0, 0.0, 2.0, 0.0]]]
        """
        sites = [self._site(name) for name in names]
        tensors = list(dict.fromkeys(u.input for s in sites for u in s.uses))
        for feed, values in zip(self._feeds, self._run(tensors, chains, self._feeds)):
            batch = self._batch_size(feed)
            yield {
                s.layer.name: tuple(_samples(s, values[u.input], batch) for u in s.uses)
                for s in sites
            }

    def gradients(self, names: Sequence[str], seed: int) -> Iterator[Samples] | None:
        r"""Yield the gradients of random combinations of the outputs, one batch at a time.

        PyTorch computes them, since onnxruntime does not differentiate.

        Parameters
        ----------
        names : sequence of str
            Names of the layers.
        seed : int
            Seed of the combinations.

        Returns
        -------
        iterator of dict of str to tuple of ndarray, or None
            One float32 array per layer, (batch, channels, \*spatial); None if PyTorch is not
            installed or does not run every node as :mod:`lowrank.interop.onnx.primitives` reads it.

        Examples
        --------
        >>> import pytest
        >>> onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
        >>> _ = pytest.importorskip("torch")
        >>> import numpy as np
        >>> from lowrank.interop.onnx import OnnxModel
        >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
        ...     net (float[N, 1, 4] x) => (float[N, 1, 2] y)
        ...     <float[1, 1, 3] w = {1, 2, 1}> {c = Conv(x, w) y = Relu(c)}''')
        >>> net = OnnxModel(model, [np.array([[[1, 1, -9, 1]]], np.float32)])
        >>> (found,) = next(net.gradients(["c"], seed=0))["c"]
        >>> found.tolist()  # the outputs are 0, whatever a small change
        [[[0.0, 0.0]]]
        """
        sites = [self._site(name) for name in names]
        networks = differentiable(self._model, self._folder, self._feeds)
        return self._gradients(sites, networks, seed) if networks else None

    def _gradients(
        self, sites: Sequence[Site], networks: Mapping[Any, Differentiable], seed: int
    ) -> Iterator[Samples]:
        import torch

        random = torch.Generator().manual_seed(seed)
        for feed in self._feeds:
            network, batch = networks[shapes_of(feed)], self._batch_size(feed)
            outputs = [u.output for s in sites for u in s.uses]
            found = network.gradients(outputs, feed, random)
            yield {
                s.layer.name: tuple(
                    _samples(s, found[u.output], batch)
                    if u.output in found
                    else _no_gradient(s.layer, batch)
                    for u in s.uses
                )
                for s in sites
            }

    def outputs(self, chains: Chains) -> Iterator[tuple[Array, ...]]:
        """Yield the outputs of the network, one batch at a time.

        Parameters
        ----------
        chains : mapping of str to Factorization
            Chains by the name of the layer that they replace.

        Yields
        ------
        tuple of ndarray
            Outputs in order; floating-point outputs as float32.

        Raises
        ------
        ValueError
            If a chain does not fit, or onnxruntime fails.

        Examples
        --------
        >>> import pytest
        >>> onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
        >>> import numpy as np
        >>> from lowrank.interop.onnx import OnnxModel
        >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
        ...     net (float[N, 1, 4] x) => (float[N, 1, 2] y)
        ...     <float[1, 1, 3] w = {1, 2, 1}> {y = Conv(x, w)}''')
        >>> net = OnnxModel(model, [np.ones((1, 1, 4), np.float32)])
        >>> next(net.outputs({}))[0].tolist()
        [[[4.0, 4.0]]]
        """
        names = [o.name for o in self._model.graph.output]
        for values in self._run(names, chains, self._feeds):
            yield tuple(_as_float32(values[name]) for name in names)

    def replaced(self, chains: Chains) -> Any:
        """Return a new model with `chains` in place of layers.

        Parameters
        ----------
        chains : mapping of str to Factorization
            Chains by the name of the layer that they replace.

        Returns
        -------
        onnx.ModelProto
            Model with all weights in memory, also those of other files;
            :func:`lowrank.interop.onnx.save` writes it.

        Raises
        ------
        ValueError
            If there is no such layer, a chain does not fit it, or ONNX cannot express it.

        Examples
        --------
        >>> import pytest
        >>> onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
        >>> import lowrank
        >>> from lowrank.interop.onnx import OnnxModel
        >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
        ...     net (float[N, 2] x) => (float[N, 2] y)
        ...     <float[2, 2] w = {1, 2, 2, 4}> {y = MatMul(x, w)}''')
        >>> net = OnnxModel(model)
        >>> new = net.replaced({"y": lowrank.channel_svd(net.layers[0].conv, rank=1)})
        >>> [list(t.dims) for t in new.graph.initializer]
        [[2, 1], [1, 2]]
        """
        new = library().ModelProto()
        new.CopyFrom(self._model)
        self._substitute(new, chains)
        del new.graph.value_info[:]
        inferred = infer_shapes(new).graph
        new.graph.value_info.extend(inferred.value_info)
        for value, known in zip(new.graph.output, inferred.output):
            if not has_shape(value):
                value.CopyFrom(known)
        check(new, full=True)
        for tensor in new.graph.initializer:
            if is_external(tensor):
                read_external(tensor, self._folder)
        return new

    def fingerprint(self) -> str:
        """Return a hash of the graph and of the inputs' shapes: what its time depends on.

        Returns
        -------
        str
            SHA-256 in hexadecimal digits.

        Examples
        --------
        >>> import pytest
        >>> onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
        >>> from lowrank.interop.onnx import OnnxModel
        >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
        ...     net (float[N, 2] x) => (float[N, 2] y)
        ...     <float[2, 2] w = {1, 2, 2, 4}> {y = MatMul(x, w)}''')
        >>> len(OnnxModel(model).fingerprint())
        64
        """
        key = hashlib.sha256(without_large_weights(self._model).SerializeToString())
        feed = self._example() or {}
        key.update(repr([(name, x.shape, str(x.dtype)) for name, x in feed.items()]).encode())
        return key.hexdigest()

    def call(
        self, chains: Chains, runtime: str, batch: int, threads: int
    ) -> Callable[[], object] | None:
        """Return a call of the network on a runtime.

        Parameters
        ----------
        chains : mapping of str to Factorization
            Chains by the name of the layer that they replace.
        runtime : str
            ``"lowrank"`` or ``"onnxruntime"``.
        batch, threads : int
            Number of examples, and of threads.

        Returns
        -------
        callable or None
            None for other runtimes, and if neither data nor the graph give the inputs' shapes.

        Raises
        ------
        ValueError
            If the network fixes another batch size, or the runtime does not run it.

        Examples
        --------
        >>> import pytest
        >>> onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
        >>> from lowrank.interop.onnx import OnnxModel
        >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
        ...     net (float[N, 2] x) => (float[N, 2] y)
        ...     <float[2, 2] w = {1, 2, 2, 4}> {y = MatMul(x, w)}''')
        >>> OnnxModel(model).call({}, "onnxruntime", 3, 1)()[0].shape
        (3, 2)
        """
        feed = self._example()
        if feed is None or runtime not in ("lowrank", "onnxruntime"):
            return None
        now = self._batch_size(feed)
        given = {}
        for i in self._inputs:
            x = feed[i.name]
            if i.shape and len(x) == now != batch:  # other inputs have no batch axis
                if i.shape[0] is not None:
                    raise ValueError(
                        f"batch must be {now}, which input {i.name!r} of the network fixes, got "
                        f"{batch}"
                    )
                x = np.resize(x, (batch, *x.shape[1:]))
            given[i.name] = x
        model = self.replaced(chains)
        if runtime == "onnxruntime":
            return session_call(model, given, threads)
        return partial(on_engine(model, threads=threads), given)

    def _site(self, name: str) -> Site:
        if name not in self._sites:
            raise ValueError(f"no layer {name!r} among {', '.join(self._sites)}")
        return self._sites[name]

    def _substitute(self, model: Any, chains: Chains) -> None:
        check_chains(chains, {name: site.layer for name, site in self._sites.items()})
        outputs = {node.output[0] for node in model.graph.node}
        parts = {}
        for name, f in chains.items():
            site, made = self._sites[name], list[Any]()
            for use in site.uses:
                if use.output in outputs:
                    parts[use.output] = partial(self._nodes, site, use, f, made)
        if parts:
            substitute(model, parts)

    def _nodes(
        self, site: Site, use: Use, f: Factorization, made: list[Any], used_names: set[str]
    ) -> tuple[list[Any], list[Any]]:
        """Return the nodes and weights in place of one node; `made` has those of earlier ones."""
        writer = Writer(site.layer.name, f.ndim, site.dtype, self._opset, used_names)
        if site.op in ("Conv", "ConvTranspose"):
            conv_chain(writer, f, use.input, use.fixed)
        else:
            linear_chain(writer, f, use.input, use.rank, site.op == "Gemm")
        known = {(t.data_type, tuple(t.dims), t.raw_data): t.name for t in made}
        names = {
            t.name: known.get((t.data_type, tuple(t.dims), t.raw_data)) for t in writer.tensors
        }
        for node in writer.nodes:
            node.input[:] = [names.get(n) or n for n in node.input]
        new = [t for t in writer.tensors if names[t.name] is None]
        made += new
        return writer.nodes, new

    def _batch_size(self, feed: Feed) -> int:
        return next((len(feed[i.name]) for i in self._inputs if i.shape), 1)

    def _run(
        self,
        tensors: Sequence[str],
        chains: Chains,
        feeds: Sequence[Feed],
        open_with: Callable[[Any, Path | None, int], Any] = open_any_session,
    ) -> Iterator[dict[str, Array]]:
        """Yield the values of tensors by name, one dict per feed."""
        inputs = {i.name for i in self._inputs}
        computed = [n for n in tensors if n not in inputs]
        session = None
        if computed and feeds:
            model = prune(self._model, computed)
            self._substitute(model, chains)
            session = open_with(model, self._folder, min(_THREADS, os.cpu_count() or 1))
        for feed in feeds:
            values = {n: feed[n] for n in tensors if n in inputs}
            if session is not None:
                session_feed = {i.name: feed[i.name] for i in session.get_inputs()}
                try:
                    values |= zip(computed, session.run(computed, session_feed))
                except Exception as why:  # onnxruntime's errors have no common base
                    raise ValueError(
                        f"onnxruntime does not run the network: {one_line(why)}"
                    ) from None
            yield values

    def _probe(self, names: Sequence[str], anywhere: bool) -> tuple[int, dict[str, Ints]] | None:
        """Run the network; return its batch size and the shapes of tensors, or None.

        With `anywhere`, onnx's evaluator runs it if onnxruntime does not.

        The input is the first batch.  Without data it is a batch of one example of zeros, if all
        other sizes are known.
        """
        feed = self._example()
        if feed is None:
            return None
        open_with = open_any_session if anywhere else open_session
        run = next(self._run(names, {}, [feed], open_with))
        return self._batch_size(feed), {name: value.shape for name, value in run.items()}

    def _example(self) -> Feed | None:
        """Return the first batch, or zeros of the given or fixed sizes; None if one is free."""
        return self._feeds[0] if self._feeds else self._zeros


def open_model(
    path: str | os.PathLike[str],
    batches: str | os.PathLike[str] | Sequence[Any] | None = None,
    input_size: InputSize | None = None,
) -> OnnxModel:
    """Open a model in ONNX's format.

    Parameters
    ----------
    path : path
        ``.onnx`` file; its external data must be in the same folder.
    batches : path or sequence, optional
        Calibration data: an ``.npz`` file, see :func:`lowrank.interop.onnx.read_batches`, or
        batches as for :class:`OnnxModel`.
    input_size : sequence of int or mapping, optional
        Sizes of the free axes of the inputs, see :class:`OnnxModel`.

    Returns
    -------
    OnnxModel

    Raises
    ------
    ValueError
        If one of the files is damaged, or they do not fit each other; see :class:`OnnxModel`.
    OSError
        If a file cannot be read.
    ImportError
        If onnx or onnxruntime is not installed.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import pytest
    >>> onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    >>> from lowrank.interop.onnx import open_model
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
    ...     net (float[N, 2] x) => (float[N, 2] y)
    ...     <float[2, 2] w = {1, 2, 2, 4}> {y = MatMul(x, w)}''')
    >>> path = pathlib.Path(tempfile.mkdtemp(), "net.onnx")
    >>> _ = path.write_bytes(model.SerializeToString())
    >>> open_model(path).layers[0].conv
    <Factorization dense: 2x2x1, 4 params>
    """
    path = Path(path)
    model = load(path)
    try:
        if isinstance(batches, (str, os.PathLike)):
            batches = read_batches(batches, inputs_of(model))
        return OnnxModel(model, batches, path.parent, input_size)
    except ValueError as why:
        raise ValueError(why if str(path) in str(why) else f"{path}: {why}") from None


def _samples(site: Site, x: Array, batch: int) -> Array:
    """Return the input of a layer as (batch, channels, *spatial)."""
    x = _as_float32(x)
    if site.op not in ("Gemm", "MatMul"):
        return x
    if x.ndim > 2 and len(x) != batch == x.shape[1]:
        x = x.swapaxes(0, 1)  # recurrent networks and attention may have the vectors first
    rows = x.size // x.shape[-1]
    examples = batch if rows % batch == 0 else rows
    return x.reshape(examples, -1, x.shape[-1]).swapaxes(1, 2)


def _no_gradient(layer: Layer, batch: int) -> Array:
    """Return the gradient of a layer that no output depends on."""
    return np.zeros((batch, *layer.conv.output_shape(layer.input_size)), np.float32)


def _as_float32(x: Array) -> Array:
    """Return floating-point values as float32, others unchanged."""
    x = as_numpy(x)
    return np.asarray(x, np.float32) if x.dtype.kind == "f" else x
