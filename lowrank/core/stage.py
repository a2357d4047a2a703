"""The primitive of all chains: a grouped convolution with replicated weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core.arrays import as_read_only
from lowrank.core.geometry import Geometry, as_integers

Kind = Literal["pointwise", "depthwise", "grouped", "dense"]
Activation = Literal["none", "relu", "relu6"]


class Epilogue(NamedTuple):
    """Bias and activation after a stage.  Plans have epilogues; chains are linear.

    Attributes
    ----------
    bias : ndarray or None, shape (out,)
        Bias of each output channel.
    activation : str
        ``"none"``, ``"relu"`` or ``"relu6"``.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.core.stage import Epilogue
    >>> Epilogue(np.zeros(8), "relu6").activation
    'relu6'
    """

    bias: Array | None = None
    activation: Activation = "none"


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    r"""A convolution with the channel matrix ``I_outer (x) blockdiag(W_1..W_g) (x) I_inner``.

    Attributes
    ----------
    weight : ndarray, shape (groups * out, in, \*kernel)
        Cross-correlation kernels, one block of rows per group; floating-point, read-only.
    geometry : Geometry
        Stride, padding and dilation.
    groups : int
        Number of blocks ``W_g``.
    outer, inner : int
        Replication: the weights are applied `outer` * `inner` times, to the channels
        (outer, group, channel, inner) in C order.  Parameters count once, MACs every time.
    shuffle : (int, int)
        Permutation of the input channels, from (a, b, rest) to (b, a, rest).  ShuffleNet's
        channel shuffle is ``(groups, channels // groups)``.
    transposed : bool
        True for the adjoint: input channels are the rows of `weight`, the stride upsamples,
        padding crops the output, and the inverse permutation acts on the output channels.

    Raises
    ------
    ValueError, TypeError
        If the weight is no floating-point array, or groups, outer, inner or shuffle do not fit it.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import Geometry, Stage
    >>> blur = Stage(np.full((8, 1, 3, 1), 1 / 3), Geometry.of(2, padding=[1, 0]), groups=8)
    >>> blur.kind, blur.output_shape((8, 32, 32))
    ('depthwise', (8, 32, 32))
    """

    weight: Array
    geometry: Geometry
    groups: int = 1
    outer: int = 1
    inner: int = 1
    shuffle: tuple[int, int] = (1, 1)
    transposed: bool = False

    def __post_init__(self) -> None:
        if getattr(getattr(self.weight, "dtype", None), "kind", "") != "f":
            raise TypeError(f"weight must be a floating-point array, got {self.weight!r:.80}")
        for name in ("groups", "outer", "inner"):
            object.__setattr__(self, name, *as_integers(name, getattr(self, name), 1))
        object.__setattr__(self, "shuffle", as_integers("shuffle", self.shuffle, 2))
        if self.weight.ndim != 2 + self.geometry.ndim:
            raise ValueError(
                f"weight must have two channel axes and {self.geometry.ndim} spatial axes, got "
                f"shape {self.weight.shape}"
            )
        if min(self.weight.shape) < 1:
            raise ValueError(f"weight must not be empty, got shape {self.weight.shape}")
        if min(self.groups, self.outer, self.inner, *self.shuffle) < 1:
            raise ValueError(
                "groups, outer, inner and shuffle must be at least 1, got "
                f"{self.groups}, {self.outer}, {self.inner} and {self.shuffle}"
            )
        if self.weight.shape[0] % self.groups:
            raise ValueError(
                f"groups must divide the {self.weight.shape[0]} output channels, got {self.groups}"
            )
        if self.matrix_shape[1] % math.prod(self.shuffle):
            raise ValueError(
                f"shuffle must divide the {self.matrix_shape[1]} input channels, got {self.shuffle}"
            )
        if self.transposed and self.geometry.padding_mode != "zeros":
            raise ValueError(
                f"padding_mode must be zeros for a transposed convolution, whose padding crops the "
                f"output, got {self.geometry.padding_mode}"
            )
        object.__setattr__(self, "weight", as_read_only(self.weight))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    @property
    def kernel(self) -> Ints:
        """Number of taps per axis."""
        return tuple(self.weight.shape[2:])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the channel matrix before any transposition."""
        copies = self.outer * self.inner
        return copies * int(self.weight.shape[0]), copies * self.groups * int(self.weight.shape[1])

    @property
    def in_channels(self) -> int:
        """Number of input channels."""
        return self.matrix_shape[0 if self.transposed else 1]

    @property
    def out_channels(self) -> int:
        """Number of output channels."""
        return self.matrix_shape[1 if self.transposed else 0]

    @property
    def kind(self) -> Kind:
        """Type of convolution."""
        if math.prod(self.kernel) == 1 and self.groups == 1:
            return "pointwise"
        if self.weight.shape[1] == 1 and self.in_channels > 1:
            return "depthwise"
        return "grouped" if self.groups * self.outer * self.inner > 1 else "dense"

    def output_shape(self, shape: Ints) -> Ints:
        r"""Return the shape of the output.

        Parameters
        ----------
        shape : tuple of int
            (channels, \*spatial) of the input.

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
        >>> from lowrank import Geometry, Stage
        >>> Stage(np.ones((8, 3, 3, 3)), Geometry.of(2)).output_shape((3, 10, 12))
        (8, 8, 10)
        """
        if len(shape) != 1 + self.geometry.ndim or shape[0] != self.in_channels:
            raise ValueError(
                f"shape must have {self.in_channels} channels and {self.geometry.ndim} spatial "
                f"axes, got {shape}"
            )
        size = self.geometry.transposed_size if self.transposed else self.geometry.output_size
        return (self.out_channels, *size(shape[1:], self.kernel))

    def channel_permutation(self) -> Array:
        """Return the input channel at each position after the shuffle.

        Returns
        -------
        ndarray of int, shape (channels,)

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank import Geometry, Stage
        >>> stage = Stage(np.ones((6, 1, 1)), Geometry.of(1), groups=6, shuffle=(2, 3))
        >>> stage.channel_permutation()
        array([0, 3, 1, 4, 2, 5])
        """
        a, b = self.shuffle
        return np.arange(self.matrix_shape[1]).reshape(a, b, -1).swapaxes(0, 1).reshape(-1)

    def adjoint(self) -> Stage:
        """Return the adjoint stage, with the same weight.

        Returns
        -------
        Stage

        Raises
        ------
        ValueError
            If the padding mode is not zeros.

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank import Geometry, Stage
        >>> Stage(np.ones((8, 3, 3)), Geometry.of(1, stride=2)).adjoint().output_shape((8, 5))
        (3, 11)
        """
        return replace(self, transposed=not self.transposed)


def abstract_weight(shape: Ints) -> Array:
    """Return a weight that has a shape but no data, for the cost of chains that do not run."""
    return np.broadcast_to(np.float32(np.nan), shape)


def is_abstract(weight: Array) -> bool:
    """Return whether a weight came from :func:`abstract_weight`."""
    return not any(weight.strides)
