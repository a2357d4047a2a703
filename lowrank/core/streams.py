"""Redirection of what C libraries print to standard output."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Two overlapping redirections could restore each other's sink and lose stdout for good.
_LOCK = threading.RLock()


@contextmanager
def discard_c_stdout() -> Iterator[None]:
    """Discard what is written to file descriptor 1 inside the ``with`` block.

    C libraries write to the descriptor, which ``contextlib.redirect_stdout`` does not change.

    Notes
    -----
    The descriptor belongs to the process: what other threads print during the block is discarded,
    too.  Blocks of several threads run one after the other.

    Examples
    --------
    >>> import os
    >>> from lowrank.core.streams import discard_c_stdout
    >>> with discard_c_stdout():
    ...     n_bytes = os.write(1, b"message of a solver")
    """
    with _LOCK:
        try:
            saved = os.dup(1)
        except OSError:  # descriptor 1 is closed
            yield
            return
        _flush()  # text from before the block must not be discarded
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.close(sink)
        try:
            yield
        finally:
            _flush()
            os.dup2(saved, 1)
            os.close(saved)


def _flush() -> None:
    """Flush the buffers of Python and of C's stdio."""
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()
    # Windows has no name for the process itself; Python's stdio is that of this library.
    ctypes.CDLL("ucrtbase" if os.name == "nt" else None).fflush(None)
