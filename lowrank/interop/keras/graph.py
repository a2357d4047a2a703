"""The configuration of a Keras model as a graph: what is called on what, with which shapes.

Weights are stored by the order of the layers, not by their names, in ``.keras`` files (with an
index and a kind) as well as in ``.h5`` files (as lists).  The order is that of Keras when it builds
the model: by depth, the distance from the outputs, and within a depth by a search from the
outputs.  A layer that becomes a chain moves others, so it has to be found as Keras finds it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Shape = tuple[int | None, ...]
_DEPTH = 64  # models in models


class Call(NamedTuple):
    """One call of one layer."""

    layer: int
    sources: tuple[tuple[int, int], ...]  # (layer, which of its calls), of each argument
    shapes: tuple[Shape | None, ...]  # of the arguments, as the file has them


class Graph(NamedTuple):
    """One model, not those within."""

    entries: list[Any]
    calls: list[list[Call]]  # of each layer
    order: list[tuple[int, int]]  # (layer, call) as they can be run
    layers: list[int]  # as Keras orders them
    outputs: list[tuple[int, int]]


def inner(entry: Any) -> list[Any] | None:
    """The layers of a model within a model; None for a layer."""
    config = entry.get("config")
    found = config.get("layers") if isinstance(config, dict) else config
    if not isinstance(found, list) or entry.get("class_name") == "StackedRNNCells":
        return None
    if not all(isinstance(e, dict) and isinstance(e.get("config"), dict | list) for e in found):
        raise ValueError("its configuration has layers that are no layers")
    return found


def name_of(entry: Any) -> str:
    """What a layer is called."""
    config = entry["config"]
    found = entry.get("name") or (config.get("name") if isinstance(config, dict) else None)
    return str(found or entry.get("class_name"))


def snake(name: str) -> str:
    """A class's name as ``.keras`` files write it."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def graph(entry: Any) -> Graph:
    """The graph of a model."""
    entries = inner(entry)
    if entries is None:
        raise ValueError("it has no layers: only Sequential and functional models can be read")
    names = {name_of(e): i for i, e in enumerate(entries)}
    if len(names) < len(entries):
        raise ValueError("two layers of a model have one name")
    config = entry["config"]
    if isinstance(config, list) or "output_layers" not in config:
        chained = [
            [Call(i, ((i - 1, 0),) if i else (), (_built(e),) if i else ())]
            for i, e in enumerate(entries)
        ]
        everything = [(i, 0) for i in range(len(entries))]
        return Graph(entries, chained, everything, [*range(len(entries))], everything[-1:])
    calls = [
        [_call(i, node, names) for node in e.get("inbound_nodes") or []] or [Call(i, (), ())]
        for i, e in enumerate(entries)
    ]
    outputs = [(names[n], c) for n, c, _ in _tensors(config["output_layers"], names)]
    for layer, call in [*outputs, *(s for cs in calls for c in cs for s in c.sources)]:
        if not 0 <= call < len(calls[layer]):
            raise ValueError(f"layer {name_of(entries[layer])!r} is not called {call + 1} times")
    order, found = _search(calls, outputs)
    depths = _depths(calls, order)
    layers = sorted(depths, key=lambda i: (-depths[i], found[i]))
    return Graph(entries, calls, order, layers, outputs)


def _call(layer: int, node: Any, names: dict[str, int]) -> Call:
    tensors = list(_tensors(node, names))
    return Call(
        layer,
        tuple((names[name], call) for name, call, _ in tensors),
        tuple(shape for _, _, shape in tensors),
    )


def _tensors(value: Any, names: dict[str, int]) -> Iterator[tuple[str, int, Shape | None]]:
    """(layer, call, shape) of all tensors in the arguments of a call, of either form."""
    if isinstance(value, dict):
        config = value.get("config")
        if value.get("class_name") == "__keras_tensor__" and isinstance(config, dict):
            name, call = config["keras_history"][:2]
            if name not in names or not isinstance(call, int):
                raise ValueError(f"there is no layer {name!r}")
            yield name, call, _shape(config.get("shape"))
        else:
            for key in sorted(value):
                yield from _tensors(value[key], names)
    elif isinstance(value, list):
        pair = len(value) >= 3 and isinstance(value[0], str) and isinstance(value[1], int)
        if pair and value[0] in names:
            yield value[0], value[1], None
            yield from _tensors(value[3:], names)
        else:
            for item in value:
                yield from _tensors(item, names)


def _search(
    calls: list[list[Call]], outputs: list[tuple[int, int]]
) -> tuple[list[tuple[int, int]], dict[int, int]]:
    """Calls in an order in which they can be run, and when each layer was first met."""
    order: list[tuple[int, int]] = []
    found: dict[int, int] = {}
    done, under_way = set(), set()
    for output in outputs:
        stack = [(output, False)]
        while stack:
            at, finished = stack.pop()
            if finished:
                under_way.discard(at)
                if at not in done:
                    done.add(at)
                    order.append(at)
                continue
            if at in done:
                continue
            if at in under_way:
                raise ValueError("its layers go round in a circle")
            found.setdefault(at[0], len(found))
            under_way.add(at)
            stack.append((at, True))
            stack += [(s, False) for s in reversed(calls[at[0]][at[1]].sources)]
    return order, found


def _depths(calls: list[list[Call]], order: list[tuple[int, int]]) -> dict[int, int]:
    """Distance of each layer from the outputs, the largest there is."""
    nodes: dict[tuple[int, int], int] = {}
    layers: dict[int, int] = {}
    for at in reversed(order):
        depth = max(nodes.setdefault(at, 0), layers.get(at[0], 0))
        nodes[at] = layers[at[0]] = depth
        for source in calls[at[0]][at[1]].sources:
            nodes[source] = max(depth + 1, nodes.get(source, 0))
    return layers


class Run(NamedTuple):
    """One call of a layer, somewhere in a model."""

    path: tuple[int, ...]  # indices of the layer and of the models that it is in
    shapes: tuple[Shape | None, ...]  # of its arguments, with the batch


def trace(entry: Any, given: Shape | None) -> list[Run]:
    """All calls of all layers in the order in which they run, with shapes where they are known.

    `given` is the shape of the model's input, with the batch, if the file is not to be asked.
    """
    runs: list[Run] = []
    _run(entry, [given], (), runs)
    return runs


def _run(
    entry: Any, given: list[Shape | None], path: tuple[int, ...], runs: list[Run]
) -> Shape | None:
    """Run a model on shapes; its (first) output's shape."""
    if len(path) > _DEPTH:
        raise ValueError("its models are nested too deep")
    g = graph(entry)
    known: dict[tuple[int, int], Shape | None] = {}
    starts = iter(given)
    for at in g.order:
        layer, call = g.entries[at[0]], g.calls[at[0]][at[1]]
        config = layer["config"]
        own = None
        if isinstance(config, dict):
            own = config.get("batch_shape") or config.get("batch_input_shape")
        if layer.get("class_name") == "InputLayer":
            known[at] = next(starts, None) or _shape(own)
            continue
        shapes = [
            known.get(source) or recorded for source, recorded in zip(call.sources, call.shapes)
        ]
        if not call.sources:  # the first layer of a Sequential model, which has its input's shape
            whole = entry["config"]
            built = whole.get("build_input_shape") if isinstance(whole, dict) else None
            shapes = [next(starts, None) or _shape(own) or _shape(built) or _built(layer)]
        runs.append(Run((*path, at[0]), tuple(shapes)))
        if inner(layer) is not None:
            known[at] = _run(layer, shapes, (*path, at[0]), runs)
        else:
            known[at] = output_shape(layer, shapes)
    return known.get(g.outputs[0]) if g.outputs else None


def output_shape(entry: Any, shapes: list[Shape | None]) -> Shape | None:
    """Shape of what a layer gives; None where it cannot be known."""
    rule = _RULES.get(str(entry.get("class_name")))
    if rule is None or not shapes or any(s is None for s in shapes):
        return None
    try:
        return rule(entry["config"], *shapes)
    except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return None  # a configuration that makes no sense has no shape


def spatial_axes(config: Any, ndim: int) -> tuple[slice, int]:
    """Where the spatial axes and the channels of an array are."""
    if config.get("data_format") == "channels_first":
        return slice(2, ndim), 1
    return slice(1, ndim - 1), ndim - 1


def entries_of(value: Any, n: int) -> tuple[int, ...]:
    """One integer for all axes, or one each."""
    found = tuple(value) if isinstance(value, list | tuple) else (value,) * n
    if len(found) != n or not all(type(v) is int for v in found):
        raise ValueError(f"{value!r} is not {n} integers")
    return found


def same_padding(size: int, extent: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: what it takes for ceil(size / stride) outputs, the odd sample last."""
    total = max((-(-size // stride) - 1) * stride + extent - size, 0)
    return total // 2, total - total // 2


def transposed_padding(
    extent: int, stride: int, padding: str, extra: int | None
) -> tuple[tuple[int, int], int]:
    """(before, after) that a transposed convolution crops, and what it adds at its end."""
    if padding == "valid":
        return (0, 0), max(stride - extent, 0) if extra is None else extra
    spare = extent - stride if extra is None else extent - extent % 2 - extra
    before = max(spare, 0) // 2
    return (before, max(spare - before, 0)), max(-spare, 0)


def _shape(value: Any) -> Shape | None:
    if not isinstance(value, list | tuple) or len(value) < 2:
        return None
    if not all(v is None or (type(v) is int and v >= 0) for v in value):
        return None
    return tuple(value)


def _built(entry: Any) -> Shape | None:
    build = entry.get("build_config")
    return _shape(build.get("input_shape")) if isinstance(build, dict) else None


def _sizes(
    config: Any, shape: Shape, channels: int | None, size: Callable[[int, int], int]
) -> Shape:
    """`shape` with other spatial sizes and channels."""
    found = list(shape)
    axes, at = spatial_axes(config, len(shape))
    for i, axis in enumerate(range(axes.start, axes.stop)):
        n = shape[axis]
        found[axis] = None if n is None else size(n, i)
    if channels is not None:
        found[at] = channels
    if any(n is not None and n < 0 for n in found):
        raise ValueError("nothing is left")
    return tuple(found)


def _windows(kernel: Any, stride: Any, dilation: Any, config: Any, n: int) -> Callable[..., int]:
    k, s, d = entries_of(kernel, n), entries_of(stride, n), entries_of(dilation, n)
    padding = str(config.get("padding", "valid")).lower()

    def size(length: int, i: int) -> int:
        if padding in ("same", "causal"):
            return -(-length // s[i])
        return (length - (k[i] - 1) * d[i] - 1) // s[i] + 1

    return size


def _conv(config: Any, shape: Shape) -> Shape:
    n = len(shape) - 2
    size = _windows(config["kernel_size"], config["strides"], config["dilation_rate"], config, n)
    channels = config.get("filters")
    if channels is None:
        known = shape[spatial_axes(config, len(shape))[1]]
        channels = None if known is None else known * int(config["depth_multiplier"])
    return _sizes(config, shape, channels, size)


def _transposed(config: Any, shape: Shape) -> Shape:
    n = len(shape) - 2
    k, s = entries_of(config["kernel_size"], n), entries_of(config["strides"], n)
    d = entries_of(config.get("dilation_rate", 1), n)
    extra = config.get("output_padding")
    o = (None,) * n if extra is None else entries_of(extra, n)

    def size(length: int, i: int) -> int:
        extent = (k[i] - 1) * d[i] + 1
        (a, b), more = transposed_padding(extent, s[i], config["padding"], o[i])
        return (length - 1) * s[i] + extent - a - b + more

    return _sizes(config, shape, config["filters"], size)


def _pool(config: Any, shape: Shape) -> Shape:
    n = len(shape) - 2
    pool = config["pool_size"]
    stride = pool if config.get("strides") is None else config["strides"]
    return _sizes(config, shape, None, _windows(pool, stride, 1, config, n))


def _global(config: Any, shape: Shape) -> Shape:
    axes, _ = spatial_axes(config, len(shape))
    one = (1,) * (len(shape) - 2) if config.get("keepdims") else ()
    return (*shape[: axes.start], *one, *shape[axes.stop :])


def _bordered(sign: int, key: str) -> Callable[[Any, Shape], Shape]:
    def rule(config: Any, shape: Shape) -> Shape:
        n = len(shape) - 2
        amount = config[key]
        if n == 1 and isinstance(amount, list | tuple) and not isinstance(amount[0], list | tuple):
            amount = [amount]
        pairs = amount if isinstance(amount, list | tuple) else [amount] * n
        sums = [sum(entries_of(p, 2)) for p in pairs]
        return _sizes(config, shape, None, lambda length, i: length + sign * sums[i])

    return rule


def _upsampled(config: Any, shape: Shape) -> Shape:
    factors = entries_of(config["size"], len(shape) - 2)
    return _sizes(config, shape, None, lambda length, i: length * factors[i])


def _flat(config: Any, shape: Shape) -> Shape:
    return (shape[0], None if None in shape[1:] else math.prod(n or 0 for n in shape[1:]))


def _reshaped(config: Any, shape: Shape) -> Shape:
    target = list(config["target_shape"])
    total = _flat(config, shape)[1]
    if -1 in target:
        rest = -math.prod(target)
        target[target.index(-1)] = None if total is None else total // rest
    return (shape[0], *target)


def _permuted(config: Any, shape: Shape) -> Shape:
    return (shape[0], *(shape[i] for i in config["dims"]))


def _dense(config: Any, shape: Shape) -> Shape:
    return (*shape[:-1], int(config["units"]))


def _merged(config: Any, *shapes: Shape) -> Shape:
    longest = max(shapes, key=len)
    found = []
    for i in range(1, len(longest) + 1):
        sizes = {s[-i] for s in shapes if i <= len(s)} - {1}
        if len(sizes - {None}) > 1:
            raise ValueError("shapes do not go together")
        known = sizes - {None}
        found.append(known.pop() if known else (None if sizes else 1))
    return tuple(reversed(found))


def _joined(config: Any, *shapes: Shape) -> Shape:
    axis = int(config.get("axis", -1))
    sizes = [s[axis] for s in shapes]
    found = list(shapes[0])
    found[axis] = None if None in sizes else sum(n or 0 for n in sizes)
    return tuple(found)


def _same(config: Any, shape: Shape, *others: Shape) -> Shape:
    return shape


_RULES: dict[str, Callable[..., Shape]] = {
    **{f"{kind}Conv{n}D": _conv for kind in ("", "Depthwise", "Separable") for n in (1, 2, 3)},
    **{f"Conv{n}DTranspose": _transposed for n in (1, 2, 3)},
    **{f"{kind}Pooling{n}D": _pool for kind in ("Max", "Average") for n in (1, 2, 3)},
    **{f"Global{kind}Pooling{n}D": _global for kind in ("Max", "Average") for n in (1, 2, 3)},
    **{f"ZeroPadding{n}D": _bordered(1, "padding") for n in (1, 2, 3)},
    **{f"Cropping{n}D": _bordered(-1, "cropping") for n in (1, 2, 3)},
    **{f"UpSampling{n}D": _upsampled for n in (1, 2, 3)},
    **dict.fromkeys(("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"), _merged),
    **dict.fromkeys(
        (
            "Activation", "ActivityRegularization", "AlphaDropout", "BatchNormalization", "Dropout",
            "ELU", "GaussianDropout", "GaussianNoise", "GroupNormalization", "Identity",
            "LayerNormalization", "LeakyReLU", "Normalization", "PReLU", "ReLU", "Rescaling",
            "Softmax", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D",
            "SyncBatchNormalization", "ThresholdedReLU", "UnitNormalization",
        ),
        _same,
    ),
    "Concatenate": _joined,
    "Dense": _dense,
    "Flatten": _flat,
    "Permute": _permuted,
    "Reshape": _reshaped,
}  # fmt: skip
