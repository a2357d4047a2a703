"""Alternating least squares for CP: starts, warm starts, and a batched form for many slices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from lowrank import algebra
from lowrank._typing import Array, Ints
from lowrank.families import _tensorly

_LETTERS = "abcdef"
RIDGE = 1e-10  # of the mean diagonal: only where the normal equations are singular


def ranks(largest: int, most: int = 12) -> Ints:
    """At most `most` ranks from 1 to `largest`, in geometric steps."""
    spaced = np.geomspace(1, max(largest, 1), most)
    return tuple(sorted({int(round(r)) for r in spaced}))


def bound(tensor: Array, batch: Sequence[int] = (0,)) -> Array:
    """``bound[R]``: no tensor of CP rank R, one a batch, is nearer; the best matricisation's.

    A matricisation of a tensor of CP rank R has rank at most R, whichever it is.
    """
    modes = [m for m in range(tensor.ndim) if m not in batch]
    found = []
    for n in range(1, len(modes) // 2 + 1):
        for rows in itertools.combinations(modes, n):
            if 2 * n < len(modes) or modes[0] in rows:  # halves only once
                found.append(algebra.tails(tensor, rows, batch))
    longest = max(map(len, found))
    return np.max([np.pad(f, (0, longest - len(f))) for f in found], axis=0)


def start(tensor: Array, rank: int, seed: int = 0) -> list[Array]:
    """Leading singular vectors of every unfolding, filled up with random columns."""
    rng = np.random.default_rng(seed)
    factors = []
    for m, size in enumerate(tensor.shape):
        unfolded = np.moveaxis(tensor, m, 0).reshape(size, -1)
        _, vectors = np.linalg.eigh(unfolded @ unfolded.T)
        some = vectors[:, ::-1][:, :rank]
        fill = rng.standard_normal((size, max(rank - size, 0))) / math.sqrt(size)
        factors.append(np.hstack([some, fill]))
    return factors


def grown(factors: Sequence[Array], rank: int, seed: int = 0) -> list[Array]:
    """`factors` with random columns added up to `rank`: the start of the next rank."""
    rng = np.random.default_rng(seed)
    return [
        np.hstack([f, rng.standard_normal((len(f), rank - f.shape[1])) / math.sqrt(len(f))])
        for f in factors
    ]


def cp(
    tensor: Array, factors: Sequence[Array], iterations: int, tolerance: float = 1e-8
) -> tuple[list[Array], float]:
    """CP factors from a start, balanced, and the relative error; finite for every tensor."""
    rank = factors[0].shape[1]
    norm = float(np.linalg.norm(tensor))
    if norm == 0:
        return [np.zeros((n, rank)) for n in tensor.shape], 0.0
    unit = tensor / norm
    best, best_error = [np.zeros((n, rank)) for n in tensor.shape], 1.0
    for ridge in (0.0, RIDGE, 1e-6):
        try:
            found = _tensorly.parafac(unit, factors, iterations, tolerance, ridge)
        except np.linalg.LinAlgError:
            continue
        if not all(np.isfinite(f).all() for f in found):
            continue
        found_error = error(unit, found)
        if found_error < best_error:
            best, best_error = found, found_error
        if found_error <= 1:
            break
    return balanced(best, norm), best_error


def balanced(factors: Sequence[Array], scale: float = 1.0) -> list[Array]:
    """The same terms, times `scale`, with columns of equal norm in every factor."""
    norms = [np.linalg.norm(f, axis=-2, keepdims=True) for f in factors]
    product = math.prod(norms) * scale  # type: ignore[arg-type]
    even = np.abs(product) ** (1 / len(factors))
    return [f * np.divide(even, n, out=np.zeros_like(n), where=n > 0) for f, n in zip(factors, norms)]


def error(tensor: Array, factors: Sequence[Array]) -> float:
    """``||tensor - [[factors]]|| / ||tensor||``, with the tensor written out once."""
    letters = _LETTERS[: tensor.ndim]
    spec = ",".join(f"{a}r" for a in letters) + "->" + letters
    if tensor.ndim == 1:
        return float(np.linalg.norm(tensor - factors[0].sum(1)) / np.linalg.norm(tensor))
    # The largest factor last, as one matrix product with the Khatri-Rao of the others.
    big = int(np.argmax(tensor.shape))
    rest = [f for m, f in enumerate(factors) if m != big]
    names = [a for m, a in enumerate(letters) if m != big]
    spec = ",".join(f"{a}r" for a in names) + "->" + "".join(names) + "r"
    khatri_rao = np.einsum(spec, *rest).reshape(-1, factors[0].shape[1])
    unfolded = np.moveaxis(tensor, big, 0).reshape(tensor.shape[big], -1)
    rest_norm = np.linalg.norm(unfolded - factors[big] @ khatri_rao.T)
    return float(rest_norm / np.linalg.norm(unfolded))


def batched_cp(
    tensors: Array, rank: int, iterations: int, factors: Sequence[Array] | None = None
) -> list[Array]:
    """CP of many small tensors, (batch, \\*sizes), at once: factors (batch, size, rank)."""
    modes = range(tensors.ndim - 1)
    names = _LETTERS[: tensors.ndim - 1]
    if factors is None:
        factors = [
            np.stack([f[m] for f in (start(t, rank, seed=0) for t in tensors)]) for m in modes
        ]
    factors = list(factors)
    eye = np.eye(rank)
    for _ in range(iterations):
        for m in modes:
            others = [n for n in modes if n != m]
            spec = f"z{names}," + ",".join(f"z{names[n]}r" for n in others) + f"->z{names[m]}r"
            rhs = np.einsum(spec, tensors, *(factors[n] for n in others), optimize=True)
            gram = math.prod((factors[n].swapaxes(1, 2) @ factors[n] for n in others), start=1.0)
            mean = np.trace(gram, axis1=1, axis2=2)[:, None, None] / rank
            # A zero slice has a zero Gram matrix: there the ridge is the whole equation.
            system = gram + (1e-9 * mean + (mean == 0)) * eye
            factors[m] = np.linalg.solve(system, rhs.swapaxes(1, 2)).swapaxes(1, 2)
    return balanced(factors)


def batched_error(tensors: Array, factors: Sequence[Array]) -> float:
    """Relative error of all slices together."""
    names = _LETTERS[: tensors.ndim - 1]
    spec = ",".join(f"z{a}r" for a in names) + f"->z{names}"
    rest = tensors - np.einsum(spec, *factors, optimize=True)
    norm = float(np.linalg.norm(tensors))
    return float(np.linalg.norm(rest)) / norm if norm else 0.0
