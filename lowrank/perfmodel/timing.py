"""Times of calls, measured in alternation: what disturbs the machine disturbs all of them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

SAMPLE = 1e-3  # seconds of a sample, at least: the clock and a call of it take 0.1 us
ROUNDS = 5  # samples per call, at least
MAX_OVERRUN = 4.0  # times the budget after which slow calls get fewer samples, but three
FEW_ROUNDS = 3
BUSY = 0.15  # relative spread of a call from which on the machine is called busy
ATTEMPTS = 3  # measurements of which the least disturbed counts

Clock = Callable[[Callable[[], Any], int], float]  # mean seconds of a number of runs of a call


class CallTime(NamedTuple):
    """Time of a call.

    Attributes
    ----------
    seconds : float
        Median over the samples.
    spread : float
        Interquartile range of the samples over their median.
    samples : tuple of float
        Repeated measurements; none of a time that was kept on disk.
    """

    seconds: float
    spread: float
    samples: tuple[float, ...] = ()


def clock_calls(call: Callable[[], object], n: int) -> float:
    """Return the mean seconds of `n` calls, by the clock."""
    start = time.perf_counter()
    for _ in range(n):
        call()
    return (time.perf_counter() - start) / n


def time_calls(
    calls: Sequence[Callable[[], Any]],
    budget: float = 0.3,
    clock: Clock = clock_calls,
    sample: float = SAMPLE,
) -> list[CallTime]:
    """Return the times of calls, measured in alternation.

    A sample follows one call that is not timed, so that data and weights are in the caches as in
    repeated calls.  If the spread of a call shows that the machine is busy, all are measured anew,
    and the measurement with the least spread counts.

    Parameters
    ----------
    calls : sequence of callable
        Calls without arguments.
    budget : float
        Seconds of one measurement, beside first calls.
    clock : callable
        Function of a call and a number of runs that returns the mean seconds of a run.
    sample : float
        Least seconds of a sample.  Calls that others have driven out of the caches are slow more
        than once: among many calls, samples should be long.

    Returns
    -------
    list of CallTime

    Examples
    --------
    >>> from lowrank.perfmodel.timing import time_calls
    >>> short, long = time_calls([lambda: sum(range(10)), lambda: sum(range(10**5))], 0.01)
    >>> short.seconds < long.seconds
    True
    """
    repeats = [_repeats(call, clock, sample) for call in calls]
    best: list[CallTime] = []
    for _ in range(ATTEMPTS):
        found = _measure(calls, repeats, budget, clock)
        if not best or _spread(found) < _spread(best):
            best = found
        if _spread(best) < BUSY:
            break
    return best


def _spread(times: Sequence[CallTime]) -> float:
    return max((t.spread for t in times), default=0.0)


def _repeats(call: Callable[[], Any], clock: Clock, sample: float) -> int:
    call()  # plans, allocates and loads
    return max(1, math.ceil(sample / max(clock(call, 1), 1e-7)))


def _measure(
    calls: Sequence[Callable[[], Any]], repeats: Sequence[int], budget: float, clock: Clock
) -> list[CallTime]:
    samples: list[list[float]] = [[] for _ in calls]
    begin, rounds = time.perf_counter(), 0
    collects = gc.isenabled()
    gc.disable()
    try:
        while True:
            elapsed = time.perf_counter() - begin
            least = ROUNDS if elapsed < MAX_OVERRUN * budget else FEW_ROUNDS
            if elapsed >= budget and rounds >= least:
                break
            for call, n, found in zip(calls, repeats, samples):
                call()
                found.append(clock(call, n))
            rounds += 1
    finally:
        if collects:
            gc.enable()
    times = []
    for found in samples:
        median = statistics.median(found)
        first, third = np.quantile(found, (0.25, 0.75))
        times.append(CallTime(median, float(third - first) / median, tuple(found)))
    return times
