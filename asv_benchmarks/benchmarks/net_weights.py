"""Weights of the trained networks, from the folder LOWRANK_DATA."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

try:
    import torch
except ImportError:  # asv imports every module of this folder
    torch = None

from .architectures import (
    Crepe,
    ResNet20,
    caffe_cifar10,
    espcn,
    keywords,
    meshnet,
    mobilenet,
    srcnn,
    style,
)  # fmt: skip
from .compat import resolve
from .net_data import folder


def load_net(name: str) -> Any:
    """Return a network with its weights."""
    read_weights = resolve("interop.weights:read_weights", "weights:read_weights")
    make, names = NETS[name]
    tensors = read_weights(folder() / "weights" / f"{name}.safetensors")
    if name == "kws_cnn_l":  # TensorFlow's (in, out), samples before channels
        tensors["W"] = tensors["W"].reshape(16, 4, 76, 58).transpose(3, 2, 0, 1)
        tensors |= {k: tensors[k].T for k in ("Variable_4", "Variable_6")}
    net = make()
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    for (key, value), stored_name in zip(state.items(), names or state, strict=True):
        # CREPE's kernels are stored as (k, 1), and a dense layer may be stored as (out, c, h, w)
        value.copy_(torch.tensor(tensors.pop(stored_name if names else key)).reshape(value.shape))
    if tensors:
        raise ValueError(f"{name}: unused tensors {sorted(tensors)}")
    return net.eval().requires_grad_(False)


KERAS = ("gamma", "beta", "moving_mean", "moving_variance")


def _pairs(weight: str, bias: str, keys: Iterable[object]) -> tuple[str, ...]:
    return tuple(pattern.format(k) for k in keys for pattern in (weight, bias))


def _style_names() -> Iterator[str]:
    """Yield weight, scale and shift of every convolution; the file has the shift first."""
    for k in range(0, 48, 3):
        yield f"Variable_{k}" if k else "Variable"
        yield from (f"Variable_{k + 2}", f"Variable_{k + 1}")


def _crepe_names() -> Iterator[str]:
    norm = ("weight", "bias", "running_mean", "running_var")
    for k in range(1, 7):
        yield from (f"conv{k}.weight", f"conv{k}.bias", *(f"conv{k}_BN.{x}" for x in norm))
    yield from ("classifier.weight", "classifier.bias")


def _keyword_names() -> Iterator[str]:
    first = (("Variable", "Variable_1"), ("Variable_2", "Variable_3"))
    for k, names in enumerate(first, 1):
        yield from (*names, *(f"bn{k}/{x}" for x in KERAS))
    yield from ("W", "b", "Variable_4", "Variable_5", *(f"bn3/{x}" for x in KERAS))
    yield from ("Variable_6", "Variable_7")


def _mobilenet_names() -> Iterator[str]:
    for k in range(27):
        number = (k + 1) // 2 if k % 2 == 0 else k // 2
        name = ("depthwise_" if k % 2 else "") + "conv2d" + (f"_{number}" if number else "")
        yield from (f"{name}.weight", f"{name}.bias")
        norm = "batch_normalization" + (f"_{k}" if k else "")
        yield from (f"{norm}.{x}" for x in KERAS)
    yield from ("dense.weight", "dense.bias")


#: Module, and the names of its parameters in the file in the module's order; none if equal.
NETS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "resnet20_cifar10": (ResNet20, ()),
    "caffe_cifar10_full": (
        caffe_cifar10, _pairs("{}.0", "{}.1", ("conv1", "conv2", "conv3", "ip1"))
    ),
    "srcnn_955": (srcnn, _pairs("weights_conv{}", "biases_conv{}", (1, 2, 3))),
    "espcn_x3": (espcn, _pairs("f{}", "b{}", (1, 2, 3))),
    "faststyle_udnie": (style, tuple(_style_names())),
    "crepe_tiny_1d": (Crepe, tuple(_crepe_names())),
    "kws_cnn_l": (keywords, tuple(_keyword_names())),
    "vww_mobilenet_025_96": (mobilenet, tuple(_mobilenet_names())),
    "meshnet3d_model20chan3cls": (
        meshnet,
        _pairs("{}.kernel", "{}.bias", (*(f"conv3d_{k}" for k in range(0, 18, 2)), "output")),
    ),
}  # fmt: skip
