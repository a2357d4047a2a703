"""Measured seconds of candidates, and the predictions of others corrected by them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lowrank._typing import Ints
from lowrank.selection.candidates import Candidate

Key = tuple[str, Ints]


def candidate_key(c: Candidate) -> Key:
    """Return what tells a candidate from others for the same convolution."""
    return c.name, c.rank


def with_measurements(
    predicted: Sequence[Candidate], measured: Mapping[Key, float]
) -> list[Candidate]:
    """Return candidates with measured seconds, and the others with corrected predictions.

    Parameters
    ----------
    predicted : sequence of Candidate
        Candidates for one convolution with predicted seconds.
    measured : mapping of (str, tuple of int) to float
        Measured seconds of some of them, by :func:`candidate_key`; infinite for those that the
        runtime cannot run.

    Returns
    -------
    list of Candidate
        A prediction is scaled by the quotient of measured and predicted seconds of the most
        similar candidate that was measured: of the same variant or family and nearest in MACs.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.selection.measured import candidate_key, with_measurements
    >>> front = lowrank.frontier(lowrank.dense(np.eye(9)[..., None]), (64,), ["channel_svd"])
    >>> dense, *_ = with_measurements(list(front)[::-1], {candidate_key(front.dense): 1.0})
    >>> dense.seconds, dense.is_measured
    (1.0, True)
    """
    finite = [c for c in predicted if measured.get(candidate_key(c), math.inf) < math.inf]
    references = [c for c in finite if not c.is_dense] or finite

    def timed(c: Candidate) -> Candidate:
        seconds = measured.get(candidate_key(c))
        if seconds is not None:
            return replace(c, seconds=seconds, is_measured=True)
        if not references:
            return c
        near = min(references, key=lambda r: _distance(c, r))
        return replace(c, seconds=c.seconds * measured[candidate_key(near)] / near.seconds)

    return [timed(c) for c in predicted]


def _distance(c: Candidate, other: Candidate) -> tuple[bool, bool, float]:
    """Return how unlike two candidates are: in family, variant and MACs."""
    ratio = math.log(max(c.cost.macs, 1) / max(other.cost.macs, 1))
    return c.family != other.family, c.name != other.name, abs(ratio)
