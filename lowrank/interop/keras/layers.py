"""One layer of Keras as a convolution, and a chain of stages as layers of Keras."""

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
    entries_of,
    same_padding,
    spatial_axes,
    transposed_padding,
)

_AXES = {
    **{f"{kind}Conv{n}D": n for kind in ("", "Depthwise", "Separable") for n in (1, 2, 3)},
    **{f"Conv{n}DTranspose": n for n in (1, 2, 3)},
    "Dense": 1,
}
#: Of the layer that is replaced these go to the last of the chain, where its bias is.
_LAST = ("bias_initializer", "bias_regularizer", "bias_constraint", "activity_regularizer")


@dataclass(frozen=True, slots=True, eq=False)
class New:
    """A layer of Keras to be."""

    class_name: str
    config: dict[str, Any]
    weights: tuple[tuple[str, Array], ...]
    shape: Shape  # of its input
    out: Shape


def is_convolution(entry: Any) -> bool:
    """Whether a layer is of a kind that can be a convolution here."""
    return entry.get("class_name") in _AXES


def ndim(entry: Any) -> int:
    """How many spatial axes such a layer has."""
    return _AXES[str(entry["class_name"])]


def count(entry: Any) -> int:
    """How many arrays such a layer has."""
    separable = str(entry["class_name"]).startswith("Separable")
    return 1 + separable + bool(entry["config"].get("use_bias", True))


def convolution(entry: Any, weights: Sequence[Array], shape: Shape) -> tuple[Factorization, Ints]:
    """The layer as a chain, of one stage or (separable layers) of two, and its input's size.

    Raises ValueError where it is none, with the reason.
    """
    kind, config = str(entry["class_name"]), entry["config"]
    n_axes = ndim(entry)
    arrays = [np.asarray(w) for w in weights]
    if len(arrays) != count(entry) or config.get("quantization_config"):
        raise ValueError("it has other weights than a layer of its kind")
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
        axes, at = spatial_axes(config, len(shape))
        channels = shape[at]
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
    stride = entries_of(config["strides"], n)
    dilation = entries_of(config.get("dilation_rate", 1), n)
    extent = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel.shape[:n]))
    padding = str(config.get("padding", "valid")).lower()
    if padding not in ("valid", "same", "causal") or (padding == "causal" and kind != "Conv1D"):
        raise ValueError(f"its padding is {padding!r}")
    if kind.endswith("Transpose"):
        extra = config.get("output_padding")
        extras = (None,) * n if extra is None else entries_of(extra, n)
        found = [transposed_padding(e, s, padding, o) for e, s, o in zip(extent, stride, extras)]
        return dense(
            np.moveaxis(kernel, (-1, -2), (0, 1)),
            bias,
            stride=stride,
            padding=[p for p, _ in found],
            dilation=dilation,
            transposed=True,
            output_padding=[o for _, o in found],
        )
    if padding == "causal":
        pads: Pads = tuple((e - 1, 0) for e in extent)
    elif padding == "same":
        pads = tuple(same_padding(m, e, s) for m, e, s in zip(size, extent, stride))
    else:
        pads = ((0, 0),) * n
    convolved = partial(dense, bias=bias, stride=stride, padding=pads, dilation=dilation)
    if kind.startswith("Conv"):
        groups = int(config.get("groups") or 1)
        return convolved(np.moveaxis(kernel, (-1, -2), (0, 1)), groups=groups)
    channels, times = kernel.shape[-2:]
    weight = np.moveaxis(kernel, (-2, -1), (0, 1)).reshape(channels * times, 1, *kernel.shape[:n])
    if kind.startswith("Depthwise"):
        return convolved(weight, groups=channels)
    first = convolved(weight, groups=channels, bias=None)
    last = np.moveaxis(arrays[1], (-1, -2), (0, 1))
    if last.shape[1:] != (channels * times, *(1,) * n):
        raise ValueError(f"its pointwise kernel has shape {arrays[1].shape}")
    pointwise = dense(last, bias)
    return chain([*first.stages, *pointwise.stages], pointwise.bias)


def layers_of(
    name: str, entry: Any, layer: Layer, f: Factorization, shape: Shape, dtype: Any
) -> list[New]:
    """The layers of Keras that do what `f` does in place of a layer; without names.

    Raises ValueError if there are none that do it with less work than the layer.
    """
    stages = [_untied(s) for s in f.stages]
    plain = chain(stages, f.bias)
    asked, now = (c.cost(layer.input_size).macs for c in (layer.conv, plain))
    if now > asked and now > f.cost(layer.input_size).macs:
        raise ValueError(
            f"layer {name!r}: {f!r} has tied, shuffled or transposed stages for which Keras has "
            f"no layers; written out they would take {now} multiply-adds, the layer takes {asked}"
        )
    plain = plain.astype(dtype)
    config = entry["config"]
    if entry["class_name"] == "Dense":
        found = list(_dense(config, plain, shape))
    else:
        found = list(_chain(config, plain, shape))
    last = next(x for x in reversed(found) if x.weights)  # a crop may follow, which is no matter
    last.config["activation"] = config.get("activation", "linear")
    last.config.update({key: config[key] for key in _LAST if key in config})
    for new in found:
        new.config["trainable"] = config.get("trainable", True)
        if "dtype" in config:
            new.config["dtype"] = config["dtype"]
    return found


def _untied(stage: Stage) -> Stage:
    """The stage as Keras has it: no tied copies, no shuffle, transposed only with one group.

    Zeros are written out where there is no other way.
    """
    if stage.geometry.padding_mode != "zeros":
        raise ValueError(f"Keras pads with zeros, not by {stage.geometry.padding_mode}")
    weight, groups = stage.weight, stage.groups
    if weight.shape[:2] == (groups, 1):  # a channel at a time, and so are its copies
        weight, groups = np.repeat(weight, stage.inner, axis=0), groups * stage.inner
    elif stage.inner > 1:
        one = weight.reshape(groups, -1, *weight.shape[1:])
        grown = np.einsum("goc...,rs->gorcs...", one, np.eye(stage.inner, dtype=weight.dtype))
        weight = grown.reshape(-1, weight.shape[1] * stage.inner, *stage.kernel)
    weight, groups = np.concatenate([weight] * stage.outer), groups * stage.outer
    source = stage.channel_permutation()
    shuffled = not np.array_equal(source, np.arange(len(source)))
    # Transposed and of stride 1 is a plain convolution with flipped taps.
    g = stage.geometry
    flipped = [
        (e - 1 - a, e - 1 - b + o)
        for e, (a, b), o in zip(g.extent(stage.kernel), g.padding, g.output_padding)
    ]
    turned = stage.transposed and max(g.stride) == 1 and min(map(min, flipped)) >= 0
    if shuffled or (stage.transposed and not turned and groups > 1):
        weight, groups = _mixed(weight, groups), 1
        if shuffled:
            weight = weight[:, np.argsort(source)]
    if turned:
        rows = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
        weight = np.flip(rows.reshape(-1, *rows.shape[2:]), tuple(range(2, 2 + g.ndim)))
        pads = tuple((a, b) for a, b in flipped)
        g = replace(g, padding=pads, output_padding=(0,) * g.ndim)
    if max(g.stride) > 1 and max(g.dilation) > 1:  # Keras has one or the other
        taps = g.extent(stage.kernel)
        spread = np.zeros((*weight.shape[:2], *taps), weight.dtype)
        spread[trailing(*(slice(None, None, d) for d in g.dilation))] = weight
        weight, g = spread, replace(g, dilation=(1,) * g.ndim)
    return Stage(weight, g, groups, transposed=stage.transposed and not turned)


def _mixed(weight: Array, groups: int) -> Array:
    """The kernel of a grouped convolution as one of a single group."""
    each = weight.reshape(groups, -1, *weight.shape[1:])
    whole = np.einsum("goc...,gh->gohc...", each, np.eye(groups, dtype=weight.dtype))
    return np.asarray(whole.reshape(weight.shape[0], -1, *weight.shape[2:]))


def _dense(config: Any, f: Factorization, shape: Shape) -> Iterator[New]:
    for i, stage in enumerate(f.stages):
        if max(stage.kernel) > 1 or stage.groups > 1:
            stage = replace(stage, weight=_mixed(stage.weight, stage.groups), groups=1)
        bias = f.bias if i == len(f.stages) - 1 else None
        weight = stage.weight[..., 0].T
        out = (*shape[:-1], stage.out_channels)
        made = {"units": stage.out_channels, "use_bias": bias is not None, "activation": "linear"}
        yield New("Dense", made, _weights(("kernel", weight), ("bias", bias)), shape, out)
        shape = out


def _chain(config: Any, f: Factorization, shape: Shape) -> Iterator[New]:
    """Layers for the stages, with borders and crops of their own where Keras has no other way."""
    axes, at = spatial_axes(config, len(shape))
    form = {"data_format": config.get("data_format", "channels_last")}
    asked = str(config.get("padding", "valid")).lower()
    kept = shape  # as far as it is known

    def resized(size: Ints, channels: int) -> Shape:
        found = list(kept)
        found[axes] = [None if n is None else m for n, m in zip(kept[axes], size)]
        found[at] = channels
        return tuple(found)

    size = tuple(n or 0 for n in shape[axes])
    i = 0
    while i < len(f.stages):
        stage = f.stages[i]
        out = stage.output_shape((stage.in_channels, *size))[1:]
        i += 1
        n, g = len(size), stage.geometry
        made = {
            "kernel_size": list(stage.kernel),
            "strides": list(g.stride),
            "dilation_rate": list(g.dilation),
            "activation": "linear",
            **form,
        }
        if stage.transposed:
            bias = f.bias if i == len(f.stages) else None
            yield from _transposed(stage, bias, made, resized, size, out, asked)
            size = out
            continue
        padding = _named(asked, stage, size)
        if padding is None:
            wider = tuple(m + sum(p) for m, p in zip(size, g.padding))
            pads = [list(p) for p in g.padding]
            yield New(
                f"ZeroPadding{n}D",
                _border("padding", pads, form),
                (),
                resized(size, stage.in_channels),
                resized(wider, stage.in_channels),
            )
            size, padding = wider, "valid"
        depthwise = stage.groups == stage.in_channels > 1
        # TensorFlow's depthwise kernels want one stride for both axes; and there is none in 3-D.
        depthwise = depthwise and n < 3 and len(set(g.stride)) == 1 and padding != "causal"
        before, last = resized(size, stage.in_channels), stage
        made["padding"] = padding
        kernel = np.moveaxis(stage.weight, (0, 1), (-1, -2))
        if depthwise:
            times = stage.out_channels // stage.groups
            taps = stage.weight.reshape(stage.groups, times, *stage.kernel)
            kernel = np.moveaxis(taps, (0, 1), (-2, -1))
            made["depth_multiplier"] = times
            kind, weights = f"DepthwiseConv{n}D", [("depthwise_kernel", kernel)]
            if i < len(f.stages) and _is_pointwise(f.stages[i]):
                last = f.stages[i]
                i += 1
                kind = f"SeparableConv{n}D"
                made["filters"] = last.out_channels
                weights.append(("pointwise_kernel", np.moveaxis(last.weight, (0, 1), (-1, -2))))
        else:
            made |= {"filters": stage.out_channels, "groups": stage.groups}
            kind, weights = f"Conv{n}D", [("kernel", kernel)]
        bias = f.bias if i == len(f.stages) else None
        made["use_bias"] = bias is not None
        yield New(
            kind, made, _weights(*weights, ("bias", bias)), before, resized(out, last.out_channels)
        )
        size = out


def _named(asked: str, stage: Stage, size: Ints) -> str | None:
    """What Keras calls this padding; that of the layer, if it will do for any size."""
    g = stage.geometry
    extent = g.extent(stage.kernel)
    named: dict[str, Any] = {
        "valid": tuple((0, 0) for _ in size),
        "same": tuple(same_padding(n, e, s) for n, e, s in zip(size, extent, g.stride)),
    }
    if len(size) == 1:
        named["causal"] = tuple((e - 1, 0) for e in extent)
    fit = [name for name, pads in named.items() if pads == g.padding]
    return asked if asked in fit else next(iter(fit), None)


def _transposed(
    stage: Stage, bias: Array | None, made: Any, resized: Any, size: Ints, out: Ints, asked: str
) -> Iterator[New]:
    """A transposed stage; ahead of a crop if Keras would crop otherwise."""
    n, g = len(size), stage.geometry
    extent = g.extent(stage.kernel)
    kernel = np.moveaxis(stage.weight, (0, 1), (-1, -2))
    weights = _weights(("kernel", kernel), ("bias", bias))
    made |= {"filters": stage.out_channels, "use_bias": bias is not None, "output_padding": None}
    kind = f"Conv{n}DTranspose"
    before = resized(size, stage.in_channels)
    for padding in (asked, "same", "valid"):
        found = [transposed_padding(e, s, padding, None) for e, s in zip(extent, g.stride)]
        spare = [
            (m - 1) * s + e - a - w
            for m, s, e, ((a, _), _), w in zip(size, g.stride, extent, found, out)
        ]
        crops = [((a, max(x, 0)), max(-x, 0)) for ((a, _), _), x in zip(found, spare)]
        if found == crops and all(a == b for ((a, _), _), (b, _) in zip(found, g.padding)):
            yield New(
                kind, made | {"padding": padding}, weights, before, resized(out, stage.out_channels)
            )
            return
    # All that there is, then a crop; what is to be added goes with the convolution.
    more = [max(o - b, 0) for (_, b), o in zip(g.padding, g.output_padding)]
    whole = tuple((m - 1) * s + e + o for m, s, e, o in zip(size, g.stride, extent, more))
    crop = [[a, w - a - m] for (a, _), w, m in zip(g.padding, whole, out)]
    if any(o >= s for o, s in zip(more, g.stride)):
        raise ValueError(f"Keras has no transposed convolution of stride {g.stride} and {g}")
    middle = resized(whole, stage.out_channels)
    yield New(kind, made | {"padding": "valid", "output_padding": more}, weights, before, middle)
    if any(map(any, crop)):
        form = {"data_format": made["data_format"]}
        yield New(
            f"Cropping{n}D",
            _border("cropping", crop, form),
            (),
            middle,
            resized(out, stage.out_channels),
        )


def _border(key: str, pairs: list[list[int]], form: dict[str, Any]) -> dict[str, Any]:
    if len(pairs) > 1:
        return {key: pairs, **form}
    if form["data_format"] == "channels_first":
        raise ValueError(f"Keras has no {key} along one axis for channels first")
    return {key: pairs[0]}


def _is_pointwise(stage: Stage) -> bool:
    g = stage.geometry
    plain = g == Geometry.of(g.ndim, dilation=g.dilation)
    return plain and max(stage.kernel) == 1 and stage.groups == 1 and not stage.transposed


def _weights(*named: tuple[str, Array | None]) -> tuple[tuple[str, Array], ...]:
    return tuple((name, np.ascontiguousarray(a)) for name, a in named if a is not None)
