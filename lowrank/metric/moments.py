"""What a layer's errors weigh: second moments of its inputs and of the gradients at its outputs.

They are accumulated over batches, in memory that does not grow with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
from scipy import linalg

from lowrank import engine
from lowrank._typing import Array, Ints
from lowrank.core import reference
from lowrank.core.geometry import Geometry
from lowrank.factorization import Factorization, as_input

WIDEST = 4608  # in * taps, above which only factors are kept: 512 channels of 3 x 3 take 170 MB
POSITIONS = 1 << 14  # outputs of a batch that are looked at, at the most: a random choice
CHUNK = 1 << 21  # numbers that are unrolled at a time: what the caches hold
RIDGE = 1e-3  # of the mean eigenvalue, added to all: what was never seen is not free
FEW = 0.05  # more of it by the ratio of unknowns to samples, 1 at the most


@final
@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    r"""A quadratic form in the error of a kernel: the mean square of what it does to outputs.

    Of an error E, as (out, in * taps) a group, it is :math:`\operatorname{tr}(G E C E^\top)` for
    the second moments C of the input patches and G of the gradients at the outputs.

    Attributes
    ----------
    inputs : ndarray of float64, shape (groups, in \* taps, in \* taps), or None
        C; None where it would be too large, and the factors stand for it.
    channels : ndarray of float64, shape (groups, in, in)
        Its factor for channels, and
    taps : tuple of ndarray of float64, shape (taps, taps)
        one for each spatial axis: their Kronecker product is near to C.
    distance : float
        Relative Frobenius distance of that product from C; NaN if C is not kept.
    outputs : ndarray of float64, shape (groups, out, out), or None
        G; None if outputs count alike.
    target : ndarray of float64, shape (out, in, \*taps), or None
        The kernel that comes closest to the original outputs on these inputs, where they are
        not the inputs that the original kernel got.
    shift : ndarray of float64, shape (groups, in \* taps), or None
        Mean patch, that the inputs are counted from: a bias makes up for it.
    reference : ndarray of float64 or None
        The same of the patches that the original kernel got.
    samples : int
        Patches that were counted.
    unit : float
        That errors count by among layers: 0 where every gradient was 0.
    made : ndarray of float64, shape (groups, out, out), or None
        Second moment of the original outputs, where there is a target.

    Notes
    -----
    Transposed convolutions spread their inputs out first; then they are plain ones, and
    "in" and "out" are those of this sentence.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.metric import Moments
    >>> conv = lowrank.dense(np.ones((1, 1, 2)))
    >>> moments = Moments(conv)
    >>> moments.add(np.array([[[1.0, 2.0, 3.0]]]))
    >>> moments.metric(ridge=0.0).inputs
    array([[[2.5, 4. ],
            [4. , 6.5]]])
    """

    inputs: Array | None
    channels: Array
    taps: tuple[Array, ...]
    distance: float
    outputs: Array | None
    target: Array | None
    shift: Array | None
    reference: Array | None
    samples: int
    unit: float = 1.0
    made: Array | None = None

    def weighted(self, e: Array) -> Array:
        """``G E C`` of an error (groups, out, in, \\*taps).

        Parameters
        ----------
        e : ndarray, shape (groups, out, in, \\*taps)

        Returns
        -------
        ndarray of the same shape

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank.metric import white
        >>> bool((white(1, (4, 3, 3)).weighted(np.ones((1, 2, 4, 3, 3))) == 1).all())
        True
        """
        if self.inputs is not None:
            rows = e.reshape(*e.shape[:2], -1) @ self.inputs
        else:
            n = self.channels.shape[-1]
            if np.count_nonzero(self.channels) <= len(self.channels) * n:  # as behind roots
                diagonal = np.diagonal(self.channels, axis1=1, axis2=2)
                rows = e * diagonal[:, None, :].reshape(len(e), 1, n, *(1,) * (e.ndim - 3))
            else:
                rows = (self.channels[:, None] @ e.reshape(*e.shape[:3], -1)).reshape(e.shape)
            for axis, c in enumerate(self.taps, start=3):
                rows = np.moveaxis(np.moveaxis(rows, axis, -1) @ c, -1, axis)
            rows = rows.reshape(*e.shape[:2], -1)
        if self.outputs is not None:
            rows = self.outputs @ rows
        return np.asarray(rows.reshape(e.shape))

    def energy(self, e: Array) -> float:
        """``tr(G E C E')``: what an error (groups, out, in, \\*taps) does to the outputs.

        Parameters
        ----------
        e : ndarray, shape (groups, out, in, \\*taps)

        Returns
        -------
        float

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank.metric import white
        >>> white(1, (4, 3)).energy(np.ones((1, 2, 4, 3)))
        24.0
        """
        return max(float(np.vdot(e, self.weighted(e))), 0.0)

    def astype(self, dtype: Any) -> Metric:
        """The same in another precision.

        Parameters
        ----------
        dtype : dtype

        Returns
        -------
        Metric

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank.metric import white
        >>> white(1, (4, 3)).astype(np.float32).channels.dtype
        dtype('float32')
        """

        def of(a: Array | None) -> Array | None:
            return None if a is None else a.astype(dtype, copy=False)

        return replace(
            self, inputs=of(self.inputs), channels=self.channels.astype(dtype),
            taps=tuple(t.astype(dtype) for t in self.taps), outputs=of(self.outputs),
        )  # fmt: skip

    def unscaled(self) -> Metric:
        """The same up to a factor: moments with eigenvalues of 1 in the mean.

        Returns
        -------
        Metric

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank.metric import white
        >>> heavy = white(1, (4, 3)).with_outputs(np.full((1, 1, 1), 5.0))
        >>> float(heavy.unscaled().outputs[0, 0, 0])
        1.0
        """

        def of(a: Array | None) -> Array | None:
            mean = 0.0 if a is None else float(np.trace(a, axis1=-2, axis2=-1).mean()) / a.shape[-1]
            return a if a is None or not mean > 0 else a / mean

        channels = of(self.channels)
        assert channels is not None
        return replace(
            self, inputs=of(self.inputs), outputs=of(self.outputs), channels=channels,
        )  # fmt: skip

    def with_outputs(self, outputs: Array | None) -> Metric:
        """The same inputs with another weight of the outputs.

        Parameters
        ----------
        outputs : ndarray, shape (groups, out, out), or None

        Returns
        -------
        Metric

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank.metric import white
        >>> white(1, (4, 3)).with_outputs(np.eye(2)[None]).outputs.shape
        (1, 2, 2)
        """
        return replace(self, outputs=outputs)


def white(groups: int, shape: Ints) -> Metric:
    """The metric of white noise: the Frobenius norm of the kernel.

    Parameters
    ----------
    groups : int
        Of the convolution.
    shape : tuple of int
        (in, \\*taps), in channels a group.

    Returns
    -------
    Metric

    Examples
    --------
    >>> from lowrank.metric import white
    >>> white(2, (4, 3, 3)).channels.shape
    (2, 4, 4)
    """
    eye = np.tile(np.eye(shape[0]), (groups, 1, 1))
    return Metric(None, eye, tuple(map(np.eye, shape[1:])), 0.0, None, None, None, None, 0)


class Moments:
    """Second moments of what a layer gets, added up batch by batch.

    Parameters
    ----------
    conv : Factorization
        One dense stage, plain or transposed.
    paired : bool
        Whether every batch comes with the inputs that the original kernel got for it.
    centred : bool
        Whether a bias is free to make up for means.
    seed : int
        For the choice of outputs where a batch has too many.
    positions : int
        Outputs of a batch that are looked at, at the most.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.metric import Moments
    >>> moments = Moments(lowrank.dense(np.ones((8, 4, 3, 3)), padding=1))
    >>> moments.add(np.random.default_rng(0).standard_normal((16, 4, 9, 9)))
    >>> moments.metric().inputs.shape
    (1, 36, 36)
    """

    def __init__(
        self,
        conv: Factorization,
        *,
        paired: bool = False,
        centred: bool = False,
        seed: int = 0,
        positions: int = POSITIONS,
    ) -> None:
        self.conv, self.paired, self.centred = conv, paired, centred
        self.positions, self._random = positions, np.random.default_rng(seed)
        weight = conv.stages[0].weight
        g = conv.groups
        rows, cols = len(weight) // g, weight.shape[1]
        self.ins: int = rows if conv.transposed else cols
        self.outs: int = cols if conv.transposed else rows
        self.kernel = tuple(weight.shape[2:])
        n = self.ins * math.prod(self.kernel)
        self.samples, self.looks = 0, 0
        self.full = n <= WIDEST
        self._mean, self._mean0 = np.zeros((g, n)), np.zeros((g, n))
        # What is taken off before products are formed in single precision, if means are free.
        self._base: Array | None = None
        self._base0: Array | None = None
        self._made, self._made_mean = np.zeros((g, self.outs, self.outs)), np.zeros((g, self.outs))
        if self.full:
            self._c = np.zeros((g, n, n))
            self._cross = np.zeros((g, n, n)) if paired else None
        else:
            self._channels = np.zeros((g, self.ins, self.ins))
            self._taps = [np.zeros((k, k)) for k in self.kernel]
        self._gradients = np.zeros((g, self.outs, self.outs))
        # The original kernel, (groups, in * taps, out), where what it made is asked for.
        self._rows: Array | None = None
        if paired and self.full:
            self._rows = unrolled(conv).reshape(g, self.outs, n).swapaxes(1, 2)

    def add(self, x: Array, original: Array | None = None) -> None:
        """Count a batch.

        Parameters
        ----------
        x : ndarray or cupy.ndarray, shape (batch, channels, \\*spatial)
            What the layer gets; on a GPU it is counted there.
        original : ndarray of the same shape, optional
            What the original kernel got, if moments are paired.

        Raises
        ------
        ValueError
            If shapes do not fit the layer, or a number is not finite.
        TypeError
            If `x` is not a floating-point array.
        """
        with engine.at(x):
            self._add(x, original)

    def _add(self, x: Array, original: Array | None) -> None:
        if (original is not None) != self.paired:
            raise ValueError("original must be given where moments are paired, and only there")
        x = _finite(self.conv, x)
        original = None if original is None else _finite(self.conv, original)
        if original is not None and original.shape != x.shape:
            raise ValueError(f"original must have the shape of x, {x.shape}, got {original.shape}")
        self._follow(x)
        patches = _Patches(self.conv, x.shape[2:])
        total = len(x) * math.prod(patches.outs)
        chosen = np.arange(total)
        if total > self.positions:
            chosen = np.sort(self._random.choice(total, self.positions, replace=False))
        now = patches.windows(x)
        before = now if original is None else patches.windows(original)
        each = max(1, CHUNK // (self.ins * math.prod(self.kernel) * self.conv.groups))
        for first in range(0, len(chosen), each):
            at = chosen[first : first + each]
            p = patches.taken(now, at)
            self._count(p, p if original is None else patches.taken(before, at))

    def _follow(self, x: Array) -> None:
        """Keep sums where the data are: products on a GPU stay there until all are counted."""
        device = engine.device_of(x)
        if engine.is_there(self._mean, device):
            return

        def there(a: Any) -> Any:
            return a if a is None else engine.moved(a, device)

        for name in ("_mean", "_mean0", "_made", "_made_mean", "_gradients", "_rows"):
            setattr(self, name, there(getattr(self, name)))
        self._base, self._base0 = there(self._base), there(self._base0)
        if self.full:
            self._c, self._cross = there(self._c), there(self._cross)
        else:
            self._channels = there(self._channels)
            self._taps = [there(t) for t in self._taps]

    def _count(self, p: Array, q: Array) -> None:
        """Patches (groups, samples, in * taps) of now and of the original."""
        self.samples += p.shape[1]
        if self.centred:
            if self._base is None or self._base0 is None:
                self._base, self._base0 = p.mean(axis=1), q.mean(axis=1)
            p, q = p - self._base[:, None], q - self._base0[:, None]
        if self._rows is not None:
            y = q @ self._rows.astype(q.dtype, copy=False)
            self._made += y.swapaxes(1, 2) @ y
            self._made_mean += y.sum(axis=1, dtype=np.float64)
        self._mean += p.sum(axis=1, dtype=np.float64)
        self._mean0 += q.sum(axis=1, dtype=np.float64)
        if self.full:
            for g, one in enumerate(p):
                self._c[g] += one.T @ one
                if self._cross is not None:
                    self._cross[g] += q[g].T @ one
            return
        tensor = p.reshape(*p.shape[:2], self.ins, *self.kernel)
        for g, one in enumerate(tensor):
            flat = np.moveaxis(one, 1, 0).reshape(self.ins, -1)
            self._channels[g] += flat @ flat.T
            for axis, total in enumerate(self._taps):
                flat = np.moveaxis(one, 2 + axis, 0).reshape(len(total), -1)
                total += flat @ flat.T

    def add_gradients(self, g: Array) -> None:
        """Count gradients at the outputs.

        Parameters
        ----------
        g : ndarray, shape (batch, out, \\*spatial)
            Of the loss of each example.

        Raises
        ------
        ValueError
            If the channels do not fit, or a number is not finite.
        """
        with engine.at(g):
            self._add_gradients(g)

    def _add_gradients(self, g: Array) -> None:
        if g.ndim < 2 or g.shape[1] != self.conv.groups * self.outs or not np.isfinite(g).all():
            raise ValueError(
                f"gradients must be finite, (batch, {self.conv.groups * self.outs}, ...), got "
                f"shape {g.shape}"
            )
        self._follow(g)
        parts = np.moveaxis(g.reshape(len(g), self.conv.groups, self.outs, -1), 0, 2)
        rows = parts.reshape(self.conv.groups, self.outs, -1).astype(np.float64)
        self._gradients += rows @ rows.swapaxes(1, 2)
        self.looks += len(g)

    def metric(self, ridge: float = RIDGE) -> Metric:
        """What was counted, regularised.

        Parameters
        ----------
        ridge : float
            Added to C, in units of its mean eigenvalue; more for few samples.

        Returns
        -------
        Metric
            With C a patch; G an example, added up over its outputs.

        Raises
        ------
        ValueError
            If nothing was counted.
        """
        if not self.samples:
            raise ValueError("no inputs were counted")
        self._follow(np.empty(0))
        # Of what was counted: without the base, which is added below.
        mean, mean0 = self._mean / self.samples, self._mean0 / self.samples
        n = mean.shape[1]
        shift = mean if self.centred else np.zeros_like(mean)
        shift0 = mean0 if self.centred else np.zeros_like(mean)
        if self._base is not None and self._base0 is not None:
            mean, mean0 = mean + self._base, mean0 + self._base0
        if ridge:
            ridge += FEW * min(1.0, n / self.samples)
        outputs, unit = None, 1.0
        if self.looks:
            # Without any gradient nothing that the layer does is lost: outputs count alike, as 0.
            unit = float(self._gradients.any())
            outputs = _ridged(self._gradients / self.looks, RIDGE)
        if not self.full:
            channels = self._channels / self.samples / math.prod(self.kernel)
            taps = [t / max(np.trace(t), 1e-300) * len(t) for t in self._taps]
            taps = [_ridged(t[None], ridge)[0] for t in taps]
            return Metric(
                None, _ridged(channels, ridge), tuple(taps), math.nan, outputs, None,
                mean if self.centred else None, mean0 if self.centred else None, self.samples,
                unit,
            )  # fmt: skip
        c = self._c / self.samples - shift[:, :, None] * shift[:, None]
        c = _ridged((c + c.swapaxes(1, 2)) / 2, ridge)
        target = made = None
        if self._cross is not None:
            cross = self._cross / self.samples - shift0[:, :, None] * shift[:, None]
            # The ridge pulls towards the original kernel, not towards zero.
            own = c - self._c / self.samples + shift[:, :, None] * shift[:, None]
            target = self._target(c, cross + own)
            offset = self._made_mean / self.samples if self.centred else 0 * self._made_mean
            made = self._made / self.samples - offset[:, :, None] * offset[:, None]
        channels, factors, distance = factored(c, (self.ins, *self.kernel))
        return Metric(
            c, channels, factors, distance, outputs, target,
            mean if self.centred else None, mean0 if self.centred else None, self.samples,
            unit, made,
        )  # fmt: skip

    def _target(self, c: Array, cross: Array) -> Array:
        """The kernel whose outputs here are nearest to those of the original there."""
        w = unrolled(self.conv)
        wanted = w.reshape(*w.shape[:2], -1) @ cross
        found = [linalg.solve(a, b.T, assume_a="pos").T for a, b in zip(c, wanted)]
        return np.stack(found).reshape(w.shape)


def unrolled(conv: Factorization, weight: Array | None = None) -> Array:
    """A kernel as (groups, out, in, \\*taps), of what runs once inputs are spread out.

    Parameters
    ----------
    conv : Factorization
        One dense stage, plain or transposed.
    weight : ndarray, optional
        Another kernel of its shape.

    Returns
    -------
    ndarray of float64

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.metric import unrolled
    >>> unrolled(lowrank.dense(np.ones((8, 4, 3, 3)), groups=2)).shape
    (2, 4, 4, 3, 3)
    """
    w = conv.to_dense() if weight is None else weight
    w = w.astype(np.float64).reshape(conv.groups, -1, *w.shape[1:])
    return w.swapaxes(1, 2) if conv.transposed else w


def factored(c: Array, shape: Ints) -> tuple[Array, tuple[Array, ...], float]:
    """The Kronecker product nearest to C, up to alternation, and how far off it is.

    Parameters
    ----------
    c : ndarray, shape (groups, n, n)
        Second moments; n is the product of `shape`.
    shape : tuple of int
        (in, \\*taps).

    Returns
    -------
    channels : ndarray, shape (groups, in, in)
    taps : tuple of ndarray, shape (taps, taps)
        Of each spatial axis, of trace `taps`; shared by groups.
    distance : float
        Relative, in Frobenius norm.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.metric import factored
    >>> a, b = np.diag([2.0, 1.0]), np.array([[1.0, 0.5], [0.5, 1.0]])
    >>> round(factored(np.kron(a, b)[None], (2, 2))[2], 6)
    0.0
    """
    g, axes = len(c), len(shape)
    tensor = c.reshape(g, *shape, *shape)
    channels = np.zeros((g, shape[0], shape[0]))
    taps = [np.eye(k) for k in shape[1:]]

    def contracted(keep: int) -> Array:
        """C times all factors but one, over their axes: the best factor, up to its size."""
        letters = "abcdefgh"
        terms: list[Array] = [tensor]
        text = ["z" + letters[:axes] + letters[:axes].upper()]
        for i in range(axes):
            if i != keep:
                terms.append(channels if i == 0 else taps[i - 1])
                text.append(("z" if i == 0 else "") + letters[i] + letters[i].upper())
        out = ("z" if keep == 0 else "") + letters[keep] + letters[keep].upper()
        return np.asarray(np.einsum(",".join(text) + "->" + out, *terms, optimize=True))

    def norm(m: Array) -> float:
        return float(np.vdot(m, m)) or 1.0

    for _ in range(3):
        channels = contracted(0) / math.prod(map(norm, taps))
        for i, k in enumerate(shape[1:], start=1):
            found = contracted(i)
            taps[i - 1] = found / (float(np.trace(found)) or 1.0) * k
    channels = contracted(0) / math.prod(map(norm, taps))
    whole = norm(tensor)
    kept = math.prod(map(norm, taps)) * float(np.vdot(channels, channels))
    distance = math.sqrt(max(0.0, 1 - kept / whole))
    return _ridged(channels, 1e-6), tuple(_ridged(t[None], 1e-6)[0] for t in taps), distance


def _ridged(c: Array, ridge: float) -> Array:
    """A multiple of the identity added, a share of the mean eigenvalue over all groups."""
    n = c.shape[-1]
    mean = float(np.trace(c, axis1=1, axis2=2).mean()) / n
    return np.asarray(c + (ridge * mean if mean > 0 else 1.0) * np.eye(n))


def _finite(conv: Factorization, x: Array) -> Array:
    if engine.on_gpu(x):
        if x.ndim != conv.ndim + 2 or x.shape[1] != conv.in_channels:
            raise ValueError(
                f"x must be (batch, {conv.in_channels}, and {conv.ndim} spatial axes), got "
                f"{x.shape}"
            )
        if conv.geometry.padding_mode == "constant":  # which NumPy alone pads with here
            x = engine.moved(x, "cpu")
    else:
        x = as_input(conv, x)
    if not np.isfinite(x).all():
        raise ValueError("inputs must be finite: found NaN or infinity")
    return x


class _Patches:
    """Cuts inputs of one size into what each output sees: (groups, samples, in * taps)."""

    def __init__(self, conv: Factorization, spatial: Sequence[int]) -> None:
        g = conv.geometry
        self.conv, self.kernel = conv, tuple(conv.stages[0].weight.shape[2:])
        if conv.transposed:
            # Samples apart, and borders so that a plain pass with the taps reversed is the same.
            self.plain = Geometry.of(g.ndim, dilation=g.dilation)
            self.outs = conv.output_shape(spatial)[1:]
        else:
            self.plain = g
            self.outs = g.output_size(tuple(spatial), self.kernel)

    def windows(self, x: Array) -> Array:
        """A view of a batch: (batch, *outs, channels, *taps)."""
        g = self.conv.geometry
        if self.conv.transposed:
            x = self._spread(x)
        else:
            x = reference.pad(x, g.padding, g.padding_mode, np.full(self.conv.in_channels, g.value))
        axes = tuple(range(2, x.ndim))
        every = np.lib.stride_tricks.sliding_window_view(x, self.plain.extent(self.kernel), axes)
        steps = [slice(None, None, s) for s in (*self.plain.stride, *self.plain.dilation)]
        seen = every[:, :, *steps][(slice(None), slice(None), *(slice(n) for n in self.outs))]
        if self.conv.transposed:
            seen = np.flip(seen, tuple(range(seen.ndim - len(axes), seen.ndim)))
        return np.moveaxis(seen, 1, 1 + len(axes))

    def taken(self, windows: Array, at: Array) -> Array:
        """Some outputs' patches, by their number: (groups, samples, in * taps)."""
        where = np.unravel_index(engine.like(at, windows), windows.shape[: 1 + len(self.outs)])
        flat = windows[where].reshape(len(at), self.conv.groups, -1)
        return flat.swapaxes(0, 1).copy()

    def _spread(self, x: Array) -> Array:
        g = self.conv.geometry
        sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], g.stride)]
        wide = np.zeros((*x.shape[:2], *sizes), x.dtype)
        wide[(slice(None), slice(None), *(slice(None, None, s) for s in g.stride))] = x
        reach = [d * (k - 1) for d, k in zip(g.dilation, self.kernel)]
        for axis, (r, (before, _), out) in enumerate(zip(reach, g.padding, self.outs), start=2):
            # Output 0 sees what the first tap, now the last, reaches back to.
            low = r - before
            high = out + r - low - wide.shape[axis]
            if low < 0:
                wide = np.take(wide, range(-low, wide.shape[axis]), axis)
                low, high = 0, out + r - wide.shape[axis]
            if high < 0:
                wide = np.take(wide, range(wide.shape[axis] + high), axis)
                high = 0
            wide = np.pad(wide, [(low, high) if a == axis else (0, 0) for a in range(wide.ndim)])
        return wide
