"""Measured seconds of candidates, and the predictions of others corrected by them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lowrank._typing import Ints
from lowrank.selection.candidates import Candidate

Key = tuple[str, Ints]
#: Shares of the dense kernel's MACs near which candidates of every variant are measured, and those
#: for large kernels, whose measurement would take minutes per network.
SAMPLED = 1 / 8, 1 / 5, 1 / 3, 1 / 2, 3 / 4
SAMPLED_OF_LARGE = (1 / 3,)
LARGE = 2e-3  # seconds


class Reference(NamedTuple):
    """A candidate that was measured.

    Attributes
    ----------
    candidate : Candidate
        The candidate, or its summary.
    quotient : float
        Measured over predicted seconds.
    """

    candidate: Candidate
    quotient: float


def candidate_key(c: Candidate) -> Key:
    """Return what tells a candidate from others for the same convolution."""
    return c.name, c.rank


def sample_variants(found: Sequence[Candidate], dense: Candidate) -> list[Candidate]:
    """Return some candidates of every variant, whose measured seconds correct the others.

    Parameters
    ----------
    found : sequence of Candidate
        Candidates for one convolution.
    dense : Candidate
        Dense kernel, with its seconds.

    Returns
    -------
    list of Candidate
        Of every variant those nearest to an eighth, a fifth, a third, a half and three quarters of
        the dense kernel's MACs; to a third alone if the dense kernel takes more than 2 ms.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.selection.measured import sample_variants
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 8, 3, 3)))
    >>> front = lowrank.frontier(conv, (16, 16), ["spatial_svd"], axis="macs")
    >>> [(c.variant, c.rank) for c in sample_variants(front[:-1], front.dense)]
    [('w-h', (1,)), ('w-h', (2,)), ('w-h', (4,)), ('w-h', (6,)), ('w-h', (8,))]
    """
    variants: dict[str, list[Candidate]] = {}
    for c in found:
        variants.setdefault(c.name, []).append(c)
    shares = SAMPLED_OF_LARGE if dense.seconds > LARGE else SAMPLED
    some = {}
    for group in variants.values():
        for share in shares:
            wanted = math.log(share) + _log_macs(dense)
            nearest = min(group, key=lambda c: abs(_log_macs(c) - wanted))
            some[candidate_key(nearest)] = nearest
    return list(some.values())


def references_of(predicted: Sequence[Candidate], measured: Mapping[Key, float]) -> list[Reference]:
    """Return the candidates that were measured.

    Parameters
    ----------
    predicted : sequence of Candidate
        Candidates for one convolution with predicted seconds.
    measured : mapping of (str, tuple of int) to float
        Measured seconds of some of them, by :func:`candidate_key`; infinite for those that the
        runtime cannot run, which are left out.

    Returns
    -------
    list of Reference
    """
    seconds = ((c, measured.get(candidate_key(c), math.inf)) for c in predicted)
    return [Reference(c, s / c.seconds) for c, s in seconds if s < math.inf]


def corrected(c: Candidate, references: Sequence[Reference]) -> Candidate:
    """Return a candidate with its predicted seconds corrected by measurements.

    Parameters
    ----------
    c : Candidate
        Candidate with predicted seconds.
    references : sequence of Reference
        Candidates for a convolution of the same shape that were measured.

    Returns
    -------
    Candidate
        Its seconds are scaled by the quotients of references of the same variant, interpolated
        between the nearest in MACs; without such by that of the most similar reference: of the
        same family if there is one, else of any chain (of the dense kernel if no chain was
        measured), and of these the nearest in MACs.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.selection.measured import Reference, corrected
    >>> front = lowrank.frontier(lowrank.dense(np.eye(9)[..., None]), (64,), ["channel_svd"])
    >>> corrected(front.dense, [Reference(front.dense, 2.0)]).seconds / front.dense.seconds
    2.0
    """
    chains = [r for r in references if r.candidate.is_dense == c.is_dense] or references
    if not chains:
        return c
    same = sorted(
        (_log_macs(r.candidate), r.quotient) for r in chains if r.candidate.name == c.name
    )
    if same:
        logs, quotients = zip(*same)
        quotient = float(np.exp(np.interp(_log_macs(c), logs, np.log(quotients))))
    else:
        quotient = min(chains, key=lambda r: _distance(c, r.candidate)).quotient
    return replace(c, seconds=c.seconds * quotient)


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
        Predictions are corrected by :func:`corrected`.

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
    references = references_of(predicted, measured)

    def timed(c: Candidate) -> Candidate:
        seconds = measured.get(candidate_key(c))
        if seconds is not None:
            return replace(c, seconds=seconds, is_measured=True)
        return corrected(c, references)

    return [timed(c) for c in predicted]


def _distance(c: Candidate, other: Candidate) -> tuple[bool, float]:
    """Return how unlike two candidates are: in family and MACs."""
    return c.family != other.family, abs(_log_macs(c) - _log_macs(other))


def _log_macs(c: Candidate) -> float:
    return math.log(max(c.cost.macs, 1))
