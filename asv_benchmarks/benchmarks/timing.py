"""Time calls beside one another."""

import math
import statistics
import time

from scipy import stats


class Seconds(float):
    """A median of samples, with the interval of the sign test around it.

    Attributes
    ----------
    low, high : float
        Order statistics that cover the median with at least 95 % whatever the distribution; for
        fewer than six samples the least and the largest, with less.
    """

    def __new__(cls, samples):
        """Return the median of samples."""
        times = sorted(samples)
        order = max(int(stats.binom.ppf(0.025, len(times), 0.5)), 1)
        found = super().__new__(cls, statistics.median(times))
        found.low, found.high = times[order - 1], times[-order]
        return found

    @property
    def spread(self):
        """Half of the interval, relative to the median."""
        return (self.high - self.low) / (2 * self)


def measure_seconds(calls, seconds, sample=1e-3, warm_up=1, wait=lambda: None, rewarm=False):
    """Return the median seconds per call with their intervals, measured interleaved.

    A sample takes at least `sample` seconds; there are at least five per call, or three where they
    exceed five times the budget `seconds`.  `wait` blocks until an asynchronous call has finished.
    With `rewarm` one call without a time precedes every sample, so that all find their own data in
    the caches.
    """
    repeats, times = [], [[] for _ in calls]
    for call in calls:
        for _ in range(warm_up):
            call()
        wait()
        start = time.perf_counter()
        call()
        wait()
        repeats.append(max(1, math.ceil(sample / max(time.perf_counter() - start, 1e-7))))
    begin = time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds or len(times[0]) < (
        5 if elapsed < 5 * seconds else 3
    ):
        for call, n, samples in zip(calls, repeats, times):
            if rewarm:
                call()
            wait()
            start = time.perf_counter()
            for _ in range(n):
                call()
            wait()
            samples.append((time.perf_counter() - start) / n)
    return [Seconds(t) for t in times]
