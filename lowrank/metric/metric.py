"""The metric: a quadratic form in the error of a kernel, made of second moments."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.factorization import Factorization


@final
@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    r"""Quadratic form in the error of a kernel: gradient-weighted mean squared error at the output.

    For an error E, as a matrix (out, in * taps) per group, it is
    :math:`\operatorname{tr}(G E C E^\top)` with the second moments C of the input patches and G
    of the gradients at the outputs.

    Attributes
    ----------
    input_moment : ndarray of float64, shape (groups, in \* taps, in \* taps), or None
        C; None where it would be too large and its Kronecker factors stand for it.
    channel_factor : ndarray of float64, shape (groups, in, in)
        Kronecker factor of C for channels.
    tap_factors : tuple of ndarray of float64, shape (taps, taps)
        Kronecker factor of C for each spatial axis; C is near the product of all factors.
    distance : float
        Relative Frobenius distance of that product from C; NaN if C is not kept.
    gradient_moment : ndarray of float64, shape (groups, out, out), or None
        G; None if all outputs have equal weight.
    target : ndarray of float64, shape (groups, out, in, \*taps), or None
        Kernel that comes closest to the original outputs on these inputs, where they differ from
        the inputs of the original kernel.
    mean : ndarray of float64, shape (groups, in \* taps), or None
        Mean input patch, subtracted from C because a bias makes up for it.
    original_mean : ndarray of float64 or None
        Mean patch of the inputs of the original kernel.
    samples : int
        Number of patches.
    unit : float
        Weight of the layer's errors among layers: 0 where every gradient was 0.
    output_power : ndarray of float64, shape (groups, out, out), or None
        Second moment of the original outputs, where there is a target.

    Notes
    -----
    A transposed convolution is treated as the plain convolution of its zero-stuffed input; "in"
    and "out" are those of that plain convolution.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.metric import Moments
    >>> conv = lowrank.dense(np.ones((1, 1, 2)))
    >>> moments = Moments(conv)
    >>> moments.add(np.array([[[1.0, 2.0, 3.0]]]))
    >>> moments.metric(damping=0.0).input_moment
    array([[[2.5, 4. ],
            [4. , 6.5]]])
    """

    input_moment: Array | None
    channel_factor: Array
    tap_factors: tuple[Array, ...]
    distance: float = 0.0
    gradient_moment: Array | None = None
    target: Array | None = None
    mean: Array | None = None
    original_mean: Array | None = None
    samples: int = 0
    unit: float = 1.0
    output_power: Array | None = None

    @property
    def is_white(self) -> bool:
        """Whether the form is the squared Frobenius norm."""
        factors = (self.channel_factor, *(t[None] for t in self.tap_factors))
        return (
            self.input_moment is None
            and self.gradient_moment is None
            and all(np.array_equal(f, np.broadcast_to(np.eye(len(f[0])), f.shape)) for f in factors)
        )

    def apply(self, e: Array) -> Array:
        """Return ``G E C`` for an error E.

        Parameters
        ----------
        e : ndarray, shape (groups, out, in, \\*taps)
            Error of a kernel.

        Returns
        -------
        ndarray, shape (groups, out, in, \\*taps)

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank.metric import white
        >>> bool((white(1, (4, 3, 3)).apply(np.ones((1, 2, 4, 3, 3))) == 1).all())
        True
        """
        if self.input_moment is not None:
            rows = e.reshape(*e.shape[:2], -1) @ self.input_moment
        else:
            n = self.channel_factor.shape[-1]
            if np.count_nonzero(self.channel_factor) <= len(self.channel_factor) * n:  # diagonal
                diagonal = np.diagonal(self.channel_factor, axis1=1, axis2=2)
                rows = e * diagonal[:, None, :].reshape(len(e), 1, n, *(1,) * (e.ndim - 3))
            else:
                rows = self.channel_factor[:, None] @ e.reshape(*e.shape[:3], -1)
                rows = rows.reshape(e.shape)
            for axis, c in enumerate(self.tap_factors, start=3):
                rows = np.moveaxis(np.moveaxis(rows, axis, -1) @ c, -1, axis)
            rows = rows.reshape(*e.shape[:2], -1)
        if self.gradient_moment is not None:
            rows = self.gradient_moment @ rows
        return np.asarray(rows.reshape(e.shape))

    def energy(self, e: Array) -> float:
        """Return ``tr(G E C E')``, the energy that an error E causes at the outputs.

        Parameters
        ----------
        e : ndarray, shape (groups, out, in, \\*taps)
            Error of a kernel.

        Returns
        -------
        float

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank.metric import white
        >>> white(1, (4, 3)).energy(np.ones((1, 2, 4, 3)))
        24.0
        """
        return max(float(np.vdot(e, self.apply(e))), 0.0)

    def astype(self, dtype: Any) -> Metric:
        """Return the metric in another precision.

        Parameters
        ----------
        dtype : dtype
            Precision of its moments.

        Returns
        -------
        Metric

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank.metric import white
        >>> white(1, (4, 3)).astype(np.float32).channel_factor.dtype
        dtype('float32')
        """

        def cast(a: Array | None) -> Array | None:
            return None if a is None else a.astype(dtype, copy=False)

        return replace(
            self,
            input_moment=cast(self.input_moment),
            channel_factor=self.channel_factor.astype(dtype),
            tap_factors=tuple(t.astype(dtype) for t in self.tap_factors),
            gradient_moment=cast(self.gradient_moment),
        )

    def normalized(self) -> Metric:
        """Return the metric scaled so that the moments have a mean eigenvalue of 1.

        Returns
        -------
        Metric

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank.metric import white
        >>> heavy = white(1, (4, 3)).with_gradient_moment(np.full((1, 1, 1), 5.0))
        >>> float(heavy.normalized().gradient_moment[0, 0, 0])
        1.0
        """

        def scale(a: Array | None) -> Array | None:
            mean = 0.0 if a is None else float(np.trace(a, axis1=-2, axis2=-1).mean()) / a.shape[-1]
            return a if a is None or not mean > 0 else a / mean

        channel_factor = scale(self.channel_factor)
        assert channel_factor is not None
        return replace(
            self,
            input_moment=scale(self.input_moment),
            gradient_moment=scale(self.gradient_moment),
            channel_factor=channel_factor,
        )

    def with_gradient_moment(self, gradient_moment: Array | None) -> Metric:
        """Return the metric with another weight of the outputs.

        Parameters
        ----------
        gradient_moment : ndarray, shape (groups, out, out), or None
            G; None for equal weights.

        Returns
        -------
        Metric

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank.metric import white
        >>> white(1, (4, 3)).with_gradient_moment(np.eye(2)[None]).gradient_moment.shape
        (1, 2, 2)
        """
        return replace(self, gradient_moment=gradient_moment)


def white(groups: int, shape: Ints) -> Metric:
    """Return the metric of white-noise inputs: the squared Frobenius norm of the kernel.

    Parameters
    ----------
    groups : int
        Number of groups of the convolution.
    shape : tuple of int
        (in, \\*taps), with input channels per group.

    Returns
    -------
    Metric

    Examples
    --------
    >>> from lowrank.metric import white
    >>> white(2, (4, 3, 3)).channel_factor.shape
    (2, 4, 4)
    """
    eye = np.tile(np.eye(shape[0]), (groups, 1, 1))
    return Metric(None, eye, tuple(map(np.eye, shape[1:])))


def unroll(conv: Factorization, weight: Array | None = None) -> Array:
    """Return the kernel of the plain convolution that runs, with its groups as an axis.

    Parameters
    ----------
    conv : Factorization
        One dense stage, plain or transposed.
    weight : ndarray, optional
        Kernel of the shape of `conv`'s; its own if not given.

    Returns
    -------
    ndarray of float64, shape (groups, out, in, \\*taps)

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.metric import unroll
    >>> unroll(lowrank.dense(np.ones((8, 4, 3, 3)), groups=2)).shape
    (2, 4, 4, 3, 3)
    """
    w = conv.to_dense() if weight is None else weight
    w = w.astype(np.float64).reshape(conv.groups, -1, *w.shape[1:])
    return w.swapaxes(1, 2) if conv.transposed else w


def nearest_kronecker(c: Array, shape: Ints) -> tuple[Array, tuple[Array, ...], float]:
    """Return the Kronecker product nearest to a second moment, by alternation.

    Parameters
    ----------
    c : ndarray, shape (groups, n, n)
        Second moments; n is the product of `shape`.
    shape : tuple of int
        (in, \\*taps).

    Returns
    -------
    channel_factor : ndarray, shape (groups, in, in)
    tap_factors : tuple of ndarray, shape (taps, taps)
        One per spatial axis, of trace `taps`; shared by the groups.
    distance : float
        Relative Frobenius distance of the product from `c`.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.metric import nearest_kronecker
    >>> a, b = np.diag([2.0, 1.0]), np.array([[1.0, 0.5], [0.5, 1.0]])
    >>> round(nearest_kronecker(np.kron(a, b)[None], (2, 2))[2], 6)
    0.0
    """
    g, axes = len(c), len(shape)
    tensor = c.reshape(g, *shape, *shape)
    channels = np.zeros((g, shape[0], shape[0]))
    taps = [np.eye(k) for k in shape[1:]]

    def contract_all_but(mode: int) -> Array:
        """Contract C with every factor but one: the least-squares factor up to scale."""
        letters = "abcdefgh"
        terms: list[Array] = [tensor]
        text = ["z" + letters[:axes] + letters[:axes].upper()]
        for i in range(axes):
            if i != mode:
                terms.append(channels if i == 0 else taps[i - 1])
                text.append(("z" if i == 0 else "") + letters[i] + letters[i].upper())
        out = ("z" if mode == 0 else "") + letters[mode] + letters[mode].upper()
        return np.asarray(np.einsum(",".join(text) + "->" + out, *terms, optimize=True))

    def squared_norm(m: Array) -> float:
        return float(np.vdot(m, m)) or 1.0

    for _ in range(3):
        channels = contract_all_but(0) / math.prod(map(squared_norm, taps))
        for i, k in enumerate(shape[1:], start=1):
            factor = contract_all_but(i)
            taps[i - 1] = factor / (float(np.trace(factor)) or 1.0) * k
    channels = contract_all_but(0) / math.prod(map(squared_norm, taps))
    explained = math.prod(map(squared_norm, taps)) * float(np.vdot(channels, channels))
    distance = math.sqrt(max(0.0, 1 - explained / squared_norm(tensor)))
    return damped(channels, 1e-6), tuple(damped(t[None], 1e-6)[0] for t in taps), distance


def damped(c: Array, damping: float) -> Array:
    """Add a multiple of the identity: `damping` times the mean eigenvalue over all groups."""
    n = c.shape[-1]
    mean = float(np.trace(c, axis1=1, axis2=2).mean()) / n
    return np.asarray(c + (damping * mean if mean > 0 else 1.0) * np.eye(n))
