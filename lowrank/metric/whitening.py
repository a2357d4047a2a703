"""Whitening: a kernel whose modes are multiplied by Cholesky factors of their second moments.

Where a single stage of a chain has a mode of the kernel, the mode can be multiplied by a Cholesky
factor of its second moment before the fit, and the stage by the inverse factor afterwards: the
fit in the Frobenius norm is then a fit in the metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import linalg

from lowrank._typing import Array
from lowrank.core.tensor_network import TensorNetwork
from lowrank.factorization import Factorization
from lowrank.metric.metric import Metric, white


@dataclass(frozen=True, slots=True, eq=False)
class Whitening:
    """Cholesky factors by which the modes of a kernel are multiplied; None for the identity.

    Attributes
    ----------
    outs : ndarray, shape (groups, out, out), or None
        Factor of the output-gradient second moment.
    joint : ndarray, shape (groups, in * taps, in * taps), or None
        Factor of the whole input second moment; the next two are None then.
    channels : ndarray, shape (groups, in, in), or None
        Factor of the channel moment.
    taps : tuple of (ndarray, shape (taps, taps), or None)
        Factor of the moment of each spatial axis.
    """

    outs: Array | None = None
    joint: Array | None = None
    channels: Array | None = None
    taps: tuple[Array | None, ...] = ()

    def apply(self, e: Array) -> Array:
        """Return a kernel (groups, out, in, \\*taps) with its modes whitened."""
        shape = e.shape
        if self.outs is not None:
            e = (self.outs.swapaxes(1, 2) @ e.reshape(*shape[:2], -1)).reshape(shape)
        if self.joint is not None:
            return np.asarray((e.reshape(*shape[:2], -1) @ self.joint).reshape(shape))
        if self.channels is not None:
            rows = self.channels.swapaxes(1, 2)[:, None] @ e.reshape(*shape[:3], -1)
            e = rows.reshape(shape)
        for axis, s in enumerate(self.taps, start=3):
            if s is not None:
                e = np.moveaxis(np.moveaxis(e, axis, -1) @ s, -1, axis)
        return np.asarray(e)

    def residual_metric(self, m: Metric) -> Metric:
        """Return the residual of the metric `m` for whitened kernels."""
        gradients, inputs = m.gradient_moment, m.input_moment
        channels, taps = m.channel_factor, m.tap_factors
        if gradients is not None and self.outs is not None:
            gradients = _residual(gradients, self.outs) if _is_diagonal(self.outs) else None
        if self.joint is not None:
            identity = white(len(channels), (channels.shape[1], *map(len, taps)))
            inputs, channels, taps = None, identity.channel_factor, identity.tap_factors
        else:
            if self.channels is not None:
                channels = _residual(channels, self.channels)
            taps = tuple(
                c if s is None else _residual(c[None], s[None])[0] for c, s in zip(taps, self.taps)
            )
            if inputs is not None:
                shape = (channels.shape[1], *(len(c) for c in taps))
                half = self._apply_inverse(inputs.reshape(len(inputs), -1, *shape))
                half = half.reshape(inputs.shape).swapaxes(1, 2)
                inputs = self._apply_inverse(half.reshape(len(inputs), -1, *shape)).reshape(
                    inputs.shape
                )
        return replace(
            m,
            input_moment=inputs,
            channel_factor=channels,
            tap_factors=taps,
            gradient_moment=gradients,
        )

    def _apply_inverse(self, e: Array) -> Array:
        """Multiply rows (groups, n, in, \\*taps) by the inverse of the input factors."""
        shape = e.shape
        if self.channels is not None:
            inverse = np.linalg.inv(self.channels)
            e = (inverse[:, None] @ e.reshape(*shape[:3], -1)).reshape(shape)
        for axis, s in enumerate(self.taps, start=3):
            if s is not None:
                e = np.moveaxis(np.moveaxis(e, axis, -1) @ np.linalg.inv(s).T, -1, axis)
        return np.asarray(e)


def _residual(c: Array, root: Array) -> Array:
    """Return ``R^-1 C R^-T`` for the Cholesky factor of C, or of its diagonal."""
    if not _is_diagonal(root):
        return np.tile(np.eye(c.shape[-1]), (len(c), 1, 1))
    diagonal = np.diagonal(root, axis1=1, axis2=2)
    return np.asarray(c / (diagonal[:, :, None] * diagonal[:, None]))


def _is_diagonal(root: Array) -> bool:
    return bool(np.count_nonzero(root) <= len(root) * root.shape[-1])


class Roles(NamedTuple):
    """Modes of a tensor network that are inputs and outputs of the plain convolution."""

    batch: str
    outs: str
    channels: str
    space: tuple[str, ...]

    @classmethod
    def of(cls, n: TensorNetwork, transposed: bool) -> Roles:
        """Return the roles of the modes of a chain."""
        batch = "".join(m for m in n.rows if m in n.columns)
        rows = "".join(m for m in n.rows if m not in batch)
        columns = "".join(m for m in n.columns if m not in batch)
        return cls(batch, *((columns, rows) if transposed else (rows, columns)), n.space)


def _holder(n: TensorNetwork, modes: str, batch: str) -> tuple[int | None, bool]:
    """Find the first stage with all `modes` and the group modes; tell whether no other has any."""
    holders = [i for i, have in enumerate(n.stages) if set(have) & set(modes)]
    whole = [i for i in holders if set(modes + batch) <= set(n.stages[i])]
    return (whole[0] if modes and whole else None), len(holders) == 1


def whiten(n: TensorNetwork, conv: Factorization, m: Metric) -> Whitening:
    """Whiten the modes that a single stage has; others by the diagonal of their moment."""
    roles = Roles.of(n, conv.transposed)
    space = "".join(roles.space)

    def root(c: Array | None, modes: str, batch: str) -> Array | None:
        at, alone = _holder(n, modes, batch)
        return None if c is None or at is None else _root(c, alone)

    outs = root(m.gradient_moment, roles.outs, roles.batch)
    at, alone = _holder(n, roles.channels + space, roles.batch)
    if m.input_moment is not None and at is not None and alone:
        return Whitening(outs, joint=root(m.input_moment, roles.channels + space, roles.batch))
    channels = root(m.channel_factor, roles.channels, roles.batch)
    # Factors of taps are shared by the groups: the stage need not have the group mode.
    taps = [root(c[None], modes, "") for modes, c in zip(roles.space, m.tap_factors)]
    return Whitening(outs, None, channels, tuple(None if t is None else t[0] for t in taps))


def _root(c: Array, whole: bool) -> Array:
    """Return the Cholesky factor of C, or the root of its diagonal."""
    if whole:
        return np.linalg.cholesky(c)
    roots = np.sqrt(np.diagonal(c, axis1=1, axis2=2))
    return np.asarray(roots[:, :, None] * np.eye(c.shape[-1]))


def unwhiten(
    n: TensorNetwork, roles: Roles, s: Whitening, tensors: Sequence[Array], inverse: bool = False
) -> list[Array]:
    """Return the weights of the original chain from those of a whitened one, or the `inverse`."""
    weights = list(tensors)

    def undo(modes: str, root: Array | None) -> None:
        """Undo a factor (groups or 1, n, n) of all these modes together."""
        if root is None or not modes:
            return
        batch = roles.batch if len(root) > 1 else ""
        at, alone = _holder(n, modes, batch)
        assert at is not None
        if alone:
            weights[at] = _times(weights[at], n.stages[at], modes, root, batch, inverse)
        else:  # a diagonal over modes of several stages: undone in one of them
            diagonal = np.diagonal(root, axis1=1, axis2=2)
            diagonal = diagonal if inverse else 1 / diagonal
            shape = n.shape(batch + modes)
            weights[at] = _scale_modes(
                weights[at], n.stages[at], batch + modes, diagonal.reshape(shape)
            )

    undo(roles.outs, s.outs)
    if s.joint is not None:
        undo(roles.channels + "".join(roles.space), s.joint)
        return weights
    undo(roles.channels, s.channels)
    for modes, root in zip(roles.space, s.taps or [None] * len(roles.space)):
        undo(modes, None if root is None else root[None])
    return weights


def _times(x: Array, have: str, modes: str, root: Array, batch: str, inverse: bool) -> Array:
    """Multiply `x` by the lower-triangular factor (groups or 1, n, n) or by its inverse."""
    rest = "".join(m for m in have if m not in batch + modes)
    order = batch + rest + modes
    moved = x.transpose([have.index(m) for m in order])
    flat = moved.reshape(len(root), -1, root.shape[1])
    flat = (
        flat @ root
        if inverse
        else np.stack(
            [linalg.solve_triangular(r, f.T, trans="T", lower=True).T for r, f in zip(root, flat)]
        )
    )
    return flat.reshape(moved.shape).transpose([order.index(m) for m in have])


def _scale_modes(x: Array, have: str, modes: str, diagonal: Array) -> Array:
    """Multiply `x` by a diagonal over `modes`."""
    order = [modes.index(m) for m in have if m in modes]
    shape = [x.shape[i] if m in modes else 1 for i, m in enumerate(have)]
    return np.asarray(x * diagonal.transpose(order).reshape(shape))
