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
    return tuple(sorted({int(r) for r in np.rint(spaced)}))


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
    return np.asarray(np.max([np.pad(f, (0, longest - len(f))) for f in found], axis=0))


def start(tensor: Array, rank: int, seed: int = 0) -> list[Array]:
    """Leading singular vectors of every unfolding, filled up with random columns."""
    rng = np.random.default_rng(seed)
    factors = []
    for m, size in enumerate(tensor.shape):
        unfolded = np.moveaxis(tensor, m, 0).reshape(size, -1)
        if size <= unfolded.shape[1]:
            some = np.linalg.eigh(unfolded @ unfolded.T)[1][:, ::-1][:, :rank]
        else:
            some = np.linalg.svd(unfolded, full_matrices=False)[0][:, :rank]
        fill = rng.standard_normal((size, rank - some.shape[1])) / math.sqrt(size)
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
    product = math.prod(norms) * scale
    even = np.abs(product) ** (1 / len(factors))
    return [
        f * np.divide(even, n, out=np.zeros_like(n), where=n > 0) for f, n in zip(factors, norms)
    ]


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
    if factors is None:
        each = [start(t, rank) for t in tensors]
        factors = [np.stack(f) for f in zip(*each)]
    factors = list(factors)
    big = int(np.argmax(tensors.shape[1:]))  # contracted first, as matrix products
    others = [m for m in modes if m != big]
    unfolded = np.moveaxis(tensors, big + 1, 1).reshape(len(tensors), tensors.shape[big + 1], -1)
    small = _LETTERS[: len(others)]
    small_sizes = [tensors.shape[m + 1] for m in others]
    for _ in range(iterations):
        spec = ",".join(f"z{a}r" for a in small) + f"->z{small}r"
        khatri_rao = np.einsum(spec, *(factors[m] for m in others))
        rhs = unfolded @ khatri_rao.reshape(len(tensors), -1, rank)
        factors[big] = _solved(rhs, factors, others)
        part = unfolded.swapaxes(1, 2) @ factors[big]
        part = part.reshape(len(tensors), *small_sizes, rank)
        for i, m in enumerate(others):
            rest = [(a, n) for j, (a, n) in enumerate(zip(small, others)) if j != i]
            spec = f"z{small}r" + "".join(f",z{a}r" for a, _ in rest) + f"->z{small[i]}r"
            rhs = np.einsum(spec, part, *(factors[n] for _, n in rest))
            factors[m] = _solved(rhs, factors, [n for n in modes if n != m])
    return balanced(factors)


def _solved(rhs: Array, factors: Sequence[Array], others: Sequence[int]) -> Array:
    """Least squares for one factor: `rhs` over the Hadamard product of the others' Grams."""
    rank = rhs.shape[-1]
    gram = np.ones((len(rhs), rank, rank))
    for n in others:
        gram *= factors[n].swapaxes(1, 2) @ factors[n]
    mean = np.trace(gram, axis1=1, axis2=2)[:, None, None] / rank
    # Of a zero slice the Gram matrix is zero: there the ridge is the whole equation.
    system = gram + (RIDGE * mean + (mean == 0)) * np.eye(rank)
    return np.linalg.solve(system, rhs.swapaxes(1, 2)).swapaxes(1, 2)


def batched_error(tensors: Array, factors: Sequence[Array]) -> float:
    """Relative error of all slices together."""
    names = _LETTERS[: tensors.ndim - 1]
    spec = ",".join(f"z{a}r" for a in names) + f"->z{names}"
    rest = tensors - np.einsum(spec, *factors, optimize=True)
    norm = float(np.linalg.norm(tensors))
    return float(np.linalg.norm(rest)) / norm if norm else 0.0
