"""ONNX networks on the C engine: programs, and onnxruntime for what they do not support."""

from __future__ import annotations

import os
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowrank._kernels import _core
from lowrank._typing import Array, Ints
from lowrank.engine import check_options
from lowrank.engine.description import NAME_WIDTH, OperationRow, operation_table
from lowrank.engine.network import describe_operation
from lowrank.engine.program import Algorithm
from lowrank.interop.batches import Feed, check_batch
from lowrank.interop.onnx.data import inputs_of
from lowrank.interop.onnx.files import check, check_external, library, load
from lowrank.interop.onnx.graph import Constants, reads, supported_opset
from lowrank.interop.onnx.partition import Piece, partition
from lowrank.interop.onnx.runtime import (
    infer_tensors,
    open_session,
    run_session,
    simplify,
)

_PLANS = 8  # kept at once, of different shapes without the batch
_SHAPES = 1024  # of the inputs, whose plans are known
_RUNS = 5  # of a network for its times


def on_engine(
    model: Any,
    *,
    threads: int | None = None,
    algorithm: Algorithm = "auto",
    folder: str | os.PathLike[str] | None = None,
) -> EngineNetwork:
    """Return an ONNX network that runs on the C engine.

    Parameters
    ----------
    model : onnx.ModelProto or path
        Model of opset 7 or newer; it is not changed.
    threads : int, optional
        Number of threads; default: one per core.
    algorithm : str
        ``"auto"``, or ``"direct"``: no convolution by a fast algorithm.
    folder : path, optional
        Folder of the model's external data; default: that of the file.

    Returns
    -------
    EngineNetwork

    Raises
    ------
    ValueError
        If the model is invalid, or an argument is out of range.
    OSError
        If a file cannot be read.
    ImportError
        If onnx or onnxruntime is not installed.

    Examples
    --------
    >>> import pytest
    >>> onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    >>> import numpy as np
    >>> from lowrank.interop.onnx import on_engine
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
    ...     net (float[N, 1, 4] x) => (float[N, 1, 2] y)
    ...     <float[1, 1, 3] w = {1, 2, 1}> {r = Relu(x) y = Conv(r, w)}''')
    >>> on_engine(model)(np.array([[[1, -1, 2, -2]]], np.float32))[0].tolist()
    [[[3.0, 4.0]]]
    """
    check_options(algorithm, threads)
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        folder = path.parent if folder is None else folder
        model = load(path)
    return EngineNetwork(
        model,
        threads or _core.max_threads(),
        algorithm,
        None if folder is None else Path(folder).resolve(),
    )


class EngineNetwork:
    """ONNX network of which the engine runs as much as its programs support.

    A call takes a dict of arrays by the name of the input, or one array if there is one input, and
    returns a list of arrays, one per output.  Programs are built at the first call with a shape of
    the inputs and run any batch; those of the latest 8 shapes are kept.

    Parameters
    ----------
    model : onnx.ModelProto
        Model of opset 7 or newer; it is not changed.
    threads : int
        Number of threads.
    algorithm : str
        ``"auto"`` or ``"direct"``.
    folder : path or None
        Folder of the model's external data.

    Examples
    --------
    >>> import pytest
    >>> onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    >>> import numpy as np
    >>> from lowrank.interop.onnx import EngineNetwork
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
    ...     net (float[N, 2] x) => (float[N, 2] y)
    ...     <float[2, 2] w = {1, 2, 2, 4}> {m = MatMul(x, w) y = Relu(m)}''')
    >>> net = EngineNetwork(model, threads=1, algorithm="auto", folder=None)
    >>> net({"x": np.array([[1, 0], [-1, 0]], np.float32)})[0].tolist()
    [[1.0, 2.0], [0.0, 0.0]]
    """

    def __init__(self, model: Any, threads: int, algorithm: Algorithm, folder: Path | None) -> None:
        self.threads, self.algorithm, self._folder = threads, algorithm, folder
        given = library().ModelProto()
        given.CopyFrom(model)
        check_external(given, folder)  # reads small tensors into it
        check(given)
        supported_opset(given)
        self._inputs = inputs_of(given)
        self._model = simplify(given, folder)
        self._outputs = [o.name for o in self._model.graph.output]
        self._constant = Constants(self._model, folder)
        self._lock = threading.Lock()  # of the plans
        self._types: dict[str, int] = {}  # element types of tensors, as in TensorProto
        self._plans: dict[tuple[Ints, ...], list[Piece]] = {}
        self._sessions: dict[tuple[Ints, tuple[str, ...]], Any] = {}

    def __call__(self, feeds: Any) -> list[Array]:
        """Return the outputs of the network.

        Parameters
        ----------
        feeds : mapping of str to array_like, or array_like
            Arrays by the name of the input.

        Returns
        -------
        list of ndarray

        Raises
        ------
        ValueError
            If the arrays do not fit the network, or onnxruntime fails.
        """
        return self._run(check_batch(self._inputs, feeds))

    def describe(self, feeds: Any) -> str:
        """Return a table of operations: of the programs, and of onnxruntime.

        Parameters
        ----------
        feeds : mapping of str to array_like, or array_like
            Arrays by the name of the input; they are run for the times.

        Returns
        -------
        str
            Table of the programs' operations with algorithm, predicted relative error, MACs per
            example, time and share of the time, then one row for each set of operators that stay
            in onnxruntime.

        Examples
        --------
        >>> import pytest
        >>> onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
        >>> import numpy as np
        >>> from lowrank.interop.onnx import on_engine
        >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
        ...     net (float[N, 2] x) => (float[N, 2] y)
        ...     <float[2, 2] w = {1, 2, 2, 4}> {m = MatMul(x, w) y = Relu(m)}''')
        >>> net = on_engine(model, algorithm="direct")
        >>> table = net.describe(np.ones((1, 2), np.float32))
        >>> [line.split()[:2] for line in table.splitlines()[1:-1]]
        [['pack', 'pack'], ['y', 'dense'], ['unpack', 'unpack']]
        """
        feed = check_batch(self._inputs, feeds)
        self._run(feed)  # builds programs and warms up
        runs: list[list[list[float]]] = []
        for _ in range(_RUNS):
            runs.append([])
            self._run(feed, runs[-1])
        rows: list[OperationRow] = []
        seconds: list[float] = []
        stays: dict[tuple[str, ...], tuple[Counter[str], float]] = {}
        for piece, *times in zip(self._plan(feed), *runs):
            medians = np.median(times, axis=0).tolist()
            if piece.program is not None:
                rows += [OperationRow(*describe_operation(o)) for o in piece.program.operations]
                seconds += medians
                continue
            types = Counter(self._model.graph.node[i].op_type for i in piece.nodes)
            key = tuple(sorted(types))
            counts, before = stays.get(key, (Counter(), 0.0))
            stays[key] = counts + types, before + medians[0]
        for counts, t in stays.values():
            text = ", ".join(f"{n} {op}" for op, n in counts.most_common())
            rows.append(OperationRow(textwrap.fill(text, NAME_WIDTH), "onnxruntime"))
            seconds.append(t)
        return operation_table(rows, seconds)

    def _run(self, feed: Feed, times: list[list[float]] | None = None) -> list[Array]:
        """Return the outputs; append the seconds of the operations of each piece to `times`."""
        values: dict[str, Array] = dict(feed)
        for piece in self._plan(feed):
            if piece.program is None:
                start = time.perf_counter()
                part = {name: values[name] for name in piece.inputs}
                results = run_session(self._session(piece), list(piece.outputs), part)
                seconds = [time.perf_counter() - start]
            else:
                results, seconds = self._run_program(piece, values, times is not None)
            values.update(zip(piece.outputs, results))
            if times is not None:
                times.append(seconds)
        constants = {n: self._constant(n) for n in self._outputs if n not in values}
        return [values[n] if n in values else np.array(constants[n]) for n in self._outputs]

    def _run_program(
        self, piece: Piece, values: Mapping[str, Array], profile: bool
    ) -> tuple[list[Array], list[float]]:
        program, count = piece.program, len(piece.inputs)
        assert program is not None
        batch = len(values[piece.inputs[0]])
        x = [
            values[name].reshape(batch, *shape)
            for name, shape in zip(piece.inputs, piece.arrays[:count])
        ]
        y = [np.empty((batch, *shape), x[0].dtype) for shape in piece.arrays[count:]]
        seconds: list[float] = []
        if profile:
            seconds = program.core.profile([*x, *y], self.threads)
        else:
            program(x, y, self.threads)
        shapes = [piece.shapes[name] for name in piece.outputs]
        return [a.reshape(batch, *shape) for a, shape in zip(y, shapes)], seconds

    def _session(self, piece: Piece) -> Any:
        """Return onnxruntime's session of a piece."""
        key = piece.nodes, piece.outputs
        if key not in self._sessions:
            onnx, graph = library(), self._model.graph
            part = onnx.ModelProto(
                ir_version=self._model.ir_version, opset_import=self._model.opset_import
            )
            part.graph.name = graph.name
            part.graph.node.extend(graph.node[i] for i in piece.nodes)
            needed = {name for node in part.graph.node for name in reads(node)}
            part.graph.initializer.extend(t for t in graph.initializer if t.name in needed)
            part.graph.sparse_initializer.extend(
                t for t in graph.sparse_initializer if t.values.name in needed
            )
            part.graph.input.extend(
                onnx.helper.make_tensor_value_info(name, self._types[name], None)
                for name in piece.inputs
            )
            part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in piece.outputs)
            self._sessions[key] = open_session(part, self._folder, self.threads)
        return self._sessions[key]

    def _plan(self, feed: Feed) -> list[Piece]:
        """Return the pieces for the shapes of a feed."""
        key = tuple(feed[i.name].shape for i in self._inputs)
        with self._lock:
            plan = self._plans.pop(key, None)
            is_new = plan is None
            if plan is None:
                plan = self._find_plan({i.name: feed[i.name].shape for i in self._inputs})
            self._plans[key] = plan  # the latest is the last
            if is_new:
                self._evict()
        return plan

    def _find_plan(self, shapes: Mapping[str, Ints]) -> list[Piece]:
        """Return a plan of the same shapes with another batch, or a new one."""
        tensors = infer_tensors(self._model, self._folder, shapes)
        for plan in self._plans.values():
            if all(piece.fits(tensors) for piece in plan):
                return plan
        self._types.update((name, t.element_type) for name, t in tensors.items())
        return partition(self._model, self._constant, tensors, self.algorithm)

    def _evict(self) -> None:
        """Forget the plans that were not used for longest, and their sessions."""
        while len({id(p) for p in self._plans.values()}) > _PLANS or len(self._plans) > _SHAPES:
            del self._plans[next(iter(self._plans))]
        kept = {(q.nodes, q.outputs) for p in self._plans.values() for q in p}
        self._sessions = {k: s for k, s in self._sessions.items() if k in kept}
