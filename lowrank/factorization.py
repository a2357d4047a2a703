"""Factorization: one immutable description from which everything else is derived."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any, cast, final, get_args

import numpy as np

from lowrank import engine
from lowrank._typing import Array, Ints, PaddingMode, trailing
from lowrank.core import chain_algebra
from lowrank.core.cost import Cost, chain_cost, chain_shapes, stage_costs
from lowrank.core.geometry import Geometry, as_integers
from lowrank.core.stage import Activation, Epilogue, Stage, as_read_only


@final
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Factorization:
    """A linear convolution written as a chain of stages; the dense one is a chain of one.

    Never subclassed: a family (CP, Tucker, ...) is a function that returns one.  Make the
    dense one with :func:`lowrank.dense`, any other chain with :func:`lowrank.chain`.

    Attributes
    ----------
    stages : tuple of Stage
        In the order in which they run.
    geometry : Geometry
        Stride, padding and dilation of the convolution that the chain stands for.
    groups : int
        Its groups.
    bias : ndarray or None, shape (out,)
        Added after the last stage, never before: a bias ahead of zero padding would not be
        the same convolution.
    family, variant : str
        Which family made the chain, and which of its variants.
    rank : tuple of int
        Its rank or ranks, in the order that the family documents.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> f = lowrank.dense(np.ones((8, 4, 3, 3)), padding=1)
    >>> f(np.ones((1, 4, 5, 5)))[0, 0, 2, 2]
    np.float64(36.0)
    """

    stages: tuple[Stage, ...]
    geometry: Geometry
    groups: int = 1
    bias: Array | None = None
    family: str = "dense"
    variant: str = ""
    rank: Ints = ()

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a chain needs at least one stage")
        for a, b in zip(self.stages, self.stages[1:]):
            if a.out_channels != b.in_channels:
                raise ValueError(
                    f"a stage gives {a.out_channels} channels but the next takes {b.in_channels}"
                )
        if self.groups < 1 or self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"groups must be at least 1 and divide {self.in_channels} and "
                f"{self.out_channels} channels, got {self.groups}"
            )
        if self.groups > 1 and not chain_algebra.is_block_diagonal(self.stages, self.groups):
            raise ValueError(f"the stages mix the channels of {self.groups} groups")
        homes = {engine.device_of(s.weight) for s in self.stages}
        homes |= set() if self.bias is None else {engine.device_of(self.bias)}
        if len(homes) > 1:
            raise ValueError(
                f"weights and bias are on {' and '.join(sorted(homes))}: a chain lives in one place"
            )
        if self.bias is not None:
            if self.bias.shape != (self.out_channels,):
                raise ValueError(
                    f"bias must have shape ({self.out_channels},), got {self.bias.shape}"
                )
            object.__setattr__(self, "bias", as_read_only(self.bias))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    @property
    def in_channels(self) -> int:
        """Channels that the chain takes."""
        return self.stages[0].in_channels

    @property
    def out_channels(self) -> int:
        """Channels that the chain gives."""
        return self.stages[-1].out_channels

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return self.geometry.ndim

    @property
    def transposed(self) -> bool:
        """Whether this is a transposed convolution."""
        return self.stages[0].transposed

    @property
    def dtype(self) -> np.dtype[Any]:
        """Precision of the weights."""
        return np.result_type(*(s.weight for s in self.stages))

    @property
    def params(self) -> int:
        """Numbers that are stored."""
        return sum(s.weight.size for s in self.stages) + (
            0 if self.bias is None else self.bias.size
        )

    def to_dense(self) -> Array:
        r"""Multiply the chain out.

        Returns
        -------
        ndarray, shape (out, in // groups, \*kernel)
            The kernel that the chain stands for, in the layout that :func:`lowrank.dense`
            takes; for a transposed convolution (in, out // groups, \*kernel).  NumPy's, wherever
            the weights are.

        Raises
        ------
        ValueError
            If plain and transposed stages are mixed.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> weight = np.arange(24.0).reshape(2, 3, 2, 2)
        >>> f = lowrank.spatial_svd(lowrank.dense(weight), rank=4)
        >>> bool(np.allclose(f.to_dense(), weight))
        True
        """
        kernel = chain_algebra.compose(self.to("cpu").stages, self.groups)
        every = (slice(None, None, d) for d in self.geometry.dilation)
        return np.asarray(kernel[trailing(*every)])

    def error(self, weight: Array) -> float:
        """Relative Frobenius error ``||to_dense() - weight|| / ||weight||``.

        For inputs of white noise this is also the relative RMS error of the output.

        Parameters
        ----------
        weight : ndarray
            The dense kernel to compare with, in the layout of :meth:`to_dense`.

        Returns
        -------
        float
            0 for equal kernels; inf if `weight` is zero and the chain is not.

        Raises
        ------
        ValueError
            If `weight` has another shape than :meth:`to_dense`.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> f = lowrank.dense(np.ones((1, 1, 3)))
        >>> f.error(2 * np.ones((1, 1, 3)))
        0.5
        """
        given = engine.moved(weight, "cpu") if engine.on_gpu(weight) else np.asarray(weight)
        return chain_algebra.relative_error(self.to_dense(), given)

    def cost(self, input_shape: Sequence[int]) -> Cost:
        """Multiply-adds, parameters and memory for one example.

        Parameters
        ----------
        input_shape : sequence of int
            (channels, \\*spatial), or the spatial size alone.

        Returns
        -------
        Cost
            Counts, exact; memory in array elements.

        Raises
        ------
        ValueError
            If the channels do not match, or the kernel does not fit.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> lowrank.dense(np.ones((1, 1, 3, 3))).cost((5, 5)).macs
        81
        """
        return chain_cost(self.stages, self.input_shape(input_shape), self.bias is not None)

    def stage_costs(self, input_shape: Sequence[int]) -> tuple[Cost, ...]:
        r"""Cost of each stage alone, in order.

        Parameters
        ----------
        input_shape : sequence of int
            (channels, \*spatial) of the chain's input, or the spatial size alone.

        Returns
        -------
        tuple of Cost
            As of :meth:`cost`; biases are left out.

        Raises
        ------
        ValueError
            If the channels do not match, or the kernel does not fit.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> f = lowrank.network_decoupling(lowrank.dense(np.ones((128, 3, 3, 3))), rank=1)
        >>> [c.macs for c in f.stage_costs((7, 7))]
        [675, 9600]
        """
        return stage_costs(self.stages, self.input_shape(input_shape))

    def output_shape(self, input_shape: Sequence[int]) -> Ints:
        r"""Shape of the output for one example.

        Parameters
        ----------
        input_shape : sequence of int
            (channels, \*spatial), or the spatial size alone.

        Returns
        -------
        tuple of int
            (channels, \*spatial).

        Raises
        ------
        ValueError
            If the channels do not match, or the kernel does not fit.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> lowrank.dense(np.ones((8, 3, 3, 3)), stride=2, padding=1).output_shape((32, 32))
        (8, 16, 16)
        """
        return chain_shapes(self.stages, self.input_shape(input_shape))[-1]

    def input_shape(self, input_shape: Sequence[int]) -> Ints:
        r"""The shape of an example with its channels in front.

        Parameters
        ----------
        input_shape : sequence of int
            (channels, \*spatial), or the spatial size alone.

        Returns
        -------
        tuple of int
            (channels, \*spatial).

        Raises
        ------
        ValueError, TypeError
            If the channels or the number of axes do not match, or an entry is no integer.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> lowrank.dense(np.ones((8, 3, 3, 3))).input_shape((32, 32))
        (3, 32, 32)
        """
        sizes = input_shape if isinstance(input_shape, Iterable) else (input_shape,)
        try:
            shape = tuple(operator.index(n) for n in sizes)
        except TypeError:
            raise TypeError(f"input_shape must be integers, got {input_shape!r}") from None
        if len(shape) == self.ndim:
            shape = (self.in_channels, *shape)
        if len(shape) != self.ndim + 1 or shape[0] != self.in_channels:
            raise ValueError(
                f"input_shape must be ({self.in_channels}, and {self.ndim} spatial sizes), "
                f"got {shape}"
            )
        return shape

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Run the chain.

        Parameters
        ----------
        x : ndarray, cupy.ndarray or dask.array.Array, shape (batch, channels, \\*spatial)
            Floating-point; it is computed in its own precision.  A CuPy array runs on its GPU, for
            a chain that was moved there; see :meth:`to`.
        out : ndarray, optional
            Where to put the result; must not overlap `x`.

        Returns
        -------
        ndarray or dask.array.Array, shape (batch, out, \\*spatial)
            A Dask array gives a lazy one, with the bits that the whole array in memory gives.

        Raises
        ------
        TypeError
            If `x` is not a floating-point array that a backend runs.
        ValueError
            If its shape does not fit.
        """
        lazy = dask_backend(x)
        if lazy is not None:
            if out is not None:
                raise TypeError("out must not be given for a Dask array: the result is one")
            return lazy.run(self, x)  # type: ignore[no-any-return]
        x = as_input(self, x)
        return self.compile(x.shape[1:], x.dtype)(x, out)

    def compile(
        self,
        input_shape: Sequence[int],
        dtype: Any = None,
        threads: int | None = None,
        activation: Activation = "none",
    ) -> engine.Runner:
        """Plan the chain for one input shape: weights packed, tiles chosen, once.

        Parameters
        ----------
        input_shape : sequence of int
            (channels, \\*spatial), or the spatial size alone; the batch is free.
        dtype : dtype, optional
            float32 or float64, on a GPU float16 and bfloat16 as well; the precision of the weights
            if not given.
        threads : int, optional
            Threads to use; all that OpenMP offers if not given, and of no meaning on a GPU.
        activation : str
            What follows the chain and its bias: ``"none"``, ``"relu"`` or ``"relu6"``.

        Returns
        -------
        callable
            ``run(x, out=None)``, to be called many times, from any thread.  `x` and `out` may
            also hold 8- or 16-bit integers: those of `out` are rounded to nearest, halves to
            even, and saturate.  ``run.breakdown(x)`` says where the time goes, stage by stage.
            On a GPU threads that share a stream need a plan each.

        Raises
        ------
        ValueError, TypeError
            As for :meth:`__call__`.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> f = lowrank.dense(np.ones((4, 2, 3)))
        >>> run = f.compile((2, 10), np.float32)
        >>> run(np.ones((3, 2, 10), np.float32)).shape
        (3, 4, 8)
        """
        return compile_chains([(self, activation)], input_shape, dtype, threads)

    def astype(self, dtype: Any) -> Factorization:
        """The same chain in another floating-point precision.

        Parameters
        ----------
        dtype : dtype
            Such as float32; half precisions are for storage, chains run in float32 and float64.

        Returns
        -------
        Factorization
            A new object.

        Raises
        ------
        TypeError
            If `dtype` is not a floating-point type.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> lowrank.dense(np.ones((8, 3, 3, 3))).astype(np.float32).dtype
        dtype('float32')
        """
        if np.dtype(dtype).kind != "f":
            raise TypeError(f"dtype must be a floating-point type, got {np.dtype(dtype)}")
        return replace(
            self,
            stages=tuple(replace(s, weight=s.weight.astype(dtype)) for s in self.stages),
            bias=None if self.bias is None else self.bias.astype(dtype),
        )

    @property
    def device(self) -> str:
        """Where the weights are: ``"cpu"``, or such as ``"cuda:0"``."""
        return engine.device_of(self.stages[0].weight)

    def to(self, device: str) -> Factorization:
        """The same chain with its weights on another device; CuPy arrays then run there.

        Parameters
        ----------
        device : str
            ``"cpu"``, ``"cuda"`` (the current GPU), or such as ``"cuda:1"``.

        Returns
        -------
        Factorization
            A new object; this one where it is there already.

        Raises
        ------
        ImportError
            If CuPy is not installed.
        RuntimeError
            If there is no GPU, or no driver that this CuPy can use.
        ValueError
            If there is no such device.
        MemoryError
            If the weights do not fit.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> f = lowrank.dense(np.ones((8, 3, 3, 3)))
        >>> f.to("cpu") is f, f.device
        (True, 'cpu')
        """
        if engine.is_there(self.stages[0].weight, device):
            return self
        bias = None if self.bias is None else engine.moved(self.bias, device)
        moved = (replace(s, weight=engine.moved(s.weight, device)) for s in self.stages)
        return replace(self, stages=tuple(moved), bias=bias)

    def adjoint(self) -> Factorization:
        """The transposed convolution with the same weights, its stages in reverse; without bias.

        Returns
        -------
        Factorization
            For zero padding ``<f(x), y> == <x, f.adjoint()(y)>`` whenever the shapes agree.

        Raises
        ------
        ValueError
            If the border is not zeros.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> f = lowrank.dense(np.ones((8, 3, 3, 3)), stride=2)
        >>> f.adjoint().output_shape((7, 7))
        (3, 15, 15)
        """
        return replace(self, stages=tuple(s.adjoint() for s in reversed(self.stages)), bias=None)

    def __repr__(self) -> str:
        name = " ".join(filter(None, (self.family, self.variant)))
        rank = f" rank {', '.join(map(str, self.rank))}" if self.rank else ""
        chain = " -> ".join("x".join(map(str, s.weight.shape)) for s in self.stages)
        return f"<Factorization {name}{rank}: {chain}, {self.params} params>"


def dense(
    weight: Array,
    bias: Array | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int | Sequence[int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
    value: float = 0.0,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
) -> Factorization:
    r"""The convolution with one dense kernel, as a chain of one stage.

    Parameters
    ----------
    weight : array_like, shape (out, in // groups, \*kernel)
        Cross-correlation kernel over 1, 2 or 3 spatial axes, PyTorch's layout; for a
        transposed convolution (in, out // groups, \*kernel).  float32 and float64 are kept,
        half precisions become float32.  It is copied.
    bias : array_like, shape (out,), optional
        Added to the output.
    stride, dilation : int or sequence of int
        One for all axes or one an axis.
    padding : int, sequence, ``"same"`` or ``"valid"``
        One for all axes, or one an axis: an int, or a (before, after) pair.  ``"same"``
        keeps the size and needs stride 1.
    groups : int
        Number of groups that the channels are split into.
    padding_mode : str
        ``"zeros"``, ``"reflect"``, ``"replicate"``, ``"circular"``, ``"symmetric"`` or
        ``"constant"``; see :class:`lowrank.Geometry`.
    value : float
        The constant of mode ``"constant"``.
    transposed : bool
        A transposed convolution.
    output_padding : int or sequence of int
        Samples added at the end of a transposed convolution's output.

    Returns
    -------
    Factorization
        What every family takes, and the baseline that it is compared with.

    Raises
    ------
    TypeError
        If `weight` or `bias` is not of a real floating-point type.
    ValueError
        If a shape, `groups`, or the geometry is impossible, or a weight is NaN or infinite.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.ones((64, 16, 3, 3), np.float32), stride=2, padding=1)
    >>> conv.output_shape((16, 32, 32))
    (64, 16, 16)
    """
    w = _as_floating("weight", weight)
    if w.ndim not in (3, 4, 5):
        raise ValueError(
            "weight must be (out, in / groups) and 1 to 3 spatial axes, "
            f"got shape {w.shape}" + (": add kernel axes of length 1" if w.ndim == 2 else "")
        )
    if not np.isfinite(w).all():
        raise ValueError("weight holds NaN or infinite values")
    n = w.ndim - 2
    if isinstance(padding, str):
        padding = _named_padding(padding, w.shape[2:], stride, dilation, transposed)
    geometry = Geometry.of(n, stride, padding, dilation, padding_mode, value, output_padding)
    if not transposed and any(geometry.output_padding):
        raise ValueError("output_padding belongs to transposed convolutions")
    (groups,) = as_integers("groups", groups, 1)
    if groups < 1 or w.shape[0] % groups:
        raise ValueError(
            f"groups must be at least 1 and divide the {w.shape[0]} channels of the "
            f"weight's first axis, got {groups!r}"
        )
    stage = Stage(w, geometry, groups, transposed=transposed)
    if bias is not None:
        bias = _as_floating("bias", bias).astype(w.dtype)
        if not np.isfinite(bias).all():
            raise ValueError("bias holds NaN or infinite values")
    return Factorization((stage,), geometry, groups, bias)


def chain(
    stages: Sequence[Stage], bias: Array | None = None, groups: int | None = None
) -> Factorization:
    """Any stages, one after another, as one object that runs, prices and saves like the others.

    Parameters
    ----------
    stages : sequence of Stage
        In the order in which they run; each takes the channels that the one before gives.
    bias : ndarray, shape (out,), optional
        Added after the last stage.
    groups : int, optional
        Groups of the chain as a whole, for :meth:`Factorization.to_dense`; if not given those
        of the stage for a chain of one, else 1.

    Returns
    -------
    Factorization
        Of family ``"chain"``.  Where two stages pad the same axis it is not the convolution
        with :meth:`Factorization.to_dense` near the border, and no family claims it is.

    Raises
    ------
    ValueError
        If there is no stage, channels do not match, or a stage mixes the groups.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> g = lowrank.Geometry.of(2, padding=1)
    >>> depthwise = lowrank.Stage(np.ones((3, 1, 3, 3)), g, groups=3)
    >>> pointwise = lowrank.Stage(np.ones((128, 3, 1, 1)), lowrank.Geometry.of(2))
    >>> lowrank.chain([depthwise, pointwise]).params
    411
    """
    stages = tuple(stages)
    if not stages:
        raise ValueError("a chain needs at least one stage")
    one_way = len({s.transposed for s in stages}) == 1
    # Of a chain that goes both ways the geometry is a list of what its stages say, no more.
    plain = list(stages)
    if one_way and stages[0].transposed:
        plain = [s.adjoint() for s in reversed(stages)]
    if groups is None:
        first = stages[0]
        plain_one = len(stages) == first.outer == first.inner == 1 and first.shuffle == (1, 1)
        groups = first.groups if plain_one else 1
    (groups,) = as_integers("groups", groups, 1)
    if bias is not None:
        bias = _as_floating("bias", bias)
    return Factorization(stages, chain_algebra.chain_geometry(plain), groups, bias, "chain")


def compile_chains(
    parts: Sequence[tuple[Factorization, Activation]],
    input_shape: Sequence[int],
    dtype: Any = None,
    threads: int | None = None,
) -> engine.Runner:
    """Plan chains, each with what follows it, to run as one; see :meth:`Factorization.compile`."""
    first = parts[0][0]
    dtype = np.result_type(*(f.dtype for f, _ in parts)) if dtype is None else dtype
    dtype = engine.precision(dtype, first.stages[0].weight)
    if threads is not None:
        (threads,) = as_integers("threads", threads, 1)
    stages: list[Stage] = []
    epilogues: list[Epilogue] = []
    for f, activation in parts:
        if activation not in get_args(Activation):
            raise ValueError(
                f"activation must be one of {', '.join(get_args(Activation))}, got {activation!r}"
            )
        stages += f.stages
        epilogues += [Epilogue()] * (len(f.stages) - 1) + [Epilogue(f.bias, activation)]
    return engine.plan(stages, first.input_shape(input_shape), dtype, epilogues, threads)


def as_input(f: Factorization, x: Array) -> Array:
    """`x` as the chain takes it: float32 or float64, with a batch axis; else says why not."""
    x = _as_floating("x", x, f.stages)
    if x.ndim != f.ndim + 2:
        raise ValueError(f"x must be (batch, channels, and {f.ndim} spatial axes), got {x.shape}")
    return x


def dask_backend(x: object) -> ModuleType | None:
    """What runs `x` if it is a Dask array; imported by name, when the first one arrives."""
    if not type(x).__module__.startswith("dask.array"):
        return None
    return importlib.import_module("lowrank.engine.dask")


def _as_floating(name: str, value: Any, stages: Sequence[Stage] = ()) -> Array:
    """`value` as a float32 or float64 array; of the library of the weights if there are any."""
    if stages:
        engine.check(name, value, stages)
        if not isinstance(value, np.ndarray):  # a GPU's: its plan says what it takes
            return cast(Array, value)
    array = value if engine.is_array(value) else np.asarray(value)
    if array.dtype.name in ("float16", "bfloat16"):
        return array.astype(np.float32)
    if array.dtype.newbyteorder("=") not in (np.float32, np.float64):
        raise TypeError(
            f"{name} must be float32 or float64 (or a half precision), got {array.dtype}: "
            "convert it first, for example with .astype('float32')"
        )
    return as_native_order(array)


def as_native_order(array: Array) -> Array:
    """`array` in native byte order.

    A dtype that spells the same order out, such as those of Zarr's arrays, is another buffer
    format, which the engine does not read: a view does without.
    """
    plain = array.dtype.newbyteorder("=")
    if not isinstance(array, np.ndarray):
        return array
    return array.view(plain) if array.dtype == plain else array.astype(plain)


def _named_padding(
    name: str,
    kernel: Ints,
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    transposed: bool,
) -> list[tuple[int, int]]:
    g = Geometry.of(len(kernel), stride, 0, dilation)
    if name == "valid":
        return [(0, 0)] * len(kernel)
    if name != "same":
        raise ValueError(f"padding must be numbers, 'same' or 'valid', got {name!r}")
    if max(g.stride) > 1 or transposed:
        raise ValueError(
            "padding 'same' needs a plain convolution of stride 1: give numbers "
            f"(stride is {g.stride}, transposed is {transposed})"
        )
    return [((e - 1) // 2, (e - 1) - (e - 1) // 2) for e in g.extent(kernel)]
