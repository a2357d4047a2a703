"""Contractions of a tensor network, each with a path that is found once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from lowrank._typing import Array
from lowrank.core.tensor_network import TensorNetwork


class Contraction:
    """Einsums over the weights of a chain as sequences of (batched) matrix products.

    Parameters
    ----------
    network : TensorNetwork
        Modes of the weights.
    unroll : callable
        Reshapes a kernel with one axis per mode to (groups, out, in, \\*taps).
    transposed : bool
        Whether the convolution is transposed, so that `unroll` exchanges out and in.
    """

    def __init__(
        self, network: TensorNetwork, unroll: Callable[[Array], Array], transposed: bool
    ) -> None:
        self.network, self.unroll, self.transposed = network, unroll, transposed
        self._paths: dict[object, list[tuple[int, int, str]]] = {}

    def roll(self, kernel: Array) -> Array:
        """Return a kernel (groups, out, in, \\*taps) with one axis per mode.

        Parameters
        ----------
        kernel : ndarray, shape (groups, out, in, \\*taps)
            Kernel of the plain convolution.

        Returns
        -------
        ndarray
        """
        if self.transposed:
            kernel = kernel.swapaxes(1, 2)
        return np.ascontiguousarray(kernel).reshape(self.network.shape(self.network.kernel))

    def contract(
        self, key: object, names: Sequence[str], out: str, arrays: Sequence[Array]
    ) -> Array:
        """Compute an einsum pair by pair, along a path that is kept under `key`.

        Parameters
        ----------
        key : hashable
            Name of the contraction; its shapes are the same at every call.
        names : sequence of str
            Modes of each array.
        out : str
            Modes of the result.
        arrays : sequence of ndarray
            Operands.

        Returns
        -------
        ndarray
        """
        if key not in self._paths:
            self._paths[key] = _plan(names, out, arrays)
        work = list(zip(names, arrays))
        for i, j, modes in self._paths[key]:
            (a, x), (b, y) = work[i], work[j]
            work = [w for at, w in enumerate(work) if at not in (i, j)]
            work.append((modes, _contract_pair(x, a, y, b, modes)))
        name, array = work[0]
        return array.transpose([name.index(m) for m in out]) if name != out else array


def _plan(names: Sequence[str], out: str, arrays: Sequence[Array]) -> list[tuple[int, int, str]]:
    """Return the pairs to contract and the modes of each product, by opt_einsum's greedy search."""
    from opt_einsum import contract_path  # imported at the first fit in a metric

    shapes = [a.shape for a in arrays]
    pairs, _ = contract_path(f"{','.join(names)}->{out}", *shapes, shapes=True, optimize="greedy")
    left, path = list(names), []
    for i, j in map(sorted, pairs):
        rest = set(out).union(*(m for at, m in enumerate(left) if at not in (i, j)))
        modes = "".join(m for m in dict.fromkeys(left[i] + left[j]) if m in rest)
        path.append((i, j, modes if len(left) > 2 else out))
        left = [m for at, m in enumerate(left) if at not in (i, j)] + [path[-1][2]]
    return path


def _contract_pair(x: Array, a: str, y: Array, b: str, out: str) -> Array:
    """Contract two tensors as one batched matrix product: einsum has none for a batch."""
    x, a = _sum_out(x, a, b + out)
    y, b = _sum_out(y, b, a + out)
    batch = "".join(m for m in a if m in b and m in out)
    summed = "".join(m for m in a if m in b and m not in out)
    rows = "".join(m for m in a if m not in b)
    columns = "".join(m for m in b if m not in a)
    sizes = dict(zip(a, x.shape)) | dict(zip(b, y.shape))

    def as_matrices(z: Array, modes: str, first: str, second: str) -> Array:
        moved = z.transpose([modes.index(m) for m in batch + first + second])
        return moved.reshape([math.prod(sizes[m] for m in part) for part in (batch, first, second)])

    product = as_matrices(x, a, rows, summed) @ as_matrices(y, b, summed, columns)
    modes = batch + rows + columns
    return product.reshape([sizes[m] for m in modes]).transpose([modes.index(m) for m in out])


def _sum_out(x: Array, modes: str, others: str) -> tuple[Array, str]:
    """Sum over the modes that nothing else has."""
    alone = [m for m in modes if m not in others]
    if alone:
        x = x.sum(axis=tuple(modes.index(m) for m in alone))
    return x, "".join(m for m in modes if m not in alone)
