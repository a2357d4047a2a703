"""Stages and filters in other libraries, where they are installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from .compat import is_replicated, resolve
from .timing import measure_seconds

try:
    import torch
except ImportError:
    torch = None
try:
    import cv2
except ImportError:
    cv2 = None
try:
    import onnx
    import onnxruntime
except ImportError:
    onnxruntime = None

Call = Callable[[], object]


def set_threads(threads: int) -> None:
    """Set the number of threads of PyTorch and OpenCV."""
    if torch is not None:
        torch.set_num_threads(threads)
    if cv2 is not None:
        cv2.setNumThreads(threads)


def torch_peers(stages: Any, x: np.ndarray, ends: Any = (), name: str = "torch") -> dict[str, Call]:
    """Return the stages as PyTorch layers in both layouts; `ends` are (bias, activation) pairs."""
    if torch is None:
        return {}
    try:
        bind_call = resolve("engine.pytorch:bind_call", "backends.pytorch:call")
        Epilogue = resolve("core.stage:Epilogue", "stage:Epilogue")
    except NotImplementedError:  # an early commit: the other libraries remain
        return {}
    epilogues = [Epilogue(*end) for end in ends or [(None, "none")] * len(stages)]
    found = {f"{name} NCHW": bind_call(stages, epilogues, x)}
    if x.ndim in (4, 5):
        found[f"{name} NHWC"] = bind_call(stages, epilogues, x, channels_last=True)
    return found


def tensorly_torch_peer(family: str, stages: Any, x: np.ndarray) -> dict[str, Call]:
    """Return the chain as a FactorizedConv of TensorLy-Torch, which has three of the families.

    The factors are those of the stages.  A short trial picks the fastest of its implementations
    and input layouts.
    """
    kind = family.rsplit(" ", 1)[0]
    if torch is None or kind not in ("cp", "tucker", "tensor train"):
        return {}
    try:
        import tltorch
    except ImportError:
        return {}
    weights = [torch.from_numpy(np.require(s.weight, requirements=["C", "W"])) for s in stages]
    first, *middle, last = weights
    first, last = first.flatten(1), last.flatten(1)  # (rank, inputs), (outputs, rank)
    kernel = [max(w.shape[2 + a] for w in middle) for a in range(x.ndim - 2)]
    shape, implementations = (len(last), first.shape[1], *kernel), ["factorized"]
    if kind == "cp":
        factors = [last, first.T, *(w.flatten(1).T for w in middle)]
        made = tltorch.CPTensor(torch.ones(len(first)), factors, shape=shape, rank=len(first))
        implementations.append("mobilenet")
    elif kind == "tucker":
        ranks = (last.shape[1], len(first), *kernel)
        made = tltorch.TuckerTensor(middle[0], [last, first.T], shape=shape, rank=ranks)
    else:
        cores = [first.T[None], *(w.flatten(2).permute(1, 2, 0) for w in middle), last.T[..., None]]
        ranks = (1, *(len(w) for w in weights[:-1]), 1)
        made = tltorch.TTTensor(cores, shape=(*shape[1:], shape[0]), rank=ranks)
    padding = [k // 2 for k in kernel]
    given = torch.from_numpy(x)
    last_format = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    inputs = [given, given.contiguous(memory_format=last_format)]

    def call(implementation: str, t: Any) -> Call:
        conv = tltorch.FactorizedConv.from_factorization(
            made, implementation=implementation, padding=padding
        )

        def run() -> Any:
            with torch.inference_mode():
                return conv(t)

        return run

    calls = [call(i, t) for i in implementations for t in inputs]
    times = measure_seconds(calls, 0.05)
    return {"TensorLy-Torch": calls[times.index(min(times))]}


def onnx_peer(stages: Any, x: np.ndarray, threads: int, ends: Any = ()) -> dict[str, Call]:
    """Return the stages as Conv nodes in onnxruntime, with a preallocated output."""
    if onnxruntime is None or any(map(is_replicated, stages)):
        return {}
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes, values, at = [], [], "x"
    for k, (s, (bias, activation)) in enumerate(
        zip(stages, ends or [(None, "none")] * len(stages))
    ):
        g = s.geometry
        inputs = [at, f"w{k}"]
        values.append(onnx.numpy_helper.from_array(np.ascontiguousarray(s.weight), f"w{k}"))
        if bias is not None:
            values.append(onnx.numpy_helper.from_array(np.ascontiguousarray(bias), f"b{k}"))
            inputs.append(f"b{k}")
        pads = [b for b, _ in g.padding] + [a for _, a in g.padding]
        nodes.append(
            helper.make_node(
                "Conv", inputs, [f"y{k}"], strides=list(g.stride), pads=pads,
                dilations=list(g.dilation), group=s.groups,
            )
        )  # fmt: skip
        at = f"y{k}"
        if activation == "relu6":
            values.append(onnx.numpy_helper.from_array(np.float32(0), f"low{k}"))
            values.append(onnx.numpy_helper.from_array(np.float32(6), f"high{k}"))
            nodes.append(helper.make_node("Clip", [at, f"low{k}", f"high{k}"], [f"c{k}"]))
            at = f"c{k}"
    given = [helper.make_tensor_value_info("x", kind, x.shape)]
    graph = helper.make_graph(
        nodes, "chain", given, [helper.make_tensor_value_info(at, kind, None)], values
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return {"onnxruntime": onnxruntime_call(model, x, threads)}


def onnxruntime_call(model: Any, x: np.ndarray, threads: int) -> Call:
    """Return a call of an ONNX model with one input and a preallocated output."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # The same policy as our OpenMP threads.
    spins = "0" if os.environ.get("OMP_WAIT_POLICY") == "passive" else "1"
    options.add_session_config_entry("session.intra_op.allow_spinning", spins)
    network = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (given,), (result,) = network.get_inputs(), network.get_outputs()
    shape = network.run(None, {given.name: x})[0].shape
    binding = network.io_binding()
    binding.bind_ortvalue_input(given.name, onnxruntime.OrtValue.ortvalue_from_numpy(x))
    out = onnxruntime.OrtValue.ortvalue_from_numpy(np.empty(shape, np.float32))
    binding.bind_ortvalue_output(result.name, out)
    return lambda: network.run_with_iobinding(binding)


def opencv_separable(image: np.ndarray, line: np.ndarray) -> dict[str, Call]:
    """Return OpenCV's separable filter."""
    if cv2 is None:
        return {}
    out, border = np.empty_like(image), cv2.BORDER_REFLECT
    return {
        "cv2.sepFilter2D": lambda: cv2.sepFilter2D(image, -1, line, line, out, borderType=border)
    }
