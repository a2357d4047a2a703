"""Networks in ONNX's format: their layers, what goes into them, and chains in their places."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.compress.model import Chains, Layer, Samples
from lowrank.factorization import Factorization
from lowrank.interop.onnx import data as data
from lowrank.interop.onnx import files as files
from lowrank.interop.onnx import graph as graphs
from lowrank.interop.onnx.chain import Writer, conv_chain, linear_chain
from lowrank.interop.onnx.data import read_batches as read_batches
from lowrank.interop.onnx.files import save as save
from lowrank.interop.onnx.layers import Site, find

_THREADS = 2  # of onnxruntime, at the most
_MODEST = 2**26  # elements
_OLDEST = 7  # opset: the first that onnxruntime runs


class OnnxModel:
    """A network in ONNX's format, as compression sees it; a :class:`lowrank.compress.Net`.

    Layers are the Conv, ConvTranspose, Gemm and MatMul nodes of the main graph whose weights are
    constants.  Left alone are those whose padding depends on a size that is not fixed.

    Parameters
    ----------
    model : onnx.ModelProto
        Of opset 7 or newer; it is not changed.
    batches : sequence, optional
        Calibration data: dicts of arrays by input, or arrays for a network of one input.
    folder : path, optional
        Where the model's external data lie, if it has any.

    Raises
    ------
    ValueError
        If the model is not valid or holds no such layer, if a batch does not fit the network, or
        if the size of a layer's input can be told neither from the graph nor from a batch.
    ImportError
        If onnx or onnxruntime is not installed.

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
    ) -> None:
        onnx = files.library()
        self._folder = None if folder is None else Path(folder).resolve()
        self._model = onnx.ModelProto()
        self._model.CopyFrom(model)
        files.resolve(self._model, self._folder)
        files.check(self._model)
        self._opset = graphs.opset_of(self._model)
        if self._opset < _OLDEST:
            raise ValueError(
                f"a model of opset {self._opset}, older than {_OLDEST}, the first that onnxruntime "
                "runs: onnx.version_converter makes it newer"
            )
        self._takes = data.inputs_of(self._model)
        self._feeds = [data.checked(self._takes, b) for b in batches or ()]
        takes = [i.name for i in self._takes]
        found = find(self._model, self._folder, takes, self._probe)
        self._sites = {site.layer.name: site for site in found}
        if not self._sites:
            raise ValueError(
                "the network has no Conv, ConvTranspose, Gemm or MatMul with constant weights"
            )

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Its layers that may be replaced, in the order in which they first run."""
        return tuple(site.layer for site in self._sites.values())

    @property
    def batches(self) -> int:
        """Calibration batches; 0 where there are no data."""
        return len(self._feeds)

    def inputs(self, names: Sequence[str], chains: Chains) -> Iterator[Samples]:
        r"""What layers get, a batch at a time, where `chains` stand in for layers of their names.

        Parameters
        ----------
        names : sequence of str
            Layers.
        chains : mapping of str to Factorization
            By layer.

        Yields
        ------
        dict of str to tuple of ndarray
            One float32 array a layer, (batch, channels, \*spatial); of a linear layer (batch,
            features, vectors).  Nothing is run that none of the layers needs.

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
        wanted = list(dict.fromkeys(s.input for s in sites))
        for feed, values in zip(self._feeds, self._run(wanted, chains, self._feeds)):
            batch = self._batch(feed)
            yield {s.layer.name: (_sample(s, values[s.input], batch),) for s in sites}

    def gradients(self, names: Sequence[str], seed: int) -> None:
        """None: onnxruntime does not differentiate.

        Parameters
        ----------
        names : sequence of str
            Layers.
        seed : int
            Of the labels.

        Returns
        -------
        None

        Examples
        --------
        >>> from lowrank.interop.onnx import OnnxModel
        >>> OnnxModel.gradients(None, [], 0) is None
        True
        """
        return

    def outputs(self, chains: Chains) -> Iterator[tuple[Array, ...]]:
        """What the network gives, a batch at a time.

        Parameters
        ----------
        chains : mapping of str to Factorization
            Stand in for layers of their names.

        Yields
        ------
        tuple of ndarray
            Its outputs in order, floating-point ones as float32.

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
        wanted = [o.name for o in self._model.graph.output]
        for values in self._run(wanted, chains, self._feeds):
            yield tuple(_single(values[name]) for name in wanted)

    def replaced(self, chains: Chains) -> Any:
        """A new model with `chains` in the places of layers; this one is not touched.

        Parameters
        ----------
        chains : mapping of str to Factorization
            By layer.

        Returns
        -------
        onnx.ModelProto
            With its weights in memory, those that lay in other files, too; :func:`save` writes it.

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
        new = files.library().ModelProto()
        new.CopyFrom(self._model)
        self._substitute(new, chains)
        del new.graph.value_info[:]
        new.graph.value_info.extend(graphs.inferred(new).graph.value_info)
        files.check(new, full=True)
        for tensor in new.graph.initializer:
            if files.is_external(tensor):
                files.read_in(tensor, self._folder)
        return new

    def _site(self, name: str) -> Site:
        if name not in self._sites:
            raise ValueError(f"no layer {name!r} among {', '.join(self._sites)}")
        return self._sites[name]

    def _substitute(self, model: Any, chains: Chains) -> None:
        parts = {}
        there = {node.output[0] for node in model.graph.node}
        for name, f in chains.items():
            site = self._site(name)
            conv, size = site.layer.conv, site.layer.input_size
            if not isinstance(f, Factorization):
                raise TypeError(f"layer {name!r}: a chain must be a Factorization, got {f!r:.80}")
            try:
                wanted, given = conv.output_shape(size), f.output_shape(conv.input_shape(size))
            except ValueError as why:
                raise ValueError(f"layer {name!r}: {why}") from None
            if wanted != given:
                raise ValueError(f"layer {name!r} gives {wanted}, but its chain {given}")
            if site.output in there:
                parts[site.output] = partial(self._nodes, site, f)
        if parts:
            graphs.substitute(model, parts)

    def _nodes(self, site: Site, f: Factorization, taken: set[str]) -> tuple[list[Any], list[Any]]:
        writer = Writer(site.layer.name, f.ndim, site.dtype, self._opset, taken)
        if site.op in ("Conv", "ConvTranspose"):
            conv_chain(writer, f, site.input, site.fixed)
        else:
            linear_chain(writer, f, site.input, site.rank, site.op == "Gemm")
        return writer.nodes, writer.tensors

    def _batch(self, feed: data.Feed) -> int:
        return next((len(feed[i.name]) for i in self._takes if i.shape), 1)

    def _run(
        self, wanted: Sequence[str], chains: Chains, feeds: Sequence[data.Feed]
    ) -> Iterator[dict[str, Array]]:
        given = {i.name for i in self._takes}
        made = [n for n in wanted if n not in given]
        session = None
        if made and feeds:
            model = graphs.pruned(self._model, made)
            self._substitute(model, chains)
            session = _session(model, self._folder)
        for feed in feeds:
            values = {n: feed[n] for n in wanted if n in given}
            if session is not None:
                needs = {i.name: feed[i.name] for i in session.get_inputs()}
                try:
                    values |= zip(made, session.run(made, needs))
                except Exception as why:  # onnxruntime's errors have no common base
                    raise ValueError(
                        f"onnxruntime does not run the network: {files.line_of(why)}"
                    ) from None
            yield values

    def _probe(self, names: Sequence[str]) -> tuple[int, dict[str, Ints]] | None:
        """What shapes tensors have in a run on the first batch; of zeros, if the sizes are fixed.

        Only the network's batch may be free then; it is 1.
        """
        if self._feeds:
            feed = self._feeds[0]
        elif all(_is_modest(i.shape) for i in self._takes):
            feed = {
                i.name: np.zeros([1 if n is None else n for n in i.shape], i.dtype)
                for i in self._takes
            }
        else:
            return None
        run = next(self._run(names, {}, [feed]))
        return self._batch(feed), {name: value.shape for name, value in run.items()}


def open_model(
    path: str | os.PathLike[str], batches: str | os.PathLike[str] | Sequence[Any] | None = None
) -> OnnxModel:
    """Open a network in ONNX's format.

    Parameters
    ----------
    path : path
        An ``.onnx`` file, with external data, if any, in its folder.
    batches : path or sequence, optional
        Calibration data: an ``.npz`` file, see :func:`read_batches`, or batches as
        :class:`OnnxModel` takes them.

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
    model = files.load(path)
    try:
        if isinstance(batches, (str, os.PathLike)):
            batches = read_batches(batches, data.inputs_of(model))
        return OnnxModel(model, batches, path.parent)
    except ValueError as why:
        raise ValueError(why if str(path) in str(why) else f"{path}: {why}") from None


def _sample(site: Site, x: Array, batch: int) -> Array:
    """What a layer gets as (batch, channels, *spatial)."""
    x = _single(x)
    if site.op not in ("Gemm", "MatMul"):
        return x
    if x.ndim > 2 and len(x) != batch == x.shape[1]:
        x = x.swapaxes(0, 1)  # vectors first, as recurrent networks and attention have them
    rows = x.size // x.shape[-1]
    examples = batch if rows % batch == 0 else rows
    return x.reshape(examples, -1, x.shape[-1]).swapaxes(1, 2)


def _is_modest(shape: Sequence[int | None]) -> bool:
    """Whether only the batch is free, and an input of zeros costs no memory to speak of."""
    return None not in shape[1:] and math.prod(n or 1 for n in shape) < _MODEST


def _single(x: Array) -> Array:
    """Floating-point values as float32."""
    return np.asarray(x, np.float32) if x.dtype.kind == "f" else x


def _session(model: Any, folder: Path | None) -> Any:
    """onnxruntime on a model, on the processor; external data from `folder` alone."""
    try:
        import onnxruntime
    except ImportError:
        raise ImportError(
            "to run ONNX models needs onnxruntime: pip install 'lowrank[onnx]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = min(_THREADS, os.cpu_count() or 1)
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised
    if folder is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(folder))
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as why:  # onnxruntime's errors have no common base
        raise ValueError(f"onnxruntime does not load the network: {files.line_of(why)}") from None
