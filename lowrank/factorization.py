"""Factorization: an immutable chain of stages, from which everything else is derived."""

# This module stands above engine, since a chain compiles itself.

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, final, get_args

import numpy as np

from lowrank import engine
from lowrank._typing import Array, Ints, PaddingMode, trailing
from lowrank.core import chain_algebra
from lowrank.core.arrays import as_floating, as_read_only, from_tensor
from lowrank.core.cost import Cost, chain_cost, chain_shapes, stage_costs
from lowrank.core.geometry import Geometry, as_integers
from lowrank.core.stage import Activation, Epilogue, Stage
from lowrank.core.threads import as_threads
from lowrank.engine import dask as chunked

KEPT_PLANS = 16  # of calls of chains, which do not compile


@final
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Factorization:
    """A linear convolution as a chain of stages; the dense convolution is a chain of one stage.

    :func:`lowrank.dense` makes the dense chain, :func:`lowrank.chain` any other; families (CP,
    Tucker, ...) are functions that return a Factorization, not subclasses.

    Attributes
    ----------
    stages : tuple of Stage
        Stages in the order in which they run.
    geometry : Geometry
        Stride, padding and dilation of the convolution that the chain represents.
    groups : int
        Groups of that convolution.
    bias : ndarray or None, shape (out,)
        Bias after the last stage; earlier it would change the zero padding of later stages.
    family, variant : str
        Family that made the chain, and its variant.
    rank : tuple of int
        Rank or ranks, in the order that the family documents.

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
                    f"stages must fit: one has {a.out_channels} output channels, the next "
                    f"{b.in_channels} input channels"
                )
        if self.groups < 1 or self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"groups must be at least 1 and divide {self.in_channels} and "
                f"{self.out_channels} channels, got {self.groups}"
            )
        if self.groups > 1 and not chain_algebra.is_block_diagonal(self.stages, self.groups):
            raise ValueError(f"the stages mix the channels of {self.groups} groups")
        devices = {engine.device_of(s.weight) for s in self.stages}
        devices |= set() if self.bias is None else {engine.device_of(self.bias)}
        if len(devices) > 1:
            raise ValueError(
                f"weights and bias must be on one device, got {' and '.join(sorted(devices))}"
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
        """Number of input channels."""
        return self.stages[0].in_channels

    @property
    def out_channels(self) -> int:
        """Number of output channels."""
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
        """Number of stored weights and biases."""
        return sum(s.weight.size for s in self.stages) + (
            0 if self.bias is None else self.bias.size
        )

    def to_dense(self) -> Array:
        r"""Compute the dense kernel of the chain.

        Returns
        -------
        ndarray, shape (out, in // groups, \*kernel)
            Kernel in the layout of :func:`lowrank.dense`; (in, out // groups, \*kernel) for a
            transposed convolution.  A NumPy array, whatever the device of the weights.

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
        """Return the relative Frobenius error ``||to_dense() - weight|| / ||weight||``.

        It is also the relative RMS error of the output for white noise.

        Parameters
        ----------
        weight : ndarray
            Dense kernel to compare with, in the layout of :meth:`to_dense`.

        Returns
        -------
        float
            0 for equal kernels, infinity if `weight` alone is zero.

        Raises
        ------
        ValueError
            If the shape of `weight` is not that of :meth:`to_dense`.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> f = lowrank.dense(np.ones((1, 1, 3)))
        >>> f.error(2 * np.ones((1, 1, 3)))
        0.5
        """
        if engine.is_on_gpu(weight):
            weight = engine.to_device(weight, "cpu")
        return chain_algebra.relative_error(self.to_dense(), np.asarray(weight))

    def cost(self, input_shape: Sequence[int]) -> Cost:
        """Return MACs, parameters and memory for one example.

        Parameters
        ----------
        input_shape : sequence of int
            (channels, \\*spatial), or the spatial size alone.

        Returns
        -------
        Cost
            Exact counts; memory in array elements.

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
        r"""Return the cost of each stage.

        Parameters
        ----------
        input_shape : sequence of int
            (channels, \*spatial) of the chain's input, or the spatial size alone.

        Returns
        -------
        tuple of Cost
            One per stage, without bias.

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
        r"""Return the shape of the output for one example.

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
        r"""Return the full shape of an example.

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
            Floating-point input; its precision is that of the computation.  A CuPy array runs on
            its GPU, by a chain on the same device; see :meth:`to`.
        out : ndarray, optional
            Output array; must not overlap `x`.

        Returns
        -------
        ndarray, cupy.ndarray or dask.array.Array, shape (batch, out, \\*spatial)
            Lazy for a Dask array, with the bits of the result for the whole array in memory.

        Raises
        ------
        TypeError
            If `x` is not a floating-point array of a supported library.
        ValueError
            If its shape does not fit.

        Notes
        -----
        Plans of the last shapes are kept: only the first call of a shape makes one.
        """
        if chunked.is_dask_array(x):
            if out is not None:
                raise TypeError("out must be None for a Dask array: the result is computed later")
            return chunked.run(self, x)  # type: ignore[no-any-return]
        x = as_input(self, x)
        if engine.is_on_gpu(x):  # threads must not share a plan there
            return self.compile(x.shape[1:], x.dtype)(x, out)
        return _kept_plan(self, x.shape[1:], x.dtype, engine.max_threads())(x, out)

    def compile(
        self,
        input_shape: Sequence[int],
        dtype: Any = None,
        threads: int | None = None,
        activation: Activation = "none",
        algorithm: engine.Algorithm = "auto",
    ) -> engine.Runner:
        """Plan the chain for one input shape: pack the weights and choose the tiles.

        Parameters
        ----------
        input_shape : sequence of int
            (channels, \\*spatial), or the spatial size alone; the batch is free.
        dtype : dtype, optional
            float32 or float64, on a GPU also float16 and bfloat16; the precision of the weights
            if not given.
        threads : int, optional
            Number of threads; all that OpenMP offers if not given.  Ignored on a GPU.
        activation : str
            Activation after the bias: ``"none"``, ``"relu"`` or ``"relu6"``.
        algorithm : str
            ``"auto"`` lets stages of 3, 5 or 7 taps run by Winograd (Toom-Cook) algorithms where
            that is faster and the predicted relative error is at most 1e-4; NaN and infinities in
            the input may then spread over a tile of neighbouring outputs, and so may overflow
            from 1/2500 of the largest number on, where outputs are as large as inputs.
            ``"direct"`` adds up products alone.

        Returns
        -------
        callable
            ``run(x, out=None)``, which any thread may call; on a GPU, threads that share a stream
            need one plan each.  `x` and `out` may also hold 8- or 16-bit integers: results are
            rounded to nearest, halves to even, and saturate.  ``run.breakdown(x)`` returns the
            time per stage and step; ``run.describe()`` is a table of the stages with algorithm,
            predicted error and MACs, ``run.describe(x)`` also with times.

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
        return compile_chains([(self, activation)], input_shape, dtype, threads, algorithm)

    def astype(self, dtype: Any) -> Factorization:
        """Return the chain in another floating-point precision.

        Parameters
        ----------
        dtype : dtype
            Such as float32.  Half precisions are for storage: chains run in float32 and float64.

        Returns
        -------
        Factorization

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
        """Device of the weights: ``"cpu"``, or such as ``"cuda:0"``."""
        return engine.device_of(self.stages[0].weight)

    def to(self, device: str) -> Factorization:
        """Return the chain with its weights on another device.

        Parameters
        ----------
        device : str
            ``"cpu"``, ``"cuda"`` (the current GPU), or such as ``"cuda:1"``.

        Returns
        -------
        Factorization
            This object if its weights are on `device` already.

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
        if engine.is_on_device(self.stages[0].weight, device):
            return self
        bias = None if self.bias is None else engine.to_device(self.bias, device)
        moved = (replace(s, weight=engine.to_device(s.weight, device)) for s in self.stages)
        return replace(self, stages=tuple(moved), bias=bias)

    def adjoint(self) -> Factorization:
        """Return the transposed convolution with the same weights, without bias.

        Returns
        -------
        Factorization
            Stages in reverse.  ``<f(x), y> == <x, f.adjoint()(y)>`` whenever the shapes agree.

        Raises
        ------
        ValueError
            If the padding mode is not zeros.

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
    r"""Make the convolution with one dense kernel: a chain of one stage.

    Parameters
    ----------
    weight : array_like, shape (out, in // groups, \*kernel)
        Cross-correlation kernel over 1, 2 or 3 spatial axes, in PyTorch's layout:
        (in, out // groups, \*kernel) for a transposed convolution.  Half precisions become
        float32.  It is copied; of a PyTorch tensor, such as ``conv.weight``, to the CPU.
    bias : array_like, shape (out,), optional
        Bias of the output channels.
    stride, dilation : int or sequence of int
        One number for all axes, or one per axis.
    padding : int, sequence, ``"same"`` or ``"valid"``
        One entry for all axes, or one per axis: an int, or a (before, after) pair.  ``"same"``
        keeps the size and needs stride 1.
    groups : int
        Number of channel groups.
    padding_mode : str
        ``"zeros"``, ``"reflect"``, ``"replicate"``, ``"circular"``, ``"symmetric"`` or
        ``"constant"``; see :class:`lowrank.Geometry`.
    value : float
        Border value of mode ``"constant"``.
    transposed : bool
        True for a transposed convolution.
    output_padding : int or sequence of int
        Samples added at the end of a transposed convolution's output.

    Returns
    -------
    Factorization
        Input of every family, and the baseline of its cost and error.

    Raises
    ------
    TypeError
        If `weight` or `bias` is not of a real floating-point type.
    ValueError
        If a shape, `groups` or the geometry is impossible, or a weight is NaN or infinite.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.ones((64, 16, 3, 3), np.float32), stride=2, padding=1)
    >>> conv.output_shape((16, 32, 32))
    (64, 16, 16)
    """
    w = _to_floating("weight", weight)
    if w.ndim not in (3, 4, 5):
        raise ValueError(
            "weight must have two channel axes and 1 to 3 spatial axes, "
            f"got shape {w.shape}" + (": add kernel axes of length 1" if w.ndim == 2 else "")
        )
    if not np.isfinite(w).all():
        raise ValueError("weight must be finite, got NaN or infinite values")
    n = w.ndim - 2
    if isinstance(padding, str):
        padding = _resolve_padding(padding, w.shape[2:], stride, dilation, transposed)
    geometry = Geometry.of(n, stride, padding, dilation, padding_mode, value, output_padding)
    if not transposed and any(geometry.output_padding):
        raise ValueError(
            f"output_padding must be 0 unless transposed, got {geometry.output_padding}"
        )
    (groups,) = as_integers("groups", groups, 1)
    if groups < 1 or w.shape[0] % groups:
        raise ValueError(
            f"groups must be at least 1 and divide the {w.shape[0]} channels of the first axis "
            f"of weight, got {groups!r}"
        )
    stage = Stage(w, geometry, groups, transposed=transposed)
    if bias is not None:
        bias = _to_floating("bias", bias).astype(w.dtype)
        if not np.isfinite(bias).all():
            raise ValueError("bias must be finite, got NaN or infinite values")
    return Factorization((stage,), geometry, groups, bias)


def chain(
    stages: Sequence[Stage], bias: Array | None = None, groups: int | None = None
) -> Factorization:
    """Make a chain of any stages.

    Parameters
    ----------
    stages : sequence of Stage
        Stages in the order in which they run; the channels of neighbours must match.
    bias : ndarray, shape (out,), optional
        Bias after the last stage.
    groups : int, optional
        Groups of the whole chain, for :meth:`Factorization.to_dense`.  If not given, those of the
        stage for a chain of one, else 1.

    Returns
    -------
    Factorization
        Of family ``"chain"``.  Where two stages pad the same axis, it differs near the border from
        the convolution with the kernel of :meth:`Factorization.to_dense`.

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
    # A chain that mixes plain and transposed stages is no single convolution: its geometry only
    # accumulates those of the stages.
    is_mixed = len({s.transposed for s in stages}) > 1
    plain = stages if is_mixed else chain_algebra.as_plain_chain(stages)
    if groups is None:
        first = stages[0]
        is_grouped = len(stages) == first.outer == first.inner == 1 and first.shuffle == (1, 1)
        groups = first.groups if is_grouped else 1
    (groups,) = as_integers("groups", groups, 1)
    if bias is not None:
        bias = _to_floating("bias", bias)
    return Factorization(stages, chain_algebra.chain_geometry(plain), groups, bias, "chain")


def compile_chains(
    parts: Sequence[tuple[Factorization, Activation]],
    input_shape: Sequence[int],
    dtype: Any = None,
    threads: int | None = None,
    algorithm: engine.Algorithm = "auto",
) -> engine.Runner:
    """Plan (chain, activation) pairs to run in one call; see :meth:`Factorization.compile`."""
    first = parts[0][0]
    dtype = np.result_type(*(f.dtype for f, _ in parts)) if dtype is None else dtype
    dtype = engine.as_precision(dtype, first.stages[0].weight)
    threads = as_threads(threads)
    stages: list[Stage] = []
    epilogues: list[Epilogue] = []
    for f, activation in parts:
        if activation not in get_args(Activation):
            raise ValueError(
                f"activation must be one of {', '.join(get_args(Activation))}, got {activation!r}"
            )
        stages += chain_algebra.levelled(f.stages)
        epilogues += [Epilogue()] * (len(f.stages) - 1) + [Epilogue(f.bias, activation)]
    shape = first.input_shape(input_shape)
    return engine.plan(stages, shape, dtype, epilogues, threads, algorithm=algorithm)


@functools.lru_cache(KEPT_PLANS)
def _kept_plan(f: Factorization, shape: Ints, dtype: Any, threads: int) -> engine.Runner:
    return f.compile(shape, dtype, threads)


def as_input(f: Factorization, x: Array) -> Array:
    """Return `x` as an input of the chain: floating-point, on its device, with a batch axis."""
    engine.check_array("x", x, f.stages)
    if isinstance(x, np.ndarray):  # plans on a GPU check the precision themselves
        x = as_floating("x", x)
    if x.ndim != f.ndim + 2:
        raise ValueError(f"x must be (batch, channels, and {f.ndim} spatial axes), got {x.shape}")
    return x


def _to_floating(name: str, value: Any) -> Array:
    """Return an array-like or a PyTorch tensor as a float32 or float64 array."""
    value = from_tensor(name, value)
    return as_floating(name, value if engine.is_array(value) else np.asarray(value))


def _resolve_padding(
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
