"""The one place that imports TensorLy, and that only when something is to be decomposed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints

#: TensorLy imports itself in circles and filters of warnings are the process's: one at a time.
_LOCK = threading.RLock()


def parafac(
    tensor: Array, start: Sequence[Array], iterations: int, tolerance: float, ridge: float
) -> tuple[list[Array], list[float]]:
    """CP factors, (size, rank) a mode, by alternating least squares from `start`.

    With them the relative errors of the start and after every sweep; none at tolerance 0.
    Raises numpy.linalg.LinAlgError where the normal equations are singular.
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
            l2_reg=ridge,
            callback=(lambda _, error: errors.append(float(error))) if tolerance else None,
        )
    weights, factors = cp
    return [factors[0] * weights, *factors[1:]], errors


def tensor_train(tensor: Array, ranks: Ints) -> list[Array]:
    """Cores (r_before, size, r_after) of the TT-SVD with these ranks between the modes."""
    with _LOCK:
        from tensorly.decomposition import tensor_train as tt_svd

    with _LOCK, _backend(tensor):
        return list(tt_svd(tensor, rank=[1, *ranks, 1]))


@contextmanager
def _backend(tensor: Array) -> Iterator[None]:
    """TensorLy's backend for arrays of this library, in this thread."""
    import tensorly as tl

    name = "numpy" if isinstance(tensor, np.ndarray) else "cupy"
    with tl.backend_context(name, local_threadsafe=True):
        yield


@contextmanager
def _fast_mttkrp() -> Iterator[None]:
    """TensorLy's product of a tensor with a Khatri-Rao product, one matrix product first.

    Its own forms the Khatri-Rao product, which takes gigabytes for a (512, 512, 3, 3) kernel.
    The choice is local to this thread, and so is putting it back.
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
    """Contract every mode but one with its factor: the largest first, by one GEMM.

    For the modes of one tensor in turn: the GEMM is kept until its factor is another one, so
    that two of them make a sweep over a kernel, not one a mode.
    """

    def __init__(self) -> None:
        self.mode = -1
        self.factor = self.part = np.empty(0)

    def __call__(self, tensor: Array, cp: tuple[Array, Sequence[Array]], mode: int) -> Array:
        """The matricised `tensor` times the Khatri-Rao product of all factors but `mode`'s."""
        weights, factors = cp
        others = [m for m in range(tensor.ndim) if m != mode]
        if self.mode not in others or factors[self.mode] is not self.factor:
            self.mode = max(others, key=lambda m: tensor.shape[m])
            self.factor = factors[self.mode]
            # (the rest, rank)
            self.part = np.tensordot(tensor, self.factor, axes=(self.mode, 0))
        part = self.part
        for m in sorted((m for m in others if m != self.mode), reverse=True):
            # Modes after the contracted one have moved up by one; contract the last first.
            axis = m - (m > self.mode)
            shape = (1,) * axis + (factors[m].shape[0],) + (1,) * (part.ndim - axis - 2) + (-1,)
            part = (part * factors[m].reshape(shape)).sum(axis=axis)
        return part if weights is None else part * weights
