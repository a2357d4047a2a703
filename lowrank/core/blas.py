"""One thread in BLAS, so that sums do not depend on the number of processors."""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from threadpoolctl import OpenBLASController, ThreadpoolController


class _Limit:
    """Limit of the process's BLAS, set by the first of the threads that need it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.limiter: Any = None


_limit = _Limit()
if hasattr(os, "register_at_fork"):  # a child must not wait for threads that it does not have
    os.register_at_fork(after_in_child=_limit.__init__)  # type: ignore[misc]


@functools.cache
def _controller() -> ThreadpoolController:
    """Return the BLAS of NumPy and that of SciPy, which has its own and loads it with `linalg`."""
    importlib.import_module("scipy.linalg")  # here, as importing lowrank must not load it
    return ThreadpoolController().select(user_api="blas")


def _release_control() -> None:
    """Let any thread set the number: recent threadpoolctl keeps it to the first that did."""
    release = getattr(OpenBLASController, "clear_controlling_thread", None)
    if release is not None:
        release(force=True)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Run BLAS on one thread within the block, in all threads of the process.

    Products that are split over threads add in another order, and iterative fits amplify the
    difference.  Several threads may be in such blocks: the last one restores the number.
    """
    with _limit.lock:
        if _limit.users == 0:
            _release_control()
            _limit.limiter = _controller().limit(limits=1)
        _limit.users += 1
    try:
        yield
    finally:
        with _limit.lock:
            _limit.users -= 1
            if _limit.users == 0:
                _release_control()  # another thread may have set the limit
                _limit.limiter.restore_original_limits()
                _release_control()
