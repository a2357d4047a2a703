"""Numbers of threads, checked alike everywhere, and threads that nobody waits for."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

MOST_THREADS = 2**31 - 1  # of an int in C


def as_threads(threads: Any) -> int | None:
    """Return a number of threads after a check, or None for the default.

    Parameters
    ----------
    threads : int or None
        Number of threads, between 1 and `MOST_THREADS`.

    Returns
    -------
    int or None

    Raises
    ------
    TypeError
        If it is not an integer.
    ValueError
        If it is out of range.

    Examples
    --------
    >>> from lowrank.core.threads import as_threads
    >>> as_threads(2)
    2
    """
    if threads is None:
        return None
    try:
        count = operator.index(threads)
    except TypeError:
        count = None
    if count is None or isinstance(threads, bool):
        raise TypeError(f"threads must be an integer, got {threads!r}")
    if not 1 <= count <= MOST_THREADS:
        raise ValueError(f"threads must be between 1 and {MOST_THREADS}, got {threads}")
    return count


@contextmanager
def impatient_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Give a pool of threads whose running tasks nobody waits for after an error or Ctrl-C.

    Parameters
    ----------
    workers : int
        Number of threads.

    Yields
    ------
    ThreadPoolExecutor
    """
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
