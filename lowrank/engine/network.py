"""Networks as lists of primitives between named values: fusion, and translation to programs.

A front end reads the graph of its framework as primitives, one per node.  :func:`fuse` merges those
that one operation of a program computes, :func:`emit` adds a primitive to a program's builder.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from lowrank._kernels.spec import ACTIVATIONS
from lowrank._typing import Array, Ints
from lowrank.core.geometry import Geometry
from lowrank.core.stage import Epilogue, Stage
from lowrank.core.tables import format_count
from lowrank.engine.algorithms import algorithm_shape
from lowrank.engine.buffers import ONES, Value
from lowrank.engine.operations import Operation
from lowrank.engine.padding import padded_indices
from lowrank.engine.program import Link, ProgramBuilder, Unsupported

# Activation that a product of a value with this activation of it is.
_GATES = {"sigmoid": "silu", "hard_sigmoid": "hard_swish"}
_LINEAR = ("convolve", "affine", "normalize")  # that may end with an affine map or a residual


@dataclass(frozen=True, eq=False)
class Primitive:
    """Operation of a network between named values.

    Attributes
    ----------
    kind : str
        ``"convolve"``, ``"affine"`` (a scale and a shift per channel), ``"normalize"`` (of each
        channel of each example, then an affine map), ``"softmax"`` (over channels),
        ``"activate"``, ``"add"``, ``"multiply"``,
        ``"concatenate"``, ``"pool"``, ``"pad"``, ``"resample"``, ``"select"`` (of channels),
        ``"spread"`` (of channels in space), ``"view"`` (another shape of the same values) or
        ``"transpose"``.
    inputs : tuple of str
        Values that it reads; the second one of a convolution, affine map or normalization is its
        residual, which is added before the activation.
    output : str
        Value that it computes.
    shape : tuple of int
        Shape of the output in the framework, without the batch.
    sources : tuple
        Nodes of the framework's graph that it computes.
    links : tuple of (Stage, Epilogue)
        Stages of a convolution.
    scale, shift : ndarray, shape (channels,)
        Factors and summands of an affine map or a normalization.
    activation : str
        Activation after the operation; one of ``lowrank._kernels.spec.ACTIVATIONS``.
    alpha : float
        Parameter of the activation.
    options : mapping
        Normalization: ``epsilon``, added to the variance; pooling: arguments of
        :meth:`ProgramBuilder.pool` over three axes; padding: ``before``,
        ``after``, ``mode`` and ``value``; resampling: ``index``, one table per spatial axis;
        selection: ``channels``; spreading: ``channels`` of each sample of a block, an array
        (d, h, w, out); transposition: ``order`` of the axes without the batch.
    """

    kind: str
    inputs: tuple[str, ...]
    output: str
    shape: Ints
    sources: tuple[Any, ...] = ()
    links: tuple[Link, ...] = ()
    scale: Any = None
    shift: Any = None
    activation: str = "none"
    alpha: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the operation in a program."""
        return self.output


def on_three(values: Iterable[int], neutral: int) -> tuple[int, int, int]:
    """Return values per spatial axis, for three axes."""
    *rest, a, b, c = (neutral,) * 3 + tuple(values)
    if len(rest) > 3:
        raise Unsupported("more than three spatial axes")
    return a, b, c


def value_shape(shape: Ints) -> Ints:
    """Return the shape (channels, d, h, w) of a value with a shape (channels, *spatial)."""
    if not 1 <= len(shape) <= 4:
        raise Unsupported(f"a value of shape (batch, {', '.join(map(str, shape))})")
    return shape[0], *on_three(shape[1:], 1)


def fuse(primitives: Iterable[Primitive], uses: Mapping[str, int]) -> list[Primitive]:
    """Merge primitives that one operation of a program computes.

    Parameters
    ----------
    primitives : iterable of Primitive
        Primitives in execution order.
    uses : mapping of str to int
        Number of uses of each value, also by nodes that are no primitives and as outputs.

    Returns
    -------
    list of Primitive
        Batch normalization and constants are folded into convolutions, activations are epilogues,
        sums are residuals, and zero padding is that of a convolution, crops that of a transposed
        one.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import Geometry, Stage
    >>> from lowrank.core.stage import Epilogue
    >>> from lowrank.engine.network import Primitive, fuse
    >>> link = Stage(np.ones((4, 4, 3, 3)), Geometry.of(2, padding=1)), Epilogue()
    >>> net = [Primitive("convolve", ("x",), "a", (4, 8, 8), links=(link,)),
    ...        Primitive("add", ("a", "x"), "b", (4, 8, 8)),
    ...        Primitive("activate", ("b",), "y", (4, 8, 8), activation="relu")]
    >>> [(p.kind, p.inputs, p.activation) for p in fuse(net, {"x": 2, "a": 1, "b": 1, "y": 1})]
    [('convolve', ('x', 'x'), 'relu')]
    """
    return _Fusion(uses).run(primitives)


class _Fusion:
    """Primitives so far, by output, and the uses of their outputs."""

    def __init__(self, uses: Mapping[str, int]) -> None:
        self.uses = Counter(uses)
        self.made: dict[str, Primitive] = {}

    def run(self, primitives: Iterable[Primitive]) -> list[Primitive]:
        for p in primitives:
            p = self._half(self._gate(p))
            p = getattr(self, f"_{p.kind}", lambda p: p)(p)
            self.made[p.output] = p
        return list(self.made.values())

    def _producer(self, name: str, kinds: Sequence[str]) -> Primitive | None:
        """Return the primitive without activation that makes a value with one use, or None."""
        q = self.made.get(name)
        if q is None or q.kind not in kinds or q.activation != "none" or self.uses[name] != 1:
            return None
        return q

    def _merge(self, q: Primitive, p: Primitive, **changes: Any) -> Primitive:
        """Return `q` followed by `p`, in the place of `p`."""
        del self.made[q.output]
        sources = (*q.sources, *p.sources)
        return replace(q, output=p.output, shape=p.shape, sources=sources, **changes)

    def _gate(self, p: Primitive) -> Primitive:
        """Return x sigmoid(x) and x (1 + erf(x / sqrt(2))) as activations."""
        if p.kind != "multiply":
            return p
        for x, gate in (p.inputs, p.inputs[::-1]):
            q = self._single(gate)
            if q is not None and q.inputs == (x,) and q.activation in _GATES and _is_scale(q, 1, 0):
                self.uses[x] -= 1
                return self._merge(q, p, kind="activate", activation=_GATES[q.activation])
            if q is None or q.activation != "none" or not _is_scale(q, 1, 1):
                continue
            erf = self._single(q.inputs[0])
            if erf is None or erf.inputs != (x,) or erf.activation != "erf":
                continue
            if _is_scale(erf, math.sqrt(0.5), 0):
                del self.made[erf.output]
                self.uses[x] -= 1
                q = replace(q, sources=(*erf.sources, *q.sources), inputs=(x,))
                return self._merge(q, p, kind="activate", activation="twice_gelu")
        return p

    def _half(self, p: Primitive) -> Primitive:
        """Return half of twice a gelu as a gelu."""
        q = self.made.get(p.inputs[0])
        if q is None or q.activation != "twice_gelu" or self.uses[q.output] != 1:
            return p
        if p.kind != "affine" or not _is_scale(p, 0.5, 0):
            return p
        return self._merge(q, p, activation="gelu")

    def _single(self, name: str) -> Primitive | None:
        """Return the map of single values that makes a value with a single use, or None."""
        q = self.made.get(name)
        is_map = q is not None and q.kind in ("activate", "affine") and len(q.inputs) == 1
        return q if is_map and self.uses[name] == 1 else None

    def _activate(self, p: Primitive) -> Primitive:
        kinds = ("convolve", "affine", "normalize", "add", "multiply", "resample", "spread")
        if (q := self._producer(p.inputs[0], kinds)) is None:
            return p
        return self._merge(q, p, activation=p.activation, alpha=p.alpha)

    def _affine(self, p: Primitive) -> Primitive:
        q = self._producer(p.inputs[0], _LINEAR)
        if q is None or len(q.inputs) > 1:
            return p
        if q.kind != "convolve":
            shift = q.shift * p.scale + p.shift
            return self._merge(q, p, scale=q.scale * p.scale, shift=shift)
        try:
            last = _scaled(q.links[-1], p.scale, p.shift)
        except Unsupported:  # the copies of a stage have one weight
            return p
        return self._merge(q, p, links=(*q.links[:-1], last))

    def _add(self, p: Primitive) -> Primitive:
        order = list(self.made)
        found = [self._producer(name, _LINEAR) for name in p.inputs]
        linear = [q for q in found if q is not None and len(q.inputs) == 1 and q.shape == p.shape]
        if not linear:
            return p
        q = max(linear, key=lambda q: order.index(q.output))
        residual = p.inputs[p.inputs[0] == q.output]
        return self._merge(q, p, inputs=(*q.inputs, residual))

    def _convolve(self, p: Primitive) -> Primitive:
        """Make zero padding that of the first stage, and every n-th sample its stride."""
        p = self._flattened(p)
        q = self._producer(p.inputs[0], ("pad", "resample"))
        (stage, epilogue), g = p.links[0], p.links[0][0].geometry
        if q is None or stage.transposed or g.padding_mode != "zeros":
            return p
        if q.kind == "pad" and q.options["mode"] == "constant" and not q.options["value"]:
            more = zip(q.options["before"][3 - g.ndim :], q.options["after"][3 - g.ndim :])
            g = replace(g, padding=tuple((b + c, a + d) for (b, a), (c, d) in zip(g.padding, more)))
        elif q.kind == "resample" and max(stage.kernel) == 1 and not any(map(any, g.padding)):
            steps = [_step(index) for index in q.options["index"][3 - g.ndim :]]
            if 0 in steps:
                return p
            g = replace(g, stride=tuple(s * n for s, n in zip(g.stride, steps)))
        else:
            return p
        links = ((replace(stage, geometry=g), epilogue), *p.links[1:])
        return self._merge(q, p, kind="convolve", inputs=(q.inputs[0], *p.inputs[1:]), links=links)

    def _flattened(self, p: Primitive) -> Primitive:
        """Permute the weights of a linear layer in place of the axes that are flattened for it."""
        view = self._producer(p.inputs[0], ("view",))
        turned = None if view is None else self._producer(view.inputs[0], ("transpose",))
        stage, epilogue = p.links[0]
        if view is None or turned is None or len(view.shape) > 1 or stage.transposed:
            return p
        weight = stage.weight.reshape(len(stage.weight), *turned.shape)
        axes = 1 + np.argsort(turned.options["order"])
        stage = replace(stage, weight=weight.transpose(0, *axes).reshape(stage.weight.shape))
        del self.made[turned.output]
        sources = (*turned.sources, *view.sources)
        self.made[view.output] = replace(view, inputs=turned.inputs, sources=sources)
        return replace(p, links=((stage, epilogue), *p.links[1:]))

    def _resample(self, p: Primitive) -> Primitive:
        q = self._producer(p.inputs[0], ("convolve", "resample"))
        if q is None:
            return p
        if q.kind == "convolve":
            return self._cropped(q, p)
        pairs = zip(q.options["index"], p.options["index"])
        index = tuple(a if b is None else b if a is None else a[b] for a, b in pairs)
        return self._merge(q, p, options={"index": index})

    def _cropped(self, q: Primitive, p: Primitive) -> Primitive:
        """Make a crop of a transposed convolution its padding."""
        (stage, epilogue), g = q.links[-1], q.links[-1][0].geometry
        tables = p.options["index"][3 - g.ndim :]
        is_crop = all(index is None or (np.diff(index) == 1).all() for index in tables)
        if not stage.transposed or len(q.inputs) > 1 or not is_crop:
            return p
        padding = tuple(
            (b, a) if index is None else (b + int(index[0]), a + n - 1 - int(index[-1]))
            for (b, a), index, n in zip(g.padding, tables, q.shape[1:])
        )
        stage = replace(stage, geometry=replace(g, padding=padding))
        return self._merge(q, p, links=(*q.links[:-1], (stage, epilogue)))


def _step(index: Array | None) -> int:
    """Return the distance of samples from the first one on, 0 if they have no common one."""
    if index is None:
        return 1
    step = int(index[1] - index[0]) if len(index) > 1 else 1
    return step if step > 0 and np.array_equal(index, np.arange(len(index)) * step) else 0


def _is_scale(p: Primitive, scale: float, shift: float) -> bool:
    """Whether a map has this scale and shift for all channels, before its activation."""
    if p.scale is None:
        return (scale, shift) == (1, 0)
    return bool(np.allclose(p.scale, scale, 1e-6, 0) and np.allclose(p.shift, shift, 1e-6, 0))


def _scaled(link: Link, scale: Array, shift: Array) -> Link:
    """Return a link followed by an affine map; computed in float64."""
    stage, epilogue = link
    weight = stage.weight.astype(np.float64)
    spatial = (1,) * len(stage.kernel)
    if stage.transposed:  # rows are input channels
        groups = weight.reshape(stage.groups, -1, *weight.shape[1:])
        weight = groups * scale.reshape(stage.groups, 1, -1, *spatial)
        weight = weight.reshape(stage.weight.shape)
    elif stage.outer * stage.inner == 1:
        weight = weight * scale.reshape(-1, 1, *spatial)
    else:
        copies = scale.reshape(stage.outer, -1, stage.inner)
        if np.ptp(copies, axis=(0, 2)).any():
            raise Unsupported("a scale that differs between the copies of a stage")
        weight = weight * copies[0, :, 0].reshape(-1, 1, *spatial)
    bias = shift if epilogue.bias is None else epilogue.bias * scale + shift
    return replace(stage, weight=weight), epilogue._replace(bias=bias)


def emit(
    builder: ProgramBuilder,
    p: Primitive,
    values: Mapping[str, Value],
    shapes: MutableMapping[str, Ints],
) -> Value:
    """Add a primitive to a program; return the value of its output.

    Parameters
    ----------
    builder : ProgramBuilder
        Builder of the program.
    p : Primitive
        Primitive whose inputs are in `values`.
    values : mapping of str to Value
        Values so far.
    shapes : mutable mapping of str to tuple of int
        Shapes of values in the framework, without the batch; that of the output is added.

    Returns
    -------
    Value

    Raises
    ------
    Unsupported
        If a program has no operation for the primitive.

    Examples
    --------
    >>> from lowrank.engine.network import Primitive, emit
    >>> from lowrank.engine.program import ProgramBuilder
    >>> builder = ProgramBuilder("float32")
    >>> x = builder.input((16, 1, 8, 8))
    >>> p = Primitive("view", ("x",), "y", (1024,))
    >>> emit(builder, p, {"x": x}, {"x": (16, 8, 8)}).shape
    (16, 1, 8, 8)
    """
    if p.activation not in ACTIVATIONS:
        raise Unsupported(f"activation {p.activation}")
    shapes[p.output] = p.shape
    return _Emitter(builder, p, values, shapes).run()


class _Emitter:
    """One primitive and the builder that it is added to."""

    def __init__(
        self,
        builder: ProgramBuilder,
        p: Primitive,
        values: Mapping[str, Value],
        shapes: Mapping[str, Ints],
    ) -> None:
        self.builder, self.p = builder, p
        self.inputs = [values[name] for name in p.inputs]
        self.shapes = [shapes[name] for name in p.inputs]
        self.epilogue: dict[str, Any] = {"activation": p.activation, "alpha": p.alpha}

    def run(self) -> Value:
        result: Value = getattr(self, f"_{self.p.kind}")()
        if math.prod(result.shape) != math.prod(self.p.shape):
            raise Unsupported(f"{self.p.kind} to {self.p.shape}")
        return result

    def _plain(self, number: int = 0) -> Value:
        """Return an input whose axes are those of its value."""
        value, shape = self.inputs[number], self.shapes[number]
        if value.shape != value_shape(shape):
            raise Unsupported(f"{self.p.kind} of a reshaped value")
        return value

    def _convolve(self) -> Value:
        links = list(self.p.links)
        value = self.inputs[0]
        if value.shape != value_shape(self.shapes[0]):
            links[0] = _over_plane(links[0], value.shape)
        for number, link in enumerate(links[:-1]):
            value = self.builder.chain(value, [link], name=f"{self.p.name}.{number}")
        return self._last(value, links[-1])

    def _affine(self) -> Value:
        p, value = self.p, self._plain()
        channels = value.shape[0]
        stage = Stage(p.scale.reshape(-1, 1, 1), Geometry.of(1), groups=channels)
        return self._last(value, (stage, Epilogue(p.shift)))

    def _last(self, value: Value, link: Link) -> Value:
        """Add a stage with the residual and the activation of the primitive."""

        def add(
            residual: Value | None = None, activation: str = "none", alpha: float = 0.0
        ) -> Value:
            final = link[0], Epilogue(link[1].bias, activation)  # type: ignore[arg-type]
            return self.builder.chain(value, [final], residual, alpha, self.p.name)

        return self._with_epilogue(add)

    def _normalize(self) -> Value:
        value, p, epsilon = self._plain(), self.p, self.p.options["epsilon"]
        if epsilon < np.finfo(self.builder.dtype).tiny:  # constant channels would become NaN
            raise Unsupported(f"normalization with epsilon {epsilon}")
        add = partial(self.builder.normalize, value, p.scale, p.shift, epsilon, name=p.name)
        return self._with_epilogue(add)

    def _softmax(self) -> Value:
        return self.builder.softmax(self._plain(), self.p.name)

    def _with_epilogue(self, add: Callable[..., Value]) -> Value:
        """Add an operation that may take a residual of its result's shape, and the activation."""
        if len(self.inputs) == 1:
            return add(**self.epilogue)
        residual = self._plain(1)
        if residual.shape == value_shape(self.p.shape):
            return add(residual=residual, **self.epilogue)
        self.shapes[0] = self.p.shape
        return self._combine(add(), residual, "add")

    def _activate(self) -> Value:
        return self.builder.combine(self.inputs[0], name=self.p.activation, **self.epilogue)

    def _add(self) -> Value:
        return self._combine(self.inputs[0], self.inputs[1], "add")

    def _multiply(self) -> Value:
        return self._combine(self.inputs[0], self.inputs[1], "multiply")

    def _combine(self, a: Value, b: Value, mode: Any) -> Value:
        if math.prod(a.shape) < math.prod(b.shape):
            a, b = b, a
        one = a.shape[0] == b.shape[0] and b.size == ONES
        if self.shapes[0] != self.shapes[1] and not (one and len(set(map(len, self.shapes))) == 1):
            raise Unsupported(f"{mode} of shapes {self.shapes[0]} and {self.shapes[1]}")
        if a.shape != b.shape and not one:
            raise Unsupported(f"{mode} of a reshaped value")
        return self.builder.combine(a, b, mode, name=mode, **self.epilogue)

    def _concatenate(self) -> Value:
        values = [self._plain(i) for i in range(len(self.inputs))]
        if len({v.size for v in values}) > 1:
            raise Unsupported("concatenation of values of different sizes")
        return self.builder.concatenate(values)

    def _pool(self) -> Value:
        return self.builder.pool(self._plain(), **self.p.options)

    def _pad(self) -> Value:
        value, o = self._plain(), self.p.options
        sides = list(zip(value.size, o["before"], o["after"]))
        if any(min(b, a) < 0 for _, b, a in sides):
            raise Unsupported("negative padding")
        index = [padded_indices(n, b, a, o["mode"], 1) if b or a else None for n, b, a in sides]
        size = on_three((n + b + a for n, b, a in sides), 1)
        return self.builder.combine(
            value, alpha=o["value"], index=(index[0], index[1], index[2]), size=size, name="pad"
        )

    def _resample(self) -> Value:
        value, index = self._plain(), self.p.options["index"]
        size = on_three((n if i is None else len(i) for n, i in zip(value.size, index)), 1)
        return self.builder.combine(value, index=index, size=size, name="resample", **self.epilogue)

    def _select(self) -> Value:
        value, channels = self._plain(), self.p.options["channels"]
        selected = self.builder.permute(value, channels)
        return replace(selected, shape=(len(channels), *value.size))

    def _spread(self) -> Value:
        value = self._plain()
        if self.p.activation != "none":  # before, on vectors that are full
            value = self.builder.combine(value, name=self.p.activation, **self.epilogue)
        return self.builder.depth_to_space(value, self.p.options["channels"], self.p.name)

    def _view(self) -> Value:
        return self.inputs[0]

    def _transpose(self) -> Value:
        """Return a permutation of channels: of axes that they were reshaped to."""
        value, shape, order = self.inputs[0], self.shapes[0], self.p.options["order"]
        moved = max((i + 1 for i, axis in enumerate(order) if axis != i), default=0)
        axes = next(
            (n for n in range(moved, len(shape) + 1) if math.prod(shape[:n]) == value.shape[0]), 0
        )
        if axes < moved:
            raise Unsupported("transposition of spatial axes")
        channels = np.arange(value.shape[0]).reshape(shape[:axes])
        return self.builder.permute(value, channels.transpose(order[:axes]).reshape(-1).tolist())


def _over_plane(link: Link, shape: Ints) -> Link:
    """Return a linear layer of a flattened value as a convolution over its whole plane."""
    stage, epilogue = link
    if stage.groups * stage.outer * stage.inner > 1 or stage.transposed or max(stage.kernel) > 1:
        raise Unsupported("convolution of a reshaped value")
    weight = stage.weight.reshape(len(stage.weight), *shape)
    return Stage(weight, Geometry.of(3)), epilogue


def describe_operation(operation: Operation) -> tuple[str, str, str, str]:
    """Return the name, algorithm, predicted error and MACs of an operation, as text."""
    algorithm = operation.kind
    if operation.kind == "winograd":
        shapes = [algorithm_shape(n) for n in operation.algorithm if n]
        outputs, taps = ("x".join(str(s[i]) for s in shapes) for i in range(2))
        algorithm = f"F({outputs}, {taps})"
    error = f"{operation.error:.0e}" if operation.error else ""
    macs = format_count(operation.macs) if operation.macs else ""
    return operation.name, algorithm, error, macs
