"""Kronecker sums: one SVD, after each mode of the kernel has been split in two.

A sum of R products A_r (x) B_r is a truncated SVD of the rearranged kernel (Van Loan and
Pitsianis), with one stage for A and one for B.
"""

from __future__ import annotations

import itertools
import math
import re

from lowrank._typing import Array
from lowrank.factorization import Factorization
from lowrank.families.kernel import Kernel, NotApplicable
from lowrank.families.svd import Layout, Row, Split, as_family

MAX_SMALL_SIDE = 600  # smaller side of the matrices that a sweep decomposes

# Modes by letter: g group, r rank.  A (x) B splits t (out) into (p, q), s (in) into (u, v), and
# each spatial axis into (D H W, d h w): A has p, u, D H W.


def _kronecker(space: str, variant: str) -> Split:
    a, b = space.upper(), space
    if variant.endswith("first"):
        first = Layout("R", "grq", "v", b, "g", left="u", shuffle=("g", "u"))
        last = Layout("L", "gp", "ur", a, "g", right="q", shuffle=("u", "g"))
    else:
        first = Layout("L", "gpr", "u", a, "g", right="v")
        last = Layout("R", "gq", "rv", b, "g", left="p")
    return Split("g", "pu" + a, "qv" + b, (first, last))


def _kronecker_variants(kernel: Kernel) -> tuple[str, ...]:
    """Return the splits to sweep: B has similar numbers of output and input channels.

    It has all of the taps, none, or a part.
    """
    variants = []
    outs, ins, *taps = kernel.tensor.shape[1:]
    parts = itertools.zip_longest(*(_divisors(k)[1:-1] for k in taps))
    spaces = {
        *itertools.product(*({1, k} for k in taps)),
        *(tuple(d or k for d, k in zip(part, taps)) for part in parts),
    }
    channels = {(_nearest(outs, n), _nearest(ins, n)) for n in (1, 2, 4, 8, 16, 32)}
    for t, s in sorted(channels):
        for space in sorted(spaces):
            inner = t * s * math.prod(space)
            outer = kernel.tensor[0].size // inner
            if 1 in (inner, outer) or min(inner, outer) > MAX_SMALL_SIDE:
                continue
            if t == s == 1 and all(b in (1, k) for b, k in zip(space, taps)):
                continue  # filter_basis: shared filters along some of the axes
            shape = "x".join(map(str, (t, s, *space)))
            variants += [f"{shape} first"] + [f"{shape} last"] * (kernel.groups == 1)
    if not variants:
        raise NotApplicable(
            "kronecker needs a number of channels per group, or of taps, that can be split"
        )
    return tuple(variants)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _nearest(n: int, target: int) -> int:
    """Return the divisor of `n` whose ratio to `target` is nearest to 1; of two, the larger."""
    return min(_divisors(n), key=lambda d: (max(d, target) / min(d, target), -d))


def _kronecker_modes(kernel: Kernel, variant: str) -> tuple[Array, str]:
    inner = tuple(map(int, variant.split()[0].split("x")))
    tensor = kernel.tensor.reshape(
        kernel.groups, *(n for k, b in zip(kernel.tensor.shape[1:], inner) for n in (k // b, b))
    )
    return tensor, "gpquv" + "".join(a.upper() + a for a in kernel.letters)


def _check_split(kernel: Kernel, variant: str) -> None:
    """Check a variant: a shape of B that divides the kernel's, and whether B runs first."""
    shape = kernel.tensor.shape[1:]
    match = re.fullmatch(r"([0-9]+(?:x[0-9]+)*) (first|last)", variant)
    inner = [int(n) for n in match[1].split("x")] if match else []
    fits = len(inner) == len(shape) and all(b > 0 and k % b == 0 for k, b in zip(shape, inner))
    if not fits:
        raise ValueError(
            f"variant must be the shape of B, dividing {'x'.join(map(str, shape))}, and 'first' or "
            f"'last', such as '{'x'.join('2' if k % 2 == 0 else '1' for k in shape)} first', "
            f"got {variant!r}"
        )
    if variant.endswith("last") and kernel.groups > 1:
        raise ValueError(f"variant must end in 'first' for a grouped convolution, got {variant!r}")


FAMILIES = {
    "kronecker": as_family(
        Row(
            "kronecker",
            "Kronecker sum",
            "#e69f00",
            "o",
            _kronecker,
            _kronecker_variants,
            has_fast_sweep=False,
            modes=_kronecker_modes,
            check_variant=_check_split,
        )
    )
}


def kronecker(
    conv: Factorization,
    rank: int | float | None = None,
    variant: str | None = None,
    *,
    max_error: float | None = None,
) -> Factorization:
    r"""Approximate by a sum of Kronecker products ``A_r (x) B_r``.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`.
    rank : int or float, optional
        Number of Kronecker products; exact at the smaller of the sizes of A and B.
        A number between 0 and 1 is a share of the parameters; if not given, the rank of fewest
        parameters within `max_error`.
    variant : str, optional
        Shape (out, in, \*taps) of B, which must divide that of the weight, and the place of B:
        ``"4x4x3x3 first"`` runs B first (in the adjoint of a transposed convolution).  The
        default is the first that a sweep tries.
    max_error : float, optional
        Largest relative error; required if `rank` is not given.

    Returns
    -------
    Factorization
        Two replicated stages.  B: (rank * out_B, in_B, \*taps_B), applied to each of the in_A
        blocks of channels; A: (out_A, in_A * rank, \*taps_A), applied to each channel of the
        blocks.

    Raises
    ------
    ValueError
        If `rank` or `variant` is invalid; NotApplicable if no split exists.

    Notes
    -----
    The SVD of the rearranged weight (Van Loan and Pitsianis) is optimal for its split [1]_.
    Along an axis on which both have taps, A is dilated by the taps of B; the first stage takes
    the padding and the second the stride.

    References
    ----------
    .. [1] M. G. A. Hameed, M. S. Tahaei, A. Mosleh, V. P. Nia, "Convolutional neural network
       compression through generalized Kronecker product decomposition", AAAI 2022.
       :arxiv:`2109.14710`.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 4, 3, 3)), padding=1)
    >>> f = lowrank.kronecker(conv, rank=2, variant="4x2x1x1 first")
    >>> [(s.weight.shape, s.outer, s.inner) for s in f.stages]
    [((8, 2, 1, 1), 2, 1), ((2, 4, 3, 3), 1, 4)]
    """
    return FAMILIES["kronecker"].fit(conv, rank, variant, max_error=max_error)
