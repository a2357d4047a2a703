"""Wrappers of TensorLy, which is imported at its first use."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints

#: TensorLy has circular imports, and warning filters are global to the process.
_LOCK = threading.RLock()


def parafac(
    tensor: Array, start: Sequence[Array], iterations: int, tolerance: float, damping: float
) -> tuple[list[Array], list[float]]:
    """Return CP factors, (size, rank) per mode, by alternating least squares from `start`.

    Also return the relative errors of the start and after every sweep (none at tolerance 0).
    Raises numpy.linalg.LinAlgError if the normal equations are singular.
    """
    with _LOCK:
        import tensorly as tl
        from tensorly.decomposition import parafac as als

    errors: list[float] = []
    with _LOCK, _backend(tensor), _fast_mttkrp(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cp = als(
            tl.tensor(tensor),
            rank=start[0].shape[1],
            init=(np.ones_like(start[0][0]), [f.copy() for f in start]),
            n_iter_max=iterations,
            tol=tolerance,
            l2_reg=damping,
            callback=(lambda _, error: errors.append(float(error))) if tolerance else None,
        )
    weights, factors = cp
    return [factors[0] * weights, *factors[1:]], errors


def tensor_train(tensor: Array, ranks: Ints) -> list[Array]:
    """Return the cores (r_before, size, r_after) of the TT-SVD with these ranks."""
    with _LOCK:
        from tensorly.decomposition import tensor_train as tt_svd

    with _LOCK, _backend(tensor):
        return list(tt_svd(tensor, rank=[1, *ranks, 1]))


@contextmanager
def _backend(tensor: Array) -> Iterator[None]:
    """Select TensorLy's backend for the array type, in this thread."""
    import tensorly as tl

    name = "numpy" if isinstance(tensor, np.ndarray) else "cupy"
    with tl.backend_context(name, local_threadsafe=True):
        yield


@contextmanager
def _fast_mttkrp() -> Iterator[None]:
    """Replace TensorLy's MTTKRP in this thread by :class:`Mttkrp`.

    TensorLy's forms the Khatri-Rao product, which takes gigabytes for a (512, 512, 3, 3) kernel.
    """
    import tensorly as tl
    from tensorly.tenalg.core_tenalg import CoreTenalgBackend

    backend: Any = CoreTenalgBackend()
    backend.unfolding_dot_khatri_rao = Mttkrp()
    before = tl.tenalg.current_backend()
    tl.tenalg.set_backend(backend, local_threadsafe=True)
    try:
        yield
    finally:
        tl.tenalg.set_backend(before, local_threadsafe=True)


class Mttkrp:
    """Contract all modes but one with their factors, the largest first, by one GEMM.

    The product of the GEMM is reused until its factor changes, so that a sweep over the modes
    takes two GEMMs, not one per mode.
    """

    def __init__(self) -> None:
        self.mode = -1
        self.factor = self.part = np.empty(0)

    def __call__(self, tensor: Array, cp: tuple[Array, Sequence[Array]], mode: int) -> Array:
        """Return the matricised `tensor` times the Khatri-Rao product of all factors but one."""
        weights, factors = cp
        others = [m for m in range(tensor.ndim) if m != mode]
        if self.mode not in others or factors[self.mode] is not self.factor:
            self.mode = max(others, key=lambda m: tensor.shape[m])
            self.factor = factors[self.mode]
            # (the rest, rank)
            self.part = np.tensordot(tensor, self.factor, axes=(self.mode, 0))
        part = self.part
        for m in sorted((m for m in others if m != self.mode), reverse=True):
            # Axes after the contracted mode are shifted by one; contract the last first.
            axis = m - (m > self.mode)
            shape = (1,) * axis + (factors[m].shape[0],) + (1,) * (part.ndim - axis - 2) + (-1,)
            part = (part * factors[m].reshape(shape)).sum(axis=axis)
        return part if weights is None else part * weights
