"""Streaming second moments of a layer's inputs and output gradients.

Memory does not grow with the number of batches.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import linalg

from lowrank import engine
from lowrank._typing import Array
from lowrank.core.arrays import power_of_two
from lowrank.factorization import Factorization, as_input
from lowrank.metric.metric import Metric, damped, nearest_kronecker, unroll
from lowrank.metric.patches import Patches

WIDEST = 4608  # in * taps above which only factors are kept: C of 512 channels x 3 x 3 is 170 MB
POSITIONS = 1 << 14  # output positions per batch, or more:
MACS = 1 << 32  # as many as C takes fewer MACs per batch, 0.1 s on one thread
CHUNK = 1 << 21  # values unrolled at a time: fits the caches
ROUNDINGS = 32  # units of the last place by which sums of a layer's products err
DAMPING = 1e-3  # of the mean eigenvalue: directions that no sample showed still cost something
FEW_SAMPLES_DAMPING = 0.05  # added, times min(1, unknowns / samples)
# The same for the target, which is not smoothed by a low rank: cifar10_full's last layer has 1024
# unknowns, and fitted 256 examples 400 times as well as others.
FEW_SAMPLES_TARGET_DAMPING = 2.0


class Moments:
    """Second moments of the inputs of a layer and of its output gradients, batch by batch.

    Parameters
    ----------
    conv : Factorization
        One dense stage, plain or transposed.
    paired : bool
        Whether every batch comes with the inputs of the original kernel.
    centred : bool
        Whether means are subtracted, because a bias makes up for them.
    seed : int
        Seed of the choice of output positions where a batch has too many.
    positions : int, optional
        Largest number of output positions per batch; more are sampled at random.  Default: 2^14,
        or more where patches are small.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.metric import Moments
    >>> moments = Moments(lowrank.dense(np.ones((8, 4, 3, 3)), padding=1))
    >>> moments.add(np.random.default_rng(0).standard_normal((16, 4, 9, 9)))
    >>> moments.metric().input_moment.shape
    (1, 36, 36)
    """

    def __init__(
        self,
        conv: Factorization,
        *,
        paired: bool = False,
        centred: bool = False,
        seed: int = 0,
        positions: int | None = None,
    ) -> None:
        self.conv, self.paired, self.centred = conv, paired, centred
        self._random = np.random.default_rng(seed)
        weight = conv.stages[0].weight
        g = conv.groups
        rows, cols = len(weight) // g, weight.shape[1]
        self.ins: int = rows if conv.transposed else cols
        self.outs: int = cols if conv.transposed else rows
        self.kernel = tuple(weight.shape[2:])
        n = self.ins * math.prod(self.kernel)
        self.positions = positions or max(POSITIONS, MACS // (g * n * n))
        self.samples, self.n_examples = 0, 0
        self._weight, self._squared_weight = 0.0, 0.0
        # Power of two by which inputs are divided, so that products neither overflow nor underflow.
        self._unit = 0.0
        self._eps = 0.0  # of the precision of inputs
        self.full = n <= WIDEST
        self._mean, self._mean0 = np.zeros((g, n)), np.zeros((g, n))
        # Subtracted before products are formed in single precision, against cancellation.
        self._base: Array | None = None
        self._base0: Array | None = None
        self._output_power, self._output_mean = (
            np.zeros((g, self.outs, self.outs)),
            np.zeros((g, self.outs)),
        )
        if self.full:
            self._c = np.zeros((g, n, n))
            self._cross = np.zeros((g, n, n)) if paired else None
        else:
            self._channels = np.zeros((g, self.ins, self.ins))
            self._taps = [np.zeros((k, k)) for k in self.kernel]
        self._gradients = np.zeros((g, self.outs, self.outs))
        # Original kernel (groups, in * taps, out), from which its output power is computed.
        # Divided by a power of two near its largest entry, as inputs are.
        self._rows: Array | None = None
        if paired and self.full:
            kernel = unroll(conv).reshape(g, self.outs, n).swapaxes(1, 2)
            self._gain = power_of_two(float(np.abs(kernel).max()))
            self._rows = kernel / self._gain

    def add(self, x: Array, original: Array | None = None, weights: Array | None = None) -> None:
        """Add a batch of inputs.

        Parameters
        ----------
        x : ndarray or cupy.ndarray, shape (batch, channels, \\*spatial)
            Inputs of the layer; a CuPy array is processed on its GPU.
        original : ndarray of the same shape, optional
            Inputs of the original kernel, if moments are paired.
        weights : ndarray, shape (batch, \\*outputs), optional
            Weight of the patch of each output position; 1 if not given.

        Raises
        ------
        ValueError
            If shapes do not fit the layer, or a value is not finite.
        TypeError
            If `x` is not a floating-point array.
        """
        with engine.device_context(x):
            self._add(x, original, weights)

    def _add(self, x: Array, original: Array | None, weights: Array | None) -> None:
        if (original is not None) != self.paired:
            needed = "needed for" if self.paired else "only taken by"
            raise ValueError(f"original is {needed} paired moments, got {type(original).__name__}")
        x = _as_finite_input(self.conv, x)
        original = None if original is None else _as_finite_input(self.conv, original)
        if original is not None and original.shape != x.shape:
            raise ValueError(f"original must have the shape of x, {x.shape}, got {original.shape}")
        self._move_to_device_of(x)
        self._raise_unit(x)
        if original is not None:
            self._raise_unit(original)
        patches = Patches(self.conv, x.shape[2:])
        total = len(x) * math.prod(patches.outs)
        if weights is not None and weights.shape != (len(x), *patches.outs):
            raise ValueError(
                f"weights must have the shape {(len(x), *patches.outs)}, got {weights.shape}"
            )
        chosen = np.arange(total)
        if total > self.positions:
            chosen = np.sort(self._random.choice(total, self.positions, replace=False))
        now = patches.windows(x)
        before = now if original is None else patches.windows(original)
        each = max(1, CHUNK // (self.ins * math.prod(self.kernel) * self.conv.groups))
        for first in range(0, len(chosen), each):
            at = chosen[first : first + each]
            p = patches.gather(now, at)
            w = np.ones(len(at)) if weights is None else weights.reshape(-1)[at]
            self._accumulate(p, p if original is None else patches.gather(before, at), w)

    def _move_to_device_of(self, x: Array) -> None:
        """Move the sums to the device of `x`: they stay on a GPU until the last batch."""
        device = engine.device_of(x)
        if engine.is_on_device(self._mean, device):
            return

        def move(a: Any) -> Any:
            return a if a is None else engine.to_device(a, device)

        for name in ("_mean", "_mean0", "_output_power", "_output_mean", "_gradients", "_rows"):
            setattr(self, name, move(getattr(self, name)))
        self._base, self._base0 = move(self._base), move(self._base0)
        if self.full:
            self._c, self._cross = move(self._c), move(self._cross)
        else:
            self._channels = move(self._channels)
            self._taps = [move(t) for t in self._taps]

    def _raise_unit(self, x: Array) -> None:
        """Raise the unit of the sums to that of the largest of some inputs."""
        border = abs(self.conv.geometry.value)
        peak = max(float(abs(x).max()) if x.size else 0.0, border)
        unit = power_of_two(peak)
        if peak == 0 or unit <= self._unit:
            return
        ratio = self._unit / unit
        for name in ("_mean", "_mean0", "_base", "_base0", "_output_mean"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name) * ratio)
        self._output_power = self._output_power * ratio**2
        if self.full:
            self._c = self._c * ratio**2
            self._cross = None if self._cross is None else self._cross * ratio**2
        else:
            self._channels = self._channels * ratio**2
            self._taps = [t * ratio**2 for t in self._taps]
        self._unit = unit

    def _accumulate(self, p: Array, q: Array, w: Array) -> None:
        """Add patches (groups, samples, in * taps) of the inputs and of the original inputs."""
        self.samples += p.shape[1]
        if self._unit not in (0.0, 1.0):
            p, q = (a / a.dtype.type(self._unit) for a in (p, q))
        self._weight += float(w.sum(dtype=np.float64))
        self._squared_weight += float(np.square(w, dtype=np.float64).sum())
        self._eps = float(np.finfo(p.dtype).eps)
        if self.centred:
            if self._base is None or self._base0 is None:
                self._base, self._base0 = p.mean(axis=1), q.mean(axis=1)
            p, q = p - self._base[:, None], q - self._base0[:, None]
        # Sums of rows by weight, without weighted copies.
        row = engine.as_array_like(w.astype(p.dtype, copy=False), p)[None]
        self._mean += (row @ p)[:, 0]
        self._mean0 += (row @ q)[:, 0]
        root = row[0, :, None] ** 0.5
        if self._rows is not None:
            y = q @ self._rows.astype(q.dtype, copy=False)
            self._output_mean += (row @ y)[:, 0]
            y = y * root
            self._output_power += y.swapaxes(1, 2) @ y
        p, q = p * root, q * root
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
        """Add gradients at the outputs.

        Parameters
        ----------
        g : ndarray, shape (batch, out, \\*spatial)
            Gradient of the loss of each example.

        Raises
        ------
        ValueError
            If the channels do not fit, or a value is not finite.
        """
        with engine.device_context(g):
            self._add_gradients(g)

    def _add_gradients(self, g: Array) -> None:
        if g.ndim < 2 or g.shape[1] != self.conv.groups * self.outs or not np.isfinite(g).all():
            raise ValueError(
                f"gradients must be finite, (batch, {self.conv.groups * self.outs}, ...), got "
                f"shape {g.shape}"
            )
        self._move_to_device_of(g)
        parts = np.moveaxis(g.reshape(len(g), self.conv.groups, self.outs, -1), 0, 2)
        rows = parts.reshape(self.conv.groups, self.outs, -1).astype(np.float64)
        self._gradients += rows @ rows.swapaxes(1, 2)
        self.n_examples += len(g)

    def metric(self, damping: float = DAMPING) -> Metric:
        """Return the metric of everything added, with damping.

        Parameters
        ----------
        damping : float
            Multiple of the identity added to C, in units of its mean eigenvalue; raised for few
            samples.

        Returns
        -------
        Metric
            C per weight; G per example, summed over its output positions.

        Raises
        ------
        ValueError
            If no input was added, or all weights are 0.
        """
        if not self._weight > 0:
            raise ValueError("no inputs were added: call add() before metric()")
        self._move_to_device_of(np.empty(0))
        # Means relative to the base, which is added below.
        mean, mean0 = self._mean / self._weight, self._mean0 / self._weight
        n = mean.shape[1]
        shift = mean if self.centred else np.zeros_like(mean)
        shift0 = mean0 if self.centred else np.zeros_like(mean)
        if self._base is not None and self._base0 is not None:
            mean, mean0 = mean + self._base, mean0 + self._base0
        mean, mean0 = mean * (self._unit or 1.0), mean0 * (self._unit or 1.0)
        power = (self._unit or 1.0) ** 2
        few = min(1.0, n * self._squared_weight / self._weight**2) if damping else 0.0
        damping += FEW_SAMPLES_DAMPING * few
        gradient_moment, unit = None, 1.0
        if self.n_examples:
            # All gradients 0: the layer has no influence on the loss.
            unit = float(self._gradients.any())
            gradient_moment = damped(self._gradients / self.n_examples, DAMPING)
        if not self.full:
            channels = self._channels / self._weight / math.prod(self.kernel)
            channels = channels + self._resolution() * np.eye(self.ins)
            taps = [t / max(np.trace(t), 1e-300) * len(t) for t in self._taps]
            taps = [damped(t[None], damping)[0] for t in taps]
            return Metric(
                None, power * damped(channels, damping), tuple(taps), math.nan, gradient_moment,
                None,
                mean if self.centred else None, mean0 if self.centred else None, self.samples,
                unit,
            )  # fmt: skip
        c = self._c / self._weight - shift[:, :, None] * shift[:, None]
        plain = (c + c.swapaxes(1, 2)) / 2 + self._resolution() * np.eye(n)
        c = damped(plain, damping)
        target = output_power = None
        if self._cross is not None:
            cross = self._cross / self._weight - shift0[:, :, None] * shift[:, None]
            # Damping pulls towards the original kernel, not towards zero.
            strong = damped(plain, damping + FEW_SAMPLES_TARGET_DAMPING * few)
            target = self._target(strong, cross + strong - plain)
            offset = self._output_mean / self._weight if self.centred else 0 * self._output_mean
            output_power = self._output_power / self._weight - offset[:, :, None] * offset[:, None]
            output_power = output_power * power * self._gain**2
        channels, factors, distance = nearest_kronecker(c, (self.ins, *self.kernel))
        return Metric(
            c * power, channels * power, factors, distance, gradient_moment, target,
            mean if self.centred else None, mean0 if self.centred else None, self.samples,
            unit, output_power,
        )  # fmt: skip

    def _resolution(self) -> float:
        """Return the variance of the rounding errors of the inputs about their base.

        Constant inputs have no other, and differences of rounding errors are not definite.
        """
        if self._base is None:
            return 0.0
        return float((ROUNDINGS * self._eps * abs(self._base).max()) ** 2)

    def _target(self, c: Array, cross: Array) -> Array:
        """Return the kernel whose outputs on these inputs are nearest to the original outputs."""
        w = unroll(self.conv)
        wanted = w.reshape(*w.shape[:2], -1) @ cross
        found = [linalg.solve(a, b.T, assume_a="pos").T for a, b in zip(c, wanted)]
        return np.stack(found).reshape(w.shape)


def _as_finite_input(conv: Factorization, x: Array) -> Array:
    if engine.is_on_gpu(x):
        if x.ndim != conv.ndim + 2 or x.shape[1] != conv.in_channels:
            raise ValueError(
                f"x must be (batch, {conv.in_channels}, and {conv.ndim} spatial axes), got "
                f"{x.shape}"
            )
        if conv.geometry.padding_mode == "constant":  # padded on the CPU
            x = engine.to_device(x, "cpu")
    else:
        x = as_input(conv, x)
    if not np.isfinite(x).all():
        raise ValueError("inputs must be finite: found NaN or infinity")
    return x
