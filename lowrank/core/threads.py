"""Numbers of threads: one check for every function that takes one."""

from __future__ import annotations

from typing import Any

from lowrank.core.geometry import as_integers

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
    (count,) = as_integers("threads", threads, 1)
    if not 1 <= count <= MOST_THREADS:
        raise ValueError(f"threads must be between 1 and {MOST_THREADS}, got {threads}")
    return count
