"""CP by alternating least squares, of one tensor or a batch, and error-preserving correction.

Factors are one array per mode, (..., size, rank), with a leading axis for a batch of tensors.

Least squares alone may end in terms that are far larger than their sum and cancel each other
(degeneracy): the error is small, but any rounding of the factors is magnified.  `corrected`
minimises the `sensitivity` within an error limit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np

from lowrank import engine
from lowrank._typing import Array, Ints
from lowrank.core import chain_algebra
from lowrank.families import _tensorly

_LETTERS = "abcdef"
SLACK = 0.01  # relative increase of the error for the correction; often a tenth of the sensitivity
NOTHING = 1e-7  # errors below are rounding of closed forms in float64
DAMPING = 1e-10  # share of the mean diagonal, against singular normal equations
TOLERANCE = 1e-8  # decrease of the relative error per sweep below which TensorLy's ALS stops
STEADY = 1e-6  # relative decrease of the error per sweep below which batched ALS stops
CORRECTIONS = 100  # largest number of sweeps of the correction
SETTLED = 1e-3  # relative decrease of the sensitivity per sweep below which it stops
MARGIN = 1e-6  # share of the error limit kept for rounding
EPS = float(np.finfo(float).eps)


class Fit(NamedTuple):
    """Balanced factors, their relative error, and its relative decrease in the last sweep.

    `falling` is about 0 if the iteration converged.
    """

    factors: list[Array]
    error: float
    falling: float


def ranks(largest: int, most: int = 12) -> Ints:
    """Return at most `most` ranks from 1 to `largest`, in geometric steps."""
    spaced = np.geomspace(1, max(largest, 1), most)
    return tuple(sorted({int(r) for r in np.rint(spaced)}))


def bound(tensor: Array, batch: Sequence[int] = (0,)) -> Array:
    """Return lower bounds on the error of CP rank R per batch entry, as ``bound[R]``.

    Every matricisation of a tensor of CP rank R has at most rank R; the largest truncation error
    is the bound.
    """
    modes = [m for m in range(tensor.ndim) if m not in batch]
    found = []
    for n in range(1, len(modes) // 2 + 1):
        for rows in itertools.combinations(modes, n):
            if 2 * n < len(modes) or modes[0] in rows:  # halves only once
                found.append(chain_algebra.truncation_errors(tensor, rows, batch))
    longest = max(map(len, found))
    return cast(Array, np.max(np.stack([np.pad(f, (0, longest - len(f))) for f in found]), axis=0))


def start(tensor: Array, rank: int, seed: int = 0) -> list[Array]:
    """Return the leading singular vectors of every unfolding, extended with random columns."""
    rng = np.random.default_rng(seed)
    factors = []
    for m, size in enumerate(tensor.shape):
        unfolded = np.moveaxis(tensor, m, 0).reshape(size, -1)
        if size <= unfolded.shape[1]:
            some = np.linalg.eigh(unfolded @ unfolded.T)[1][:, ::-1][:, :rank]
        else:
            some = np.linalg.svd(unfolded, full_matrices=False)[0][:, :rank]
        fill = rng.standard_normal((size, rank - some.shape[1])) / math.sqrt(size)
        factors.append(np.hstack([some, engine.as_array_like(fill, tensor)]))
    return factors


def grown(factors: Sequence[Array], rank: int, seed: int = 0) -> list[Array]:
    """Return `factors` extended with random columns to `rank`."""
    rng = np.random.default_rng(seed)
    fills = [(*f.shape[:-1], rank - f.shape[-1]) for f in factors]
    return [
        np.concatenate(
            [f, engine.as_array_like(rng.standard_normal(fill) / math.sqrt(fill[-2]), f)], axis=-1
        )
        for f, fill in zip(factors, fills)
    ]


def cp(
    tensor: Array, factors: Sequence[Array], iterations: int, tolerance: float = TOLERANCE
) -> Fit:
    """Fit one tensor from a start with TensorLy; the result is always finite."""
    zeros = [np.zeros_like(f) for f in factors]
    norm = float(np.linalg.norm(tensor))
    if norm == 0:
        return Fit(zeros, 0.0, 0.0)
    unit = tensor / norm
    best = Fit(zeros, 1.0, 0.0)
    for damping in (0.0, DAMPING, 1e-6):
        try:
            found, errors = _tensorly.parafac(unit, factors, iterations, tolerance, damping)
        except np.linalg.LinAlgError:
            continue
        if not all(np.isfinite(f).all() for f in found):
            continue
        found_error = batched_error(unit[None], [f[None] for f in found])
        if found_error < best.error:
            stopped = len(errors) <= iterations  # the first error is that of the start
            best = Fit(found, found_error, 0.0 if stopped else _falling(*errors[-2:]))
        if found_error <= 1:
            break
    return best._replace(factors=balanced(best.factors, norm))


def _falling(before: float, now: float) -> float:
    return (before - now) / now if now > 0 else 0.0


def balanced(factors: Sequence[Array], scale: float = 1.0) -> list[Array]:
    """Return the factors of the terms times `scale`, with equal mean squares of their entries.

    For a term of norm l, mode m adds ``n_m l^2 / ||u_m||^2`` to the sensitivity.  The product
    of these parts is fixed, so their sum is least if they are equal: ``||u_m||^2 ~ n_m``.
    """
    norms = [np.linalg.norm(f, axis=-2, keepdims=True) / math.sqrt(f.shape[-2]) for f in factors]
    even = (math.prod(norms) * scale) ** (1 / len(factors))
    return [f * np.where(n > 0, even / np.where(n > 0, n, 1), 0) for f, n in zip(factors, norms)]


def batched_cp(
    tensors: Array, factors: Sequence[Array], iterations: int, damping: float = 0.0
) -> Fit:
    """Fit a batch of small tensors, (batch, \\*sizes), from a start.

    Minimises ``||tensors - sums||^2 + damping * sum_r ||term_r||^2``: for one factor, least squares
    with the diagonal of the normal equations times 1 + damping.
    """
    energy = float(np.vdot(tensors, tensors))
    factors = list(factors)
    products = _products(tensors, factors)
    now, falling = 1.0, 0.0  # relative error of zero factors
    for _ in range(iterations):
        for mode, rhs in itertools.islice(products, len(factors)):
            factors[mode] = _solved(rhs, _gram(factors, mode), damping)
        # At the minimum over one factor the objective is energy - <rhs, factor>.
        missed = max(energy - float(np.vdot(rhs, factors[mode])), 0.0)
        before, now = now, math.sqrt(missed / energy) if energy else 0.0
        falling = _falling(before, now)
        if before - now <= STEADY * now:
            break
    return Fit(balanced(factors), batched_error(tensors, factors), falling)


def _products(tensors: Array, factors: list[Array]) -> Iterator[tuple[int, Array]]:
    """Yield each mode with its MTTKRP (tensors times all other factors), sweep after sweep.

    The caller must update the mode's factor before the next one.  The largest mode comes first;
    the others share its product with the tensors, so that a sweep takes two large products.
    """
    big = int(np.argmax(tensors.shape[1:]))
    others = [m for m in range(len(factors)) if m != big]
    unfolded = np.moveaxis(tensors, big + 1, 1).reshape(len(tensors), tensors.shape[big + 1], -1)
    small = _LETTERS[: len(others)]
    sizes = [tensors.shape[m + 1] for m in others]
    while True:
        yield big, unfolded @ _khatri_rao([factors[m] for m in others])
        part = unfolded.swapaxes(1, 2) @ factors[big]
        part = part.reshape(len(tensors), *sizes, -1)
        for i, m in enumerate(others):
            rest = [(a, n) for j, (a, n) in enumerate(zip(small, others)) if j != i]
            spec = f"z{small}r" + "".join(f",z{a}r" for a, _ in rest) + f"->z{small[i]}r"
            yield m, np.einsum(spec, part, *(factors[n] for _, n in rest))


def _khatri_rao(factors: Sequence[Array]) -> Array:
    """Return the column-wise Khatri-Rao product, (batch, product of sizes, rank)."""
    product = factors[0]
    for f in factors[1:]:
        product = (product[:, :, None] * f[:, None]).reshape(len(f), -1, f.shape[-1])
    return product


def _gram(factors: Sequence[Array], mode: int) -> Array:
    """Return the normal matrix of one factor: the product of the other factors' Gram matrices."""
    grams = (f.swapaxes(1, 2) @ f for m, f in enumerate(factors) if m != mode)
    return cast(Array, math.prod(grams))


def _solved(rhs: Array, gram: Array, damping: float) -> Array:
    """Solve the damped normal equations of one factor."""
    diagonal = np.diagonal(gram, axis1=1, axis2=2)
    mean = diagonal.mean(-1, keepdims=True)
    # The Gram matrix of a zero slice is zero: damping is then all of the system.
    added = damping * diagonal + DAMPING * mean + (mean == 0)
    system = gram.copy()
    system.reshape(len(gram), -1)[:, :: gram.shape[-1] + 1] += added  # its diagonals
    return np.linalg.solve(system, rhs.swapaxes(1, 2)).swapaxes(1, 2)


def batched_error(tensors: Array, factors: Sequence[Array]) -> float:
    """Return the relative error of all tensors together, (batch, \\*sizes)."""
    norm = float(np.linalg.norm(tensors))
    big = int(np.argmax(tensors.shape[1:]))
    khatri_rao = _khatri_rao([f for m, f in enumerate(factors) if m != big])
    sums = factors[big] @ khatri_rao.swapaxes(1, 2)
    rest = np.moveaxis(tensors, big + 1, 1).reshape(sums.shape) - sums
    return float(np.linalg.norm(rest)) / norm if norm else 0.0


def sensitivity(factors: Sequence[Array]) -> float:
    """Return the expected squared change of the sums for unit-variance noise on all entries.

    ``sum_m n_m sum_r prod_{k != m} ||u_r^k||^2`` is large if terms are large and cancel.
    """
    squares = [np.square(f).sum(-2) for f in factors]
    sizes = [f.shape[-2] for f in factors]
    return float(sum(np.sum(n * _others(squares, m)) for m, n in enumerate(sizes)))


def _others(squares: Sequence[Array], *but: int) -> Array:
    """Return the product per term of the squared norms of all modes but some."""
    others = (q for m, q in enumerate(squares) if m not in but)
    return math.prod(others, start=np.ones_like(squares[0]))


def spared(error: float) -> float:
    """Return the default error limit of the correction."""
    return max((1 + SLACK) * error, NOTHING)


def corrected(
    tensors: Array, factors: Sequence[Array], limit: float, sweeps: int = CORRECTIONS
) -> list[Array]:
    r"""Return less sensitive factors with a relative error within `limit`.

    Each step of the error-preserving correction [1]_ minimises the `sensitivity` over one factor
    subject to the error, and never increases it.  Alternating steps are slow in the narrow
    valleys of degenerate sums, so sweeps start from an extrapolation (Nesterov) [2]_, which is
    dropped if it does not lower the sensitivity.

    Parameters
    ----------
    tensors : ndarray, shape (batch, \*sizes)
        Batch with one limit on its total error; separate limits would give a larger total
        sensitivity.
    factors : sequence of ndarray, shape (batch, size, rank)
        One factor per mode, for at least two modes, with an error of at most `limit`.
    limit : float
        Largest ``||tensors - sums|| / ||tensors||``.
    sweeps : int
        Largest number of sweeps.

    Returns
    -------
    list of ndarray
        Balanced factors; those of `factors` if none less sensitive were found.

    References
    ----------
    .. [1] A.-H. Phan et al., "Stable low-rank tensor decomposition for compression of
       convolutional neural network", ECCV 2020. :arxiv:`2008.05441`.
    .. [2] B. O'Donoghue, E. Candes, "Adaptive restart for accelerated gradient schemes",
       Found. Comput. Math. 15, 2015. :arxiv:`1204.3982`.
    """
    tensors = tensors.astype(np.float64, copy=False)
    energy = float(np.vdot(tensors, tensors))
    first = best = last = balanced(factors)
    least = sensitivity(best)
    spare = (limit**2 * (1 - 2 * MARGIN) - 1) * energy
    trial = list(best)
    products = _products(tensors, trial)
    age, found = 0, None  # age: sweeps since the last one without extrapolation
    for _ in range(sweeps):
        rate = age / (age + 3)
        trial[:] = [b + rate * (b - a) for a, b in zip(last, best)]
        for mode, rhs in itertools.islice(products, len(trial)):
            found = _least_sensitive(rhs, trial, mode, spare)
            if found is not None:
                trial[mode] = found
        even = balanced(trial)
        now = sensitivity(even)
        # If the last step of a sweep exceeds the error limit, the extrapolation went too far.
        if now < least and (age == 0 or found is not None):
            settled = least - now < SETTLED * least
            last, best, least, age = best, even, now, age + 1
            if settled:
                break
        elif age == 0:
            break
        else:
            age = 0
    return best if batched_error(tensors, best) <= limit else first


def _least_sensitive(rhs: Array, factors: Sequence[Array], mode: int, spare: float) -> Array | None:
    r"""Return the factor of least sensitivity within the error limit, or None if none is.

    min sum_r w_r ||u_r||^2 over U with ||Y - U Z'||^2 <= limit^2 ||Y||^2 is least squares with
    damping in the metric of w, U = M (Z'Z + mu diag(w))^-1.  In the eigenbasis of
    W^-1/2 Z'Z W^-1/2 with values s, the squared error is that of mu = 0 plus
    sum_i p_i (mu / (s_i + mu))^2, a sum without cancellation; p_i is the part of ||Y||^2 that
    direction i explains.
    """
    squares = [np.square(f).sum(-2) for f in factors]
    weight = sum(
        f.shape[-2] * _others(squares, mode, m) for m, f in enumerate(factors) if m != mode
    )
    root = np.sqrt(np.where(weight > 0, weight, 1))[:, None]  # zero terms have weight 0
    s, q = np.linalg.eigh(_gram(factors, mode) / (root * root.swapaxes(1, 2)))
    s = np.maximum(s, EPS * s.shape[-1] * s[:, -1:])  # smaller values are rounding
    along = rhs / root @ q
    p = np.where(s > 0, np.square(along).sum(1) / np.where(s > 0, s, 1), 0)
    spare += float(p.sum())
    if spare <= 0:
        return None
    if spare >= p.sum():
        return np.zeros_like(rhs)
    mu = _multiplier(s[p > 0], p[p > 0], spare)
    return cast(Array, (along / (s + mu)[:, None]) @ q.swapaxes(1, 2) / root)


def _multiplier(s: Array, p: Array, spare: float) -> float:
    """Solve ``sum p (mu / (s + mu))^2 == spare`` for mu, by Newton's method in logarithms."""
    share = math.sqrt(spare / p.sum())
    low, high = (float(x) * share / (1 - share) for x in (s.min(), s.max()))
    mu = math.sqrt(low * high)
    for _ in range(100):
        spent = p * np.square(mu / (s + mu))
        total = float(spent.sum())
        if abs(total - spare) <= MARGIN**1.5 * spare:
            break
        low, high = (mu, high) if total < spare else (low, mu)
        slope = 2 * float(spent @ (s / (s + mu))) / total  # of log total over log mu
        step = math.log(spare / total) / slope
        mu = mu * math.exp(step) if abs(step) < 100 else 0.0
        if not low < mu < high:
            mu = math.sqrt(low * high)
    return mu
