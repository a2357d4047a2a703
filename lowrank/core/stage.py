"""The one primitive that everything else is made of: a grouped, tied convolution."""

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
    """What a stage ends with: a bias, then an activation.  Only plans have them, chains are linear.

    Attributes
    ----------
    bias : ndarray or None, shape (out,)
        Added to each output channel.
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
    r"""A convolution whose channel action is ``I_left (x) blockdiag(W_1..W_g) (x) I_right``.

    Attributes
    ----------
    weight : ndarray, shape (groups * out, in, \*kernel)
        One cross-correlation kernel a group; floating-point, copied, read-only.
    geometry : Geometry
        Stride, padding and dilation along the axes that this stage runs along.
    groups : int
        Blocks ``W_g``, each with weights of its own.
    left, right : int
        Tied copies: the same weights are applied `left` * `right` times, to the channels
        (l, g, c, r) in C order.  They count once as parameters and every time as work.
    shuffle : (int, int)
        Input channels, seen as (a, b, rest), are taken in the order (b, a, rest).
        ShuffleNet's channel shuffle is ``(groups, channels // groups)``.
    transposed : bool
        The adjoint of the above instead: input channels are the rows of `weight`, a stride
        spreads the samples out, padding crops the output, and the shuffle undoes itself
        on the output.

    Raises
    ------
    ValueError, TypeError
        If the weight is no floating-point array, or groups, left, right or shuffle do not fit it.

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
                f"weight of shape {self.weight.shape} must have two channel axes and "
                f"{self.geometry.ndim} spatial axes"
            )
        if min(self.weight.shape) < 1:
            raise ValueError(f"weight of shape {self.weight.shape} is empty")
        if min(self.groups, self.outer, self.inner, *self.shuffle) < 1:
            raise ValueError(
                f"groups {self.groups}, outer {self.outer}, inner {self.inner} and "
                f"shuffle {self.shuffle} must be at least 1"
            )
        if self.weight.shape[0] % self.groups:
            raise ValueError(
                f"{self.weight.shape[0]} outputs do not split into {self.groups} groups"
            )
        if self.matrix_shape[1] % math.prod(self.shuffle):
            raise ValueError(
                f"{self.matrix_shape[1]} channels do not split into a shuffle of {self.shuffle}"
            )
        if self.transposed and self.geometry.padding_mode != "zeros":
            raise ValueError(
                "a transposed convolution crops its output, so its padding_mode must be "
                f"zeros, got {self.geometry.padding_mode}"
            )
        object.__setattr__(self, "weight", as_read_only(self.weight))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    @property
    def kernel(self) -> Ints:
        """Taps an axis."""
        return tuple(self.weight.shape[2:])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the channel matrix, whichever way it is applied."""
        tied = self.outer * self.inner
        return tied * int(self.weight.shape[0]), tied * self.groups * int(self.weight.shape[1])

    @property
    def in_channels(self) -> int:
        """Channels that the stage takes."""
        return self.matrix_shape[0 if self.transposed else 1]

    @property
    def out_channels(self) -> int:
        """Channels that the stage gives."""
        return self.matrix_shape[1 if self.transposed else 0]

    @property
    def kind(self) -> Kind:
        """What the field calls this stage."""
        if math.prod(self.kernel) == 1 and self.groups == 1:
            return "pointwise"
        if self.weight.shape[1] == 1 and self.in_channels > 1:
            return "depthwise"
        return "grouped" if self.groups * self.outer * self.inner > 1 else "dense"

    def output_shape(self, shape: Ints) -> Ints:
        r"""Shape of the output.

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
                f"stage takes ({self.in_channels}, {'spatial, ' * self.geometry.ndim}) "
                f"inputs, got {shape}".replace(", )", ")")
            )
        size = self.geometry.transposed_size if self.transposed else self.geometry.output_size
        return (self.out_channels, *size(shape[1:], self.kernel))

    def channel_permutation(self) -> Array:
        """Index of the input channel that stands at each place after the shuffle.

        Returns
        -------
        ndarray of int, shape (channels,)

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank import Geometry, Stage
        >>> Stage(np.ones((6, 1, 1)), Geometry.of(1), groups=6, shuffle=(2, 3)).channel_permutation()
        array([0, 3, 1, 4, 2, 5])
        """
        a, b = self.shuffle
        return np.arange(self.matrix_shape[1]).reshape(a, b, -1).swapaxes(0, 1).reshape(-1)

    def adjoint(self) -> Stage:
        """The transposed stage: rows and columns of its matrix change places.

        Returns
        -------
        Stage
            With the same weight.

        Raises
        ------
        ValueError
            If its border is not zeros.

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank import Geometry, Stage
        >>> Stage(np.ones((8, 3, 3)), Geometry.of(1, stride=2)).adjoint().output_shape((8, 5))
        (3, 11)
        """
        return replace(self, transposed=not self.transposed)


def abstract_weight(shape: Ints) -> Array:
    """A weight of this shape that takes no memory, for stages that are priced but not run."""
    return np.broadcast_to(np.float32(np.nan), shape)


def is_abstract(weight: Array) -> bool:
    """Whether a weight came from :func:`blank`."""
    return not any(weight.strides)
