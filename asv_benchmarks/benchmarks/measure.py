"""How calls are timed beside one another."""

import math
import statistics
import time


def measured(calls: list, seconds: float) -> list[float]:
    """Medians of seconds a call: samples of at least a millisecond, in turns."""
    each, times = [], [[] for _ in calls]
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        each.append(max(1, math.ceil(1e-3 / max(time.perf_counter() - start, 1e-7))))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, n, seen in zip(calls, each, times):
            start = time.perf_counter()
            for _ in range(n):
                call()
            seen.append((time.perf_counter() - start) / n)
    return [statistics.median(t) for t in times]
