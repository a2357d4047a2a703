"""Families of one singular value decomposition: one function and a table of matricisations.

With t, s and the spatial axes as the modes of a kernel, a truncated SVD of any matricisation
is the best approximation of its rank (Eckart and Young), and each of its two factors is the
weight of one stage.  A family is a choice of modes: those that enumerate separate matrices
(`batch`), those of the rows (`left`) and columns (`right`), and the layout of each factor as
a stage.  Network decoupling does this per slice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
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

# Modes by letter: g group, t out, s in, d h w space, r rank.


class Layout(NamedTuple):
    """Layout of one factor as the weight (rows, columns, *space) of one stage.

    Attributes
    ----------
    factor : str
        "L" for the factor with modes (batch, left, r), "R" for that with (batch, r, right).
    rows, columns, space : str
        Modes of the weight's axes.
    groups : str
        Modes whose sizes multiply to the stage's number of groups.
    left, right : str
        Modes of the stage's outer and inner replication.
    shuffle : (str, str)
        Modes of the two factors of the stage's channel shuffle.
    """

    factor: str
    rows: str
    columns: str
    space: str
    groups: str = ""
    left: str = ""
    right: str = ""
    shuffle: tuple[str, str] = ("", "")


class Split(NamedTuple):
    """Modes of one variant: one batched SVD, and two stages in the order in which they run."""

    batch: str
    left: str
    right: str
    stages: tuple[Layout, Layout]


def _modes(kernel: Kernel, variant: str) -> tuple[Array, str]:
    return kernel.tensor, "gts" + kernel.letters


class Row(NamedTuple):
    """One family of the table.

    Attributes
    ----------
    name, label, color, marker : str
        As in :class:`Family`.
    split : callable
        ``split(letters of the spatial axes, variant)`` returns the :class:`Split`.
    variants : callable
        ``variants(kernel)`` returns the variants that apply; raises NotApplicable if none does.
    has_fast_sweep : bool
        As in :class:`Family`.
    modes : callable
        ``modes(kernel, variant)`` returns the tensor to matricise and the letters of its modes.
    check_variant : callable, optional
        ``check_variant(kernel, variant)`` raises ValueError for an invalid variant.  If not given,
        only the variants that apply are valid.
    """

    name: str
    label: str
    color: str
    marker: str
    split: Callable[[str, str], Split]
    variants: Callable[[Kernel], tuple[str, ...]]
    has_fast_sweep: bool = True
    modes: Callable[[Kernel, str], tuple[Array, str]] = _modes
    check_variant: Callable[[Kernel, str], None] | None = None


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
            variants.append("-".join((_join(early), _join(late))))
    return tuple(sorted(variants, key=lambda v: (len(v.split("-")[0]), v)))


def _filter_basis_variants(kernel: Kernel) -> tuple[str, ...]:
    if kernel.is_pointwise or kernel.outs * kernel.ins < 2:
        raise NotApplicable("filter_basis needs a spatial kernel and two filters per group")
    return tuple(
        _join(some)
        for n in range(len(kernel.axes), 0, -1)
        for some in itertools.combinations(kernel.axes, n)
    )


def _network_decoupling_variants(kernel: Kernel) -> tuple[str, ...]:
    variants = (["dw-pw"] if kernel.outs > 1 else []) + (["pw-dw"] if kernel.ins > 1 else [])
    if kernel.is_pointwise or not variants:
        raise NotApplicable(
            "network_decoupling needs a spatial kernel and more than one input or output channel "
            "per group"
        )
    return tuple(variants)


def _join(axes: Iterable[str]) -> str:
    return "".join(sorted("".join(axes)))


@dataclass(frozen=True, eq=False)
class _Parts:
    """Matricisation from which the chain of every rank of a variant is made.

    Sweeps need its singular values alone; the vectors, which take as much memory as the kernel,
    are computed for the first chain that is built.
    """

    conv: Factorization
    kernel: Kernel
    row: Row
    variant: str
    split: Split
    sizes: dict[str, int]
    geometries: tuple[Geometry, Geometry]

    @property
    def shape(self) -> Ints:
        """Numbers of matrices, of their rows and of their columns."""
        parts = (self.split.batch, self.split.left, self.split.right)
        return tuple(math.prod(self.sizes[m] for m in part) for part in parts)

    def matrices(self) -> Array:
        """Return the matrices, (batch, left, right)."""
        tensor, modes = self.row.modes(self.kernel, self.variant)
        order = self.split.batch + self.split.left + self.split.right
        return tensor.transpose([modes.index(m) for m in order]).reshape(self.shape)

    def values(self) -> Array:
        """Return the singular values, (batch, r)."""
        return chain_algebra.singular_values(self.matrices())

    @cached_property
    def decomposition(self) -> tuple[Array, Array, Array]:
        """Left vectors (batch, left, r), values (batch, r) and right vectors (batch, r, right)."""
        u, s, vt = np.linalg.svd(self.matrices(), full_matrices=False)
        return u, s, vt

    def stages(self, rank: int, is_abstract: bool) -> tuple[Stage, ...]:
        """Return the two stages at `rank`."""
        sizes = self.sizes | {"r": rank, "": 1}
        if not is_abstract:
            u, s, vt = self.decomposition
            root = np.sqrt(s[:, :rank] * self.kernel.scale)  # shared evenly by the stages

        def size(modes: str) -> int:
            return math.prod(sizes[m] for m in modes)

        stages = []
        for layout, geometry in zip(self.split.stages, self.geometries):
            target = layout.rows + layout.columns + layout.space
            shape = (size(layout.rows), size(layout.columns), *self._space(layout, sizes))
            if is_abstract:
                weight = abstract_weight(shape)
            else:
                if layout.factor == "L":
                    modes = self.split.batch + self.split.left + "r"
                    factor = u[:, :, :rank] * root[:, None]
                else:
                    modes = self.split.batch + "r" + self.split.right
                    factor = vt[:, :rank] * root[..., None]
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
        taps = {m.lower(): sizes[m] for m in layout.space}
        return tuple(taps.get(a, 1) for a in self.kernel.letters)


def _matricise(row: Row, conv: Factorization, variant: str) -> _Parts:
    """Return the matricisation whose SVD every rank of `variant` truncates."""
    kernel = as_kernel(conv)
    split = row.split(kernel.letters, variant)
    tensor, modes = row.modes(kernel, variant)
    sizes = dict(zip(modes, tensor.shape))
    return _Parts(conv, kernel, row, variant, split, sizes, _geometries(conv, split, sizes))


def _geometries(
    conv: Factorization, split: Split, sizes: dict[str, int]
) -> tuple[Geometry, Geometry]:
    """Return the geometries of both stages: each axis goes to the stage that runs along it.

    Axes along which both stages run are explained in the notes of :func:`lowrank.kronecker`.
    """
    ndim = conv.geometry.ndim
    early, late = (
        {i for m in layout.space if sizes[m] > 1 for i in axis_indices(m.lower(), ndim)}
        for layout in split.stages
    )
    both = early & late
    # Axes with one tap go to the stage that the table names, to the first if it names both.
    by_table = [{*axis_indices(layout.space.lower(), ndim)} for layout in split.stages]
    early |= by_table[0] - late
    late |= by_table[1] - early
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


def _variants(row: Row, conv: Factorization) -> tuple[str, ...]:
    return row.variants(as_kernel(conv))


def _sweep(row: Row, conv: Factorization, variant: str) -> Iterator[SweepPoint]:
    parts = _matricise(row, conv, variant)
    tail = chain_algebra.tail_norms(parts.values())
    for rank in range(1, len(tail)):
        error = float(tail[rank])
        yield SweepPoint(
            (rank,), error, error, parts.stages(rank, True), partial(parts.stages, rank, False)
        )


@on_weight_device
def _fit(
    row: Row, conv: Factorization, rank: int | Sequence[int], variant: str | None = None
) -> Factorization:
    kernel = as_kernel(conv)
    if row.check_variant is None or variant is None:
        variant = checked_variant(variant, row.variants(kernel))
    else:
        row.check_variant(kernel, variant)
    parts = _matricise(row, conv, variant)
    ranks = checked_rank(rank, (min(parts.shape[1:]),), "one number")
    stages = parts.stages(ranks[0], False)
    return replace(conv, stages=stages, family=row.name, variant=variant, rank=ranks)


def _bound(row: Row, conv: Factorization, rank: Ints, variant: str) -> float:
    """Return the smallest possible error (Eckart and Young)."""
    return float(chain_algebra.tail_norms(_matricise(row, conv, variant).values())[rank[0]])


def _spectra(row: Row, conv: Factorization, variant: str) -> list[Spectrum]:
    parts = _matricise(row, conv, variant)
    _, rows, columns = parts.shape
    return [Spectrum(row.name, rows, columns, parts.values())]


def as_family(row: Row) -> Family:
    """Return the family of a row of the table."""
    return Family(
        row.name,
        partial(_variants, row),
        partial(_sweep, row),
        partial(_fit, row),
        partial(_bound, row),
        exact=True,
        label=row.label,
        color=row.color,
        marker=row.marker,
        has_fast_sweep=row.has_fast_sweep,
        spectra=partial(_spectra, row),
    )


_ROWS = (
    Row("channel_svd", "channel SVD", "#0072b2", "o", _channel_svd, _channel_svd_variants),
    Row("spatial_svd", "spatial SVD", "#d55e00", "o", _spatial_svd, _spatial_svd_variants),
    Row("filter_basis", "filter basis", "#d55e00", "s", _filter_basis, _filter_basis_variants),
    Row(
        "network_decoupling",
        "network decoupling",
        "#009e73",
        "o",
        _network_decoupling,
        _network_decoupling_variants,
    ),
)
FAMILIES = {row.name: as_family(row) for row in _ROWS}


def channel_svd(
    conv: Factorization,
    rank: int | float | None = None,
    variant: str | None = None,
    *,
    max_error: float | None = None,
) -> Factorization:
    r"""Approximate by a spatial and a pointwise convolution with few channels between them.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, of any dimension, grouped or transposed.
    rank : int or float, optional
        Number of channels between the stages, per group; from 1 to ``min(out, in * taps)``
        (variant "output") or ``min(in, out * taps)`` (variant "input"), where it is exact.
        A number between 0 and 1 is a share of the parameters; if not given, the rank of fewest
        parameters within `max_error`.
    variant : {"output", "input"}, optional
        "output" runs the spatial convolution first, to `rank` maps, then the pointwise one;
        "input" runs the pointwise one first.  Default: the first that applies.
    max_error : float, optional
        Largest relative error; required if `rank` is not given.

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
        If `rank` is neither an integer nor a share, or neither it nor `max_error` is given.

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
    return FAMILIES["channel_svd"].fit(conv, rank, variant, max_error=max_error)


def spatial_svd(
    conv: Factorization,
    rank: int | float | None = None,
    variant: str | None = None,
    *,
    max_error: float | None = None,
) -> Factorization:
    r"""Approximate by a pass along some spatial axes, then one along the others.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with two or three axes of several taps.
    rank : int or float, optional
        Number of channels between the stages, per group.
        A number between 0 and 1 is a share of the parameters; if not given, the rank of fewest
        parameters within `max_error`.
    variant : str, optional
        Axes of the first pass and of the second.  2-D: ``"h-w"`` (columns, then rows; the
        default) or ``"w-h"``.  3-D: ``"d-hw"``, ``"hw-d"``, ``"h-dw"`` and so on.  For a
        transposed convolution, here and in the other families, the axes are those of its adjoint,
        whose stages run in reverse order.
    max_error : float, optional
        Largest relative error; required if `rank` is not given.

    Returns
    -------
    Factorization
        For ``"h-w"`` weights (rank, in, height, 1) and (out, rank, 1, width), per group.  Each
        stage has the stride, padding and dilation of its axis.

    Raises
    ------
    ValueError
        If `rank` or `variant` is invalid; NotApplicable for kernels along one axis.

    See Also
    --------
    lowrank.cp : depthwise passes, which cost far less and are not guaranteed to be optimal.
    lowrank.tensor_train : three passes for a 3-D kernel.

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
    A Gaussian blur is separable, so rank 1 is exact:

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
    return FAMILIES["spatial_svd"].fit(conv, rank, variant, max_error=max_error)


def filter_basis(
    conv: Factorization,
    rank: int | float | None = None,
    variant: str | None = None,
    *,
    max_error: float | None = None,
) -> Factorization:
    r"""Approximate by a few spatial filters that all channels share.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with a spatial kernel.
    rank : int or float, optional
        Number of shared filters, from 1 to the number of taps of `variant`, where it is exact.
        A number between 0 and 1 is a share of the parameters; if not given, the rank of fewest
        parameters within `max_error`.
    variant : str, optional
        Axes along which the shared filters run: all (the default; 2-D ``"hw"``), or some
        (``"h"`` or ``"w"``); the second stage runs along the others.
    max_error : float, optional
        Largest relative error; required if `rank` is not given.

    Returns
    -------
    Factorization
        A stage of `rank` filters shared by all input channels, weight (rank, 1, \*kernel), then
        one of weight (out, in * rank, ...).

    Raises
    ------
    ValueError
        If `rank` or `variant` is invalid; NotApplicable for 1x1 kernels.

    Notes
    -----
    The truncated SVD of {t s | i j}, {i | t s j} or {j | t s i}: optimal, and exact from
    `rank` = number of taps on.  All groups share the filters.

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
    return FAMILIES["filter_basis"].fit(conv, rank, variant, max_error=max_error)


def network_decoupling(
    conv: Factorization,
    rank: int | float | None = None,
    variant: str | None = None,
    *,
    max_error: float | None = None,
) -> Factorization:
    r"""Approximate by a sum of depthwise-separable convolutions.

    Parameters
    ----------
    conv : Factorization
        One dense stage, from :func:`lowrank.dense`, with a spatial kernel.
    rank : int or float, optional
        Number of summands; exact at ``min(taps, out)`` (``"dw-pw"``) or ``min(taps, in)``
        (``"pw-dw"``).
        A number between 0 and 1 is a share of the parameters; if not given, the rank of fewest
        parameters within `max_error`.
    variant : str, optional
        ``"dw-pw"``: depthwise with `rank` filters per channel, then pointwise (MobileNet's order,
        the default); ``"pw-dw"``: pointwise to `rank` maps per output, then grouped.  For a
        transposed convolution, the order is that of its adjoint.
    max_error : float, optional
        Largest relative error; required if `rank` is not given.

    Returns
    -------
    Factorization
        ``"dw-pw"``: (in * rank, 1, \*kernel) and (out, in * rank, 1, ...), for each group;
        ``"pw-dw"``: (out * rank, in, 1, ...) and (out, rank, \*kernel) in out groups.

    Raises
    ------
    ValueError
        If `rank` or `variant` is invalid; NotApplicable for 1x1 kernels.

    Notes
    -----
    One SVD per slice, of W[:, s] as {i j | t} or W[t] as {s | i j}, all truncated at the same
    rank: optimal among sums of `rank` depthwise-separable convolutions in that order [1]_.

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
    return FAMILIES["network_decoupling"].fit(conv, rank, variant, max_error=max_error)
