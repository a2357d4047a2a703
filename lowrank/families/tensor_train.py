"""Tensor train: modes in a sequence from the input channels to the output channels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, cast

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core import chain_algebra
from lowrank.core.stage import Stage, abstract_weight
from lowrank.factorization import Factorization
from lowrank.families import _tensorly
from lowrank.families.family import Family, Spectrum
from lowrank.families.kernel import (
    Kernel,
    NotApplicable,
    as_kernel,
    axis_indices,
    balance_norms,
    checked_rank,
    checked_variant,
    on_weight_device,
    orient,
)
from lowrank.families.sweep_point import SweepPoint

LEVELS = 12  # truncation levels in a sweep


class Train(NamedTuple):
    """Kernel with its modes in the order of the train, one core per item of `cars`."""

    conv: Factorization
    kernel: Kernel
    cars: tuple[str, ...]  # modes of each core: "s", "h", "w", "t", or merged "sd", "h", "wt"
    tensor: Array  # (g, *cars)

    def largest(self) -> Ints:
        """Return the largest useful rank at each bond."""
        sizes = self.tensor.shape[1:]
        return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


def train(conv: Factorization, variant: str) -> Train:
    """Return the tensor that `variant` decomposes."""
    kernel = as_kernel(conv)
    cars = tuple(variant.split("-"))
    modes = "gts" + kernel.letters
    named = [_with_units(car, kernel) for car in cars]
    order = [modes.index(m) for m in "g" + "".join(named)]
    size = dict(zip(modes, kernel.tensor.shape))
    shape = [math.prod(size[m] for m in car) for car in named]
    tensor = kernel.tensor.transpose(order).reshape(kernel.groups, *shape)
    return Train(conv, kernel, tuple(named), tensor)


def _with_units(car: str, kernel: Kernel) -> str:
    """Return the modes of a core, with the axes of one tap that belong to its axis."""
    for axes in kernel.axes:
        long = next((a for a in axes if a in car), None)
        if long is not None:
            car = car.replace(long, axes)
    return car


def _variants(conv: Factorization) -> tuple[str, ...]:
    kernel = as_kernel(conv)
    long = ["".join(a for a in axes if _taps(kernel, a) > 1) for axes in kernel.axes]
    channels = min(kernel.outs, kernel.ins) > 1
    if kernel.is_pointwise or not (channels or len(long) > 2):
        raise NotApplicable(
            "tensor_train needs a spatial kernel, and two input and output channels per group "
            "or three axes"
        )
    variants = ["-".join(("s", *long, "t"))] if channels else []
    if len(long) > 2:
        variants.append("-".join(("s" + long[0], *long[1:-1], long[-1] + "t")))
    return tuple(variants)


def _taps(kernel: Kernel, letter: str) -> int:
    return int(kernel.tensor.shape[3 + kernel.letters.index(letter)])


def _chain(parts: Train, rank: Ints, cores: Sequence[Array] | None) -> tuple[Stage, ...]:
    """Return one stage per core, (g, r_before, size, r_after); abstract without `cores`."""
    conv, kernel, g = parts.conv, parts.kernel, parts.kernel.groups
    each = kernel.scale ** (1 / len(parts.cars))
    bonds = (1, *rank, 1)
    stages = []
    for i, car in enumerate(parts.cars):
        before, after = bonds[i], bonds[i + 1]
        axes = "".join(a for a in car if a not in "st")
        taps = tuple(_taps(kernel, a) if a in axes else 1 for a in kernel.letters)
        ins = before * (kernel.ins if "s" in car else 1)
        outs = after * (kernel.outs if "t" in car else 1)
        shape = (g * outs, ins, *taps)
        w = abstract_weight(shape)
        if cores is not None:
            # (g, before, s, space, t, after) to (g, after or t, before or s, space)
            core = cores[i].reshape(g, before, kernel.ins if "s" in car else 1, math.prod(taps), -1)
            w = core.transpose(0, 4, 1, 2, 3).reshape(shape) * each
        stages.append(Stage(w, conv.geometry.only(axis_indices(axes, conv.geometry.ndim)), g))
    return orient(conv, stages if cores is None else balance_norms(stages))


def _build(parts: Train, rank: Ints) -> tuple[Stage, ...]:
    cores = [_tensorly.tensor_train(t, rank) for t in parts.tensor]
    balanced = [_balanced(c) for c in cores]
    return _chain(parts, rank, [np.stack(c) for c in zip(*balanced)])


def _balanced(cores: Sequence[Array]) -> list[Array]:
    """Share the norm, which TT-SVD leaves in the last core, evenly by all cores.

    The square roots of the singular values go to both sides of each bond.
    """
    cores = list(cores)
    for k in range(len(cores) - 1, 0, -1):
        r = cores[k].shape[0]
        norms = np.sqrt(np.linalg.norm(cores[k].reshape(r, -1), axis=1))
        cores[k] = cores[k] / np.where(norms, norms, 1)[:, None, None]
        cores[k - 1] = cores[k - 1] * norms
    return cores


def _sweep(conv: Factorization, variant: str) -> Iterator[SweepPoint]:
    """Yield TT-SVD at a dozen levels, with the same share of the norm at every bond."""
    parts = train(conv, variant)
    tails, turned = _tails(parts), _turned(parts.tensor)
    seen = set()
    for level in np.linspace(0.95, 0.0, LEVELS):
        rank = tuple(max(1, int(np.argmax(t <= level + 1e-12))) for t in tails)
        rank = _consistent(rank, parts.tensor.shape[1:])
        if rank in seen:
            continue
        seen.add(rank)
        error = _truncated_error(turned, rank)
        bound = float(max(t[r] for t, r in zip(tails, rank)))
        yield SweepPoint(
            rank,
            error,
            min(bound, error),
            _chain(parts, rank, None),
            partial(_build, parts, rank),
        )


def _tails(parts: Train) -> list[Array]:
    """Return the truncation errors per bond: lower bounds for any train of that rank."""
    bonds = range(1, parts.tensor.ndim - 1)
    return [chain_algebra.truncation_errors(parts.tensor, range(1, k + 1), (0,)) for k in bonds]


def _bound(conv: Factorization, rank: Ints, variant: str) -> float:
    return float(max(t[r] for t, r in zip(_tails(train(conv, variant)), rank)))


def _consistent(rank: Ints, sizes: Sequence[int]) -> Ints:
    """Lower each rank to its neighbour's times the size of the mode between them."""
    ranks = [1, *rank, 1]
    for k in range(1, len(ranks) - 1):
        ranks[k] = min(ranks[k], ranks[k - 1] * sizes[k - 1])
    for k in range(len(ranks) - 2, 0, -1):
        ranks[k] = min(ranks[k], ranks[k + 1] * sizes[k])
    return tuple(ranks[1:-1])


def _turned(tensor: Array) -> Array:
    """Turn the first mode, (g, size, ...), to its singular vectors, the leading ones first.

    Truncations at the first bond are then slices, and norms are as before.
    """
    unfolded = tensor.reshape(*tensor.shape[:2], -1)
    _, vectors = chain_algebra.eigh(unfolded @ unfolded.swapaxes(1, 2))
    return (vectors[:, :, ::-1].swapaxes(1, 2) @ unfolded).reshape(tensor.shape)


def _truncated_error(tensor: Array, rank: Ints) -> float:
    """Return the relative error of TT-SVD at these ranks, from norms of the projected tensor.

    Gram matrices replace SVDs, since only subspaces and norms are needed, and at the last bond
    only values.  The first mode must be turned to its singular vectors.
    """
    total = float(np.square(tensor).sum())
    if total == 0:
        return 0.0
    sizes, g, before = tensor.shape[2:], len(tensor), rank[0]
    rest = tensor[:, :before]
    for r, size in zip(rank[1:-1], sizes):
        rest = rest.reshape(g, before * size, -1)
        if r < min(rest.shape[1:]):
            if rest.shape[1] <= rest.shape[2]:
                _, vectors = chain_algebra.eigh(rest @ rest.swapaxes(1, 2))
                rest = vectors[:, :, -r:].swapaxes(1, 2) @ rest
            else:  # rows are orthogonal combinations: sqrt of the leading eigenvalues
                values, vectors = chain_algebra.eigh(rest.swapaxes(1, 2) @ rest)
                roots = np.sqrt(values[:, -r:].clip(min=0))
                rest = roots[:, :, None] * vectors[:, :, -r:].swapaxes(1, 2)
        elif r < rest.shape[1]:
            rest = cast(Array, np.linalg.qr(rest, mode="r"))
        before = rest.shape[1]
    kept = np.square(rest).sum()
    if len(rank) > 1:
        rest = rest.reshape(g, before * sizes[len(rank) - 2], -1)
        if rank[-1] < min(rest.shape[1:]):
            wide = rest if rest.shape[1] <= rest.shape[2] else rest.swapaxes(1, 2)
            kept = np.linalg.eigvalsh(wide @ wide.swapaxes(1, 2))[:, -rank[-1] :].sum()
    return math.sqrt(max(0.0, 1 - float(kept) / total))


@on_weight_device
def _fit(conv: Factorization, rank: Sequence[int], variant: str | None = None) -> Factorization:
    variant = checked_variant(variant, _variants(conv))
    parts = train(conv, variant)
    ranks = checked_rank(rank, parts.largest(), "one per bond of " + variant)
    ranks = _consistent(ranks, parts.tensor.shape[1:])
    return replace(
        conv, stages=_build(parts, ranks), family="tensor_train", variant=variant, rank=ranks
    )


def _spectra(conv: Factorization, variant: str) -> list[Spectrum]:
    """Return the spectrum of the unfolding at every bond of the train."""
    cars = train(conv, variant).tensor
    spectra = []
    for bond in range(2, cars.ndim):
        rows = math.prod(cars.shape[1:bond])
        matrices = cars.reshape(len(cars), rows, -1)
        values = np.linalg.svd(matrices, compute_uv=False)
        spectra.append(Spectrum(f"bond {bond - 1}", rows, matrices.shape[2], values))
    return spectra


FAMILIES = {
    "tensor_train": Family(
        "tensor_train",
        _variants,
        _sweep,
        _fit,
        _bound,
        exact=False,
        label="tensor train",
        color="#000000",
        marker="o",
        has_fast_sweep=True,
        spectra=_spectra,
    )
}


def tensor_train(
    conv: Factorization,
    rank: Sequence[int] | float | None = None,
    variant: str | None = None,
    *,
    max_error: float | None = None,
) -> Factorization:
    r"""Approximate by one pass per axis between two pointwise stages, all of few channels.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with a spatial kernel.
    rank : sequence of int or float, optional
        Numbers of channels between the stages, per group; lowered to what the sizes allow.
        A number between 0 and 1 is a share of the parameters; if not given, the rank of fewest
        parameters within `max_error`.
    variant : str, optional
        Modes of the train.  2-D: ``"s-h-w-t"`` (the default).  3-D: ``"s-d-h-w-t"``, or
        ``"sd-h-wt"``: three passes without pointwise stages.
    max_error : float, optional
        Largest relative error; required if `rank` is not given.

    Returns
    -------
    Factorization
        For ``"s-h-w-t"``: (r1, in, 1, 1), (r2, r1, height, 1), (r3, r2, 1, width), (out, r3, 1, 1).

    Raises
    ------
    ValueError
        If `rank` or `variant` is invalid; NotApplicable for 1x1 kernels and single channels.

    Notes
    -----
    TT-SVD, whose error is at most :math:`\sqrt{modes - 1}` times the smallest at these ranks [1]_.

    References
    ----------
    .. [1] I. V. Oseledets, "Tensor-train decomposition", SIAM J. Sci. Comput. 33, 2011.
    .. [2] T. Garipov, D. Podoprikhin, A. Novikov, D. Vetrov, "Ultimate tensorization:
       compressing convolutional and FC layers alike", 2016. :arxiv:`1611.03214`.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 6, 3, 3)), padding=1)
    >>> [s.weight.shape for s in lowrank.tensor_train(conv, rank=(4, 5, 6)).stages]
    [(4, 6, 1, 1), (5, 4, 3, 1), (6, 5, 1, 3), (8, 6, 1, 1)]
    """
    return FAMILIES["tensor_train"].fit(conv, rank, variant, max_error=max_error)
