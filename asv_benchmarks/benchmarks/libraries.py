"""Stages and filters as other libraries run them, where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

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


def torch_peers(stages: Any, x: np.ndarray, ends: Any = (), name: str = "torch") -> dict[str, Call]:
    """The stages as PyTorch's layers, in both layouts; `ends` are (bias, activation) pairs."""
    if torch is None:
        return {}
    from lowrank.backends import pytorch
    from lowrank.stage import Epilogue

    epilogues = [Epilogue(*end) for end in ends or [(None, "none")] * len(stages)]
    found = {f"{name} NCHW": pytorch.call(stages, epilogues, x)}
    if x.ndim in (4, 5):
        found[f"{name} NHWC"] = pytorch.call(stages, epilogues, x, channels_last=True)
    return found


def onnx_peer(stages: Any, x: np.ndarray, threads: int, ends: Any = ()) -> dict[str, Call]:
    """The stages as a network of Conv nodes in onnxruntime, its output bound beforehand."""
    if onnxruntime is None or any(s.left > 1 or s.right > 1 for s in stages):
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
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    network = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    shape = network.run(None, {"x": x})[0].shape
    binding = network.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    out = onnxruntime.OrtValue.ortvalue_from_numpy(np.empty(shape, np.float32))
    binding.bind_ortvalue_output(at, out)
    return {"onnxruntime": lambda: network.run_with_iobinding(binding)}


def opencv_separable(image: np.ndarray, line: np.ndarray) -> dict[str, Call]:
    if cv2 is None:
        return {}
    out, border = np.empty_like(image), cv2.BORDER_REFLECT
    return {
        "cv2.sepFilter2D": lambda: cv2.sepFilter2D(image, -1, line, line, out, borderType=border)
    }
