"""Ctrl-C: one sentence about what is kept, and an end that waits for no running fit."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

EXIT_CODE = 130  # of shells: 128 and the number of SIGINT
PATIENCE = 1.0  # seconds until a call of a C library, which Python cannot interrupt, is abandoned


class Interrupted(RuntimeError):
    """Ctrl-C, with the sentence to print: Typer turns a KeyboardInterrupt into an exit code."""


_sentences: list[Callable[[], str]] = [lambda: "interrupted"]


@contextmanager
def describe_interruption(sentence: Callable[[], str]) -> Iterator[None]:
    """Say `sentence` if the block is interrupted, in place of a bare word.

    Parameters
    ----------
    sentence : callable
        Function that returns what was done and what is kept, in one sentence.
    """
    _sentences.append(sentence)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(sentence()) from None
    finally:
        _sentences.pop()


def report_interruption(sentence: str) -> None:
    """Print the sentence of an interruption to stderr."""
    print(f"lowrank: {sentence}", file=sys.stderr, flush=True)


def end_process() -> None:
    """End the process without waiting for threads, which may be in the middle of long fits."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # closed by the reader
            stream.flush()
    os._exit(EXIT_CODE)


@contextmanager
def abandon_long_calls() -> Iterator[None]:
    """End the process if it does not react to Ctrl-C within a second.

    Python runs the handler of a signal in the main thread, after the call that is running there.
    The system's handler writes to a pipe at once, which a thread of its own reads.
    """
    read, write = os.pipe()
    if os.name == "posix":  # which Python demands there; Windows had no such call before 3.12
        os.set_blocking(write, False)
    is_over = threading.Event()

    def watch() -> None:
        while signals := os.read(read, 1):
            if signals[0] == signal.SIGINT and not is_over.wait(PATIENCE):
                report_interruption(_sentences[-1]())
                end_process()
        os.close(read)

    previous = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        signal.set_wakeup_fd(previous)
        os.close(write)
