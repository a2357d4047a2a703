"""Norms, quotients and tables that all certificates share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lowrank._typing import Array
from lowrank.core.tables import align_columns


def energy(weight: Array) -> float:
    """Return the squared Frobenius norm."""
    return float(np.square(weight, dtype=np.float64).sum())


def joint_energies(before: Sequence[Array], after: Sequence[Array]) -> list[float]:
    r"""Return, for each joint between stages, the summed energies of its channels' kernels.

    The kernel of channel c is the product of the chain up to c and the chain from c on; its
    energy is :math:`\|B_c\|^2 \|A_c\|^2`.
    """
    flat = ((b.reshape(len(b), -1), a.reshape(len(a), -1)) for b, a in zip(before, after))
    return [float(np.square(b).sum(axis=1) @ np.square(a).sum(axis=1)) for b, a in flat]


def ratio(a: float, b: float) -> float:
    """Return ``a / b``, with ``0 / 0 = 0``."""
    return a / b if b else (math.inf if a else 0.0)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of (name, number, explanation)."""
    lines = align_columns([row[:2] for row in rows])
    width = max(map(len, lines))
    return "\n".join(f"{x:<{width}}  {row[2]}".rstrip() for x, row in zip(lines, rows))
