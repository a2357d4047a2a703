"""The wrapper of TensorLy, which is imported at its first use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from lowrank._typing import Array, Ints

#: TensorLy has circular imports.
_LOCK = threading.RLock()


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
