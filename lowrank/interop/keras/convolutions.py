"""Keras layers as convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lowrank._typing import Array, Ints, Pads
from lowrank.factorization import Factorization, chain, dense

_AXES = {
    **{f"{kind}Conv{n}D": n for kind in ("", "Depthwise", "Separable") for n in (1, 2, 3)},
    **{f"Conv{n}DTranspose": n for n in (1, 2, 3)},
    **dict.fromkeys(("Dense", "EinsumDense"), 1),
}
#: Layers that multiply vectors of an input of any number of axes.
_LINEAR = ("Dense", "EinsumDense")
#: Letters of the axes of an einsum, without the two that chains use for their ranks.
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Config = Mapping[str, Any]
_LARGE = 4096  # samples, more than a kernel has


class Einsum(NamedTuple):
    """Equation of an EinsumDense layer, by the letters of its axes.

    Attributes
    ----------
    input, kernel, output : str
        Axes of the arrays, without ellipses.
    elided : str
        Axes for which the layer has an ellipsis.
    """

    input: str
    kernel: str
    output: str
    elided: str

    @property
    def lead(self) -> str:
        """Axes of the input that the output keeps: the batch and the vectors."""
        return "".join(c for c in self.input if c not in self.kernel)

    @property
    def ins(self) -> str:
        """Axes that are summed over."""
        return "".join(c for c in self.kernel if c in self.input)

    @property
    def outs(self) -> str:
        """Axes that the kernel adds."""
        return "".join(c for c in self.kernel if c in self.output)

    @classmethod
    def parse(cls, equation: str, ndim: int) -> Einsum:
        """Return the equation for an input of `ndim` axes.

        Parameters
        ----------
        equation : str
            Such as ``"...x,xy->...y"``.
        ndim : int
            Number of axes of the input, with the batch.

        Returns
        -------
        Einsum

        Raises
        ------
        ValueError
            If it is not the product of a matrix and the vectors of one example.
        """
        terms = _terms(equation)
        unused = [c for c in _LETTERS if c not in equation]
        more = ndim - len(terms[0].replace("...", ""))
        if len(terms) == 3 and 0 <= more <= len(unused):
            elided = "".join(unused[:more])
            inputs, kernel, output = (t.replace("...", elided) for t in terms)
            e = cls(inputs, kernel, output, elided)
            rest = set(e.output) - set(e.outs)
            if (
                len(e.input) == ndim
                and e.input[:1] == e.output[:1] == e.lead[:1]
                and rest == set(e.lead)
                and set(e.ins).isdisjoint(e.output)
                and set(e.kernel) == set(e.ins + e.outs)
            ):
                return e
        raise ValueError(f"its equation {equation!r} is not a product of a matrix and vectors")


def _terms(equation: str) -> list[str]:
    return equation.replace(" ", "").replace("->", ",").split(",")


def is_convolution(kind: str) -> bool:
    """Return whether layers of a class are convolutions or products with a matrix."""
    return kind in _AXES


def is_linear(kind: str) -> bool:
    """Return whether layers of a class are products with a matrix."""
    return kind in _LINEAR


def spatial_axes(config: Config, ndim: int) -> tuple[slice, int]:
    """Return the slice of the spatial axes of an array and the index of its channel axis."""
    if config.get("data_format") == "channels_first":
        return slice(2, ndim), 1
    return slice(1, ndim - 1), ndim - 1


def as_convolution(
    kind: str, config: Config, weights: Sequence[Array], shape: Ints
) -> tuple[Factorization, Ints]:
    """Return a layer as a chain of one stage, and its input size.

    Parameters
    ----------
    kind : str
        Class of the layer.
    config : mapping
        Its configuration.
    weights : sequence of ndarray
        Its weights, in Keras's order.
    shape : tuple of int
        Shape of its input, with the batch.

    Returns
    -------
    conv : Factorization
        One stage; two of a separable layer.
    size : tuple of int
        Spatial size of the input; the number of vectors for a product with a matrix.

    Raises
    ------
    ValueError
        If the layer cannot be replaced; the message is the reason.
    """
    arrays = [np.asarray(w) for w in weights]
    has_bias = config.get("bias_axes" if kind == "EinsumDense" else "use_bias")
    if len(arrays) != 1 + kind.startswith("Separable") + bool(has_bias):
        raise ValueError("its weights are not those of a layer of its class")
    arrays = [a.astype(np.float32) if a.dtype.name == "bfloat16" else a for a in arrays]
    if any(a.dtype.kind != "f" for a in arrays):
        raise ValueError(f"its weights are of type {arrays[0].dtype}")
    bias = arrays.pop() if has_bias else None
    if kind == "EinsumDense":
        return _einsum(config, arrays[0], bias, shape)
    if kind == "Dense":
        return dense(arrays[0].T[..., None], bias), (math.prod(shape[1:-1]),)
    size = shape[spatial_axes(config, len(shape))[0]]
    f = _convolution(kind, config, arrays, bias, size)
    f.output_shape(size)  # raises if the kernel does not fit
    return f, size


def large_shape(kind: str, config: Config, kernel: Array) -> Ints:
    """Return a shape that an input of a layer may have, with more samples than the kernel.

    Parameters
    ----------
    kind : str
        Class of the layer, but not EinsumDense.
    config : mapping
        Its configuration.
    kernel : ndarray
        Its first weight.

    Returns
    -------
    tuple of int
    """
    if kind == "Dense":
        return (1, len(kernel))
    size = (_LARGE,) * (kernel.ndim - 2)
    return (1, 1, *size) if config.get("data_format") == "channels_first" else (1, *size, 1)


def as_samples(kind: str, config: Config, x: Array) -> Array:
    """Return the input of a layer as (batch, channels, \\*spatial), float32.

    Parameters
    ----------
    kind : str
        Class of the layer.
    config : mapping
        Its configuration.
    x : ndarray
        Array in the layer's order of axes.

    Returns
    -------
    ndarray
    """
    x = np.asarray(x, np.float32)
    if kind == "EinsumDense":
        e = Einsum.parse(config["equation"], x.ndim)
        return _vectors(np.einsum(f"{e.input}->{e.lead}{e.ins}", x), len(e.ins))
    if kind == "Dense":
        return _vectors(x, 1)
    return np.moveaxis(x, spatial_axes(config, x.ndim)[1], 1)


def as_output_samples(kind: str, config: Config, y: Array) -> Array:
    """Return the output of a layer as (batch, channels, \\*spatial), float32.

    Parameters
    ----------
    kind, config, y
        As in :func:`as_samples`.

    Returns
    -------
    ndarray
    """
    if kind != "EinsumDense":
        return as_samples(kind, config, y)
    inputs, _, output = _terms(config["equation"])
    elided = y.ndim - len(output.replace("...", ""))
    e = Einsum.parse(config["equation"], len(inputs.replace("...", "")) + elided)
    ordered = np.einsum(f"{e.output}->{e.lead}{e.outs}", np.asarray(y, np.float32))
    return _vectors(ordered, len(e.outs))


def _vectors(x: Array, count: int) -> Array:
    """Return an array of vectors along its last `count` axes as (batch, channels, vectors)."""
    channels = math.prod(x.shape[x.ndim - count :])
    return x.reshape(len(x), -1, channels).swapaxes(1, 2)


def _einsum(
    config: Config, kernel: Array, bias: Array | None, shape: Ints
) -> tuple[Factorization, Ints]:
    e = Einsum.parse(config["equation"], len(shape))
    sizes = dict(zip(e.kernel, kernel.shape))
    outs = tuple(sizes[c] for c in e.outs)
    if bias is not None:
        letters = e.output[len(e.output) - bias.ndim :]
        if any(n > 1 and c not in e.outs for c, n in zip(letters, bias.shape)):
            raise ValueError(f"its bias has axes {config['bias_axes']!r} that are not channels")
        own = {c: n for c, n in zip(letters, bias.shape) if c in e.outs}
        ordered = np.einsum(
            f"{''.join(own)}->{''.join(c for c in e.outs if c in own)}",
            bias.reshape([*own.values()]),
        )
        one_each = ordered.reshape([own.get(c, 1) for c in e.outs])
        bias = np.broadcast_to(one_each, outs).reshape(-1)
    matrix = np.einsum(f"{e.kernel}->{e.outs}{e.ins}", kernel).reshape(math.prod(outs), -1, 1)
    vectors = [n for c, n in zip(e.input, shape) if c in e.lead[1:]]
    return dense(matrix, bias), (math.prod(vectors),)


def _convolution(
    kind: str, config: Config, arrays: list[Array], bias: Array | None, size: Ints
) -> Factorization:
    kernel, n = arrays[0], len(size)
    stride, dilation = (tuple(config.get(key) or (1,) * n) for key in ("strides", "dilation_rate"))
    extent = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel.shape[:n]))
    padding = config["padding"]
    if kind.endswith("Transpose"):
        extras = config.get("output_padding")
        extras = (None,) * n if extras is None else np.broadcast_to(extras, n).tolist()
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
    pads: Pads = ((0, 0),) * n
    if padding == "causal":
        pads = tuple((e - 1, 0) for e in extent)
    elif padding == "same":
        pads = tuple(same_padding(m, e, s) for m, e, s in zip(size, extent, stride))
    convolution: Callable[..., Factorization] = partial(
        dense, bias=bias, stride=stride, padding=pads, dilation=dilation
    )
    if kind.startswith("Conv"):
        return convolution(np.moveaxis(kernel, (-1, -2), (0, 1)), groups=config["groups"])
    channels, times = kernel.shape[-2:]
    weight = np.moveaxis(kernel, (-2, -1), (0, 1)).reshape(channels * times, 1, *kernel.shape[:n])
    if kind.startswith("Depthwise"):
        return convolution(weight, groups=channels)
    first = convolution(weight, groups=channels, bias=None)
    pointwise = dense(np.moveaxis(arrays[1], (-1, -2), (0, 1)), bias)
    return chain([*first.stages, *pointwise.stages], pointwise.bias)


def same_padding(size: int, extent: int, stride: int) -> tuple[int, int]:
    """Return TensorFlow's SAME padding: ceil(size / stride) outputs, the odd sample at the end."""
    total = max((-(-size // stride) - 1) * stride + extent - size, 0)
    return total // 2, total - total // 2


def transposed_padding(
    extent: int, stride: int, padding: str, extra: int | None
) -> tuple[tuple[int, int], int]:
    """Return what a transposed convolution crops, (before, after), and what it adds at the end."""
    if padding == "valid":
        return (0, 0), max(stride - extent, 0) if extra is None else extra
    spare = extent - stride if extra is None else extent - extent % 2 - extra
    before = max(spare, 0) // 2
    return (before, max(spare - before, 0)), max(-spare, 0)
