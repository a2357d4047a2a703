"""PyTorch's operations as operations of a program."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional

from lowrank._kernels.spec import Three
from lowrank._typing import Ints
from lowrank.core.stage import Activation, Epilogue
from lowrank.engine.padding import padded_indices
from lowrank.engine.program import Link, ProgramBuilder, Unsupported, Value
from lowrank.factorization import Factorization, dense
from lowrank.interop.torch.modules import PADDING_MODES

# Stands for the batch size while a program is built: only what follows the batch equals it.
BATCH = 2147483647


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a program: the elements of `value`, in its order, in a shape without batch."""

    value: Value
    shape: Ints

    @property
    def ndim(self) -> int:
        """Number of axes, that of the batch included."""
        return 1 + len(self.shape)

    def as_map(self, ndim: int | None = None) -> Value:
        """Return the value if the shape is (channels, *spatial), of `ndim` spatial axes."""
        if not self.is_map or (ndim is not None and len(self.shape) != 1 + ndim):
            raise Unsupported(f"a tensor of shape (batch, {self.shape}) is no map of channels")
        return self.value

    @property
    def is_map(self) -> bool:
        """Whether axis 0 of the shape holds the channels of the value, and the others its size."""
        channels, *size = self.shape
        return self.value.shape == (channels, *(1,) * (3 - len(size)), *size)

    def with_value(self, value: Value) -> Tensor:
        """Return a tensor of the same number of axes: (channels, *spatial)."""
        return Tensor(value, (value.shape[0], *value.shape[6 - self.ndim :]))


def _three(values: int | Sequence[int], ndim: int, neutral: int) -> Three:
    """Return PyTorch's setting of `ndim` axes as one of three axes."""
    given = (values,) * ndim if isinstance(values, int) else tuple(values)
    if len(given) == 1:
        given *= ndim
    a, b, c = (*(neutral,) * (3 - ndim), *given)
    return a, b, c


def _axis(axis: int, ndim: int) -> int:
    return axis + ndim if axis < 0 else axis


def elementwise(
    mode: Any, builder: ProgramBuilder, a: Any, b: Any, *, alpha: float = 1.0
) -> Tensor:
    """Return the sum or product of tensors of one shape, or of one with a value per channel."""
    if alpha != 1 or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        raise Unsupported(f"{mode} of a constant or with a factor")
    if math.prod(a.shape) < math.prod(b.shape):
        a, b = b, a
    per_channel = b.is_map and b.value.size == (1, 1, 1) and a.ndim == b.ndim
    if a.shape != b.shape and not (per_channel and a.shape[0] == b.shape[0]):
        raise Unsupported(f"{mode} of shapes {a.shape} and {b.shape}")
    if a.shape == b.shape and a.value.shape != b.value.shape:
        raise Unsupported(f"{mode} of flattened tensors of different sizes")
    x, y = align(builder, a.value, b.value)
    return Tensor(builder.combine(x, y, mode), a.shape)


def align(builder: ProgramBuilder, *values: Value) -> list[Value]:
    """Return values whose channels have the same places in memory."""
    first = values[0].position
    if all(np.array_equal(v.position, first) for v in values):
        return list(values)
    return [in_order(builder, v) for v in values]


def in_order(builder: ProgramBuilder, value: Value) -> Value:
    """Return a value with its channels in order, through an identity convolution if need be."""
    if has_order(value):
        return value
    identity = np.eye(value.shape[0], dtype=builder.dtype)[:, :, None]
    return builder.chain(value, as_links(dense(identity)), name="reorder")


def has_order(value: Value) -> bool:
    """Return whether the channels of a value follow each other in memory."""
    return bool(np.array_equal(value.position, np.arange(value.shape[0])))


def as_links(f: Factorization, activation: str = "none") -> list[Link]:
    """Return the stages of a chain with their epilogues."""
    return [
        *((s, Epilogue()) for s in f.stages[:-1]),
        (f.stages[-1], Epilogue(f.bias, cast(Activation, activation))),
    ]


def max_pool(
    ndim: int, builder: ProgramBuilder, input: Tensor, kernel_size: Any, stride: Any = None,
    padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False,
) -> Tensor:  # fmt: skip
    """Return maxima over windows."""
    if return_indices:
        raise Unsupported("max pooling that returns indices")
    return _pool(
        "max pool", ndim, builder, input, kernel_size, stride, padding, dilation, ceil_mode
    )


def mean_pool(
    ndim: int, builder: ProgramBuilder, input: Tensor, kernel_size: Any, stride: Any = None,
    padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    """Return means over windows."""
    if divisor_override is not None:
        raise Unsupported("mean pooling with another divisor")
    return _pool(
        "mean pool", ndim, builder, input, kernel_size, stride, padding, 1, ceil_mode,
        count_include_pad,
    )  # fmt: skip


def _pool(
    kind: Any, ndim: int, builder: ProgramBuilder, x: Tensor, taps: Any, stride: Any, padding: Any,
    dilation: Any, ceil_mode: bool, count_padding: bool = False,
) -> Tensor:  # fmt: skip
    value = x.as_map(ndim)
    windows, before = _three(taps, ndim, 1), _three(padding, ndim, 0)
    steps = _three(taps if stride is None or stride == () else stride, ndim, 1)
    apart = _three(dilation, ndim, 1)
    size = []
    for n, k, s, p, d in zip(value.size, windows, steps, before, apart):
        room = n + 2 * p - d * (k - 1) - 1
        count = -(-room // s) if ceil_mode else room // s
        # PyTorch has no window that starts in the padding behind.
        size.append(count + 1 - (ceil_mode and count * s >= n + p))
    if min(size) < 1:
        raise Unsupported(f"a window of {windows} on {value.size}")
    a, b, c = size
    return x.with_value(
        builder.pool(
            value, kind, (a, b, c), windows, steps, before, apart, count_padding, name=kind
        )
    )


def adaptive_pool(
    kind: Any, ndim: int, builder: ProgramBuilder, input: Tensor, output_size: Any,
    return_indices: bool = False,
) -> Tensor:  # fmt: skip
    """Return maxima or means over as many windows as asked for, if they divide the input."""
    value = input.as_map(ndim)
    wanted = (output_size,) * ndim if isinstance(output_size, int | None) else tuple(output_size)
    sizes = value.size[3 - ndim :]
    size = _three([n if w is None else w for n, w in zip(sizes, wanted)], ndim, 1)
    if return_indices or any(n % w for n, w in zip(value.size, size)):
        raise Unsupported(f"adaptive pooling of {sizes} to {wanted}")
    taps = tuple(n // w for n, w in zip(value.size, size))
    pooled = builder.pool(value, kind, size, taps, taps, (0, 0, 0), name=kind)  # type: ignore[arg-type]
    return input.with_value(pooled)


def mean(
    builder: ProgramBuilder, input: Tensor, dim: Any = None, keepdim: bool = False, **other: Any
) -> Tensor:
    """Return the means over all spatial axes."""
    dims = () if dim is None else (dim,) if isinstance(dim, int) else dim
    ndim, axes = input.ndim - 2, sorted(_axis(d, input.ndim) for d in dims)
    if other or not axes or axes != list(range(2, input.ndim)):
        raise Unsupported(f"a mean over axes {dim}")
    pooled = adaptive_pool("mean pool", ndim, builder, input, 1)
    return pooled if keepdim else Tensor(pooled.value, pooled.shape[:1])


def pad(
    builder: ProgramBuilder, input: Tensor, pad: Any, mode: str = "constant", value: Any = None
) -> Tensor:
    """Return the padded tensor; negative padding crops."""
    x = input.as_map()
    ends = [int(p) for p in pad]
    pairs = [(0, 0)] * 4
    pairs[: len(ends) // 2] = list(zip(ends[::2], ends[1::2]))
    if len(ends) == 2 * (input.ndim - 1) and mode == "constant" and not value:
        *ends, before, after = ends
        x = _pad_channels(builder, x, before, after)
    if len(ends) > 2 * (input.ndim - 2):
        raise Unsupported(f"padding of {ends}")
    index: list[Any] = []
    if not any(ends):
        return input.with_value(x)
    for n, (before, after) in zip(x.size, pairs[2::-1]):
        table = None
        if before or after:
            table = padded_indices(n, max(before, 0), max(after, 0), mode, 1)
            table = table[max(-before, 0) : len(table) - max(-after, 0)]
        index.append(table)
    size = tuple(n if i is None else len(i) for n, i in zip(x.size, index))
    if min(size) < 1:
        raise Unsupported(f"padding {ends} of {x.size}")
    a, b, c = index
    return input.with_value(
        builder.combine(x, alpha=value or 0.0, index=(a, b, c), size=size, name="pad")  # type: ignore[arg-type]
    )


def _pad_channels(builder: ProgramBuilder, value: Value, before: int, after: int) -> Value:
    weight = np.eye(value.shape[0], dtype=builder.dtype)
    weight = np.pad(weight[max(-before, 0) :], ((max(before, 0), max(after, 0)), (0, 0)))
    weight = weight[: len(weight) - max(-after, 0)]
    return builder.chain(value, as_links(dense(weight[:, :, None])), name="pad channels")


def _pad_module(
    mode: str, builder: ProgramBuilder, input: Tensor, padding: Any, value: float = 0.0
) -> Tensor:
    return pad(builder, input, padding, mode, value)


def upsample(
    builder: ProgramBuilder, input: Tensor, size: Any = None, scale_factor: Any = None,
    mode: str = "nearest", align_corners: Any = None, **other: Any,
) -> Tensor:  # fmt: skip
    """Return nearest neighbours at an integer factor."""
    ndim = input.ndim - 2
    value = input.as_map()
    if mode not in ("nearest", "nearest-exact") or any(other.values()) or ndim < 1:
        raise Unsupported(f"interpolation of mode {mode}")
    sizes = value.size[3 - ndim :]
    if size is not None:
        wanted = [int(n) for n in ((size,) * ndim if isinstance(size, int) else size)]
    else:
        given = scale_factor if isinstance(scale_factor, tuple | list) else (scale_factor,) * ndim
        wanted = [int(n * s) for n, s in zip(sizes, given)]
        if any(w != n * s for n, s, w in zip(sizes, given, wanted)):
            raise Unsupported(f"interpolation by {scale_factor}")
    if any(w % n for n, w in zip(sizes, wanted)):
        raise Unsupported(f"interpolation of {sizes} to {wanted}")
    target = _three(wanted, ndim, 1)
    a, b, c = (
        None if w == n else np.arange(w, dtype=np.int32) // (w // n)
        for n, w in zip(value.size, target)
    )
    return input.with_value(builder.combine(value, index=(a, b, c), size=target, name="upsample"))


def pixel_shuffle(builder: ProgramBuilder, input: Tensor, upscale_factor: int) -> Tensor:
    """Return channels moved to space: a transposed convolution with one tap per channel."""
    r, value = upscale_factor, input.as_map(2)
    if value.shape[0] % r**2:
        raise Unsupported(f"a pixel shuffle of {value.shape[0]} channels by {r}")
    channels = value.shape[0] // r**2
    weight = np.tile(np.eye(r * r, dtype=builder.dtype), (channels, 1)).reshape(-1, 1, r, r)
    f = dense(weight, stride=r, groups=channels, transposed=True)
    return input.with_value(builder.chain(value, as_links(f), name="pixel shuffle"))


def channel_shuffle(builder: ProgramBuilder, input: Tensor, groups: int) -> Tensor:
    """Return the channels (groups, n) in the order (n, groups)."""
    value = input.as_map()
    order = np.arange(value.shape[0]).reshape(groups, -1).T.reshape(-1)
    return Tensor(builder.permute(value, order.tolist()), input.shape)


def concatenate(builder: ProgramBuilder, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return the channels of all tensors."""
    first = tensors[0]
    same = all(t.is_map and t.shape[1:] == first.shape[1:] for t in tensors)
    if _axis(dim, first.ndim) != 1 or not same:
        raise Unsupported(f"a concatenation along axis {dim}")
    if len(tensors) == 1:
        return first
    return first.with_value(builder.concatenate([t.value for t in tensors]))


def split(
    builder: ProgramBuilder, input: Tensor, split_size_or_sections: Any, dim: int = 0
) -> list[Tensor]:
    """Return slices of the channels."""
    value, given = input.as_map(), split_size_or_sections
    if _axis(dim, input.ndim) != 1:
        raise Unsupported(f"a split along axis {dim}")
    channels = value.shape[0]
    if isinstance(given, int):
        given = [min(given, channels - i) for i in range(0, channels, given)]
    if sum(given) != channels or min(given) < 1:
        raise Unsupported(f"a split of {channels} channels into {given}")
    ends = np.cumsum(given).tolist()
    return [_channels(builder, input, range(e - n, e)) for n, e in zip(given, ends)]


def chunk(builder: ProgramBuilder, input: Tensor, chunks: int, dim: int = 0) -> list[Tensor]:
    """Return slices of the channels of nearly equal length."""
    return split(builder, input, -(-input.shape[0] // chunks), dim)


def _channels(builder: ProgramBuilder, x: Tensor, chosen: range) -> Tensor:
    return x.with_value(builder.permute(x.as_map(), list(chosen)))


def get_item(builder: ProgramBuilder, x: Any, index: Any) -> Any:
    """Return an entry of several tensors, or a slice of the channels of one."""
    if not isinstance(x, Tensor):
        return x[index]
    index = index if isinstance(index, tuple) else (index,)
    if index.count(Ellipsis) == 1:
        i = index.index(Ellipsis)
        index = (*index[:i], *[slice(None)] * (x.ndim + 1 - len(index)), *index[i + 1 :])
    index = (*index, *[slice(None)] * (x.ndim - len(index)))
    if (
        len(index) != x.ndim
        or index[0] != slice(None)
        or not all(isinstance(i, slice) for i in index)
    ):
        raise Unsupported(f"index {index}")
    chosen = [range(n)[i] for n, i in zip(x.shape, index[1:])]
    if not all(chosen):
        raise Unsupported(f"index {index}, which selects nothing")
    value, (channels, *places) = x.as_map(), chosen
    if len(channels) < value.shape[0]:
        value = builder.permute(value, list(channels))
    tables = [np.array(r, np.int32) if len(r) < n else None for r, n in zip(places, x.shape[1:])]
    if any(t is not None for t in tables):
        a, b, c = [None] * (3 - len(tables)) + tables
        size = _three([len(r) for r in places], len(places), 1)
        value = builder.combine(value, index=(a, b, c), size=size, name="slice")
    return x.with_value(value)


def reshape(builder: ProgramBuilder, input: Tensor, *shape: Any) -> Tensor:
    """Return a tensor with flattened axes, or with its channels split into two axes."""
    new = [int(n) for n in (shape[0] if isinstance(shape[0], tuple | list) else shape)]
    elements = BATCH * math.prod(input.shape)
    if -1 in new:
        rest = -math.prod(new)
        new[new.index(-1)] = elements // rest if rest and elements % rest == 0 else 0
    if new[0] != BATCH or math.prod(new) != elements:
        raise Unsupported(f"a view of (batch, {input.shape}) as {shape}")
    tensor = Tensor(input.value, tuple(new[1:]))
    channels, *size = tensor.value.shape
    is_flat = len(new) == 2
    is_split = math.prod(new[1:3]) == channels and [1] * (6 - len(new)) + new[3:] == size
    if not (tensor.is_map or is_flat or is_split):
        raise Unsupported(f"a view of (batch, {input.shape}) as {shape}")
    return tensor


def flatten(
    builder: ProgramBuilder, input: Tensor, start_dim: int = 0, end_dim: int = -1
) -> Tensor:
    """Return a tensor with several axes as one."""
    start, end = _axis(start_dim, input.ndim), _axis(end_dim, input.ndim)
    shape = (BATCH, *input.shape)
    return reshape(
        builder, input, *shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]
    )


def squeeze(builder: ProgramBuilder, input: Tensor, dim: Any = None) -> Tensor:
    """Return a tensor without axes of length 1."""
    shape = (BATCH, *input.shape)
    if dim is None:
        raise Unsupported("squeeze of all axes, which depends on the batch")
    gone = [_axis(d, input.ndim) for d in ((dim,) if isinstance(dim, int) else dim)]
    return reshape(builder, input, *(n for i, n in enumerate(shape) if i not in gone or n != 1))


def unsqueeze(builder: ProgramBuilder, input: Tensor, dim: int) -> Tensor:
    """Return a tensor with another axis of length 1."""
    shape = [BATCH, *input.shape]
    shape.insert(_axis(dim, input.ndim + 1), 1)
    return reshape(builder, input, *shape)


def transpose(builder: ProgramBuilder, input: Tensor, dim0: int, dim1: int) -> Tensor:
    """Return a tensor whose channels are split into two axes, with those exchanged."""
    channels, *size = input.value.shape
    a, b, *rest = input.shape if input.ndim > 2 else (0, 0)
    is_split = a * b == channels and [1] * (3 - len(rest)) + rest == size
    if {_axis(dim0, input.ndim), _axis(dim1, input.ndim)} != {1, 2} or not is_split:
        raise Unsupported(f"a transposition of axes {dim0} and {dim1}")
    order = np.arange(channels).reshape(a, b).T.reshape(-1)
    return Tensor(builder.permute(input.value, order.tolist()), (b, a, *rest))


def permute(builder: ProgramBuilder, input: Tensor, *dims: Any) -> Tensor:
    """Return a transposition, given as the order of all axes."""
    order = list(dims[0] if isinstance(dims[0], tuple | list) else dims)
    if order[:3] != [0, 2, 1] or order[3:] != list(range(3, input.ndim)):
        raise Unsupported(f"a permutation of axes {order}")
    return transpose(builder, input, 1, 2)


def identity(builder: ProgramBuilder, input: Tensor, *unused: Any, **settings: Any) -> Tensor:
    """Return the tensor: what PyTorch computes in evaluation mode."""
    return input


def dropout(
    builder: ProgramBuilder, input: Tensor, p: float = 0.5, training: bool = True,
    inplace: bool = False,
) -> Tensor:  # fmt: skip
    """Return the tensor in evaluation mode."""
    if training:
        raise Unsupported("dropout in training mode")
    return input


Operation = Callable[..., Any]


def _of_each_ndim(family: Any, pattern: str, operation: Operation) -> dict[Any, Operation]:
    return {getattr(family, pattern.format(n)): partial(operation, n) for n in (1, 2, 3)}


add, multiply = partial(elementwise, "add"), partial(elementwise, "multiply")
_max, _mean = partial(adaptive_pool, "max pool"), partial(adaptive_pool, "mean pool")

# Settings of a module are the attributes that have the names of an operation's parameters.
_MODULES: dict[type[nn.Module], Operation] = {
    **_of_each_ndim(nn, "MaxPool{}d", max_pool), **_of_each_ndim(nn, "AvgPool{}d", mean_pool),
    **_of_each_ndim(nn, "AdaptiveMaxPool{}d", _max),
    **_of_each_ndim(nn, "AdaptiveAvgPool{}d", _mean),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), identity),
    nn.Upsample: upsample, nn.UpsamplingNearest2d: upsample, nn.PixelShuffle: pixel_shuffle,
    nn.ChannelShuffle: channel_shuffle, nn.Flatten: flatten,
    **{kind: partial(_pad_module, mode) for kind, mode in PADDING_MODES.items()},
}  # fmt: skip
_FUNCTIONS: dict[Any, Operation] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add), add),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply), multiply),
    **_of_each_ndim(functional, "max_pool{}d", max_pool),
    **_of_each_ndim(torch, "max_pool{}d", max_pool),
    **_of_each_ndim(functional, "avg_pool{}d", mean_pool),
    **_of_each_ndim(functional, "adaptive_max_pool{}d", _max),
    **_of_each_ndim(functional, "adaptive_avg_pool{}d", _mean),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), concatenate),
    torch.mean: mean, functional.pad: pad, functional.interpolate: upsample,
    functional.pixel_shuffle: pixel_shuffle, functional.channel_shuffle: channel_shuffle,
    torch.split: split, torch.chunk: chunk, operator.getitem: get_item, torch.reshape: reshape,
    torch.flatten: flatten, torch.squeeze: squeeze, torch.unsqueeze: unsqueeze,
    torch.transpose: transpose, torch.permute: permute,
    **dict.fromkeys(
        (functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d),
        dropout,
    ),
}  # fmt: skip
_METHODS: dict[str, Operation] = {
    **dict.fromkeys(("add", "add_", "__add__", "__iadd__"), add),
    **dict.fromkeys(("mul", "mul_", "multiply"), multiply),
    "mean": mean, "split": split, "chunk": chunk, "view": reshape, "reshape": reshape,
    "flatten": flatten, "squeeze": squeeze, "unsqueeze": unsqueeze, "transpose": transpose,
    "permute": permute, "contiguous": identity, "clone": identity, "detach": identity,
}  # fmt: skip
# Operations whose outputs may share memory with their inputs in PyTorch.
ALIASES = (
    identity, dropout, split, chunk, get_item, reshape, flatten, squeeze, unsqueeze, transpose,
    permute,
)  # fmt: skip


def find_operation(node: fx.Node, module: nn.Module | None) -> Operation | None:
    """Return the operation of a program that a node computes, or None.

    Parameters
    ----------
    node : fx.Node
        Node of a traced graph.
    module : nn.Module or None
        Module that the node calls, if it calls one.

    Returns
    -------
    callable or None
        ``operation(builder, *args, **settings)`` of :class:`Tensor` arguments; it may still raise
        Unsupported for their shapes.
    """
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    operation = _MODULES.get(type(module))  # type: ignore[arg-type]
    if operation is None:
        return None
    settings = {
        name: getattr(module, name)
        for name in inspect.signature(operation).parameters
        if hasattr(module, name)
    }
    return partial(operation, **settings)


# Activations of the engine, by the modules, functions and methods that compute them.
_ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((nn.ReLU, functional.relu, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((nn.ReLU6, functional.relu6), "relu6"),
    **dict.fromkeys((nn.Hardswish, functional.hardswish), "hard_swish"),
    **dict.fromkeys((nn.Hardsigmoid, functional.hardsigmoid), "hard_sigmoid"),
    **dict.fromkeys((nn.SiLU, functional.silu), "silu"),
    **dict.fromkeys(
        (nn.Sigmoid, functional.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_"), "sigmoid"
    ),
    **dict.fromkeys((nn.Tanh, functional.tanh, torch.tanh, "tanh", "tanh_"), "tanh"),
}  # fmt: skip


def _hardtanh(min_val: Any = -1.0, max_val: Any = 1.0, inplace: bool = False) -> Any:
    return ("relu6", 0.0) if (min_val, max_val) == (0, 6) else None


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Any:
    return "leaky_relu", negative_slope


def _gelu(approximate: str = "none") -> Any:
    return ("gelu", 0.0) if approximate == "none" else None


def _clamp(min: Any = None, max: Any = None) -> Any:
    return {(0, 6): ("relu6", 0.0), (0, None): ("relu", 0.0)}.get((min, max))


# Activations that depend on settings, which have PyTorch's names.
_CHOICES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((nn.Hardtanh, functional.hardtanh), _hardtanh),
    **dict.fromkeys((nn.LeakyReLU, functional.leaky_relu), _leaky_relu),
    **dict.fromkeys((nn.GELU, functional.gelu), _gelu),
    **dict.fromkeys((torch.clamp, "clamp", "clamp_"), _clamp),
}


def find_activation(node: fx.Node, module: nn.Module | None) -> tuple[str, float] | None:
    """Return the activation that a node computes, if the engine has it, and its slope.

    Parameters
    ----------
    node : fx.Node
        Node of a traced graph.
    module : nn.Module or None
        Module that the node calls, if it calls one.

    Returns
    -------
    (str, float) or None
        Name of the activation and, for ``"leaky_relu"``, its slope for negative values.
    """
    called: Any = type(module) if node.op == "call_module" else node.target
    if called in _ACTIVATIONS:
        return _ACTIVATIONS[called], 0.0
    choose = _CHOICES.get(called)
    if choose is None:
        return None
    if node.op != "call_module":
        return choose(*node.args[1:], **node.kwargs)  # type: ignore[no-any-return]
    names = inspect.signature(choose).parameters
    settings = {name: getattr(module, name) for name in names if hasattr(module, name)}
    return choose(**settings)  # type: ignore[no-any-return]
