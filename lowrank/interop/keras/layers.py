"""Conversion of Keras layers to convolutions, and of chains to Keras layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints, Pads, trailing
from lowrank.compress.model import Layer
from lowrank.core.geometry import Geometry
from lowrank.core.stage import Stage
from lowrank.factorization import Factorization, chain, dense
from lowrank.interop.keras.graph import (
    Shape,
    per_axis,
    same_padding,
    spatial_axes,
    transposed_padding,
)

_AXES = {
    **{f"{kind}Conv{n}D": n for kind in ("", "Depthwise", "Separable") for n in (1, 2, 3)},
    **{f"Conv{n}DTranspose": n for n in (1, 2, 3)},
    "Dense": 1,
}
#: Settings of the replaced layer that the last layer of the chain gets, as it has the bias.
_LAST = ("bias_initializer", "bias_regularizer", "bias_constraint", "activity_regularizer")


@dataclass(frozen=True, slots=True, eq=False)
class NewLayer:
    """Keras layer that is to be written."""

    class_name: str
    config: dict[str, Any]
    weights: tuple[tuple[str, Array], ...]
    shape: Shape  # of its input
    out: Shape


def is_convolution(entry: Any) -> bool:
    """Whether the class of a layer is a convolution or a dense layer."""
    return entry.get("class_name") in _AXES


def spatial_ndim(entry: Any) -> int:
    """Return the number of spatial axes of a convolution."""
    return _AXES[str(entry["class_name"])]


def weight_count(entry: Any) -> int:
    """Return the number of arrays of a convolution."""
    separable = str(entry["class_name"]).startswith("Separable")
    return 1 + separable + bool(entry["config"].get("use_bias", True))


def as_convolution(
    entry: Any, weights: Sequence[Array], shape: Shape
) -> tuple[Factorization, Ints]:
    """Return a layer as a chain of one stage (separable layers: two), and its input size.

    Raise a ValueError with the reason if the layer cannot be replaced.
    """
    kind, config = str(entry["class_name"]), entry["config"]
    n_axes = spatial_ndim(entry)
    arrays = [np.asarray(w) for w in weights]
    if len(arrays) != weight_count(entry) or config.get("quantization_config"):
        raise ValueError("its weights are not those of a layer of its class")
    if any(a.dtype.kind != "f" for a in arrays):
        raise ValueError(f"its weights are of type {arrays[0].dtype}")
    bias = arrays.pop() if config.get("use_bias", True) else None
    kernel = arrays[0]
    if kernel.ndim != (2 if kind == "Dense" else n_axes + 2):
        raise ValueError(f"its kernel has shape {kernel.shape}")
    if kind == "Dense":
        if len(shape) < 2 or any(n is None for n in shape[1:]):
            raise ValueError(f"its input size is not known: {shape}")
        size: Ints = (math.prod(n or 1 for n in shape[1:-1]),)
        f = dense(kernel.T[..., None], bias)
        channels = shape[-1]
    else:
        if len(shape) != n_axes + 2:
            raise ValueError(f"its input has shape {shape}")
        axes, channel_axis = spatial_axes(config, len(shape))
        channels = shape[channel_axis]
        if any(n is None for n in shape[axes]):
            raise ValueError(f"its input size is not known: {shape}")
        size = tuple(n or 0 for n in shape[axes])
        f = _convolution(kind, config, arrays, bias, size)
    if channels is not None and channels != f.in_channels:
        raise ValueError(f"its kernel takes {f.in_channels} channels, its input has {channels}")
    f.output_shape(size)  # raises if the kernel does not fit
    return f, size


def _convolution(
    kind: str, config: Any, arrays: list[Array], bias: Array | None, size: Ints
) -> Factorization:
    kernel, n = arrays[0], len(size)
    stride = per_axis(config["strides"], n)
    dilation = per_axis(config.get("dilation_rate", 1), n)
    extent = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel.shape[:n]))
    padding = str(config.get("padding", "valid")).lower()
    if padding not in ("valid", "same", "causal") or (padding == "causal" and kind != "Conv1D"):
        raise ValueError(f"its padding is {padding!r}")
    if kind.endswith("Transpose"):
        extra = config.get("output_padding")
        extras = (None,) * n if extra is None else per_axis(extra, n)
        crops = [transposed_padding(e, s, padding, o) for e, s, o in zip(extent, stride, extras)]
        return dense(
            np.moveaxis(kernel, (-1, -2), (0, 1)),
            bias,
            stride=stride,
            padding=[p for p, _ in crops],
            dilation=dilation,
            transposed=True,
            output_padding=[o for _, o in crops],
        )
    if padding == "causal":
        pads: Pads = tuple((e - 1, 0) for e in extent)
    elif padding == "same":
        pads = tuple(same_padding(m, e, s) for m, e, s in zip(size, extent, stride))
    else:
        pads = ((0, 0),) * n
    convolution = partial(dense, bias=bias, stride=stride, padding=pads, dilation=dilation)
    if kind.startswith("Conv"):
        groups = int(config.get("groups") or 1)
        return convolution(np.moveaxis(kernel, (-1, -2), (0, 1)), groups=groups)
    channels, times = kernel.shape[-2:]
    weight = np.moveaxis(kernel, (-2, -1), (0, 1)).reshape(channels * times, 1, *kernel.shape[:n])
    if kind.startswith("Depthwise"):
        return convolution(weight, groups=channels)
    first = convolution(weight, groups=channels, bias=None)
    last = np.moveaxis(arrays[1], (-1, -2), (0, 1))
    if last.shape[1:] != (channels * times, *(1,) * n):
        raise ValueError(f"its pointwise kernel has shape {arrays[1].shape}")
    pointwise = dense(last, bias)
    return chain([*first.stages, *pointwise.stages], pointwise.bias)


def chain_layers(
    name: str, entry: Any, layer: Layer, f: Factorization, shape: Shape, dtype: Any
) -> list[NewLayer]:
    """Return the unnamed Keras layers that compute the chain `f` in place of a layer.

    Raise a ValueError if Keras has none that need fewer MACs than the layer.
    """
    stages = [_as_keras_stage(s) for s in f.stages]
    plain = chain(stages, f.bias)
    layer_macs, macs = (c.cost(layer.input_size).macs for c in (layer.conv, plain))
    if macs > layer_macs and macs > f.cost(layer.input_size).macs:
        raise ValueError(
            f"layer {name!r}: {f!r} has tied, shuffled or transposed stages for which Keras has "
            f"no layers; written out they need {macs} MACs, the layer needs {layer_macs}"
        )
    plain = plain.astype(dtype)
    config = entry["config"]
    if entry["class_name"] == "Dense":
        layers = list(_dense_layers(config, plain, shape))
    else:
        layers = list(_conv_layers(config, plain, shape))
    last = next(x for x in reversed(layers) if x.weights)  # a crop may follow: it has no bias
    last.config["activation"] = config.get("activation", "linear")
    last.config.update({key: config[key] for key in _LAST if key in config})
    for new in layers:
        new.config["trainable"] = config.get("trainable", True)
        if "dtype" in config:
            new.config["dtype"] = config["dtype"]
    return layers


def _as_keras_stage(stage: Stage) -> Stage:
    """Return an equal stage without tied copies or shuffles, transposed only with one group.

    If necessary, the weights become a larger array with zeros.
    """
    if stage.geometry.padding_mode != "zeros":
        raise ValueError(f"Keras pads with zeros, not by {stage.geometry.padding_mode}")
    weight, groups = stage.weight, stage.groups
    if weight.shape[:2] == (groups, 1):  # depthwise, so its copies are depthwise, too
        weight, groups = np.repeat(weight, stage.inner, axis=0), groups * stage.inner
    elif stage.inner > 1:
        grouped = weight.reshape(groups, -1, *weight.shape[1:])
        tied = np.einsum("goc...,rs->gorcs...", grouped, np.eye(stage.inner, dtype=weight.dtype))
        weight = tied.reshape(-1, weight.shape[1] * stage.inner, *stage.kernel)
    weight, groups = np.concatenate([weight] * stage.outer), groups * stage.outer
    source = stage.channel_permutation()
    shuffled = not np.array_equal(source, np.arange(len(source)))
    # A transposed convolution with stride 1 is a convolution with flipped taps.
    g = stage.geometry
    flipped = [
        (e - 1 - a, e - 1 - b + o)
        for e, (a, b), o in zip(g.extent(stage.kernel), g.padding, g.output_padding)
    ]
    is_flippable = stage.transposed and max(g.stride) == 1 and min(map(min, flipped)) >= 0
    if shuffled or (stage.transposed and not is_flippable and groups > 1):
        weight, groups = _ungroup(weight, groups), 1
        if shuffled:
            weight = weight[:, np.argsort(source)]
    if is_flippable:
        rows = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
        weight = np.flip(rows.reshape(-1, *rows.shape[2:]), tuple(range(2, 2 + g.ndim)))
        pads = tuple((a, b) for a, b in flipped)
        g = replace(g, padding=pads, output_padding=(0,) * g.ndim)
    if max(g.stride) > 1 and max(g.dilation) > 1:  # Keras allows only one of the two
        extent = g.extent(stage.kernel)
        dilated = np.zeros((*weight.shape[:2], *extent), weight.dtype)
        dilated[trailing(*(slice(None, None, d) for d in g.dilation))] = weight
        weight, g = dilated, replace(g, dilation=(1,) * g.ndim)
    return Stage(weight, g, groups, transposed=stage.transposed and not is_flippable)


def _ungroup(weight: Array, groups: int) -> Array:
    """Return the kernel of a grouped convolution as a kernel with one group."""
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    dense_kernel = np.einsum("goc...,gh->gohc...", grouped, np.eye(groups, dtype=weight.dtype))
    return np.asarray(dense_kernel.reshape(weight.shape[0], -1, *weight.shape[2:]))


def _dense_layers(config: Any, f: Factorization, shape: Shape) -> Iterator[NewLayer]:
    for i, stage in enumerate(f.stages):
        if max(stage.kernel) > 1 or stage.groups > 1:
            stage = replace(stage, weight=_ungroup(stage.weight, stage.groups), groups=1)
        bias = f.bias if i == len(f.stages) - 1 else None
        weight = stage.weight[..., 0].T
        out = (*shape[:-1], stage.out_channels)
        new = {"units": stage.out_channels, "use_bias": bias is not None, "activation": "linear"}
        yield NewLayer("Dense", new, _weights(("kernel", weight), ("bias", bias)), shape, out)
        shape = out


def _conv_layers(config: Any, f: Factorization, shape: Shape) -> Iterator[NewLayer]:
    """Yield layers for the stages, with layers for padding and cropping where necessary."""
    axes, channel_axis = spatial_axes(config, len(shape))
    data_format = {"data_format": config.get("data_format", "channels_last")}
    layer_padding = str(config.get("padding", "valid")).lower()

    def resized(size: Ints, channels: int) -> Shape:
        new = list(shape)
        new[axes] = [None if n is None else m for n, m in zip(shape[axes], size)]
        new[channel_axis] = channels
        return tuple(new)

    size = tuple(n or 0 for n in shape[axes])
    i = 0
    while i < len(f.stages):
        stage = f.stages[i]
        out = stage.output_shape((stage.in_channels, *size))[1:]
        i += 1
        n, g = len(size), stage.geometry
        new = {
            "kernel_size": list(stage.kernel),
            "strides": list(g.stride),
            "dilation_rate": list(g.dilation),
            "activation": "linear",
            **data_format,
        }
        if stage.transposed:
            bias = f.bias if i == len(f.stages) else None
            yield from _transposed_layers(stage, bias, new, resized, size, out, layer_padding)
            size = out
            continue
        padding = _padding_name(layer_padding, stage, size)
        if padding is None:
            padded = tuple(m + sum(p) for m, p in zip(size, g.padding))
            pads = [list(p) for p in g.padding]
            yield NewLayer(
                f"ZeroPadding{n}D",
                _pad_config("padding", pads, data_format),
                (),
                resized(size, stage.in_channels),
                resized(padded, stage.in_channels),
            )
            size, padding = padded, "valid"
        depthwise = stage.groups == stage.in_channels > 1
        # TensorFlow's depthwise kernels need equal strides, and do not exist in 3-D.
        depthwise = depthwise and n < 3 and len(set(g.stride)) == 1 and padding != "causal"
        input_shape, last = resized(size, stage.in_channels), stage
        new["padding"] = padding
        kernel = np.moveaxis(stage.weight, (0, 1), (-1, -2))
        if depthwise:
            times = stage.out_channels // stage.groups
            taps = stage.weight.reshape(stage.groups, times, *stage.kernel)
            kernel = np.moveaxis(taps, (0, 1), (-2, -1))
            new["depth_multiplier"] = times
            kind, weights = f"DepthwiseConv{n}D", [("depthwise_kernel", kernel)]
            if i < len(f.stages) and _is_pointwise(f.stages[i]):
                last = f.stages[i]
                i += 1
                kind = f"SeparableConv{n}D"
                new["filters"] = last.out_channels
                weights.append(("pointwise_kernel", np.moveaxis(last.weight, (0, 1), (-1, -2))))
        else:
            new |= {"filters": stage.out_channels, "groups": stage.groups}
            kind, weights = f"Conv{n}D", [("kernel", kernel)]
        bias = f.bias if i == len(f.stages) else None
        new["use_bias"] = bias is not None
        output_shape = resized(out, last.out_channels)
        yield NewLayer(kind, new, _weights(*weights, ("bias", bias)), input_shape, output_shape)
        size = out


def _padding_name(layer_padding: str, stage: Stage, size: Ints) -> str | None:
    """Return Keras's name of a padding or None; that of the layer, which suits any size, first."""
    g = stage.geometry
    extent = g.extent(stage.kernel)
    paddings: dict[str, Any] = {
        "valid": tuple((0, 0) for _ in size),
        "same": tuple(same_padding(n, e, s) for n, e, s in zip(size, extent, g.stride)),
    }
    if len(size) == 1:
        paddings["causal"] = tuple((e - 1, 0) for e in extent)
    names = [name for name, pads in paddings.items() if pads == g.padding]
    return layer_padding if layer_padding in names else next(iter(names), None)


def _transposed_layers(
    stage: Stage,
    bias: Array | None,
    config: Any,
    resized: Any,
    size: Ints,
    out: Ints,
    layer_padding: str,
) -> Iterator[NewLayer]:
    """Yield a transposed convolution, with a layer that crops where Keras would crop otherwise."""
    n, g = len(size), stage.geometry
    extent = g.extent(stage.kernel)
    kernel = np.moveaxis(stage.weight, (0, 1), (-1, -2))
    weights = _weights(("kernel", kernel), ("bias", bias))
    config |= {"filters": stage.out_channels, "use_bias": bias is not None, "output_padding": None}
    kind = f"Conv{n}DTranspose"
    input_shape, output_shape = resized(size, stage.in_channels), resized(out, stage.out_channels)
    for padding in (layer_padding, "same", "valid"):
        keras_crops = [transposed_padding(e, s, padding, None) for e, s in zip(extent, g.stride)]
        excess = [
            (m - 1) * s + e - a - w
            for m, s, e, ((a, _), _), w in zip(size, g.stride, extent, keras_crops, out)
        ]
        crops = [((a, max(x, 0)), max(-x, 0)) for ((a, _), _), x in zip(keras_crops, excess)]
        starts_agree = all(a == b for ((a, _), _), (b, _) in zip(keras_crops, g.padding))
        if keras_crops == crops and starts_agree:
            yield NewLayer(kind, config | {"padding": padding}, weights, input_shape, output_shape)
            return
    # Otherwise compute the whole output, with the samples to add at its end, and crop it.
    extra = [max(o - b, 0) for (_, b), o in zip(g.padding, g.output_padding)]
    whole = tuple((m - 1) * s + e + o for m, s, e, o in zip(size, g.stride, extent, extra))
    crop = [[a, w - a - m] for (a, _), w, m in zip(g.padding, whole, out)]
    if any(o >= s for o, s in zip(extra, g.stride)):
        raise ValueError(f"Keras has no transposed convolution of stride {g.stride} and {g}")
    whole_shape = resized(whole, stage.out_channels)
    config |= {"padding": "valid", "output_padding": extra}
    yield NewLayer(kind, config, weights, input_shape, whole_shape)
    if any(map(any, crop)):
        crop_config = _pad_config("cropping", crop, {"data_format": config["data_format"]})
        yield NewLayer(f"Cropping{n}D", crop_config, (), whole_shape, output_shape)


def _pad_config(key: str, pairs: list[list[int]], data_format: dict[str, Any]) -> dict[str, Any]:
    if len(pairs) > 1:
        return {key: pairs, **data_format}
    if data_format["data_format"] == "channels_first":
        raise ValueError(f"Keras has no {key} along one axis for channels first")
    return {key: pairs[0]}


def _is_pointwise(stage: Stage) -> bool:
    g = stage.geometry
    plain = g == Geometry.of(g.ndim, dilation=g.dilation)
    return plain and max(stage.kernel) == 1 and stage.groups == 1 and not stage.transposed


def _weights(*named: tuple[str, Array | None]) -> tuple[tuple[str, Array], ...]:
    return tuple((name, np.ascontiguousarray(a)) for name, a in named if a is not None)
