"""Toom-Cook (Winograd) algorithms for short 1-D correlations: exact matrices, and their C code.

F(m, r) computes m outputs of a correlation with r taps by m + r - 1 multiplications,

    y = A^T [(G g) * (B^T d)],

for m + r - 1 inputs d.  It evaluates polynomials at m + r - 2 points and at infinity (Winograd,
Arithmetic Complexity of Computations, 1980; Lavin and Gray, arXiv 1509.09308).

``python -m lowrank._kernels.toom_cook`` writes ``transforms.inc``; a test compares them.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from typing import NamedTuple

#: (outputs, taps) of the algorithms that the C kernels have; their numbers there count from 1.
ALGORITHMS = ((2, 3), (4, 3), (6, 3), (2, 5), (4, 5), (2, 7))
# Points in pairs of opposite sign share half of the operations; those beyond 2 lose accuracy.
POINTS = tuple(map(Fraction, ("0", "1", "-1", "2", "-2", "1/2", "-1/2")))

Matrix = tuple[tuple[Fraction, ...], ...]


class ToomCook(NamedTuple):
    """Matrices of F(m, r): `a` is A^T, (m, m + r - 1); `g`, (m + r - 1, r); `b` is B^T, square."""

    a: Matrix
    g: Matrix
    b: Matrix


@cache
def matrices(outputs: int, taps: int) -> ToomCook:
    """Return the matrices of F(outputs, taps)."""
    points = POINTS[: outputs + taps - 2]
    if outputs < 1 or taps < 1 or len(points) < outputs + taps - 2:
        raise ValueError(f"outputs + taps must be 2 to {len(POINTS) + 2}, got {outputs} + {taps}")
    others = [[q for q in points if q != p] for p in points]
    scales = [
        math.prod((p - q for q in rest), start=Fraction(1)) for p, rest in zip(points, others)
    ]
    a = [[*(p**j for p in points), Fraction(j == outputs - 1)] for j in range(outputs)]
    g = [[p**k / s for k in range(taps)] for p, s in zip(points, scales)]
    g.append([Fraction(k == taps - 1) for k in range(taps)])
    b = [[*_from_roots(rest), Fraction(0)] for rest in others]
    b.append(_from_roots(points))
    return ToomCook(*(tuple(map(tuple, matrix)) for matrix in (a, g, b)))


def _from_roots(roots: Sequence[Fraction]) -> list[Fraction]:
    """Return the coefficients of the product of x - root, lowest first."""
    product = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *product]
        product = [s - root * p for s, p in zip(shifted, [*product, Fraction(0)])]
    return product


@cache
def error_gain(outputs: int, taps: int) -> float:
    r"""Return how much F(outputs, taps) amplifies rounding errors, in one dimension.

    It is the root mean square of the products' contributions to an output,
    ``sum over i of a_ji^2 E[(G g)_i^2] E[(B^T d)_i^2]``, over that of the output, for inputs and
    weights of white noise; of the m outputs, the largest.  Gains of several axes multiply.
    """
    t = matrices(outputs, taps)
    squares = [_energy(g) * _energy(b) for g, b in zip(t.g, t.b)]
    return max(math.sqrt(sum(x * x * s for x, s in zip(row, squares)) / taps) for row in t.a)


@cache
def range_gain(outputs: int, taps: int) -> float:
    r"""Return how far the values of F(outputs, taps) exceed those of direct sums, in one dimension.

    For inputs of at most 1 and taps whose absolute values add up to 1, inputs and outputs of the
    products stay below, and so do all partial sums of the outputs,
    ``sum over i of |a_ji| max_k |g_ik| sum over l of |b_il|``.  Gains of several axes multiply.
    """
    t = matrices(outputs, taps)
    inputs = [sum(map(abs, row)) for row in t.b]
    products = [max(map(abs, g)) * b for g, b in zip(t.g, inputs)]
    sums = [sum(abs(x) * p for x, p in zip(row, products)) for row in t.a]
    return float(max(*inputs, *sums))


def _energy(row: Sequence[Fraction]) -> Fraction:
    return sum((x * x for x in row), start=Fraction(0))


def source() -> str:
    """Return the C code of the input and output transforms of a line of vectors."""
    lines = [
        "/* Written by toom_cook.py; do not edit.",
        " *",
        " * Transforms of one line of vectors: LR_NAME(line_in) is B^T, LR_NAME(line_out) is A^T",
        " * of F(m, r); vectors are `is` elements apart in `in`, `os` elements apart in `out`.",
        " */",
        "",
    ]
    sizes = {m + r - 1: (m, r) for m, r in reversed(ALGORITHMS)}  # B^T depends on their sum only
    for n, (m, r) in sorted(sizes.items()):
        lines += _function(f"in_{n}", matrices(m, r).b)
    for m, n in sorted({(m, m + r - 1) for m, r in ALGORITHMS}):
        lines += _function(f"out_{m}_{n}", matrices(m, n - m + 1).a)
    names_in = [f"in_{m + r - 1}" for m, r in ALGORITHMS]
    names_out = [f"out_{m}_{m + r - 1}" for m, r in ALGORITHMS]
    for name, functions in (("line_in", names_in), ("line_out", names_out)):
        lines += [f"{_SIGNATURE.format(name=name, form='int64_t algorithm, ')}", "{"]
        lines += ["    switch (algorithm) {"]
        for number, function in enumerate(functions, start=1):
            lines.append(f"    case {number}: LR_NAME({function})(in, is, out, os); break;")
        lines += ["    }", "}", ""]
    planes = " ".join(
        f"PLANE({i}, {m + r - 1}, {m})" for i, (m, r) in enumerate(ALGORITHMS, start=1)
    )
    lines += ["#undef LR_PLANES", f"#define LR_PLANES {planes}"]
    columns = ("outputs", [m for m, _ in ALGORITHMS]), ("taps", [r for _, r in ALGORITHMS])
    for name, values in columns:
        numbers = ", ".join(map(str, [1, *values]))
        lines.append(f"static const int LR_NAME({name})[] = {{{numbers}}};")
    return "\n".join(lines) + "\n"


_SIGNATURE = (
    "static inline __attribute__((always_inline)) void LR_NAME({name})({form}const T *in, "
    "int64_t is,\n    T *out, int64_t os)"
)


def _function(name: str, matrix: Matrix) -> list[str]:
    """Return the function that multiplies a line by `matrix`."""
    return [_SIGNATURE.format(name=name, form=""), "{", *_statements(matrix), "}", ""]


def _statements(matrix: Matrix) -> Iterator[str]:
    """Yield a product with `matrix`: of inputs, or of sums and differences where pairs exist."""
    columns = list(zip(*matrix))
    for i in range(len(columns)):
        yield f"    const V d{i} = *(const V *)(in + {i} * is);"
    terms = {f"d{i}": column for i, column in enumerate(columns)}
    for i, j in _opposite(columns):  # of A^T: columns of opposite points
        yield f"    const V s{i} = d{i} + d{j}, t{i} = d{i} - d{j};"
        column = columns[i]
        del terms[f"d{j}"], terms[f"d{i}"]
        terms[f"s{i}"] = tuple(x if k % 2 == 0 else Fraction(0) for k, x in enumerate(column))
        terms[f"t{i}"] = tuple(x if k % 2 else Fraction(0) for k, x in enumerate(column))
    rows = [{name: column[k] for name, column in terms.items()} for k in range(len(matrix))]
    pairs = dict(_opposite(matrix)) if len(matrix) == len(columns) else {}  # of B^T: rows
    for k, row in enumerate(rows):
        if k in pairs:
            even = _sum({n: c for i, (n, c) in enumerate(row.items()) if i % 2 == 0})
            odd = _sum({n: c for i, (n, c) in enumerate(row.items()) if i % 2})
            yield f"    const V e{k} = {even}, o{k} = {odd};"
            yield f"    *(V *)(out + {k} * os) = e{k} + o{k};"
            yield f"    *(V *)(out + {pairs[k]} * os) = e{k} - o{k};"
        elif k not in pairs.values():
            yield f"    *(V *)(out + {k} * os) = {_sum(row)};"


def _opposite(lines: Sequence[Sequence[Fraction]]) -> Iterator[tuple[int, int]]:
    """Yield the numbers of neighbouring lines that differ in the signs of odd positions only."""
    for i, (a, b) in enumerate(itertools.pairwise(lines)):
        signs = [x * (-1) ** k for k, x in enumerate(a)]
        if any(a[1::2]) and list(b) == signs:
            yield i, i + 1


def _sum(row: dict[str, Fraction]) -> str:
    """Return a sum of products as C, terms with a factor of one first."""
    nonzero = sorted(
        ((n, c) for n, c in row.items() if c), key=lambda t: (abs(t[1]) != 1, t[1] < 0)
    )
    text = ""
    for name, c in nonzero:
        product = name if abs(c) == 1 else f"(T){float(abs(c))!r} * {name}"
        if not text:
            text = product if c > 0 else f"-{product}"
        else:
            text += f" {'+' if c > 0 else '-'} {product}"
    return text


if __name__ == "__main__":
    sys.stdout.write(source())
