"""Every family fitted in a metric: modes scaled so that its own fit is nearly right, then refined.

Where a stage holds a mode of the kernel alone, that mode can be multiplied by a root of its second
moment before the fit, and the stage by the inverse after it: the fit is then one in the metric.
What this leaves out (moments that are no Kronecker product; modes that several stages hold) is
made up for by alternating least squares in the full metric, a stage at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from scipy import linalg

from lowrank._typing import Array, Ints
from lowrank.core.chain_algebra import plain
from lowrank.core.stage import Stage
from lowrank.core.tensor_network import Network, composed, entries, network
from lowrank.factorization import Factorization
from lowrank.families import FAMILIES
from lowrank.families.family import SweepPoint, norm_balance
from lowrank.metric import Metric, unrolled, white

SWEEPS = 30  # of alternation, at the most
TOLERANCE = 1e-3  # of what is left of the energy: a sweep that takes off less is the last
STEPS = 6  # of conjugate gradients a stage
RESIDUAL = 0.03  # of the gradient, that they may leave
BONDS = 700  # unknowns that a preconditioner couples, at the most


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """Roots that modes are multiplied by; None where a mode stays as it is.

    ``joint`` scales all modes of the inputs together and ``outs`` those of the outputs, as
    (groups, n, n); ``channels`` and ``taps`` the inputs' one by one.
    """

    outs: Array | None = None
    joint: Array | None = None
    channels: Array | None = None
    taps: tuple[Array | None, ...] = ()

    def to(self, e: Array) -> Array:
        """A kernel (groups, out, in, \\*taps), scaled."""
        shape = e.shape
        if self.outs is not None:
            e = (self.outs.swapaxes(1, 2) @ e.reshape(*shape[:2], -1)).reshape(shape)
        if self.joint is not None:
            return np.asarray((e.reshape(*shape[:2], -1) @ self.joint).reshape(shape))
        if self.channels is not None:
            rows = self.channels.swapaxes(1, 2)[:, None] @ e.reshape(*shape[:3], -1)
            e = rows.reshape(shape)
        for axis, s in enumerate(self.taps, start=3):
            if s is not None:
                e = np.moveaxis(np.moveaxis(e, axis, -1) @ s, -1, axis)
        return np.asarray(e)

    def seen(self, m: Metric) -> Metric:
        """The metric of scaled kernels, where the roots are those of `m`."""
        outputs, inputs, channels, taps = m.outputs, m.inputs, m.channels, m.taps
        if outputs is not None and self.outs is not None:
            outputs = _left(outputs, self.outs) if _is_diagonal(self.outs) else None
        if self.joint is not None:
            plain = white(len(channels), (channels.shape[1], *map(len, taps)))
            inputs, channels, taps = None, plain.channels, plain.taps
        else:
            if self.channels is not None:
                channels = _left(channels, self.channels)
            taps = tuple(
                c if s is None else _left(c[None], s[None])[0] for c, s in zip(taps, self.taps)
            )
            if inputs is not None:
                shape = (channels.shape[1], *(len(c) for c in taps))
                half = self._inverse(inputs.reshape(len(inputs), -1, *shape))
                half = half.reshape(inputs.shape).swapaxes(1, 2)
                inputs = self._inverse(half.reshape(len(inputs), -1, *shape)).reshape(inputs.shape)
        return replace(m, inputs=inputs, channels=channels, taps=taps, outputs=outputs)

    def _inverse(self, e: Array) -> Array:
        """Rows (groups, n, in, \\*taps) times the inverse of the inputs' roots."""
        shape = e.shape
        if self.channels is not None:
            inverse = np.linalg.inv(self.channels)
            e = (inverse[:, None] @ e.reshape(*shape[:3], -1)).reshape(shape)
        for axis, s in enumerate(self.taps, start=3):
            if s is not None:
                e = np.moveaxis(np.moveaxis(e, axis, -1) @ np.linalg.inv(s).T, -1, axis)
        return np.asarray(e)


def _left(c: Array, root: Array) -> Array:
    """What is left of C between the inverses of its root, of all of it or of its diagonal."""
    if not _is_diagonal(root):
        return np.tile(np.eye(c.shape[-1]), (len(c), 1, 1))
    diagonal = np.diagonal(root, axis1=1, axis2=2)
    return np.asarray(c / (diagonal[:, :, None] * diagonal[:, None]))


def _is_diagonal(root: Array) -> bool:
    return bool(np.count_nonzero(root) <= len(root) * root.shape[-1])


class _Roles(NamedTuple):
    """Which modes of a network are inputs and which outputs of what runs."""

    batch: str
    outs: str
    channels: str
    space: tuple[str, ...]

    @classmethod
    def of(cls, n: Network, transposed: bool) -> _Roles:
        batch = "".join(m for m in n.rows if m in n.columns)
        rows = "".join(m for m in n.rows if m not in batch)
        columns = "".join(m for m in n.columns if m not in batch)
        return cls(batch, *((columns, rows) if transposed else (rows, columns)), n.space)


def _holder(n: Network, modes: str, batch: str) -> tuple[int | None, bool]:
    """A stage that holds all of these modes, groups going along, and whether no other has any."""
    holders = [i for i, have in enumerate(n.stages) if set(have) & set(modes)]
    whole = [i for i in holders if set(modes + batch) <= set(n.stages[i])]
    return (whole[0] if modes and whole else None), len(holders) == 1


def scaling(n: Network, conv: Factorization, m: Metric) -> Scaling:
    """Roots for the modes that one stage holds alone, of diagonals where several do."""
    roles = _Roles.of(n, conv.transposed)
    space = "".join(roles.space)

    def root(c: Array | None, modes: str, batch: str) -> Array | None:
        at, alone = _holder(n, modes, batch)
        return None if c is None or at is None else _root(c, alone)

    outs = root(m.outputs, roles.outs, roles.batch)
    at, alone = _holder(n, roles.channels + space, roles.batch)
    if m.inputs is not None and at is not None and alone:
        return Scaling(outs, joint=root(m.inputs, roles.channels + space, roles.batch))
    channels = root(m.channels, roles.channels, roles.batch)
    # Roots of taps are shared by groups, so that the stage need not hold them.
    taps = [root(c[None], modes, "") for modes, c in zip(roles.space, m.taps)]
    return Scaling(outs, None, channels, tuple(None if t is None else t[0] for t in taps))


def _root(c: Array, whole: bool) -> Array:
    """R with C = R R', or the root of C's diagonal."""
    if whole:
        return np.linalg.cholesky(c)
    roots = np.sqrt(np.diagonal(c, axis1=1, axis2=2))
    return np.asarray(roots[:, :, None] * np.eye(c.shape[-1]))


def _split(
    n: Network, roles: _Roles, s: Scaling, tensors: Sequence[Array], scaled: bool = False
) -> list[Array]:
    """Weights as they are before scaling, from those for scaled modes; or `scaled`, back again."""
    found = list(tensors)

    def undo(modes: str, root: Array | None) -> None:
        """Root (groups or 1, n, n) of all these modes together."""
        if root is None or not modes:
            return
        batch = roles.batch if len(root) > 1 else ""
        at, alone = _holder(n, modes, batch)
        assert at is not None
        if alone:
            found[at] = _times(found[at], n.stages[at], modes, root, batch, scaled)
        else:  # a diagonal of modes that several stages hold: undone in one of them
            diagonal = np.diagonal(root, axis1=1, axis2=2)
            diagonal = diagonal if scaled else 1 / diagonal
            shape = n.shape(batch + modes)
            found[at] = _rows(found[at], n.stages[at], batch + modes, diagonal.reshape(shape))

    undo(roles.outs, s.outs)
    if s.joint is not None:
        undo(roles.channels + "".join(roles.space), s.joint)
        return found
    undo(roles.channels, s.channels)
    for modes, root in zip(roles.space, s.taps or [None] * len(roles.space)):
        undo(modes, None if root is None else root[None])
    return found


def _times(x: Array, have: str, modes: str, root: Array, batch: str, scaled: bool) -> Array:
    """`x` times the (inverse) root over `modes`: (groups or 1, n, n), lower triangular."""
    rest = "".join(m for m in have if m not in batch + modes)
    order = batch + rest + modes
    moved = x.transpose([have.index(m) for m in order])
    flat = moved.reshape(len(root), -1, root.shape[1])
    flat = (
        flat @ root
        if scaled
        else np.stack(
            [linalg.solve_triangular(r, f.T, trans="T", lower=True).T for r, f in zip(root, flat)]
        )
    )
    return flat.reshape(moved.shape).transpose([order.index(m) for m in have])


def _rows(x: Array, have: str, modes: str, diagonal: Array) -> Array:
    order = [modes.index(m) for m in have if m in modes]
    shape = [x.shape[i] if m in modes else 1 for i, m in enumerate(have)]
    return np.asarray(x * diagonal.transpose(order).reshape(shape))


class Prepared(NamedTuple):
    """What fits of one form share; see :meth:`Weighted.prepared`.

    Attributes
    ----------
    scaling : Scaling
        Roots of modes.
    metric : Metric
        Of scaled kernels.
    wanted : ndarray
        The kernel, scaled.
    """

    scaling: Scaling
    metric: Metric
    wanted: Array


@dataclass(frozen=True, slots=True, eq=False)
class Weighted:
    """A convolution to be fitted in a metric by one family and variant.

    Attributes
    ----------
    conv : Factorization
        One dense stage.
    metric : Metric
        Of its inputs and outputs.
    family, variant : str
        What is fitted.
    """

    conv: Factorization
    metric: Metric
    family: str
    variant: str

    @property
    def wanted(self) -> Array:
        """The kernel that is approximated, (groups, out, in, \\*taps)."""
        target = self.metric.target
        return unrolled(self.conv) if target is None else target

    @property
    def energy(self) -> float:
        """What missing all of it would cost."""
        return self.metric.energy(self.wanted)

    def points(self) -> Iterator[SweepPoint]:
        """Every rank of the form, with the error in the metric as far as roots express it.

        Yields
        ------
        Point
            Its error is relative, ``sqrt(tr(G E C E') / tr(G W C W'))``; `build` gives stages that
            are fitted in the metric, to be refined by :meth:`refined`.
        """
        # Which modes stages hold alone is the same for every rank: found from the first one's.
        sample = next(iter(FAMILIES[self.family].sweep(_thin(self.conv), self.variant)), None)
        if sample is None:
            return
        n = network(sample.stages)
        tried = scaling(n, self.conv, self.metric)
        scaled = self._scaled(tried)
        for point in FAMILIES[self.family].sweep(scaled, self.variant):
            yield point._replace(build=partial(self._built, point, tried))

    def at(self, rank: Ints) -> tuple[Stage, ...]:
        """The chain at one rank, fitted as far as roots express the metric.

        Parameters
        ----------
        rank : tuple of int
            As the family documents.

        Returns
        -------
        tuple of Stage
            To be refined by :meth:`refined`.

        Raises
        ------
        ValueError
            If the family has no such rank or form.
        """
        family = FAMILIES[self.family]
        n = network(family.fit(_thin(self.conv), rank, self.variant).stages)
        s = scaling(n, self.conv, self.metric)
        f = family.fit(self._scaled(s), rank, self.variant)
        point = SweepPoint(rank, math.nan, math.nan, f.stages, lambda: f.stages)
        return self._built(point, s)

    def _scaled(self, s: Scaling) -> Factorization:
        wanted = s.to(self.wanted)
        if self.conv.transposed:
            wanted = wanted.swapaxes(1, 2)
        weight = np.ascontiguousarray(wanted).reshape(self.conv.stages[0].weight.shape)
        stage = replace(self.conv.stages[0], weight=weight)
        return replace(self.conv, stages=(stage,), bias=None)

    def _built(self, point: SweepPoint, s: Scaling) -> tuple[Stage, ...]:
        stages = point.build()
        n = network(stages)
        roles = _Roles.of(n, self.conv.transposed)
        return self._put(stages, n, _split(n, roles, s, n.tensors(stages)))

    def _put(
        self, stages: Sequence[Stage], n: Network, tensors: Sequence[Array]
    ) -> tuple[Stage, ...]:
        """The stages with other weights, norm_balance, in the precision of the convolution."""
        chain = plain(stages)
        chain = norm_balance(
            [replace(s, weight=t.reshape(s.weight.shape)) for s, t in zip(chain, tensors)]
        )
        chain = [replace(s, weight=s.weight.astype(self.conv.dtype, copy=False)) for s in chain]
        return tuple(s.adjoint() for s in reversed(chain)) if self.conv.transposed else tuple(chain)

    def error(self, stages: Sequence[Stage]) -> float:
        """Relative error of a chain, in the metric."""
        n = network(stages)
        e = self._kernel(n, n.tensors(stages)) - self.wanted
        whole = self.energy
        return math.sqrt(self.metric.energy(e) / whole) if whole else 0.0

    def _kernel(self, n: Network, tensors: Sequence[Array]) -> Array:
        kernel = composed(n, [t.astype(np.float64) for t in tensors])
        return self._unrolled(kernel)

    def _unrolled(self, kernel: Array) -> Array:
        """A kernel with an axis a mode as (groups, out, in, \\*taps)."""
        shape, groups = self.conv.stages[0].weight.shape, self.conv.groups
        w = kernel.reshape(groups, shape[0] // groups, *shape[1:])
        return w.swapaxes(1, 2) if self.conv.transposed else w

    def prepared(self, stages: Sequence[Stage]) -> Prepared:
        """What fits of one form share: roots, the metric behind them, and the scaled kernel.

        Parameters
        ----------
        stages : sequence of Stage
            A chain of the form, of any rank.

        Returns
        -------
        Prepared
        """
        s = scaling(network(stages), self.conv, self.metric)
        return Prepared(s, s.seen(self.metric).unscaled(), s.to(self.wanted))

    def refined(
        self,
        stages: Sequence[Stage],
        sweeps: int = SWEEPS,
        tolerance: float = TOLERANCE,
        dtype: Any = np.float64,
        prepared: Prepared | None = None,
    ) -> tuple[tuple[Stage, ...], float]:
        """A chain with its weights fitted in the full metric, and its relative error there.

        Parameters
        ----------
        stages : sequence of Stage
            Any chain for the convolution; its weights are the start.
        sweeps : int
            Of alternation, at the most.
        tolerance : float
            Relative: a sweep that takes less off the energy that is left is the last.
        dtype : dtype
            float32 takes half the time and tells errors above about 0.003 apart.
        prepared : Prepared, optional
            From :meth:`prepared`, for several fits of one form.

        Returns
        -------
        stages : tuple of Stage
        error : float
            Never larger than that of the start.
        """
        n = network(stages)
        s, metric, wanted = prepared or self.prepared(stages)
        roles = _Roles.of(n, self.conv.transposed)
        tensors = [t.astype(np.float64) for t in n.tensors(stages)]
        tensors = _split(n, roles, s, tensors, scaled=True)
        # In units of their own, so that squares are in the range of single precision.
        unit = float(np.abs(wanted).max()) or 1.0
        tensors[0] = tensors[0] / unit
        fit = _Fit(n, self, metric.astype(dtype), (wanted / unit).astype(dtype))
        tensors, energy = fit.run([t.astype(dtype) for t in tensors], sweeps, tolerance)
        tensors[0] = tensors[0].astype(np.float64) * unit
        whole = fit.whole
        error = math.sqrt(max(energy, 0.0) / whole) if whole else 0.0
        tensors = _split(n, roles, s, [t.astype(np.float64) for t in tensors])
        return self._put(stages, n, tensors), error


def _thin(conv: Factorization) -> Factorization:
    """A convolution of the same modes with a weight of zeros: its fits take no time."""
    stage = conv.stages[0]
    weight = np.zeros(stage.weight.shape, stage.weight.dtype)
    return replace(conv, stages=(replace(stage, weight=weight),))


class _Fit:
    """Alternating least squares over the weights of a network."""

    def __init__(self, n: Network, of: Weighted, metric: Metric, wanted: Array) -> None:
        self.n, self.of, self.metric, self.wanted = n, of, metric, wanted
        self.transposed = of.conv.transposed
        self.pull = metric.weighted(wanted)  # G W C
        self.whole = float(np.vdot(wanted, self.pull))
        self.paths: dict[object, list[tuple[int, int, str]]] = {}

    def run(self, tensors: list[Array], sweeps: int, tolerance: float) -> tuple[list[Array], float]:
        e = self._rolled_back(composed(self.n, tensors)) - self.wanted
        energy = self.metric.energy(e)
        least = 1e-12 * self.whole
        for _ in range(sweeps):
            before = energy
            for k in reversed(range(len(tensors))):
                tensors[k], energy = self._solved(tensors, k, energy)
            if before - energy <= tolerance * before or energy <= least:
                break
        return tensors, energy

    def _rolled_back(self, kernel: Array) -> Array:
        return self.of._unrolled(kernel)

    def _rolled(self, e: Array) -> Array:
        if self.transposed:
            e = e.swapaxes(1, 2)
        return np.ascontiguousarray(e).reshape(self.n.shape(self.n.kernel))

    def _solved(self, tensors: list[Array], k: int, energy: float) -> tuple[Array, float]:
        """Stage `k` by preconditioned conjugate gradients, the others staying as they are."""
        others = [t for i, t in enumerate(tensors) if i != k]
        names = [m for i, m in enumerate(self.n.stages) if i != k]
        mine = self.n.stages[k]

        def forward(x: Array) -> Array:
            made = self._contracted(("f", k), [*names, mine], self.n.kernel, [*others, x])
            return self._rolled_back(made)

        def backward(z: Array) -> Array:
            return self._contracted(
                ("b", k), [*names, self.n.kernel], mine, [*others, self._rolled(z)]
            )

        precondition = self._preconditioner(names, others, mine, k)
        x = tensors[k]
        residual = backward(self.pull - self.metric.weighted(forward(x)))
        z = precondition(residual)
        direction, rho = z, float(np.vdot(residual, z))
        first = rho
        if not rho > 0:
            return x, energy
        for _ in range(STEPS):
            step = backward(self.metric.weighted(forward(direction)))
            curve = float(np.vdot(direction, step))
            if not curve > 0:
                break
            a = rho / curve
            x = x + a * direction
            energy -= a * rho
            residual = residual - a * step
            z = precondition(residual)
            rho, last = float(np.vdot(residual, z)), rho
            if rho <= RESIDUAL**2 * first:
                break
            direction = z + rho / last * direction
        return x, energy

    def _preconditioner(
        self, names: list[str], others: list[Array], mine: str, k: int
    ) -> Callable[[Array], Array]:
        """The inverse of the normal matrix as it would be for white inputs, over the bonds."""
        held = set("".join(names))
        bonds = "".join(m for m in mine if m in held and m not in self.n.kernel)
        batch = "".join(m for m in mine if m in held and m in self.n.kernel)
        if not bonds or entries(self.n, bonds) > BONDS:
            return lambda z: z
        free = iter(m for m in _LETTERS if m not in self.n.sizes)
        inner = {m for m in held if m not in self.n.kernel}  # bonds, here or between the others
        twin = {m: next(free) for m in sorted(inner)}
        copies = ["".join(twin.get(m, m) for m in have) for have in names]
        out = batch + bonds + "".join(twin[m] for m in bonds)
        gram = self._contracted(("n", k), [*names, *copies], out, [*others, *others])
        size = entries(self.n, bonds)
        gram = gram.reshape(-1, size, size)
        mean = np.trace(gram, axis1=1, axis2=2)[:, None, None] / size
        if not (mean > 0).all():
            return lambda z: z
        inverse = np.linalg.inv(gram + 1e-7 * mean * np.eye(size, dtype=gram.dtype))
        rest = "".join(m for m in mine if m not in batch + bonds)
        order = batch + bonds + rest
        there, back = [mine.index(m) for m in order], [order.index(m) for m in mine]

        def apply(z: Array) -> Array:
            moved = z.transpose(there)
            flat = inverse @ moved.reshape(len(inverse), size, -1)
            return np.asarray(flat.reshape(moved.shape).transpose(back))

        return apply

    def _contracted(
        self, key: object, names: Sequence[str], out: str, arrays: Sequence[Array]
    ) -> Array:
        """An einsum as products of pairs, in an order that is found once."""
        if key not in self.paths:
            self.paths[key] = _path(names, out, arrays)
        work = list(zip(names, arrays))
        for i, j, kept in self.paths[key]:
            (a, x), (b, y) = work[i], work[j]
            work = [w for at, w in enumerate(work) if at not in (i, j)]
            work.append((kept, _pair(x, a, y, b, kept)))
        name, array = work[0]
        return array.transpose([name.index(m) for m in out]) if name != out else array


_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" + "".join(
    chr(c) for c in range(0xC0, 0x180)
)


def _path(names: Sequence[str], out: str, arrays: Sequence[Array]) -> list[tuple[int, int, str]]:
    """Pairs to multiply, greedily the one whose product takes the fewest multiply-adds first."""
    sizes = {m: n for name, a in zip(names, arrays) for m, n in zip(name, a.shape)}
    left, path = list(names), []
    while len(left) > 1:
        best = None
        for i, j in itertools.combinations(range(len(left)), 2):
            rest = set(out).union(*(left[m] for m in range(len(left)) if m not in (i, j)))
            union = dict.fromkeys(left[i] + left[j])
            kept = "".join(m for m in union if m in rest)
            work = math.prod(sizes[m] for m in union)
            made = math.prod(sizes[m] for m in kept)
            grown = (
                made - math.prod(sizes[m] for m in left[i]) - math.prod(sizes[m] for m in left[j])
            )
            if best is None or (grown, work) < best[0]:
                best = ((grown, work), i, j, kept)
        assert best is not None
        _, i, j, kept = best
        if len(left) == 2:
            kept = out
        path.append((i, j, kept))
        left = [m for at, m in enumerate(left) if at not in (i, j)] + [kept]
    return path


def _pair(x: Array, a: str, y: Array, b: str, out: str) -> Array:
    """Two tensors multiplied, as one (batched) matrix product."""
    alone = [m for m in a if m not in b and m not in out]
    if alone:
        x = x.sum(axis=tuple(a.index(m) for m in alone))
        a = "".join(m for m in a if m not in alone)
    alone = [m for m in b if m not in a and m not in out]
    if alone:
        y = y.sum(axis=tuple(b.index(m) for m in alone))
        b = "".join(m for m in b if m not in alone)
    batch = "".join(m for m in a if m in b and m in out)
    summed = "".join(m for m in a if m in b and m not in out)
    left = "".join(m for m in a if m not in b)
    right = "".join(m for m in b if m not in a)
    sizes = dict(zip(a, x.shape)) | dict(zip(b, y.shape))

    def flat(z: Array, have: str, first: str, second: str) -> Array:
        order = batch + first + second
        moved = z.transpose([have.index(m) for m in order])
        return moved.reshape(
            math.prod(sizes[m] for m in batch),
            math.prod(sizes[m] for m in first),
            math.prod(sizes[m] for m in second),
        )

    product = flat(x, a, left, summed) @ flat(y, b, summed, right)
    made = batch + left + right
    product = product.reshape([sizes[m] for m in made])
    return product.transpose([made.index(m) for m in out])


Shape = Ints
