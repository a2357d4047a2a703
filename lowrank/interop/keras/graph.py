"""Graph of a Keras model, built from its configuration: calls of layers and shapes of tensors.

Both ``.keras`` and ``.h5`` files store weights by the order of the layers, not by their names.  It
is the order in which Keras builds the model: by depth (the distance from the outputs), and within
one depth by a search from the outputs.  A chain in place of a layer changes the order of others,
so the order is computed here as Keras computes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Shape = tuple[int | None, ...]
_DEPTH = 64  # nesting of models; no network needs more


class Call(NamedTuple):
    """One call of one layer."""

    layer: int
    sources: tuple[tuple[int, int], ...]  # (layer, index of its call) of each argument
    shapes: tuple[Shape | None, ...]  # shapes of the arguments in the file


class Graph(NamedTuple):
    """Graph of one model, without the layers of nested models."""

    entries: list[Any]  # configurations of the layers
    calls: list[list[Call]]  # calls of each layer
    order: list[tuple[int, int]]  # (layer, call) in an order of execution
    layers: list[int]  # layers in the order of Keras
    outputs: list[tuple[int, int]]


def inner_layers(entry: Any) -> list[Any] | None:
    """Return the layers of a model, or None for an entry that is a layer."""
    config = entry.get("config")
    layers = config.get("layers") if isinstance(config, dict) else config
    if not isinstance(layers, list) or entry.get("class_name") == "StackedRNNCells":
        return None
    if not all(isinstance(e, dict) and isinstance(e.get("config"), dict | list) for e in layers):
        raise ValueError("its configuration has an invalid layer")
    return layers


def name_of(entry: Any) -> str:
    """Return the name of a layer."""
    config = entry["config"]
    name = entry.get("name") or (config.get("name") if isinstance(config, dict) else None)
    return str(name or entry.get("class_name"))


def snake_case(name: str) -> str:
    """Return the name of a class as ``.keras`` files write it."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def model_graph(entry: Any) -> Graph:
    """Return the graph of a model."""
    entries = inner_layers(entry)
    if entries is None:
        raise ValueError("it has no layers: only Sequential and functional models can be read")
    names = {name_of(e): i for i, e in enumerate(entries)}
    if len(names) < len(entries):
        raise ValueError("two layers of a model have the same name")
    config = entry["config"]
    if isinstance(config, list) or "output_layers" not in config:  # a Sequential model
        calls = [
            [Call(i, ((i - 1, 0),) if i else (), (_built_shape(e),) if i else ())]
            for i, e in enumerate(entries)
        ]
        order = [(i, 0) for i in range(len(entries))]
        return Graph(entries, calls, order, [*range(len(entries))], order[-1:])
    calls = [
        [_call(i, node, names) for node in e.get("inbound_nodes") or []] or [Call(i, (), ())]
        for i, e in enumerate(entries)
    ]
    outputs = [(names[n], c) for n, c, _ in _tensors(config["output_layers"], names)]
    for layer, call in [*outputs, *(s for cs in calls for c in cs for s in c.sources)]:
        if not 0 <= call < len(calls[layer]):
            raise ValueError(f"layer {name_of(entries[layer])!r} is not called {call + 1} times")
    order, first_visits = _search(calls, outputs)
    depths = _depths(calls, order)
    layers = sorted(depths, key=lambda i: (-depths[i], first_visits[i]))
    return Graph(entries, calls, order, layers, outputs)


def _call(layer: int, node: Any, names: dict[str, int]) -> Call:
    tensors = list(_tensors(node, names))
    return Call(
        layer,
        tuple((names[name], call) for name, call, _ in tensors),
        tuple(shape for _, _, shape in tensors),
    )


def _tensors(value: Any, names: dict[str, int]) -> Iterator[tuple[str, int, Shape | None]]:
    """Yield (layer, call, shape) of all tensors in the arguments of a call, of either format."""
    if isinstance(value, dict):
        config = value.get("config")
        if value.get("class_name") == "__keras_tensor__" and isinstance(config, dict):
            name, call = config["keras_history"][:2]
            if name not in names or not isinstance(call, int):
                raise ValueError(f"no layer {name!r}")
            yield name, call, _as_shape(config.get("shape"))
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
    """Return the calls in an order of execution, and the rank of each layer's first visit."""
    order: list[tuple[int, int]] = []
    first_visits: dict[int, int] = {}
    done, active = set(), set()
    for output in outputs:
        stack = [(output, False)]
        while stack:
            at, finished = stack.pop()
            if finished:
                active.discard(at)
                if at not in done:
                    done.add(at)
                    order.append(at)
                continue
            if at in done:
                continue
            if at in active:
                raise ValueError("its layers form a cycle")
            first_visits.setdefault(at[0], len(first_visits))
            active.add(at)
            stack.append((at, True))
            stack += [(s, False) for s in reversed(calls[at[0]][at[1]].sources)]
    return order, first_visits


def _depths(calls: list[list[Call]], order: list[tuple[int, int]]) -> dict[int, int]:
    """Return the largest distance of each layer from the outputs."""
    nodes: dict[tuple[int, int], int] = {}
    layers: dict[int, int] = {}
    for at in reversed(order):
        depth = max(nodes.setdefault(at, 0), layers.get(at[0], 0))
        nodes[at] = layers[at[0]] = depth
        for source in calls[at[0]][at[1]].sources:
            nodes[source] = max(depth + 1, nodes.get(source, 0))
    return layers


class Run(NamedTuple):
    """One call of a layer, which may be in a nested model."""

    path: tuple[int, ...]  # indices of the nested models and of the layer
    shapes: tuple[Shape | None, ...]  # shapes of its arguments, with the batch


def trace(entry: Any, input_shape: Shape | None) -> list[Run]:
    """Return all calls of all layers in execution order, with the shapes that are known.

    `input_shape` is the shape of the model's input, with the batch; None for that in the file.
    """
    runs: list[Run] = []
    _run(entry, [input_shape], (), runs)
    return runs


def _run(
    entry: Any, input_shapes: list[Shape | None], path: tuple[int, ...], runs: list[Run]
) -> Shape | None:
    """Infer all shapes of a model, append its calls to `runs`; return the first output's shape."""
    if len(path) > _DEPTH:
        raise ValueError("its models are nested too deep")
    g = model_graph(entry)
    known: dict[tuple[int, int], Shape | None] = {}
    remaining = iter(input_shapes)
    for at in g.order:
        layer, call = g.entries[at[0]], g.calls[at[0]][at[1]]
        config = layer["config"]
        own = None
        if isinstance(config, dict):
            own = config.get("batch_shape") or config.get("batch_input_shape")
        if layer.get("class_name") == "InputLayer":
            known[at] = next(remaining, None) or _as_shape(own)
            continue
        shapes = [
            known.get(source) or recorded for source, recorded in zip(call.sources, call.shapes)
        ]
        if not call.sources:  # the first layer of a Sequential model
            whole = entry["config"]
            built = whole.get("build_input_shape") if isinstance(whole, dict) else None
            shapes = [
                next(remaining, None) or _as_shape(own) or _as_shape(built) or _built_shape(layer)
            ]
        runs.append(Run((*path, at[0]), tuple(shapes)))
        if inner_layers(layer) is not None:
            known[at] = _run(layer, shapes, (*path, at[0]), runs)
        else:
            known[at] = output_shape(layer, shapes)
    return known.get(g.outputs[0]) if g.outputs else None


def output_shape(entry: Any, shapes: list[Shape | None]) -> Shape | None:
    """Return the shape of a layer's output, or None if it is unknown."""
    rule = _RULES.get(str(entry.get("class_name")))
    if rule is None or not shapes or any(s is None for s in shapes):
        return None
    try:
        return rule(entry["config"], *shapes)
    except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return None  # the configuration is invalid


def spatial_axes(config: Any, ndim: int) -> tuple[slice, int]:
    """Return the slice of the spatial axes of an array and the index of its channel axis."""
    if config.get("data_format") == "channels_first":
        return slice(2, ndim), 1
    return slice(1, ndim - 1), ndim - 1


def per_axis(value: Any, n: int) -> tuple[int, ...]:
    """Return one integer per axis, from one for all axes or one each."""
    integers = tuple(value) if isinstance(value, list | tuple) else (value,) * n
    if len(integers) != n or not all(type(v) is int for v in integers):
        raise ValueError(f"{value!r} is not {n} integers")
    return integers


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


def _as_shape(value: Any) -> Shape | None:
    if not isinstance(value, list | tuple) or len(value) < 2:
        return None
    if not all(v is None or (type(v) is int and v >= 0) for v in value):
        return None
    return tuple(value)


def _built_shape(entry: Any) -> Shape | None:
    build = entry.get("build_config")
    return _as_shape(build.get("input_shape")) if isinstance(build, dict) else None


def _resized(
    config: Any, shape: Shape, channels: int | None, size: Callable[[int, int], int]
) -> Shape:
    """Return `shape` with other spatial sizes and channels; `size` maps (length, axis)."""
    new = list(shape)
    axes, channel_axis = spatial_axes(config, len(shape))
    for i, axis in enumerate(range(axes.start, axes.stop)):
        n = shape[axis]
        new[axis] = None if n is None else size(n, i)
    if channels is not None:
        new[channel_axis] = channels
    if any(n is not None and n < 0 for n in new):
        raise ValueError("the kernel is larger than its input")
    return tuple(new)


def _window_size(
    kernel: Any, stride: Any, dilation: Any, config: Any, n: int
) -> Callable[..., int]:
    k, s, d = per_axis(kernel, n), per_axis(stride, n), per_axis(dilation, n)
    padding = str(config.get("padding", "valid")).lower()

    def size(length: int, i: int) -> int:
        if padding in ("same", "causal"):
            return -(-length // s[i])
        return (length - (k[i] - 1) * d[i] - 1) // s[i] + 1

    return size


def _conv(config: Any, shape: Shape) -> Shape:
    n = len(shape) - 2
    size = _window_size(
        config["kernel_size"], config["strides"], config["dilation_rate"], config, n
    )
    channels = config.get("filters")
    if channels is None:
        known = shape[spatial_axes(config, len(shape))[1]]
        channels = None if known is None else known * int(config["depth_multiplier"])
    return _resized(config, shape, channels, size)


def _transposed(config: Any, shape: Shape) -> Shape:
    n = len(shape) - 2
    k, s = per_axis(config["kernel_size"], n), per_axis(config["strides"], n)
    d = per_axis(config.get("dilation_rate", 1), n)
    extra = config.get("output_padding")
    o = (None,) * n if extra is None else per_axis(extra, n)

    def size(length: int, i: int) -> int:
        extent = (k[i] - 1) * d[i] + 1
        (a, b), extra_end = transposed_padding(extent, s[i], config["padding"], o[i])
        return (length - 1) * s[i] + extent - a - b + extra_end

    return _resized(config, shape, config["filters"], size)


def _pool(config: Any, shape: Shape) -> Shape:
    n = len(shape) - 2
    pool = config["pool_size"]
    stride = pool if config.get("strides") is None else config["strides"]
    return _resized(config, shape, None, _window_size(pool, stride, 1, config, n))


def _global_pool(config: Any, shape: Shape) -> Shape:
    axes, _ = spatial_axes(config, len(shape))
    one = (1,) * (len(shape) - 2) if config.get("keepdims") else ()
    return (*shape[: axes.start], *one, *shape[axes.stop :])


def _pad_or_crop(sign: int, key: str) -> Callable[[Any, Shape], Shape]:
    def rule(config: Any, shape: Shape) -> Shape:
        n = len(shape) - 2
        amount = config[key]
        if n == 1 and isinstance(amount, list | tuple) and not isinstance(amount[0], list | tuple):
            amount = [amount]
        pairs = amount if isinstance(amount, list | tuple) else [amount] * n
        sums = [sum(per_axis(p, 2)) for p in pairs]
        return _resized(config, shape, None, lambda length, i: length + sign * sums[i])

    return rule


def _upsampling(config: Any, shape: Shape) -> Shape:
    factors = per_axis(config["size"], len(shape) - 2)
    return _resized(config, shape, None, lambda length, i: length * factors[i])


def _flatten(config: Any, shape: Shape) -> Shape:
    return (shape[0], None if None in shape[1:] else math.prod(n or 0 for n in shape[1:]))


def _reshape(config: Any, shape: Shape) -> Shape:
    target = list(config["target_shape"])
    total = _flatten(config, shape)[1]
    if -1 in target:
        rest = -math.prod(target)
        target[target.index(-1)] = None if total is None else total // rest
    return (shape[0], *target)


def _permute(config: Any, shape: Shape) -> Shape:
    return (shape[0], *(shape[i] for i in config["dims"]))


def _dense(config: Any, shape: Shape) -> Shape:
    return (*shape[:-1], int(config["units"]))


def _broadcast(config: Any, *shapes: Shape) -> Shape:
    longest = max(shapes, key=len)
    merged = []
    for i in range(1, len(longest) + 1):
        sizes = {s[-i] for s in shapes if i <= len(s)} - {1}
        if len(sizes - {None}) > 1:
            raise ValueError("shapes cannot be broadcast")
        known = sizes - {None}
        merged.append(known.pop() if known else (None if sizes else 1))
    return tuple(reversed(merged))


def _concatenate(config: Any, *shapes: Shape) -> Shape:
    axis = int(config.get("axis", -1))
    sizes = [s[axis] for s in shapes]
    joined = list(shapes[0])
    joined[axis] = None if None in sizes else sum(n or 0 for n in sizes)
    return tuple(joined)


def _same(config: Any, shape: Shape, *others: Shape) -> Shape:
    return shape


_RULES: dict[str, Callable[..., Shape]] = {
    **{f"{kind}Conv{n}D": _conv for kind in ("", "Depthwise", "Separable") for n in (1, 2, 3)},
    **{f"Conv{n}DTranspose": _transposed for n in (1, 2, 3)},
    **{f"{kind}Pooling{n}D": _pool for kind in ("Max", "Average") for n in (1, 2, 3)},
    **{f"Global{kind}Pooling{n}D": _global_pool for kind in ("Max", "Average") for n in (1, 2, 3)},
    **{f"ZeroPadding{n}D": _pad_or_crop(1, "padding") for n in (1, 2, 3)},
    **{f"Cropping{n}D": _pad_or_crop(-1, "cropping") for n in (1, 2, 3)},
    **{f"UpSampling{n}D": _upsampling for n in (1, 2, 3)},
    **dict.fromkeys(("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"), _broadcast),
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
    "Concatenate": _concatenate,
    "Dense": _dense,
    "Flatten": _flatten,
    "Permute": _permute,
    "Reshape": _reshape,
}  # fmt: skip
