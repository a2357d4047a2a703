"""How calls are timed beside one another."""

import math
import statistics
import time


def measured(calls: list, seconds: float) -> list[float]:
    """Medians of seconds a call: samples of at least a millisecond, in turns.

    At least five of each; three where they take longer than all the time that was given.
    """
    each, times = [], [[] for _ in calls]
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        each.append(max(1, math.ceil(1e-3 / max(time.perf_counter() - start, 1e-7))))
    begin = time.perf_counter()
    while (past := time.perf_counter() - begin) < seconds or len(times[0]) < (
        5 if past < 5 * seconds else 3
    ):
        for call, n, seen in zip(calls, each, times):
            start = time.perf_counter()
            for _ in range(n):
                call()
            seen.append((time.perf_counter() - start) / n)
    return [statistics.median(t) for t in times]
