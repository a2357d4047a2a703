"""The families that are one singular value decomposition: six tables, one function.

With t, s and the spatial axes as the modes of a kernel, a truncated SVD of any matricisation
is the best approximation of its rank (Eckart and Young), and each of its two factors is the
weight of one stage.  A family is the choice of modes: which enumerate separate matrices
(`batch`), which make rows (`left`) and columns (`right`), and how each factor is laid out as
a stage.  Network decoupling is the same done a slice at a time; a Kronecker sum is the same
after each mode has been split in two (Van Loan and Pitsianis).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core import chain_algebra
from lowrank.core.geometry import Geometry
from lowrank.core.stage import Stage, abstract_weight
from lowrank.factorization import Factorization
from lowrank.families.family import Family, Spectrum
from lowrank.families.kernel import (
    Kernel,
    NotApplicable,
    as_kernel,
    axis_indices,
    checked_rank,
    checked_variant,
    on_weight_device,
    orient,
)
from lowrank.families.sweep_point import SweepPoint

# Modes by letter: g group, t out, s in, d h w space, r rank.  A Kronecker sum A (x) B splits
# t into (p, q), s into (u, v), and each spatial axis into (D H W, d h w): A has p, u, D H W.


class Layout(NamedTuple):
    """How one factor becomes the weight (rows, columns, *space) of one stage."""

    factor: str  # "L" has the modes batch, left, r; "R" the modes batch, r, right
    rows: str
    columns: str
    space: str
    groups: str = ""
    left: str = ""
    right: str = ""
    shuffle: tuple[str, str] = ("", "")


class Split(NamedTuple):
    """A family and variant, as modes: one (batched) SVD, two stages in the order they run."""

    batch: str
    left: str
    right: str
    stages: tuple[Layout, Layout]


def _channel_svd(space: str, variant: str) -> Split:
    if variant == "output":
        first, last = Layout("R", "gr", "s", space, "g"), Layout("L", "gt", "r", "", "g")
        return Split("g", "t", "s" + space, (first, last))
    first, last = Layout("L", "gr", "s", "", "g"), Layout("R", "gt", "r", space, "g")
    return Split("g", "s", "t" + space, (first, last))


def _spatial_svd(space: str, variant: str) -> Split:
    early, late = variant.split("-")
    early = "".join(a for a in space if a not in late)  # axes with one tap go first
    first, last = Layout("L", "gr", "s", early, "g"), Layout("R", "gt", "r", late, "g")
    return Split("g", "s" + early, "t" + late, (first, last))


def _filter_basis(space: str, variant: str) -> Split:
    late = "".join(a for a in space if a not in variant)
    first, last = Layout("L", "r", "", variant, left="gs"), Layout("R", "gt", "sr", late, "g")
    return Split("", variant, "gts" + late, (first, last))


def _network_decoupling(space: str, variant: str) -> Split:
    if variant == "dw-pw":
        first, last = Layout("L", "gsr", "", space, "gs"), Layout("R", "gt", "sr", "", "g")
        return Split("gs", space, "t", (first, last))
    first, last = Layout("L", "gtr", "s", "", "g"), Layout("R", "gt", "r", space, "gt")
    return Split("gt", "s", space, (first, last))


def _kronecker(space: str, variant: str) -> Split:
    a, b = space.upper(), space
    if variant.endswith("first"):
        first = Layout("R", "grq", "v", b, "g", left="u", shuffle=("g", "u"))
        last = Layout("L", "gp", "ur", a, "g", right="q", shuffle=("u", "g"))
    else:
        first = Layout("L", "gpr", "u", a, "g", right="v")
        last = Layout("R", "gq", "rv", b, "g", left="p")
    return Split("g", "pu" + a, "qv" + b, (first, last))


def _channel_svd_variants(kernel: Kernel) -> tuple[str, ...]:
    has_output = kernel.outs > 1 and int(kernel.tensor[0, 0].size) > 1
    has_input = kernel.ins > 1 and not kernel.is_pointwise
    variants = ("output",) * has_output + ("input",) * has_input
    if not variants:
        raise NotApplicable(
            "channel_svd needs two output channels, or two input channels, per group"
        )
    return variants


def _spatial_svd_variants(kernel: Kernel) -> tuple[str, ...]:
    if len(kernel.axes) < 2:
        raise NotApplicable("spatial_svd needs two axes with more than one tap")
    variants = []
    for n in range(1, len(kernel.axes)):
        for late in itertools.combinations(kernel.axes, n):
            early = (a for a in kernel.axes if a not in late)
            variants.append("-".join((_joined(early), _joined(late))))
    return tuple(sorted(variants, key=lambda f: (len(f.split("-")[0]), f)))


def _filter_basis_variants(kernel: Kernel) -> tuple[str, ...]:
    if kernel.is_pointwise or kernel.outs * kernel.ins < 2:
        raise NotApplicable("filter_basis needs a spatial kernel and two filters a group")
    return tuple(
        _joined(some)
        for n in range(len(kernel.axes), 0, -1)
        for some in itertools.combinations(kernel.axes, n)
    )


def _network_decoupling_variants(kernel: Kernel) -> tuple[str, ...]:
    variants = (["dw-pw"] if kernel.outs > 1 else []) + (["pw-dw"] if kernel.ins > 1 else [])
    if kernel.is_pointwise or not variants:
        raise NotApplicable(
            "network_decoupling needs a spatial kernel and more than one channel in or out of a group"
        )
    return tuple(variants)


def _kronecker_variants(kernel: Kernel) -> tuple[str, ...]:
    """Splits worth a sweep: B about square in channels, with all, none or a part of the taps."""
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
            if 1 in (inner, outer) or min(inner, outer) > _LARGEST:
                continue
            if t == s == 1 and all(b in (1, k) for b, k in zip(space, taps)):
                continue  # shared filters along some of the axes: that is `basis`
            shape = "x".join(map(str, (t, s, *space)))
            variants += [f"{shape} first"] + [f"{shape} last"] * (kernel.groups == 1)
    if not variants:
        raise NotApplicable("kronecker needs channels of a group, or taps of an axis, that split")
    return tuple(variants)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _nearest(n: int, target: int) -> int:
    """The divisor of `n` whose ratio to `target` is nearest to 1, the larger if two are."""
    return min(_divisors(n), key=lambda d: (max(d, target) / min(d, target), -d))


_LARGEST = 600  # small side of the matrices that a sweep over Kronecker splits decomposes


def _joined(axes: Sequence[str] | Iterator[str]) -> str:
    return "".join(sorted("".join(axes)))


class Row(NamedTuple):
    """A line of the table of families."""

    split: Callable[[str, str], Split]
    variants: Callable[[Kernel], tuple[str, ...]]


ROWS = {
    "channel_svd": Row(_channel_svd, _channel_svd_variants),
    "spatial_svd": Row(_spatial_svd, _spatial_svd_variants),
    "filter_basis": Row(_filter_basis, _filter_basis_variants),
    "network_decoupling": Row(_network_decoupling, _network_decoupling_variants),
    "kronecker": Row(_kronecker, _kronecker_variants),
}


class _Parts(NamedTuple):
    """A decomposition: everything that any rank of a form is made from."""

    conv: Factorization
    kernel: Kernel
    split: Split
    sizes: dict[str, int]
    geometries: tuple[Geometry, Geometry]
    u: Array  # (batch, left, r)
    s: Array  # (batch, r)
    vt: Array  # (batch, r, right)

    def stages(self, rank: int, real: bool) -> tuple[Stage, ...]:
        """The two stages at `rank`, blank or with their weights."""
        sizes = self.sizes | {"r": rank, "": 1}
        root = np.sqrt(self.s[:, :rank] * self.kernel.scale)  # shared evenly by the stages

        def size(modes: str) -> int:
            return math.prod(sizes[m] for m in modes)

        stages = []
        for layout, geometry in zip(self.split.stages, self.geometries):
            target = layout.rows + layout.columns + layout.space
            shape = (size(layout.rows), size(layout.columns), *self._space(layout, sizes))
            weight = abstract_weight(shape)
            if real:
                if layout.factor == "L":
                    modes = self.split.batch + self.split.left + "r"
                    factor = self.u[:, :, :rank] * root[:, None]
                else:
                    modes = self.split.batch + "r" + self.split.right
                    factor = self.vt[:, :rank] * root[..., None]
                tensor = factor.reshape([sizes[m] for m in modes])
                weight = tensor.transpose([modes.index(m) for m in target]).reshape(shape)
            a, b = (size(m) for m in layout.shuffle)
            stages.append(
                Stage(
                    weight,
                    geometry,
                    size(layout.groups),
                    size(layout.left),
                    size(layout.right),
                    (a, b) if min(a, b) > 1 else (1, 1),
                )
            )
        return orient(self.conv, stages)

    def _space(self, layout: Layout, sizes: dict[str, int]) -> Ints:
        have = {m.lower(): sizes[m] for m in layout.space}
        return tuple(have.get(a, 1) for a in self.kernel.letters)


def decompose(conv: Factorization, family: str, variant: str) -> _Parts:
    """The (batched) SVD that every rank of `variant` is cut from."""
    kernel = as_kernel(conv)
    split = ROWS[family].split(kernel.letters, variant)
    tensor, modes = kernel.tensor, "gts" + kernel.letters
    if family == "kronecker":
        inner = tuple(map(int, variant.split()[0].split("x")))
        tensor = tensor.reshape(
            kernel.groups, *(n for k, b in zip(tensor.shape[1:], inner) for n in (k // b, b))
        )
        modes = "gpquv" + "".join(a.upper() + a for a in kernel.letters)
    sizes = dict(zip(modes, tensor.shape))
    order = split.batch + split.left + split.right
    matrices = tensor.transpose([modes.index(m) for m in order]).reshape(
        *(math.prod(sizes[m] for m in part) for part in (split.batch, split.left, split.right))
    )
    u, s, vt = np.linalg.svd(matrices, full_matrices=False)
    return _Parts(conv, kernel, split, sizes, _geometries(conv, split, sizes), u, s, vt)


def _geometries(
    conv: Factorization, split: Split, sizes: dict[str, int]
) -> tuple[Geometry, Geometry]:
    """Each axis to the stage that runs along it; along a shared one see the notes of kronecker."""
    ndim = conv.geometry.ndim
    early, late = (
        {i for m in layout.space if sizes[m] > 1 for i in axis_indices(m.lower(), ndim)}
        for layout in split.stages
    )
    both = early & late
    # Axes with one tap belong to whichever stage the table gives them, the first if both.
    named = [{*axis_indices(layout.space.lower(), ndim)} for layout in split.stages]
    early |= named[0] - late
    late |= named[1] - early
    g = conv.geometry
    first, last = g.only(early), g.only(late - both)
    if both:
        inner = [sizes[a] for a in "dhw"[3 - ndim :]]  # taps of B
        wide = tuple(d * b for d, b in zip(g.dilation, inner))
        a_first = split.stages[0].factor == "L"

        def mixed(own: Geometry, shared: Geometry, dilation: Ints) -> Geometry:
            return replace(
                own,
                stride=_pick(both, shared.stride, own.stride),
                padding=_pick(both, shared.padding, own.padding),
                dilation=_pick(both, dilation, own.dilation),
                output_padding=_pick(both, shared.output_padding, own.output_padding),
            )

        plain = replace(g, stride=(1,) * ndim, output_padding=(0,) * ndim)
        bare = replace(g, padding=((0, 0),) * ndim)
        first = mixed(first, plain, wide if a_first else g.dilation)
        last = mixed(last, bare, g.dilation if a_first else wide)
    return first, last


def _pick(axes: set[int], a: Sequence[Any], b: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(x if i in axes else y for i, (x, y) in enumerate(zip(a, b)))


def _variants(family: str, conv: Factorization) -> tuple[str, ...]:
    return ROWS[family].variants(as_kernel(conv))


def _sweep(family: str, conv: Factorization, variant: str) -> Iterator[SweepPoint]:
    """Every rank of `variant`, from one decomposition."""
    parts = decompose(conv, family, variant)
    tail = chain_algebra.tail_norms(parts.s)
    for rank in range(1, parts.s.shape[-1] + 1):
        error = float(tail[rank])
        yield SweepPoint(
            (rank,), error, error, parts.stages(rank, False), partial(parts.stages, rank, True)
        )


@on_weight_device
def _fit(
    family: str, conv: Factorization, rank: int | Sequence[int], variant: str | None = None
) -> Factorization:
    if family == "kronecker" and variant is not None:
        _check_split(as_kernel(conv), variant)  # any split, whether a sweep tries it or not
    else:
        variant = checked_variant(variant, _variants(family, conv))
    parts = decompose(conv, family, variant)
    ranks = checked_rank(rank, (parts.s.shape[-1],), "one number")
    stages = parts.stages(ranks[0], True)
    return replace(conv, stages=stages, family=family, variant=variant, rank=ranks)


def _bound(family: str, conv: Factorization, rank: Ints, variant: str) -> float:
    """The error of the best chain: Eckart and Young's."""
    return float(chain_algebra.tail_norms(decompose(conv, family, variant).s)[rank[0]])


def _check_split(kernel: Kernel, variant: str) -> None:
    """A Kronecker form is the shape of B, dividing the kernel's, and which factor runs first."""
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
        raise ValueError("with groups, B runs first: form must end with 'first'")


def _spectra(family: str, conv: Factorization, variant: str) -> list[Spectrum]:
    svd = decompose(conv, family, variant)
    return [Spectrum(family, svd.u.shape[1], svd.vt.shape[2], svd.s)]


def _family(name: str, label: str, color: str, marker: str, is_fast: bool = True) -> Family:
    return Family(
        name,
        partial(_variants, name),
        partial(_sweep, name),
        partial(_fit, name),
        partial(_bound, name),
        exact=True,
        label=label,
        color=color,
        marker=marker,
        has_fast_sweep=is_fast,
        spectra=partial(_spectra, name),
    )


FAMILIES = {
    family.name: family
    for family in (
        _family("channel_svd", "channel SVD", "#0072b2", "o"),
        _family("spatial_svd", "spatial SVD", "#d55e00", "o"),
        _family("filter_basis", "filter basis", "#d55e00", "s"),
        _family("network_decoupling", "network decoupling", "#009e73", "o"),
        _family("kronecker", "Kronecker sum", "#e69f00", "o", is_fast=False),
    )
}


def channel_svd(conv: Factorization, rank: int, variant: str | None = None) -> Factorization:
    r"""Approximate by a spatial and a pointwise convolution with few channels between them.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, of any dimension, grouped or transposed.
    rank : int
        Number of channels between the stages, per group; from 1 to ``min(out, in * taps)``
        (variant "output") or ``min(in, out * taps)`` (variant "input"), where it is exact.
    variant : {"output", "input"}, optional
        "output" runs the spatial convolution first, to `rank` maps, then the pointwise one;
        "input" runs the pointwise one first.  Default: the first that applies.

    Returns
    -------
    Factorization
        Two stages, per group: weights (rank, in, \*kernel) and (out, rank, 1, ...) for "output",
        (rank, in, 1, ...) and (out, rank, \*kernel) for "input".

    Raises
    ------
    NotApplicable
        If no variant applies to the convolution.
    ValueError
        If `conv` is not a single dense stage, or `rank` or `variant` is out of range.
    TypeError
        If `rank` is not an integer.

    See Also
    --------
    lowrank.spatial_svd : splits the spatial axes as well.
    lowrank.frontier : every useful rank of every family at once.

    Notes
    -----
    The truncated SVD of the weight as a matrix {t | s i j} [1]_ ("output") or {s | t i j} [2]_
    ("input", known as weight SVD).  Among all chains of these shapes it has the smallest
    Frobenius error, :math:`\sqrt{\sum_{r > R} \sigma_r^2 / \sum_r \sigma_r^2}`.  The spatial
    stage carries the stride.

    References
    ----------
    .. [1] X. Zhang, J. Zou, K. He, J. Sun, "Accelerating very deep convolutional networks for
       classification and detection", TPAMI 2016. :arxiv:`1505.06798`.
    .. [2] A. Kuzmin, M. Nagel, S. Pitre, S. Pendyam, T. Blankevoort, M. Welling, "Taxonomy and
       evaluation of structured compression of convolutional neural networks", 2019.
       :arxiv:`1912.09802`.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 4, 3, 3)), padding=1)
    >>> [s.weight.shape for s in lowrank.channel_svd(conv, rank=2).stages]
    [(2, 4, 3, 3), (8, 2, 1, 1)]
    >>> [s.weight.shape for s in lowrank.channel_svd(conv, rank=2, variant="input").stages]
    [(2, 4, 1, 1), (8, 2, 3, 3)]
    """
    return _fit("channel_svd", conv, rank, variant)


def spatial_svd(conv: Factorization, rank: int, variant: str | None = None) -> Factorization:
    r"""Approximate by a pass along some spatial axes, then one along the others.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with two or three axes of several taps.
    rank : int
        Channels in between, a group.
    variant : str, optional
        Axes of the first pass and of the second.  2-D: ``"h-w"`` (columns, then rows; the
        default) or ``"w-h"``.  3-D: ``"d-hw"``, ``"hw-d"``, ``"h-dw"`` and so on.  For a
        transposed convolution here and in the other families: of its adjoint, whose stages
        run in reverse.

    Returns
    -------
    Factorization
        For ``"h-w"`` weights (rank, in, height, 1) and (out, rank, 1, width), a group.  Each
        takes the stride, padding and dilation of the axis it runs along.

    Raises
    ------
    ValueError
        If `rank` or `variant` is not possible; NotApplicable for kernels with one long axis.

    See Also
    --------
    lowrank.cp : every pass depthwise; far cheaper, no optimality guarantee.
    lowrank.tensor_train : a 3-D kernel as three passes.

    Notes
    -----
    With the weight regrouped to the matrix {s i | t j}, two passes [1]_ are a product of rank
    `rank`: the truncated SVD is optimal [2]_, with relative error
    :math:`\sqrt{\sum_{r > R} \sigma_r^2 / \sum_r \sigma_r^2}`.  For inputs of white noise
    that is the relative RMS error of the output.

    References
    ----------
    .. [1] M. Jaderberg, A. Vedaldi, A. Zisserman, "Speeding up convolutional neural networks
       with low rank expansions", BMVC 2014. :arxiv:`1405.3866`.
    .. [2] C. Tai, T. Xiao, Y. Zhang, X. Wang, W. E, "Convolutional neural networks with
       low-rank regularization", ICLR 2016. :arxiv:`1511.06067`.

    Examples
    --------
    A Gaussian blur is separable, so rank 1 loses nothing:

    >>> import numpy as np
    >>> import lowrank
    >>> g = np.exp(-np.linspace(-2, 2, 7) ** 2)
    >>> blur = lowrank.dense(np.outer(g, g)[None, None])
    >>> f = lowrank.spatial_svd(blur, rank=1)
    >>> [s.weight.shape for s in f.stages]
    [(1, 1, 7, 1), (1, 1, 1, 7)]
    >>> bool(f.error(blur.to_dense()) < 1e-12)
    True
    """
    return _fit("spatial_svd", conv, rank, variant)


def filter_basis(conv: Factorization, rank: int, variant: str | None = None) -> Factorization:
    r"""Approximate with a few spatial filters that all channels share.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with a spatial kernel.
    rank : int
        Shared filters; from 1 to the taps of `variant`, where it is exact.
    variant : str, optional
        Axes that the shared filters run along: all of them (the default; 2-D ``"hw"``), or
        some, ``"h"`` or ``"w"``, the others staying with the second stage.

    Returns
    -------
    Factorization
        A stage of `rank` filters tied over all input channels, weight (rank, 1, \*kernel),
        then one of weight (out, in * rank, ...).

    Raises
    ------
    ValueError
        If `rank` or `variant` is not possible; NotApplicable for 1x1 kernels.

    Notes
    -----
    The truncated SVD of {t s | i j}, {i | t s j} or {j | t s i}: optimal, and exact from
    `rank` = number of taps on.  With groups, all of them share the filters.

    References
    ----------
    .. [1] R. Rigamonti, A. Sironi, V. Lepetit, P. Fua, "Learning separable filters", CVPR 2013.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 4, 3, 3)), padding=1)
    >>> [s.weight.shape for s in lowrank.filter_basis(conv, rank=5).stages]
    [(5, 1, 3, 3), (8, 20, 1, 1)]
    """
    return _fit("filter_basis", conv, rank, variant)


def network_decoupling(conv: Factorization, rank: int, variant: str | None = None) -> Factorization:
    r"""Approximate by a sum of depthwise-separable convolutions.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with a spatial kernel.
    rank : int
        Terms; exact at ``min(taps, out)`` (``"dw-pw"``) or ``min(taps, in)`` (``"pw-dw"``).
    variant : str, optional
        ``"dw-pw"``: depthwise with `rank` filters a channel, then pointwise (MobileNet's order,
        the default); ``"pw-dw"``: pointwise to `rank` maps an output, then grouped.  Of a
        transposed convolution the adjoint's order.

    Returns
    -------
    Factorization
        ``"dw-pw"``: (in * rank, 1, \*kernel) and (out, in * rank, 1, ...), for each group;
        ``"pw-dw"``: (out * rank, in, 1, ...) and (out, rank, \*kernel) in out groups.

    Raises
    ------
    ValueError
        If `rank` or `variant` is not possible; NotApplicable for 1x1 kernels.

    Notes
    -----
    One SVD a slice, of W[:, s] as {i j | t} or W[t] as {s | i j}, all cut at the same rank:
    optimal among sums of `rank` depthwise-separable convolutions in that order [1]_.

    References
    ----------
    .. [1] J. Guo, Y. Li, W. Lin, Y. Chen, J. Li, "Network decoupling: from regular to depthwise
       separable convolutions", BMVC 2018. :arxiv:`1808.05517`.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 4, 3, 3)), padding=1)
    >>> [s.weight.shape for s in lowrank.network_decoupling(conv, rank=1).stages]
    [(4, 1, 3, 3), (8, 4, 1, 1)]
    """
    return _fit("network_decoupling", conv, rank, variant)


def kronecker(conv: Factorization, rank: int, variant: str | None = None) -> Factorization:
    r"""Approximate by a sum of Kronecker products ``A_r (x) B_r``.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`.
    rank : int
        Terms; exact at the smaller of the sizes of A and B.
    variant : str, optional
        Shape (out, in, \*taps) of B, which divides that of the weight, and which of the two
        factors' stages runs first or last: ``"4x4x3x3 first"`` runs B first (in the adjoint of
        a transposed convolution).  Any shape that divides; the default is the first that a
        sweep tries.

    Returns
    -------
    Factorization
        Two tied stages.  B: (rank * out_B, in_B, \*taps_B), applied to each of the in_A blocks
        of channels; A: (out_A, in_A * rank, \*taps_A), applied to each channel of the blocks.

    Raises
    ------
    ValueError
        If `rank` or `variant` is not possible; NotApplicable if no even split exists.

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
    return _fit("kronecker", conv, rank, variant)
