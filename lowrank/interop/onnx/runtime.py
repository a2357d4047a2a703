"""Sessions of onnxruntime on the CPU, types of tensors and constant folding."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.interop.common import one_line
from lowrank.interop.onnx.files import (
    is_external,
    library,
    read_external,
    without_large_weights,
)
from lowrank.interop.onnx.graph import constant_nodes, prune, reads


class Tensor(NamedTuple):
    """Type and shape of a tensor.

    Attributes
    ----------
    kind : str
        Type as onnxruntime writes it, such as ``"tensor(float)"``.
    shape : tuple of (int or None)
        Sizes of its axes, None where they depend on the values of the inputs.
    """

    kind: str
    shape: tuple[int | None, ...]

    @property
    def element_type(self) -> int:
        """Type of the elements as TensorProto numbers them; 0 if it is not a tensor."""
        names = dict(library().TensorProto.DataType.items())
        return int(names.get(self.kind.removeprefix("tensor(").removesuffix(")").upper(), 0))


def open_session(model: Any, folder: Path | None, threads: int, optimize: bool = True) -> Any:
    """Load a model, its bytes or its file into onnxruntime; external data are in `folder`."""
    try:
        import onnxruntime
    except ImportError:
        raise ImportError(
            "ONNX models need onnxruntime to run: pip install 'lowrank[onnx]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised, not logged
    if not optimize:  # shapes are known after constants are folded, which the least level does
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if folder is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(folder))
    source = model if isinstance(model, (bytes, str)) else model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as why:  # onnxruntime's errors have no common base
        raise ValueError(f"onnxruntime does not load the network: {one_line(why)}") from None


class ReferenceSession:
    """A model in onnx's own evaluator, with the methods of a session of onnxruntime.

    It is slow, and runs types for which onnxruntime has no kernels.

    Parameters
    ----------
    model : onnx.ModelProto
        Model; its external data are read.
    folder : path or None
        Folder of the model's external data.
    """

    def __init__(self, model: Any, folder: Path | None) -> None:
        from onnx.reference import ReferenceEvaluator  # not loaded with onnx

        for tensor in model.graph.initializer:
            if is_external(tensor):
                read_external(tensor, folder)
        constants = {t.name for t in model.graph.initializer}
        self._inputs = [i for i in model.graph.input if i.name not in constants]
        self._evaluator = ReferenceEvaluator(model)

    def get_inputs(self) -> list[Any]:
        """Return the inputs of the model."""
        return self._inputs

    def run(self, outputs: list[str], feed: Mapping[str, Array]) -> list[Any]:
        """Return outputs of the model."""
        return list(self._evaluator.run(outputs, dict(feed)))


def open_any_session(model: Any, folder: Path | None, threads: int) -> Any:
    """Load a model into onnxruntime, or where that fails, into onnx's reference evaluator."""
    try:
        return open_session(model, folder, threads)
    except ValueError as why:
        reason = str(why)
        try:
            session = ReferenceSession(model, folder)
        except Exception:  # of any operator
            raise ValueError(reason) from None
    warnings.warn(f"{reason}; onnx's reference evaluator runs it, slowly", stacklevel=2)
    return session


def session_call(
    model: Any, feed: Mapping[str, Array], threads: int, folder: Path | None = None
) -> Callable[[], object]:
    """Return a call of a model in onnxruntime; see :func:`open_session`."""
    session = open_session(model, folder, threads)
    given = {i.name: feed[i.name] for i in session.get_inputs()}
    return lambda: session.run(None, given)


def run_session(session: Any, outputs: list[str], feed: Mapping[str, Array]) -> list[Array]:
    """Return outputs of a session."""
    try:
        return list(session.run(outputs, feed))
    except Exception as why:  # onnxruntime's errors have no common base
        raise ValueError(f"onnxruntime does not run the network: {one_line(why)}") from None


def infer_tensors(model: Any, folder: Path | None, shapes: Mapping[str, Ints]) -> dict[str, Tensor]:
    """Return the types and shapes of all tensors of the main graph, for shapes of its inputs."""
    onnx = library()
    fixed = without_large_weights(model)
    for value in fixed.graph.input:
        if value.name in shapes:
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shapes[value.name]))
    del fixed.graph.output[:]
    names = [o for node in fixed.graph.node for o in node.output if o]
    fixed.graph.output.extend(onnx.ValueInfoProto(name=o) for o in names)
    session = open_session(fixed, folder, 1, optimize=False)
    return {
        t.name: Tensor(t.type, tuple(n if isinstance(n, int) else None for n in t.shape))
        for t in (*session.get_inputs(), *session.get_outputs())
    }


def simplify(model: Any, folder: Path | None) -> Any:
    """Return a copy of a model without functions, constant inputs, and nodes that are not needed.

    Nodes that depend on constants only become initializers.
    """
    new = library().ModelProto()
    new.CopyFrom(model)
    if new.functions:
        from onnx import inliner  # not loaded with onnx

        new = inliner.inline_local_functions(new)
    constants = {t.name for t in new.graph.initializer}
    for i in reversed(range(len(new.graph.input))):
        if new.graph.input[i].name in constants:
            del new.graph.input[i]
    new.ir_version = max(new.ir_version, 4)
    fold_constants(new, folder)
    return prune(new, [o.name for o in new.graph.output])


def fold_constants(model: Any, folder: Path | None) -> None:
    """Replace nodes that depend on constants only by initializers, in place."""
    onnx, graph = library(), model.graph
    folded = list(constant_nodes(graph))
    outputs = {o for node in folded for o in node.output if o}
    kept = [node for node in graph.node if outputs.isdisjoint(node.output)]
    used = {name for node in kept for name in reads(node)}
    used.update(o.name for o in graph.output)
    wanted = sorted(outputs & used)
    if not wanted:
        return
    part = prune(model, wanted)
    values = run_session(open_session(part, folder, 1), wanted, {})
    if not all(isinstance(v, np.ndarray) and v.dtype.kind in "fiub" for v in values):
        return
    graph.initializer.extend(
        onnx.numpy_helper.from_array(v, name) for name, v in zip(wanted, values)
    )
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(copies)
