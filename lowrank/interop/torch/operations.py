"""PyTorch's operations as primitives of a network; see :mod:`lowrank.engine.network`."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from lowrank._kernels.spec import Three
from lowrank._typing import Array, Ints
from lowrank.core.stage import Epilogue
from lowrank.engine.network import Primitive, on_three, value_shape
from lowrank.engine.program import Unsupported
from lowrank.factorization import dense
from lowrank.interop.torch.modules import to_numpy

# Stands for the batch size: only what follows the batch equals this prime number.
BATCH = 2147483647


class ArrangedError(Unsupported):
    """Elements of a tensor are not in the order of its value; `node` has arranged them."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__("transposed or reshaped elements")
        self.node = tensor.node


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a network, without the batch axis.

    Attributes
    ----------
    name : str
        Name of its value.
    shape : tuple of int
        Shape in PyTorch.
    value : tuple of int
        Shape of the value, (channels, d, h, w).
    layout : ndarray of int or None
        Number of each element in the value; None if the order is the same.
    node : fx.Node or None
        Node that has given a tensor its layout.
    """

    name: str
    shape: Ints
    value: Ints
    layout: Array | None = None
    node: fx.Node | None = None

    @property
    def ndim(self) -> int:
        """Number of axes, that of the batch included."""
        return 1 + len(self.shape)

    @property
    def is_map(self) -> bool:
        """Whether the shape is that of the value: (channels, *spatial)."""
        self.check_order()
        return len(self.shape) <= 4 and value_shape(self.shape) == self.value

    def check_order(self) -> None:
        """Raise ArrangedError unless the elements are in the order of the value."""
        if self.layout is not None:
            raise ArrangedError(self)

    def sizes(self, ndim: int | None = None) -> Three:
        """Return the spatial size of a tensor (channels, *spatial) of `ndim` spatial axes."""
        if not self.is_map or (ndim is not None and len(self.shape) != 1 + ndim):
            raise Unsupported(f"a tensor of shape (batch, {', '.join(map(str, self.shape))})")
        _, d, h, w = self.value
        return d, h, w


class Recorder:
    """Primitives so far, and the node that is read now."""

    def __init__(self) -> None:
        self.primitives: list[Primitive] = []
        self.node: fx.Node

    def add(
        self,
        kind: str,
        inputs: Sequence[Tensor],
        shape: Ints,
        value: Ints | None = None,
        **fields: Any,
    ) -> Tensor:
        """Add a primitive of the current node; return its output.

        Parameters
        ----------
        kind : str
            Kind of primitive.
        inputs : sequence of Tensor
            Tensors that it reads.
        shape : tuple of int
            Shape of the output.
        value : tuple of int, optional
            Shape of its value; not given for an output (channels, *spatial).
        **fields
            Other fields of the primitive.

        Returns
        -------
        Tensor
        """
        name, n = self.node.name, sum(self.node in p.sources for p in self.primitives)
        for t in inputs:
            if kind != "view":
                t.check_order()
        output = f"{name}.{n}" if n else name
        names = tuple(t.name for t in inputs)
        self.primitives.append(Primitive(kind, names, output, shape, (self.node,), **fields))
        return Tensor(output, shape, value or value_shape(shape))

    def resized(self, kind: str, input: Tensor, size: Three, options: dict[str, Any]) -> Tensor:
        """Add a primitive that changes the spatial size."""
        shape = (input.shape[0], *size[3 - len(input.shape[1:]) :])
        return self.add(kind, (input,), shape, options=options)


def _per_axis(values: Any, ndim: int, neutral: int) -> Three:
    """Return PyTorch's setting of `ndim` axes for three axes."""
    given = (values,) if isinstance(values, int) else tuple(values)
    return on_three(given * ndim if len(given) == 1 else given, neutral)


def _axis(axis: int, ndim: int) -> int:
    return axis + ndim if axis < 0 else axis


def elementwise(kind: str, net: Recorder, a: Any, b: Any, *, alpha: float = 1.0) -> Tensor:
    """Return the sum or product of tensors of one shape, or of one with a value per channel."""
    if alpha != 1 or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        raise Unsupported(f"{kind} of a constant or with a factor")
    if math.prod(a.shape) < math.prod(b.shape):
        a, b = b, a
    is_per_channel = a.ndim == b.ndim and b.shape == (a.shape[0], *(1,) * (a.ndim - 2))
    if a.shape != b.shape and not is_per_channel:
        raise Unsupported(f"{kind} of shapes {a.shape} and {b.shape}")
    return net.add(kind, (a, b), a.shape, a.value)


def power(net: Recorder, input: Any, exponent: Any = 2) -> Tensor:
    """Return the square of a tensor."""
    if not isinstance(input, Tensor) or isinstance(exponent, Tensor) or exponent != 2:
        raise Unsupported(f"a power other than the square, of exponent {exponent}")
    return elementwise("multiply", net, input, input)


def max_pool(
    ndim: int, net: Recorder, input: Tensor, kernel_size: Any, stride: Any = None,
    padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False,
) -> Tensor:  # fmt: skip
    """Return maxima over windows."""
    if return_indices:
        raise Unsupported("max pooling that returns indices")
    return _pool("max pool", ndim, net, input, kernel_size, stride, padding, dilation, ceil_mode)


def mean_pool(
    ndim: int, net: Recorder, input: Tensor, kernel_size: Any, stride: Any = None,
    padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    """Return means over windows."""
    if divisor_override is not None:
        raise Unsupported("mean pooling with another divisor")
    return _pool(
        "mean pool", ndim, net, input, kernel_size, stride, padding, 1, ceil_mode,
        count_include_pad,
    )  # fmt: skip


def _pool(
    kind: str, ndim: int, net: Recorder, x: Tensor, taps: Any, stride: Any, padding: Any,
    dilation: Any, ceil_mode: bool, count_padding: bool = False,
) -> Tensor:  # fmt: skip
    windows, before = _per_axis(taps, ndim, 1), _per_axis(padding, ndim, 0)
    steps = _per_axis(taps if stride is None or stride == () else stride, ndim, 1)
    apart = _per_axis(dilation, ndim, 1)
    size = []
    for n, k, s, p, d in zip(x.sizes(ndim), windows, steps, before, apart):
        room = n + 2 * p - d * (k - 1) - 1
        count = -(-room // s) if ceil_mode else room // s
        # PyTorch has no window that starts in the padding behind.
        size.append(count + 1 - (ceil_mode and count * s >= n + p))
    if min(size) < 1:
        raise Unsupported(f"windows of {windows} on {x.shape}")
    out = on_three(size, 1)
    options = {
        "kind": kind, "size": out, "taps": windows, "stride": steps, "before": before,
        "dilation": apart, "count_padding": count_padding,
    }  # fmt: skip
    return net.resized("pool", x, out, options)


def adaptive_pool(
    kind: str, ndim: int, net: Recorder, input: Tensor, output_size: Any,
    return_indices: bool = False,
) -> Tensor:  # fmt: skip
    """Return maxima or means over as many windows as asked for, if they divide the input."""
    wanted = (output_size,) * ndim if isinstance(output_size, int | None) else tuple(output_size)
    before = input.sizes(ndim)
    size = on_three((n if w is None else w for n, w in zip(before[3 - ndim :], wanted)), 1)
    if return_indices or any(n % w for n, w in zip(before, size)):
        raise Unsupported(f"adaptive pooling of {input.shape} to {wanted}")
    taps = on_three((n // w for n, w in zip(before, size)), 1)
    options = {"kind": kind, "size": size, "taps": taps, "stride": taps, "before": (0, 0, 0)}
    return net.resized("pool", input, size, options)


def mean(
    net: Recorder, input: Tensor, dim: Any = None, keepdim: bool = False, **other: Any
) -> Tensor:
    """Return the means over all spatial axes."""
    dims = () if dim is None else (dim,) if isinstance(dim, int) else dim
    ndim, axes = input.ndim - 2, sorted(_axis(d, input.ndim) for d in dims)
    if other or not axes or axes != list(range(2, input.ndim)):
        raise Unsupported(f"a mean over axes {dim}")
    pooled = adaptive_pool("mean pool", ndim, net, input, 1)
    return pooled if keepdim else reshape(net, pooled, BATCH, input.shape[0])


def instance_norm(
    ndim: int | None, net: Recorder, input: Tensor, running_mean: Any = None,
    running_var: Any = None, weight: Any = None, bias: Any = None, use_input_stats: bool = True,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Return each channel of each example with zero mean and unit variance, times weight + bias."""
    input.sizes(ndim)
    if not use_input_stats or running_mean is not None or running_var is not None:
        raise Unsupported("instance normalization by other statistics")
    return _normalize(net, input, weight, bias, eps)


def group_norm(
    net: Recorder, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Return the normalization of groups of one channel each."""
    if num_groups != input.shape[0]:
        raise Unsupported(f"normalization of {input.shape[0]} channels in {num_groups} groups")
    return _normalize(net, input, weight, bias, eps)


def softmax(
    net: Recorder, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Tensor:
    """Return the softmax over channels."""
    if dim is None or dtype is not None or _axis(dim, input.ndim) != 1 or not input.is_map:
        raise Unsupported(f"a softmax over axis {dim}")
    return net.add("softmax", (input,), input.shape)


def _normalize(net: Recorder, x: Tensor, weight: Any, bias: Any, epsilon: float) -> Tensor:
    if math.prod(x.sizes()) == 1:  # which PyTorch may reject
        raise Unsupported("normalization of single samples")
    scale = np.ones(x.shape[0]) if weight is None else to_numpy(weight)
    shift = np.zeros(x.shape[0]) if bias is None else to_numpy(bias)
    options = {"epsilon": epsilon}
    return net.add("normalize", (x,), x.shape, scale=scale, shift=shift, options=options)


def pad(
    net: Recorder, input: Tensor, pad: Any, mode: str = "constant", value: Any = None
) -> Tensor:
    """Return the padded tensor; negative padding crops."""
    ends = [int(p) for p in pad]
    pairs = list(zip(ends[::2], ends[1::2]))[::-1]
    sizes = input.shape[1:]
    if len(pairs) == len(input.shape) and mode == "constant" and not value:
        input = _pad_channels(net, input, *pairs.pop(0))
    pairs = [(0, 0)] * (len(sizes) - len(pairs)) + pairs
    if len(pairs) > len(sizes) or (mode != "constant" and min(ends) < 0):
        raise Unsupported(f"padding {ends} of mode {mode}")
    if min(ends) < 0:
        kept = [range(max(-b, 0), n - max(-a, 0)) for n, (b, a) in zip(sizes, pairs)]
        input = _resample(net, input, kept)
    before, after = (on_three((max(p[i], 0) for p in pairs), 0) for i in range(2))
    if not any((*before, *after)):
        return input
    size = on_three((b + n + a for b, n, a in zip(before, input.sizes(), after)), 1)
    options = {"before": before, "after": after, "mode": mode, "value": value or 0.0}
    return net.resized("pad", input, size, options)


def _pad_channels(net: Recorder, input: Tensor, before: int, after: int) -> Tensor:
    channels, *size = input.shape
    weight = np.eye(channels)[max(-before, 0) : channels - max(-after, 0)]
    weight = np.pad(weight, ((max(before, 0), max(after, 0)), (0, 0)))
    (stage,) = dense(weight.reshape(*weight.shape, *(1,) * len(size))).stages
    return net.add("convolve", (input,), (len(weight), *size), links=((stage, Epilogue()),))


def pad_module(mode: str, net: Recorder, input: Tensor, padding: Any, value: float = 0.0) -> Tensor:
    """Return what a padding module computes."""
    return pad(net, input, padding, mode, value)


def _resample(net: Recorder, input: Tensor, chosen: Sequence[Any]) -> Tensor:
    """Return samples: their numbers along each spatial axis."""
    tables = [
        None if len(r) == n and list(r) == list(range(n)) else np.array(r, np.int32)
        for r, n in zip(chosen, input.sizes()[3 - len(chosen) :])
    ]
    if any(t is not None and not len(t) for t in tables):
        raise Unsupported("a selection of no samples")
    if all(t is None for t in tables):
        return input
    index = (*(None,) * (3 - len(tables)), *tables)
    return net.resized("resample", input, on_three(map(len, chosen), 1), {"index": index})


def upsample(
    net: Recorder, input: Tensor, size: Any = None, scale_factor: Any = None,
    mode: str = "nearest", align_corners: Any = None, **other: Any,
) -> Tensor:  # fmt: skip
    """Return nearest neighbours at an integer factor."""
    ndim = input.ndim - 2
    if mode not in ("nearest", "nearest-exact") or any(other.values()) or ndim < 1:
        raise Unsupported(f"interpolation of mode {mode}")
    sizes = input.sizes()[3 - ndim :]
    given = scale_factor if size is None else size
    given = tuple(given) if isinstance(given, tuple | list) else (given,) * ndim
    factors = [w / (n if size is not None else 1) for n, w in zip(sizes, given)]
    if any(f != int(f) for f in factors):
        raise Unsupported(f"interpolation of {sizes} by {factors}")
    return _resample(net, input, [np.repeat(range(n), int(f)) for n, f in zip(sizes, factors)])


def pixel_shuffle(net: Recorder, input: Tensor, upscale_factor: int) -> Tensor:
    """Return channels moved to space."""
    r, (_, h, w) = upscale_factor, input.sizes(2)
    channels, rest = divmod(input.shape[0], r**2)
    if rest:
        raise Unsupported(f"a pixel shuffle of {input.shape[0]} channels by {r}")
    block = np.arange(input.shape[0]).reshape(channels, 1, r, r).transpose(1, 2, 3, 0)
    shape = (channels, h * r, w * r)
    return net.add("spread", (input,), shape, options={"channels": block})


def channel_shuffle(net: Recorder, input: Tensor, groups: int) -> Tensor:
    """Return the channels (groups, n) in the order (n, groups)."""
    return _select(net, input, np.arange(input.shape[0]).reshape(groups, -1).T.reshape(-1))


def _select(net: Recorder, input: Tensor, channels: Any) -> Tensor:
    input.sizes()
    shape = (len(channels), *input.shape[1:])
    return net.add("select", (input,), shape, options={"channels": [int(c) for c in channels]})


def concatenate(net: Recorder, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return the channels of all tensors."""
    first = tensors[0]
    same = all(t.is_map and t.shape[1:] == first.shape[1:] for t in tensors)
    if _axis(dim, first.ndim) != 1 or not same:
        raise Unsupported(f"a concatenation along axis {dim}")
    shape = (sum(t.shape[0] for t in tensors), *first.shape[1:])
    return net.add("concatenate", tensors, shape) if len(tensors) > 1 else first


def split(net: Recorder, input: Tensor, split_size_or_sections: Any, dim: int = 0) -> list[Tensor]:
    """Return slices of the channels."""
    given, channels = split_size_or_sections, input.shape[0]
    if _axis(dim, input.ndim) != 1:
        raise Unsupported(f"a split along axis {dim}")
    if isinstance(given, int):
        given = [min(given, channels - i) for i in range(0, channels, given)]
    if sum(given) != channels or min(given) < 1:
        raise Unsupported(f"a split of {channels} channels into {given}")
    ends = np.cumsum(given).tolist()
    return [_select(net, input, range(e - n, e)) for n, e in zip(given, ends)]


def chunk(net: Recorder, input: Tensor, chunks: int, dim: int = 0) -> list[Tensor]:
    """Return slices of the channels of nearly equal length."""
    return split(net, input, -(-input.shape[0] // chunks), dim)


def get_item(net: Recorder, x: Any, index: Any) -> Any:
    """Return an entry of several tensors, or channels and samples of one."""
    if not isinstance(x, Tensor):
        return x[index]
    index = index if isinstance(index, tuple) else (index,)
    if index.count(Ellipsis) == 1:
        i = index.index(Ellipsis)
        index = (*index[:i], *[slice(None)] * (x.ndim + 1 - len(index)), *index[i + 1 :])
    index = (*index, *[slice(None)] * (x.ndim - len(index)))
    slices = [i for i in index if isinstance(i, slice)]
    if len(index) != x.ndim or len(slices) != x.ndim or slices[0] != slice(None):
        raise Unsupported(f"index {index}")
    channels, *samples = (range(n)[i] for n, i in zip(x.shape, slices[1:]))
    if not channels:
        raise Unsupported(f"index {index}, which selects nothing")
    if len(channels) < x.shape[0]:
        x = _select(net, x, channels)
    return _resample(net, x, samples)


def reshape(net: Recorder, input: Tensor, *shape: Any) -> Tensor:
    """Return a tensor of another shape."""
    new = [int(n) for n in (shape[0] if isinstance(shape[0], tuple | list) else shape)]
    elements = BATCH * math.prod(input.shape)
    if -1 in new:
        rest = -math.prod(new)
        new[new.index(-1)] = elements // rest if rest and elements % rest == 0 else 0
    if len(new) < 2 or new[0] != BATCH or math.prod(new) != elements:
        raise Unsupported(f"a view of (batch, {', '.join(map(str, input.shape))}) as {shape}")
    return _arranged(net, input, _layout(input).reshape(new[1:]))


def _layout(x: Tensor) -> Array:
    return np.arange(math.prod(x.shape)).reshape(x.shape) if x.layout is None else x.layout


def _arranged(net: Recorder, x: Tensor, layout: Array) -> Tensor:
    """Return the elements of a tensor's value in another arrangement."""
    shape, channels = layout.shape, x.value[0]
    is_map = len(shape) <= 4 and value_shape(shape) == x.value
    is_in_order = np.array_equal(layout.reshape(-1), np.arange(layout.size))
    if is_in_order and (is_map or len(shape) == 1):
        return net.add("view", (x,), shape, x.value)
    planes = layout.reshape(channels, -1)
    order, rest = np.divmod(planes, planes.shape[1])
    if is_map and (order == order[:, :1]).all() and (rest == np.arange(planes.shape[1])).all():
        return _select(net, net.add("view", (x,), shape, x.value), order[:, 0])
    return Tensor(x.name, shape, x.value, layout, net.node)


def flatten(net: Recorder, input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """Return a tensor with several axes as one."""
    start, end = _axis(start_dim, input.ndim), _axis(end_dim, input.ndim)
    shape = (BATCH, *input.shape)
    return reshape(net, input, *shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])


def squeeze(net: Recorder, input: Tensor, dim: Any = None) -> Tensor:
    """Return a tensor without axes of length 1."""
    shape = (BATCH, *input.shape)
    if dim is None:
        raise Unsupported("squeeze of all axes, which depends on the batch")
    gone = [_axis(d, input.ndim) for d in ((dim,) if isinstance(dim, int) else dim)]
    return reshape(net, input, *(n for i, n in enumerate(shape) if i not in gone or n != 1))


def unsqueeze(net: Recorder, input: Tensor, dim: int) -> Tensor:
    """Return a tensor with another axis of length 1."""
    shape = [BATCH, *input.shape]
    shape.insert(_axis(dim, input.ndim + 1), 1)
    return reshape(net, input, *shape)


def transpose(net: Recorder, input: Tensor, dim0: int, dim1: int) -> Tensor:
    """Return a tensor with two axes exchanged."""
    order = list(range(input.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(net, input, order)


def permute(net: Recorder, input: Tensor, *dims: Any) -> Tensor:
    """Return a tensor with its axes in another order."""
    first, *order = (
        _axis(d, input.ndim) for d in (dims[0] if isinstance(dims[0], tuple | list) else dims)
    )
    if first:
        raise Unsupported("a batch on another axis")
    return _arranged(net, input, _layout(input).transpose([axis - 1 for axis in order]))


def expand_as(net: Recorder, input: Tensor, other: Tensor) -> Tensor:
    """Return a tensor with a value per channel, which products with it repeat."""
    (user, *more) = net.node.users
    if more or user.target not in (operator.mul, torch.mul, "mul", "mul_"):
        raise Unsupported("an expanded tensor")
    return input


def identity(net: Recorder, input: Tensor, *unused: Any, **settings: Any) -> Tensor:
    """Return the tensor: what PyTorch computes in evaluation mode."""
    return input


def dropout(
    net: Recorder, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Return the tensor in evaluation mode."""
    if training:
        raise Unsupported("dropout in training mode")
    return input
