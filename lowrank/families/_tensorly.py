"""The one place that imports TensorLy, and that only when something is to be decomposed."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints


def parafac(
    tensor: Array, start: Sequence[Array], iterations: int, tolerance: float, ridge: float
) -> list[Array]:
    """CP factors, (size, rank) a mode, by alternating least squares from `start`.

    Raises numpy.linalg.LinAlgError where the normal equations are singular.
    """
    import tensorly as tl
    from tensorly.decomposition import parafac as als

    with _fast_mttkrp(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cp = als(
            tl.tensor(tensor),
            rank=start[0].shape[1],
            init=(np.ones(start[0].shape[1]), [f.copy() for f in start]),
            n_iter_max=iterations,
            tol=tolerance,
            l2_reg=ridge,
        )
    weights, factors = cp
    return [factors[0] * weights, *factors[1:]]


def partial_tucker(
    tensor: Array, start: Sequence[Array], modes: Sequence[int], iterations: int, tolerance: float
) -> list[Array]:
    """Orthonormal Tucker factors along `modes`, by HOOI from `start`."""
    from tensorly.decomposition import partial_tucker as hooi
    from tensorly.tenalg import multi_mode_dot

    core = multi_mode_dot(tensor, list(start), modes=list(modes), transpose=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (_, factors), _ = hooi(
            tensor,
            rank=[f.shape[1] for f in start],
            modes=list(modes),
            init=(core, [f.copy() for f in start]),
            n_iter_max=iterations,
            tol=tolerance,
        )
    return list(factors)


def tensor_train(tensor: Array, ranks: Ints) -> list[Array]:
    """Cores (r_before, size, r_after) of the TT-SVD with these ranks between the modes."""
    from tensorly.decomposition import tensor_train as tt_svd

    return [np.asarray(core) for core in tt_svd(tensor, rank=[1, *ranks, 1])]


@contextmanager
def _fast_mttkrp() -> Iterator[None]:
    """TensorLy's product of a tensor with a Khatri-Rao product, one matrix product first.

    Its own forms the Khatri-Rao product, which takes gigabytes for a (512, 512, 3, 3) kernel.
    The choice is local to this thread, and so is putting it back.
    """
    import tensorly as tl

    before = tl.tenalg.current_backend()
    tl.tenalg.set_backend(_backend(), local_threadsafe=True)
    try:
        yield
    finally:
        tl.tenalg.set_backend(before, local_threadsafe=True)


@functools.cache
def _backend() -> Any:
    from tensorly.tenalg.core_tenalg import CoreTenalgBackend

    class GemmFirst(CoreTenalgBackend, backend_name="lowrank_gemm_first"):  # type: ignore[misc, call-arg]
        """CoreTenalgBackend with another MTTKRP."""

    GemmFirst.unfolding_dot_khatri_rao = staticmethod(mttkrp)
    return GemmFirst()


def mttkrp(tensor: Array, cp: tuple[Array, Sequence[Array]], mode: int) -> Array:
    """Contract every mode but `mode` with its factor: the largest first, by one GEMM."""
    weights, factors = cp
    others = [m for m in range(tensor.ndim) if m != mode]
    largest = max(others, key=lambda m: tensor.shape[m])
    part = np.tensordot(tensor, factors[largest], axes=(largest, 0))  # (the rest, rank)
    for m in sorted((m for m in others if m != largest), reverse=True):
        # Modes after `largest` have moved up by one; contract the last first.
        axis = m - (m > largest)
        shape = (1,) * axis + (factors[m].shape[0],) + (1,) * (part.ndim - axis - 2) + (-1,)
        part = (part * factors[m].reshape(shape)).sum(axis=axis)
    return part if weights is None else part * weights
