"""Chains as nodes of an ONNX graph, and their calls in onnxruntime; imported only when called."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core import reference
from lowrank.core.cost import chain_shapes
from lowrank.core.geometry import Geometry
from lowrank.core.stage import Epilogue, Stage

OPSET = 19  # the first with circular padding
IR_VERSION = 9  # of files of that opset
_PAD_MODE = {"reflect": "reflect", "replicate": "edge", "circular": "wrap", "constant": "constant"}


def library() -> Any:
    """Import onnx, or raise an ImportError that says how to install it."""
    try:
        import onnx
    except ImportError:
        raise ImportError(
            "ONNX models need onnx and onnxruntime: pip install 'lowrank[onnx]'"
        ) from None
    return onnx


def unique_name(name: str, used: Collection[str]) -> str:
    """Return `name`, with a number appended if it is among `used`."""
    unique, i = name, 0
    while unique in used:
        i += 1
        unique = f"{name}_{i}"
    return unique


class Writer:
    """Nodes and weights that replace one layer, with unique names.

    Attributes
    ----------
    nodes : list of onnx.NodeProto
        Nodes in execution order.
    tensors : list of onnx.TensorProto
        Weights and shapes that the nodes read.
    """

    def __init__(
        self, layer: str, ndim: int, dtype: np.dtype[Any], opset: int, used_names: set[str]
    ) -> None:
        self.layer, self.ndim, self.dtype, self.opset = layer, ndim, dtype, opset
        self.prefix = layer
        self._used_names = used_names
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []

    def _new_name(self, name: str) -> str:
        name = unique_name(name, self._used_names)
        self._used_names.add(name)
        return name

    def weight(self, role: str, array: Array) -> str:
        """Add a constant in the layer's precision; return its name."""
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(array, self.dtype)
        if not np.isfinite(values).all():
            raise ValueError(f"layer {self.layer!r}: weights too large for {self.dtype}")
        return self._constant(role, values)

    def _constant(self, role: str, array: Array) -> str:
        name = self._new_name(f"{self.prefix}.{role}")
        self.tensors.append(library().numpy_helper.from_array(array, name))
        return name

    def integers(self, role: str, entries: Sequence[int] | Array) -> str:
        """Add a constant of 64-bit integers, such as a shape; return its name."""
        return self._constant(role, np.array(entries, np.int64))

    def node(self, op: str, inputs: Sequence[str], role: str = "", **attributes: Any) -> str:
        """Add a node; return its name, which is also that of its output."""
        name = self._new_name(f"{self.prefix}.{role}" if role else self.prefix)
        self.nodes.append(library().helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def reshape(self, x: str, shape: Sequence[int], like: str | None = None, first: int = 2) -> str:
        """Add a Reshape of `x`: 0 keeps the size of an axis, -1 is inferred from the others.

        Sizes that the graph does not fix are taken from the tensor `like`, from its axis `first`
        on, and appended to `shape`.
        """
        target = self.integers("shape", shape)
        if like is not None:
            axes = self.integers("axes", range(first, first + self.ndim))
            sizes = self.node("Gather", [self.node("Shape", [like], "size"), axes], "sizes", axis=0)
            target = self.node("Concat", [target, sizes], "concat", axis=0)
        return self.node("Reshape", [x, target], "reshape")


def write_stages(
    w: Writer, stages: Sequence[Stage], epilogues: Sequence[Epilogue], x: str, size: Ints | None
) -> str:
    """Write the convolutions of a chain; return the name of its output.

    `size` is the spatial size of `x`, None if the graph does not fix it.
    """
    border = np.full(stages[0].in_channels, stages[0].geometry.value)
    for i, (stage, (bias, activation)) in enumerate(zip(stages, epilogues)):
        w.prefix = f"{w.layer}.{i}"
        x = _conv_stage(w, stage, x, size, border, bias)
        if activation == "relu":
            x = w.node("Relu", [x], activation)
        elif activation == "relu6":
            limits = [w.weight("limit", np.array(limit)) for limit in (0.0, 6.0)]
            x = w.node("Clip", [x, *limits], activation)
        border = reference.dc_response(stage, border)
        if size is not None:
            size = stage.output_shape((stage.in_channels, *size))[1:]
    return x


def _conv_stage(
    w: Writer, s: Stage, x: str, size: Ints | None, border: Array, bias: Array | None
) -> str:
    g = s.geometry
    if g.padding_mode != "zeros" and any(map(any, g.padding)):
        x = _pad(w, s, x, border)
        if size is not None:
            size = tuple(n + sum(p) for n, p in zip(size, g.padding))
        s = replace(s, geometry=replace(g, padding=((0, 0),) * g.ndim, padding_mode="zeros"))
    source = s.channel_permutation()
    shuffled = not np.array_equal(source, np.arange(len(source)))
    if shuffled and not s.transposed:
        x = w.node("Gather", [x, w.integers("order", source)], "shuffle", axis=1)
    # The bias of a tied convolution would be the same for all copies, and a shuffle would permute
    # it: it is added at the end then.
    conv_has_bias = bias is not None and s.outer * s.inner == 1 and not (shuffled and s.transposed)
    if s.outer > 1:
        x = w.reshape(x, (-1, s.in_channels // s.outer, *(0,) * g.ndim))
    x = _inner_copies(w, s, x, size, bias if conv_has_bias else None)
    if s.outer > 1:
        x = w.reshape(x, (-1, s.out_channels, *(0,) * g.ndim))
    if shuffled and s.transposed:
        x = w.node("Gather", [x, w.integers("order", np.argsort(source))], "shuffle", axis=1)
    if bias is not None and not conv_has_bias:
        x = w.node("Add", [x, w.weight("bias", bias.reshape(-1, *(1,) * g.ndim))], "add")
    return x


def _inner_copies(w: Writer, s: Stage, x: str, size: Ints | None, bias: Array | None) -> str:
    """Write a stage on channels (groups, in, inner), with the copies along an axis or the batch."""
    g, r, n = s.geometry, s.inner, s.geometry.ndim
    ins, outs = (channels // (s.outer * r) for channels in (s.in_channels, s.out_channels))
    if r == 1:
        return _conv(w, s, x, s.weight, bias)
    if s.kernel[0] == g.stride[0] == 1 and g.padding[0] == (0, 0) and not g.output_padding[0]:
        # The first axis is pointwise, so the copies can be part of it.
        y = _conv(w, s, w.reshape(x, (0, ins, -1, *(0,) * (n - 1))), s.weight)
        return w.reshape(y, (0, outs * r, -1, *(0,) * (n - 1)))
    fixed = size is not None
    before = size or ()
    after = s.output_shape((s.in_channels, *size))[1:] if size is not None else ()
    if n == 1:
        y = _conv(w, s, w.reshape(x, (0, ins, r, -1)), s.weight[:, :, None])
        return w.reshape(y, (0, outs * r, -1))
    split = w.reshape(x, (0, ins, r, *before), None if fixed else x)
    if n == 2:
        y = _conv(w, s, split, s.weight[:, :, None])
        return w.reshape(y, (0, outs * r, *after), None if fixed else y, 3)
    swap = [0, 2, 1, 3, 4, 5]  # Conv has no fourth axis: the copies become part of the batch
    split = w.node("Transpose", [split], "transpose", perm=swap)
    y = _conv(w, s, w.reshape(split, (-1, ins, *before), None if fixed else x), s.weight)
    split = w.reshape(y, (-1, r, outs, *after), None if fixed else y)
    split = w.node("Transpose", [split], "transpose", perm=swap)
    return w.reshape(split, (0, outs * r, *after), None if fixed else y)


def _conv(w: Writer, s: Stage, x: str, weight: Array, bias: Array | None = None) -> str:
    """Write a Conv or ConvTranspose, with one more leading spatial axis if `weight` has one."""
    g, more = s.geometry, weight.ndim - s.weight.ndim
    pads, ends = list(g.padding), list(g.output_padding)
    for axis, (a, b) in enumerate(pads):
        # onnxruntime limits output_padding to less than a stride; less cropping is equivalent.
        if ends[axis] >= max(g.stride[axis], g.dilation[axis]):
            pads[axis], ends[axis] = (a, max(b - ends[axis], 0)), max(ends[axis] - b, 0)
        if ends[axis] >= max(g.stride[axis], g.dilation[axis]):
            raise ValueError(
                f"layer {w.layer!r}: output_padding must be less than the stride {g.stride} or "
                f"the dilation {g.dilation} in onnxruntime, got {g.output_padding}"
            )
    inputs = [x, w.weight("weight", weight)]
    if bias is not None:
        inputs.append(w.weight("bias", bias))
    none = [0] * more
    extra: dict[str, Any] = {"output_padding": none + ends} if any(ends) else {}
    return w.node(
        "ConvTranspose" if s.transposed else "Conv",
        inputs,
        kernel_shape=list(weight.shape[2:]),
        strides=[1] * more + list(g.stride),
        dilations=[1] * more + list(g.dilation),
        pads=none + [a for a, _ in pads] + none + [b for _, b in pads],
        group=s.groups,
        **extra,
    )


def _pad(w: Writer, s: Stage, x: str, border: Array) -> str:
    """Pad `x` in a mode that Conv does not have; `border` has one value per channel."""
    g = s.geometry
    mode = _PAD_MODE.get(g.padding_mode)
    if mode is None or (mode == "wrap" and w.opset < 19):
        needs = "needs opset 19" if mode else "does not exist in ONNX"
        raise ValueError(f"layer {w.layer!r}: padding_mode {g.padding_mode!r} {needs}")
    pads = [0, 0, *(a for a, _ in g.padding), 0, 0, *(b for _, b in g.padding)]
    shift = ""
    if mode == "constant" and np.ptp(border):
        # One constant per channel: subtract it, pad with zeros, and add it again.
        shift = w.weight("outside", border.reshape(-1, *(1,) * g.ndim))
        x, border = w.node("Sub", [x, shift], "sub"), np.zeros(1)
    value = float(border[0]) if mode == "constant" else 0.0
    if w.opset < 11:
        x = w.node("Pad", [x], "pad", mode=mode, pads=pads, value=value)
    else:
        inputs = [x, w.integers("pads", pads)]
        if value:
            inputs.append(w.weight("value", np.array(value)))
        x = w.node("Pad", inputs, "pad", mode=mode)
    return w.node("Add", [x, shift], "restore") if shift else x


def bind_call(
    stages: Sequence[Stage],
    epilogues: Sequence[Epilogue],
    x: Array,
    threads: int,
    in_network: bool = False,
) -> Callable[[], Array]:
    """Return a call of `stages` on `x` in onnxruntime, on a number of threads.

    In a network the neighbours of a chain have its layout.  With `in_network`, the chain stands
    between two depthwise 1 x 1 convolutions, which onnxruntime computes in its blocked layout
    where it has one; no stages at all give the two alone.

    Raises
    ------
    NotImplementedError
        If ONNX has no operator for a stage.
    """
    import onnxruntime

    model = chain_model(stages, epilogues, x, in_network)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads that spin after a call would take cores from the next call, of another session.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 4  # errors are raised, not logged
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model, options, providers=providers)
    result = np.empty((len(x), *chain_shapes(stages, x.shape[1:])[-1]), x.dtype)
    binding = session.io_binding()  # results are not copied
    binding.bind_cpu_input("x", np.ascontiguousarray(x))
    address = result.ctypes.data
    binding.bind_output("y", "cpu", 0, x.dtype.type, result.shape, address)

    def run() -> Array:
        session.run_with_iobinding(binding)
        return result

    return run


def chain_model(
    stages: Sequence[Stage], epilogues: Sequence[Epilogue], x: Array, in_network: bool = False
) -> bytes:
    """Return the ONNX model of :func:`bind_call`, from an input "x" like `x` to an output "y"."""
    helper = library().helper
    shapes = chain_shapes(stages, x.shape[1:])
    if in_network:
        first, last = (_end(shape) for shape in (shapes[0], shapes[-1]))
        stages, epilogues = [first, *stages, last], [Epilogue(), *epilogues, Epilogue()]
    writer = Writer("chain", x.ndim - 2, x.dtype, OPSET, {"x", "y"})
    try:
        last_name = write_stages(writer, stages, epilogues, "x", x.shape[2:])
    except ValueError as why:
        raise NotImplementedError(str(why)) from None
    writer.nodes.append(helper.make_node("Identity", [last_name], ["y"]))
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    given, result = (
        helper.make_tensor_value_info(name, kind, (len(x), *shape))
        for name, shape in (("x", shapes[0]), ("y", shapes[-1]))
    )
    graph = helper.make_graph(writer.nodes, "chain", [given], [result], writer.tensors)
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    return bytes(model.SerializeToString())


def _end(shape: Ints) -> Stage:
    """Return a depthwise convolution of one tap, as a neighbour of a chain."""
    channels, *size = shape
    weight = np.full((channels, 1, *(1,) * len(size)), 0.5, np.float32)
    return Stage(weight, Geometry.of(len(size)), groups=channels)
