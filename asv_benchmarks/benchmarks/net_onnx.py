"""Export of networks to ONNX."""

from __future__ import annotations

import io
import warnings
from typing import Any

try:
    import torch
except ImportError:  # asv imports every module of this folder
    torch = None

from .nets import outputs

#: Warnings of PyTorch's exporters that do not matter here.
IGNORED_WARNINGS = (
    "You are using the legacy TorchScript-based ONNX export",
    "The feature will be removed",
    "Constant folding - Only steps=1 can be constant folded",
    "ONNX export mode is set to TrainingMode.EVAL, but operator 'instance_norm'",
    "Converting a tensor to a Python boolean might cause the trace to be incorrect",  # its size
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def onnx_model(model: Any, x: Any, dynamo: bool = False) -> Any:
    """Return a network as ONNX, for any batch size at the size of an input.

    Parameters
    ----------
    model : torch.nn.Module
        Network in evaluation mode.
    x : torch.Tensor
        Input.
    dynamo : bool
        Use PyTorch's newer exporter, which needs onnxscript, instead of the TorchScript one, which
        leaves more to readers, such as padding computed by nodes.

    Returns
    -------
    onnx.ModelProto
        Input "x" (float32), output "y".
    """
    import onnx

    options: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamo": dynamo}
    file = io.BytesIO()
    with warnings.catch_warnings():
        for message in IGNORED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        if dynamo:
            options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
            found = torch.onnx.export(model, (x,), verbose=False, **options).model_proto
        else:
            options["dynamic_axes"] = {"x": {0: "batch"}, "y": {0: "batch"}}
            torch.onnx.export(model, (x,), file, **options)
            found = onnx.load_from_string(file.getvalue())
            # the exporter loses the size after a crop
            sizes = found.graph.output[0].type.tensor_type.shape.dim
            for size, n in list(zip(sizes, outputs(model, x).shape, strict=True))[1:]:
                size.dim_value = n
    onnx.checker.check_model(found)
    return found
