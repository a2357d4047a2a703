r"""
Errors and certificates
=======================

"Relative error 0.36" is a number about weights.  A certificate says how good that is, as it has a
lower bound beside it, and what it does to an output: at the most, and on average.  This page asks
both questions, first of a layer of a trained network in all its families, then of an image filter,
and holds every number that comes out against what happens to inputs.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import lowrank
from lowrank import filters
from lowrank.core import tables
from lowrank.interop import weights
from lowrank.metric import Moments
from lowrank.report import figures

plt.rcParams.update(figures.STYLE)
NET = Path(lowrank.__file__).parent / "data" / "digits.safetensors"
COLOURS = ("#0072b2", "#009e73", "#e69f00", "#d55e00")
layers = {layer.name: layer for layer in weights.layers(NET)}
conv, shape = layers["conv2"].conv, layers["conv2"].input_size
print(conv, shape)

# %%
# Achieved, possible, and the gap
# -------------------------------
#
# Every family may take a third of the MACs of the dense layer.  Of each the best candidate
# is built, and :func:`lowrank.certificate` compares it with the kernel.
#
# ``error``
#     :math:`\|W - \hat W\| / \|W\|`, in Frobenius norms; measured, not estimated.
# ``bound``
#     No chain of that family, variant and rank has less, whoever fits it and however long.
# ``gap``
#     The difference: what better fitting could still gain, at the most.  0 for families that are
#     one singular value decomposition, since those are optimal.

chains = {}
for family in lowrank.FAMILIES:
    front = lowrank.frontier(conv, shape, [family], axis="macs")
    if family not in front.left_out:
        chains[family] = front.affordable(front.dense.cost.macs / 3).build()

certificates = {name: lowrank.certificate(conv, f) for name, f in chains.items()}
whole = conv.cost(shape).macs
rows = [("family", "rank", "macs", "error", "bound", "gap", "sensitivity")]
for name, c in sorted(certificates.items(), key=lambda x: x[1].error):
    f = chains[name]
    share = f.cost(shape).macs / whole
    rank = ",".join(map(str, f.rank))
    rows.append((name, rank, f"{share:.0%}", f"{c.error:.4f}", f"{c.bound:.4f}", f"{c.gap:.4f}",
                 f"{c.sensitivity:.0f}"))  # fmt: skip
print("\n".join(tables.align_columns(rows)))

# %%
# How to read it: the bound is about one family at one rank.  Where the gap is 0, more fitting is a
# waste of time: take another rank or another family.  Where it is wide, as for CP sums, it is not
# known how much of it can be had; finding the best CP sum is hard, and the bound is only what
# matricisations say.  The bar of one family below the bound of another, at equal cost, *is*
# conclusive: the other family cannot get there with these ranks.

names = [row[0] for row in rows[1:]]
figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
at = np.arange(len(names))
error, bound = ([getattr(certificates[n], part) for n in names] for part in ("error", "bound"))
axes.barh(at, bound, color="#0072b2", alpha=0.75, label="no chain of these ranks has less")
axes.barh(at, np.subtract(error, bound), left=bound, color="#e69f00", alpha=0.75,
          label="gap: may or may not be gained")  # fmt: skip
axes.plot(error, at, "|", color="black", markersize=13, markeredgewidth=2, label="achieved")
axes.set(yticks=at, yticklabels=names, xlabel="relative error of the weights",
         title="a third of the MACs, at most")  # fmt: skip
axes.invert_yaxis()
axes.legend(frameon=False, loc="upper right")
plt.show()

# %%
# At the output of a layer
# ------------------------
#
# :func:`lowrank.output_bound` turns the error of the kernel into errors of the output: of its norm
# (``l2``), of its largest sample (``linf``), and on average (``rms``).  Grey levels are for images,
# further down.

f = chains["spatial_svd"]
size = (32, 32)  # of the layer's input: convolutions take any
bound = lowrank.output_bound(conv, f, size)
print(bound)

# %%
# ``rms, relative`` is the error of the weights once more: for white noise it is what the output is
# off by, relatively, on average, away from the border.  With noise of 32 channels:


def both(conv, f, x):
    """Outputs without the bias, and the errors of those of the chain."""
    still = np.zeros((1, *x.shape[1:]))
    y = conv(x) - conv(still)
    return y, y - (f(x) - f(still))


rng = np.random.default_rng(0)
noise = rng.standard_normal((10, 32, *size))
y, e = (out[..., 1:-1, 1:-1] for out in both(conv, f, noise))
print(f"weights {f.error(conv.to_dense()):.4f}")
print(f"bound   {bound.rms_relative:.4f}, {bound.rms:.4f} a sample")
print(f"noise   {np.linalg.norm(e) / np.linalg.norm(y):.4f}, {e.std():.4f} a sample")

# %%
# A network does not see white noise.  What its layers get is smooth and correlated, and there an
# approximation may do much better than the weights say, or worse.  All that counts of the inputs,
# for the average error, is the second moment of a patch.  :class:`lowrank.metric.Moments` estimates
# it from some inputs; with it the expected error is exact for those, and a forecast for others like
# them.  Here the inputs are random smooth pictures that have gone through the first layer.


def pictures(count, size, seed):
    """Random smooth pictures from 0 to 1: noise whose spectrum falls with the frequency."""
    shaped = np.fft.rfft2(np.random.default_rng(seed).standard_normal((count, *size)))
    fy, fx = np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])
    smooth = np.fft.irfft2(shaped / np.maximum(np.hypot(fy, fx), 1 / max(size)) ** 1.5, size)
    smooth -= smooth.min((1, 2), keepdims=True)
    return smooth / smooth.max((1, 2), keepdims=True)


def activations(seed):
    """Return the inputs of the second layer for ten pictures."""
    return np.maximum(layers["conv1"].conv(pictures(10, size, seed)[:, None]), 0)


seen, unseen = activations(seed=1), activations(seed=2)
moments = Moments(conv, positions=seen.size)  # no random subset of the patches
moments.add(seen)
moment = moments.metric(damping=0.0).input_moment
expected = lowrank.output_bound(conv, f, size, second_moment=moment)
print(f"forecast       {expected.rms_relative:.5f}")
for name, x in (("same inputs", seen), ("other inputs", unseen)):
    y, e = both(conv, f, x)
    print(f"{name:13}  {np.linalg.norm(e) / np.linalg.norm(y):.5f}")

# %%
# The worst case is the operator norm of what is missed: no input of that size is enlarged more than
# the bound on it says.
# It is attained, or nearly, by some input; the power method, with the adjoint convolution, finds
# one.  An input of this kind is a wave in the right mixture of channels, and unlikely to occur.

x = rng.standard_normal((1, 32, *size))
for _ in range(20):
    missed = both(conv, f, x)[1]
    x = conv.adjoint()(missed) - f.adjoint()(missed)
    x /= np.linalg.norm(x)
reached = np.linalg.norm(both(conv, f, x)[1]) / np.linalg.norm(x)
print(f"power method  {reached:.4f} times the norm of the input")
print(f"bound         {bound.l2.value:.4f}, {bound.l2.method}")

# %%
# Such a norm depends on the size of the input, a little, and less the larger that is.
# :func:`lowrank.resolution_free` bounds it for all sizes at once.

rest = lowrank.dense(conv.to_dense() - f.to_dense(), padding=1)
for n in (4, 8, 16, 32, 64):
    print(f"{n:3} x {n:<3}  {lowrank.operator_norm(rest, (n, n))}")
print(f"any size   {lowrank.resolution_free(rest)}")

# %%
# An image filter, in grey levels
# -------------------------------
#
# For images the question is by how many grey levels a pixel may be off.  A lens blur of 19 × 19
# taps, which has rank 6, is cut down to three terms.

kernel = filters.disk(9.5)
blur = lowrank.dense(kernel[None, None], padding=9, padding_mode="symmetric")
three = lowrank.spatial_svd(blur, rank=3)
size = (256, 256)
bound = lowrank.output_bound(blur, three, size)
print(f"error {three.error(blur.to_dense()):.3f}, at most {bound.grey:.1f} grey levels")

# %%
# For values from 0 to 255 the largest error is 255 times the sum of the positive entries of what is
# missed, or of the negative ones, and a picture that is white exactly where these are attains it.
# Pictures that look like pictures stay far below.

missed = (three.to_dense() - blur.to_dense())[0, 0]
worst = np.zeros(size)
worst[119:138, 119:138] = missed > 0
yy, xx = np.indices(size)
images = {
    "smooth picture": pictures(1, size, seed=3)[0],
    "edge of a disk": (np.hypot(yy - 128, xx - 128) < 40) * 1.0,
    "noise, black and white": rng.integers(0, 2, size) * 1.0,
    "the worst picture": worst,
}
off = {name: both(blur, three, 255 * x[None, None])[1][0, 0] for name, x in images.items()}
print("largest, root mean square error in grey levels")
for name, e in off.items():
    print(f"{name:23}  {np.abs(e).max():5.2f}  {np.sqrt(np.square(e).mean()):5.2f}")
print(f"{'bound':23}  {bound.grey:5.2f}")

figure = plt.figure(figsize=(7.6, 4.8), layout="constrained")
places = figure.subplot_mosaic([list("abcd"), ["e"] * 4], height_ratios=[1, 1.5])
for ax, (name, x), colour in zip(map(places.get, "abcd"), images.items(), COLOURS):
    ax.imshow(x[80:176, 80:176], cmap="gray", vmin=0, vmax=1)
    ax.set_title(name, fontsize=9, color=colour)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    e = np.sort(np.abs(off[name]), axis=None)
    places["e"].loglog(e, np.linspace(1, 1 / e.size, e.size), color=colour, label=name)
places["e"].axvline(bound.grey, color="black", linewidth=0.8, linestyle=":", label="bound")
places["e"].set(xlim=(1e-2, 2 * bound.grey), xlabel="grey levels",
                ylabel="share of pixels off by more")  # fmt: skip
places["e"].legend(frameon=False, loc="lower left")
plt.show()

# %%
# What to do
# ----------
#
# * Compare candidates by ``error`` and look at ``gap`` before spending time on a better fit.
# * For a forecast of what a layer's output loses, give ``output_bound`` the second moment of a few
#   hundred inputs.  Without inputs, the error of the weights is the forecast for white noise.
# * For guarantees, use ``l2`` (energy), ``linf`` (any sample) or ``grey`` (images).  Guarantees
#   hold for every input, so typical inputs stay well below them.
# * None of these knows of the layers that follow.  Their operator norms, multiplied, give a bound
#   for a network that is true, and mostly far too large; measure a network by its task.
