"""Paired intervals: of a difference of scores on the same images, and of a ratio of times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 4000
LEVEL = 0.95

Score = Callable[[np.ndarray], np.ndarray]


class Interval(NamedTuple):
    """An estimate with its interval.

    Attributes
    ----------
    value, low, high : float
        Estimate and ends.
    """

    value: float
    low: float
    high: float


def score_difference(
    a: np.ndarray, b: np.ndarray, score: Score, is_share: bool, seed: int = 0
) -> Interval:
    """Return the difference of two networks' scores, b - a, with its 95 % interval.

    Parameters
    ----------
    a, b : ndarray, shape (calibration seeds, images)
        Value of each image, such as 1 for a correct prediction; of the same images and seeds.
    score : callable
        Maps means over images, (..., seeds), to scores of the same shape.
    is_share : bool
        Whether values are in [0, 1].
    seed : int
        Seed of the resamples.

    Returns
    -------
    Interval
        NaN as ends for one image.

    Notes
    -----
    Bootstrap percentiles.  Images and calibration seeds are resampled independently of each other,
    both networks alike (the pigeonhole bootstrap, somewhat conservative [1]_).  Where values are
    shares, two images are added on which one network alone is right, one for each: without them
    intervals are too short where the networks differ on few images [2]_.

    References
    ----------
    .. [1] A. B. Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1, 2007.
    .. [2] D. G. Bonett, R. M. Price, "Adjusted Wald confidence interval for a difference of
       binomial proportions based on paired data", J. Educational and Behavioral Statistics 37,
       2012.
    """
    value = float((score(b.mean(1)) - score(a.mean(1))).mean())
    if a.shape[1] == 1:
        return Interval(value, np.nan, np.nan)
    if is_share:
        a = np.hstack([a, np.tile([1.0, 0.0], (len(a), 1))])
        b = np.hstack([b, np.tile([0.0, 1.0], (len(b), 1))])
    seeds, images = (_resamples(n, seed) for n in a.shape)
    differences = ((score(images @ b.T) - score(images @ a.T)) * seeds).sum(1)
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


@cache
def _resamples(n: int, seed: int) -> np.ndarray:
    """Return the weights of `n` observations in every resample, (resamples, n)."""
    random = np.random.default_rng([seed, n])
    return random.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n


def time_ratio(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Return the ratio of two times, b / a, with an interval of at least 95 %.

    Parameters
    ----------
    a, b : sequence of float
        Times in the same blocks of an alternation; at least six.

    Returns
    -------
    Interval
        Median of the ratios per block, and the order statistics around it whose coverage is that
        of the sign test: at least 95 % whatever the distribution.
    """
    ratios = np.sort(np.divide(b, a))
    n = len(ratios)
    if n < 6:
        raise ValueError(f"a and b must be times of at least 6 blocks, got {n}")
    order = int(stats.binom.ppf((1 - LEVEL) / 2, n, 0.5))
    return Interval(float(np.median(ratios)), float(ratios[order - 1]), float(ratios[-order]))
