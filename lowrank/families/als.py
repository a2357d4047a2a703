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
from typing import Any, NamedTuple, cast

import numpy as np
from scipy import linalg

from lowrank import engine
from lowrank._typing import Array, Ints
from lowrank.core import chain_algebra

_LETTERS = "abcdef"
SLACK = 0.01  # relative increase of the error for the correction; often a tenth of the sensitivity
NOTHING = 1e-7  # errors below are rounding of closed forms in float64
DAMPING = 1e-10  # share of the diagonal, against singular normal equations
STEADY = 1e-6  # relative decrease of the error per sweep below which ALS stops
SINGLE = 1 << 26  # MACs per product from which float32 saves more than its conversions take
COARSE = 0.01  # relative error above which float32 tells fits apart
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


def balanced(factors: Sequence[Array]) -> list[Array]:
    """Return the factors of the terms with equal mean squares of their entries.

    For a term of norm l, mode m adds ``n_m l^2 / ||u_m||^2`` to the sensitivity.  The product
    of these parts is fixed, so their sum is least if they are equal: ``||u_m||^2 ~ n_m``.
    """
    norms = [np.linalg.norm(f, axis=-2, keepdims=True) / math.sqrt(f.shape[-2]) for f in factors]
    even = math.prod(norms) ** (1 / len(factors))
    return [f * np.where(n > 0, even / np.where(n > 0, n, 1), 0) for f, n in zip(factors, norms)]


def batched_cp(
    tensors: Array, factors: Sequence[Array], iterations: int, damping: float = 0.0
) -> Fit:
    """Fit a batch of tensors, (batch, \\*sizes), from a start; the result is always finite.

    Minimises ``||tensors - sums||^2 + damping * sum_r ||term_r||^2``: for one factor, least squares
    with the diagonal of the normal equations times 1 + damping.  In long fits the products with
    the tensors are computed in float32, all else in float64: they take most of the time, and their
    rounding is far below an error above `COARSE`.
    """
    is_long = tensors.size * factors[0].shape[-1] >= SINGLE
    fit = _iterate(tensors, factors, iterations, damping, np.float32 if is_long else np.float64)
    if is_long and fit.error < COARSE:
        fit = _iterate(tensors, fit.factors, iterations, damping, np.float64)
    return fit._replace(factors=balanced(fit.factors), error=batched_error(tensors, fit.factors))


def _iterate(
    tensors: Array, factors: Sequence[Array], iterations: int, damping: float, dtype: Any
) -> Fit:
    """Run ALS sweeps with the products of one precision until the error is steady."""
    energy = float(np.vdot(tensors, tensors))
    factors = list(factors)
    rounded = [f.astype(dtype, copy=False) for f in factors]
    grams = [f.swapaxes(1, 2) @ f for f in factors]
    products = _products(tensors.astype(dtype, copy=False), rounded)
    fit = Fit([np.zeros_like(f) for f in factors], 1.0, 0.0)
    for _ in range(iterations):
        for mode, rhs in itertools.islice(products, len(factors)):
            rhs = rhs.astype(np.float64, copy=False)
            gram = cast(Array, math.prod(g for m, g in enumerate(grams) if m != mode))
            factors[mode] = factor = _solved(rhs, gram, damping)
            rounded[mode] = factor.astype(dtype, copy=False)
            grams[mode] = factor.swapaxes(1, 2) @ factor
        # At the minimum over one factor the objective is energy - <rhs, factor>.
        missed = energy - float(np.vdot(rhs, factors[mode]))
        if not math.isfinite(missed):
            break
        now = math.sqrt(max(missed, 0.0) / energy) if energy else 0.0
        before, fit = fit.error, Fit(list(factors), now, _falling(fit.error, now))
        if before - now <= STEADY * now:
            break
    return fit


def _falling(before: float, now: float) -> float:
    return (before - now) / now if now > 0 else 0.0


def _products(tensors: Array, factors: list[Array]) -> Iterator[tuple[int, Array]]:
    """Yield each mode with its MTTKRP (tensors times all other factors), sweep after sweep.

    The caller must update the mode's factor before the next one.  All modes but the largest share
    the product of the tensors and its factor, so that a sweep takes two large products.
    """
    big = int(np.argmax(tensors.shape[1:]))
    others = [m for m in range(len(factors)) if m != big]
    unfolded = np.moveaxis(tensors, big + 1, 1).reshape(len(tensors), tensors.shape[big + 1], -1)
    small = dict(zip(others, _LETTERS))
    sizes = [tensors.shape[m + 1] for m in others]
    part: Array | None = None
    for m in itertools.cycle(range(len(factors))):
        if m == big:
            yield big, unfolded @ _khatri_rao([factors[n] for n in others])
            part = None
            continue
        if part is None:
            part = unfolded.swapaxes(1, 2) @ factors[big]
            part = part.reshape(len(tensors), *sizes, -1)
        rest = [n for n in others if n != m]
        spec = f"z{''.join(small.values())}r" + "".join(f",z{small[n]}r" for n in rest)
        yield m, np.einsum(f"{spec}->z{small[m]}r", part, *(factors[n] for n in rest))


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
    """Solve the normal equations of one factor; damp those that are singular."""
    diagonal = np.diagonal(gram, axis1=1, axis2=2)
    system = gram.copy()
    diagonals = system.reshape(len(gram), -1)[:, :: gram.shape[-1] + 1]
    diagonals += damping * diagonal
    columns = rhs.swapaxes(1, 2)
    if len(system) == 1 and isinstance(system, np.ndarray):
        try:
            return _solve_definite(system[0], columns[0])[None].swapaxes(1, 2)
        except linalg.LinAlgError:
            pass
    mean = diagonal.mean(-1, keepdims=True)
    # The Gram matrix of a zero slice is zero: damping is then all of the system.
    diagonals += DAMPING * mean + (mean == 0)
    return np.linalg.solve(system, columns).swapaxes(1, 2)


def _solve_definite(system: Array, columns: Array) -> Array:
    """Solve by Cholesky's factorization; LinAlgError if the matrix is singular up to DAMPING."""
    factor, is_lower = linalg.cho_factor(system, lower=True, check_finite=False)
    # The square of a pivot is the part of a term that those before do not explain.
    if (np.square(np.diagonal(factor)) < DAMPING * np.diagonal(system)).any():
        raise linalg.LinAlgError("singular normal equations")
    return cast(Array, linalg.cho_solve((factor, is_lower), columns, check_finite=False))


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
