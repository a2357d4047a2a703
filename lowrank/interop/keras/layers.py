"""Chains as Keras layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from string import ascii_lowercase
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints, Pads, trailing
from lowrank.compress.model import Layer
from lowrank.core.cost import stage_costs
from lowrank.core.geometry import Geometry
from lowrank.core.stage import Stage
from lowrank.factorization import Factorization, chain
from lowrank.interop.keras.convolutions import Config, Einsum, same_padding, transposed_padding

#: Settings of the replaced layer that the last layer of the chain gets, as it has the bias.
_LAST = ("bias_initializer", "bias_regularizer", "bias_constraint", "activity_regularizer")


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """Layer of a Keras model that can be replaced.

    Attributes
    ----------
    layer : Layer
        The layer as a convolution.
    kind : str
        Its class in ``keras.layers``.
    config : dict
        Its configuration.
    kernel : tuple of int
        Shape of its kernel.
    shape : tuple of int
        Shape of its input, with the batch.
    """

    layer: Layer
    kind: str
    config: Config
    kernel: Ints
    shape: Ints


@dataclass(frozen=True, slots=True, eq=False)
class NewLayer:
    """Keras layer that is to be made.

    Attributes
    ----------
    kind : str
        Class of the layer in ``keras.layers``.
    config : dict
        Its configuration, without a name.
    weights : list of ndarray
        Its weights, in Keras's order.
    """

    kind: str
    config: dict[str, Any]
    weights: list[Array]


def chain_layers(site: Site, f: Factorization) -> list[NewLayer]:
    """Return the Keras layers that compute a chain in place of a layer.

    Parameters
    ----------
    site : Site
        Layer that is replaced.
    f : Factorization
        Chain.

    Returns
    -------
    list of NewLayer
        Layers in the order of execution.  The last with weights has the bias and the activation;
        only a crop may follow.

    Raises
    ------
    ValueError
        If Keras has no layers for the chain that need fewer MACs than the layer.
    """
    layer, config = site.layer, site.config
    if not is_expressible(layer.conv, layer.input_size, f.stages):
        macs, most = (written_macs(x.stages, layer.input_size) for x in (f, layer.conv))
        raise ValueError(
            f"layer {layer.name!r}: {f!r} has tied, shuffled or transposed stages for which Keras "
            f"has no layers; written out they need {macs} MACs, the layer needs {most}"
        )
    plain = chain([_as_keras_stage(s) for s in f.stages], f.bias)
    if site.kind == "Dense":
        layers = list(_dense_layers(plain))
    elif site.kind == "EinsumDense":
        layers = list(_einsum_layers(site, plain))
    else:
        layers = list(_conv_layers(config, layer.input_size, plain))
    last = next(x for x in reversed(layers) if x.weights)
    last.config["activation"] = config["activation"]
    last.config.update({key: config[key] for key in _LAST if key in config})
    for new in layers:
        new.config.update(trainable=config["trainable"], dtype=config["dtype"])
    return layers


def is_expressible(conv: Factorization, size: Ints, stages: Sequence[Stage]) -> bool:
    """Return whether Keras has layers for a chain that do not undo its saving.

    Parameters
    ----------
    conv : Factorization
        Layer that the chain replaces.
    size : tuple of int
        Spatial size of its input.
    stages : sequence of Stage
        Stages of the chain, whose weights may be abstract.

    Returns
    -------
    bool
    """
    own = sum(c.macs for c in stage_costs(stages, (stages[0].in_channels, *size)))
    return written_macs(stages, size) <= max(written_macs(conv.stages, size), own)


def written_macs(stages: Sequence[Stage], size: Ints) -> int:
    """Return the MACs of stages as Keras layers, which hold tied weights as dense ones."""
    costs = stage_costs(stages, (stages[0].in_channels, *size))
    return sum(c.macs * _growth(s) for s, c in zip(stages, costs))


def _growth(s: Stage) -> int:
    """Return the factor by which the weights of a stage grow in :func:`_as_keras_stage`."""
    is_depthwise = s.weight.shape[:2] == (s.groups, 1)
    factor = 1 if is_depthwise else s.inner
    if _is_shuffled(s) or (s.transposed and _flipped_padding(s) is None):
        factor *= s.groups * s.outer * (s.inner if is_depthwise else 1)
    if max(s.geometry.stride) > 1 and max(s.geometry.dilation) > 1:
        factor *= math.prod(s.geometry.extent(s.kernel)) // math.prod(s.kernel)
    return factor


def _is_shuffled(s: Stage) -> bool:
    source = s.channel_permutation()
    return not np.array_equal(source, np.arange(len(source)))


def _flipped_padding(s: Stage) -> Pads | None:
    """Return the padding of the convolution that equals a transposed one of stride 1, or None."""
    g = s.geometry
    flipped = tuple(
        (e - 1 - a, e - 1 - b + o)
        for e, (a, b), o in zip(g.extent(s.kernel), g.padding, g.output_padding)
    )
    return flipped if max(g.stride) == 1 and min(map(min, flipped)) >= 0 else None


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
    g, shuffled = stage.geometry, _is_shuffled(stage)
    flipped = _flipped_padding(stage) if stage.transposed else None
    if shuffled or (stage.transposed and flipped is None and groups > 1):
        weight, groups = _ungroup(weight, groups), 1
        if shuffled:
            weight = weight[:, np.argsort(stage.channel_permutation())]
    if flipped is not None:
        rows = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
        weight = np.flip(rows.reshape(-1, *rows.shape[2:]), tuple(range(2, 2 + g.ndim)))
        g = replace(g, padding=flipped, output_padding=(0,) * g.ndim)
    if max(g.stride) > 1 and max(g.dilation) > 1:  # Keras allows only one of the two
        extent = g.extent(stage.kernel)
        dilated = np.zeros((*weight.shape[:2], *extent), weight.dtype)
        dilated[trailing(*(slice(None, None, d) for d in g.dilation))] = weight
        weight, g = dilated, replace(g, dilation=(1,) * g.ndim)
    return Stage(weight, g, groups, transposed=stage.transposed and flipped is None)


def _ungroup(weight: Array, groups: int) -> Array:
    """Return the kernel of a grouped convolution as a kernel with one group."""
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    dense_kernel = np.einsum("goc...,gh->gohc...", grouped, np.eye(groups, dtype=weight.dtype))
    return np.asarray(dense_kernel.reshape(weight.shape[0], -1, *weight.shape[2:]))


def _as_matrices(f: Factorization) -> list[Array]:
    """Return the matrices (out, in) of a chain of pointwise stages."""
    for s in f.stages:
        if s.transposed or max(s.kernel) > 1 or max(s.geometry.stride) > 1:
            raise ValueError(f"the chain of a linear layer must be pointwise, got {s!r}")
    return [_ungroup(s.weight, s.groups)[..., 0] for s in f.stages]


def _dense_layers(f: Factorization) -> Iterator[NewLayer]:
    matrices = _as_matrices(f)
    for i, matrix in enumerate(matrices):
        bias = f.bias if i == len(matrices) - 1 else None
        new = {"units": len(matrix), "use_bias": bias is not None, "activation": "linear"}
        yield NewLayer("Dense", new, _weights(matrix.T, bias))


def _einsum_layers(site: Site, f: Factorization) -> Iterator[NewLayer]:
    """Yield EinsumDense layers; between the stages, the channels are one axis."""
    e = Einsum.parse(site.config["equation"], len(site.shape))
    unused = [c for c in ascii_lowercase if c not in "".join(e)]
    named = [c for c in e.output if c not in e.elided]
    if not e.output.startswith(e.elided) or not e.elided:
        del named[0]  # the batch, which Keras adds
    known = dict(zip(named, site.config["output_shape"]))
    sizes = dict(zip(e.kernel, site.kernel))
    # Keras wants an ellipsis at the same end of all terms.
    at = len(e.lead) if e.lead.startswith(e.elided) else len(e.lead) - len(e.elided)
    matrices = _as_matrices(f)
    x, ins = e.input, e.ins
    for i, matrix in enumerate(matrices):
        is_last = i == len(matrices) - 1
        outs = e.outs if is_last else unused[i % 2]
        y = e.output if is_last else e.lead[:at] + outs + e.lead[at:]
        if not is_last:
            sizes[outs] = len(matrix)
        shape = [sizes[c] for c in outs]
        equation = f"{x},{ins}{outs}->{y}"
        new = {
            "equation": equation.replace(e.elided, "...") if e.elided else equation,
            "output_shape": [
                sizes[c] if c in outs else known.get(c)
                for c in (y if y.startswith(e.elided) and e.elided else y[1:])
                if c not in e.elided
            ],
            "bias_axes": None,
            "activation": "linear",
        }
        bias = f.bias if is_last else None
        if bias is not None:
            letters = y[min(map(y.index, outs)) :]
            order = "".join(c for c in letters if c in outs)
            bias = np.einsum(f"{outs}->{order}", bias.reshape(shape))
            bias = bias.reshape([sizes[c] if c in outs else 1 for c in letters])
            new["bias_axes"] = order
        kernel = matrix.T.reshape(*(sizes[c] for c in ins), *shape)
        yield NewLayer("EinsumDense", new, _weights(kernel, bias))
        x, ins = y, outs


def _conv_layers(config: Config, size: Ints, f: Factorization) -> Iterator[NewLayer]:
    """Yield layers for the stages, with layers for padding and cropping where necessary."""
    data_format = config["data_format"]
    i = 0
    while i < len(f.stages):
        stage = f.stages[i]
        out = stage.output_shape((stage.in_channels, *size))[1:]
        i += 1
        n, g = len(size), stage.geometry
        new: dict[str, Any] = {
            "kernel_size": list(stage.kernel),
            "strides": list(g.stride),
            "dilation_rate": list(g.dilation),
            "activation": "linear",
            "data_format": data_format,
        }
        if stage.transposed:
            bias = f.bias if i == len(f.stages) else None
            yield from _transposed_layers(stage, bias, new, size, out, config["padding"])
            size = out
            continue
        padding = _padding_name(config["padding"], stage, size)
        if padding is None:
            size = tuple(m + sum(p) for m, p in zip(size, g.padding))
            yield _pad_layer("ZeroPadding", "padding", g.padding, data_format)
            padding = "valid"
        depthwise = stage.groups == stage.in_channels > 1
        # TensorFlow's depthwise kernels need equal strides, and do not exist in 3-D.
        depthwise = depthwise and n < 3 and len(set(g.stride)) == 1 and padding != "causal"
        new["padding"] = padding
        kernels = [np.moveaxis(stage.weight, (0, 1), (-1, -2))]
        if depthwise:
            times = stage.out_channels // stage.groups
            taps = stage.weight.reshape(stage.groups, times, *stage.kernel)
            kernels = [np.moveaxis(taps, (0, 1), (-2, -1))]
            new["depth_multiplier"] = times
            kind = f"DepthwiseConv{n}D"
            if i < len(f.stages) and _is_pointwise(f.stages[i]):
                last = f.stages[i]
                i += 1
                kind = f"SeparableConv{n}D"
                new["filters"] = last.out_channels
                kernels.append(np.moveaxis(last.weight, (0, 1), (-1, -2)))
        else:
            new |= {"filters": stage.out_channels, "groups": stage.groups}
            kind = f"Conv{n}D"
        bias = f.bias if i == len(f.stages) else None
        new["use_bias"] = bias is not None
        yield NewLayer(kind, new, _weights(*kernels, bias))
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
    stage: Stage, bias: Array | None, config: dict[str, Any], size: Ints, out: Ints, first: str
) -> Iterator[NewLayer]:
    """Yield a transposed convolution, with a layer that crops where Keras would crop otherwise.

    `first` is the padding that is tried first.
    """
    n, g = len(size), stage.geometry
    extent = g.extent(stage.kernel)
    weights = _weights(np.moveaxis(stage.weight, (0, 1), (-1, -2)), bias)
    config |= {"filters": stage.out_channels, "use_bias": bias is not None, "output_padding": None}
    kind = f"Conv{n}DTranspose"
    for padding in (first, "same", "valid"):
        keras_crops = [transposed_padding(e, s, padding, None) for e, s in zip(extent, g.stride)]
        excess = [
            (m - 1) * s + e - a - w
            for m, s, e, ((a, _), _), w in zip(size, g.stride, extent, keras_crops, out)
        ]
        crops = [((a, max(x, 0)), max(-x, 0)) for ((a, _), _), x in zip(keras_crops, excess)]
        starts_agree = all(a == b for ((a, _), _), (b, _) in zip(keras_crops, g.padding))
        if keras_crops == crops and starts_agree:
            yield NewLayer(kind, config | {"padding": padding}, weights)
            return
    # Otherwise compute the whole output, with the samples to add at its end, and crop it.
    extra = [max(o - b, 0) for (_, b), o in zip(g.padding, g.output_padding)]
    whole = tuple((m - 1) * s + e + o for m, s, e, o in zip(size, g.stride, extent, extra))
    crop = tuple((a, w - a - m) for (a, _), w, m in zip(g.padding, whole, out))
    if any(o >= s for o, s in zip(extra, g.stride)):
        raise ValueError(f"Keras has no transposed convolution of stride {g.stride} and {g}")
    yield NewLayer(kind, config | {"padding": "valid", "output_padding": extra}, weights)
    if any(map(any, crop)):
        yield _pad_layer("Cropping", "cropping", crop, config["data_format"])


def _pad_layer(kind: str, key: str, pairs: Pads, data_format: str) -> NewLayer:
    """Return a layer that pads or crops."""
    config: dict[str, Any] = {key: [list(p) for p in pairs], "data_format": data_format}
    if len(pairs) == 1:
        if data_format == "channels_first" and kind == "Cropping":
            raise ValueError("Keras has no cropping along one axis for channels first")
        config[key] = config[key][0]
        if kind == "Cropping":
            del config["data_format"]
    return NewLayer(f"{kind}{len(pairs)}D", config, [])


def _is_pointwise(stage: Stage) -> bool:
    g = stage.geometry
    plain = g == Geometry.of(g.ndim, dilation=g.dilation)
    return plain and max(stage.kernel) == 1 and stage.groups == 1 and not stage.transposed


def _weights(*arrays: Array | None) -> list[Array]:
    return [np.ascontiguousarray(a) for a in arrays if a is not None]
