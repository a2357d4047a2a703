r"""
Filters that choose for themselves
==================================

A filter of many taps can run by three methods: directly, tap by tap; as a sum of separable terms,
each along the columns and then along the rows; and by Fourier transforms of blocks.  Which is
fastest depends on the kernel's size, its rank, the error that is allowed, and the machine.
:func:`lowrank.filter_image` chooses, and :func:`lowrank.plan_filter` shows the choice.
"""

import matplotlib.pyplot as plt
import numpy as np

import lowrank
from lowrank import filters, perfmodel
from lowrank.report import figures

plt.rcParams.update(figures.STYLE)

# %%
# Times on this page are predictions, for one thread, with the rates of this machine if
# ``lowrank calibrate`` has measured them, else with those that ship with the package.  Nothing is
# calibrated here.

here = perfmodel.current()
print("measured on this machine" if here.calibrated else "rates that ship with the package")

# %%
# Kernels and their ranks
# -----------------------
#
# A matrix of taps of rank R is a sum of R separable terms.  A Gaussian has rank 1.  The Laplacian
# of one has two terms, as it is a sum of two derivatives; so has a wave under a Gaussian at an
# angle.  A disk and a slanted line are of high rank: nothing about them goes along rows and
# columns.

kernels = {
    "gauss": filters.gauss(3.0),
    "log": filters.log(3.0),
    "gabor": filters.gabor(4.0, 9.0, angle=0.5),
    "unsharp": filters.unsharp(2.0),
    "disk": filters.disk(9.5),
    "motion": filters.motion(21, angle=0.5),
}
size = (1080, 1920)
plans = {n: lowrank.plan_filter(k, size, tolerance=0.02, threads=1) for n, k in kernels.items()}
figure, axes = plt.subplots(1, 6, figsize=(9.6, 2.2), layout="constrained")
for ax, (name, k) in zip(axes, kernels.items()):
    root = np.sign(k) * np.sqrt(np.abs(k) / np.abs(k).max())  # so that small taps can be seen
    ax.imshow(root, cmap="RdBu_r", vmin=-1, vmax=1)
    ax.spines[:].set_visible(False)
    choice = plans[name].choice
    terms = f", rank {choice.rank[0]}" if choice.rank else ""
    ax.set_title(f"{name} {'×'.join(map(str, k.shape))}\nrank {filters.rank(k)}", fontsize=9)
    ax.set(xticks=[], yticks=[])
    ax.set_xlabel(f"{choice.method}{terms}")
plt.show()

# %%
# Below each kernel is the method that runs on a picture of 1080 × 1920 with a tolerance of 0.02.
# Colours show square roots, so that small taps are visible.  A plan lists the other methods:

print(plans["disk"])

# %%
# ``error``
#     Relative Frobenius error of the kernel that runs.
# ``grey levels``
#     Bound on the error of a pixel for values from 0 to 255, apart from round-off.
# ``predicted``
#     Time of one picture.
#
# The fastest method within the tolerance runs.  Methods beyond it are listed to show what a larger
# tolerance would save.
#
# The two columns of errors differ.  Unsharp masking is a large tap in the middle minus a wide,
# faint blur.  Its rank-1 approximation has an error of about 0.05, since the blur is a small part
# of the squared norm, but it misses the whole blur: bright pictures would change by a hundred grey
# levels and more.

for name in ("log", "gabor", "unsharp"):
    print(name, plans[name], sep="\n")

# %%
# Where the fastest method changes
# --------------------------------
#
# Direct filtering takes K² MACs per pixel, R separable terms take 2 R K, and transforms about the
# same time for every kernel size.  So there are crossovers.  Kernels of random
# numbers have full rank, K terms, which never pays; with ``rank=R`` a plan is about the best sum of
# R terms.

rng = np.random.default_rng(0)
sides = (3, 5, 7, 9, 11, 15, 19, 25, 31, 41, 51, 63)
size = (1024, 1024)
names = ("direct", "fft", "rank 1", "rank 2", "rank 4", "full rank")
seconds = {name: [] for name in names}
for side in sides:
    kernel = rng.standard_normal((side, side))
    times = {}
    for method in lowrank.plan_filter(kernel, size, threads=1).methods:
        times.setdefault(method.method, method.seconds)  # the fastest comes first
    for rank in (1, 2, 4, side):
        name = "full rank" if rank == side else f"rank {rank}"
        if rank <= side:
            plan = lowrank.plan_filter(kernel, size, rank=rank, threads=1)
            times[name] = plan.choice.seconds
    for name in names:
        seconds[name].append(times.get(name, np.nan))

figure, axes = plt.subplots(figsize=(6.6, 4.2), layout="constrained")
looks = {
    "direct": ("black", "-"), "fft": ("#e69f00", "-"), "full rank": ("#cc79a7", "--"),
    "rank 4": ("#d55e00", "-"), "rank 2": ("#009e73", "-"), "rank 1": ("#0072b2", "-"),
}  # fmt: skip
for name, (colour, line) in looks.items():
    axes.plot(sides, np.multiply(seconds[name], 1e3), line, color=colour, marker="o", markersize=3,
              label=name)  # fmt: skip
shown = [3, 5, 9, 15, 25, 41, 63]
axes.set(xscale="log", yscale="log", xlabel="taps along a side", ylabel="predicted ms",
         title="1024 × 1024, float32, one thread")  # fmt: skip
axes.set_xticks(shown, map(str, shown))
axes.minorticks_off()
axes.grid(alpha=0.25, linewidth=0.5)
axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %%
# Sizes from which on a method is predicted to be faster than another:


def crossover(new, old):
    """Say from which size on `new` takes less time than `old`."""
    slower = np.flatnonzero(~(np.array(seconds[new]) < np.array(seconds[old])))
    first = slower[-1] + 1 if len(slower) else 0
    return f"from {sides[first]} taps a side" if first < len(sides) else "at none of these sizes"


for new, old in (
    ("rank 1", "direct"), ("rank 2", "direct"), ("rank 4", "direct"), ("fft", "direct"),
    ("fft", "rank 4"), ("fft", "rank 2"), ("fft", "rank 1"),
):  # fmt: skip
    print(f"{new:6} before {old:6}  {crossover(new, old)}")

# %%
# Grey levels, promised and lost
# ------------------------------
#
# A tolerance is about the kernel.  The plan's bound is about the picture.  Here is a lens blur of a
# test picture in 8 bits, in fewer and fewer terms, against the exact one in float64.

yy, xx = np.indices((480, 640))
rings = 127.5 + 127.5 * np.cos((xx**2 + yy**2) / 1500)
checks = 255.0 * (((xx // 9) + (yy // 9)) % 2)
picture = np.where(xx < 320, rings, checks).round().astype(np.uint8)
lens = kernels["disk"]
exact = lowrank.filter_image(picture.astype(np.float64), lens, method="direct")
print("tolerance  terms    error  bound  largest  mean")
for tolerance in (1e-6, 0.1, 0.15, 0.3):
    asked = {"tolerance": tolerance, "method": "separable"}
    choice = lowrank.plan_filter(lens, picture.shape, **asked).choice
    off = np.abs(lowrank.filter_image(picture, lens, **asked) - exact)
    print(f"{tolerance:9}  {choice.rank[0]:5}  {choice.error:7.1e}  {choice.grey:5.1f}"
          f"  {off.max():7.2f}  {off.mean():4.2f}")  # fmt: skip

# %%
# The result is rounded to whole grey levels, which adds up to a half to what the bound says.  The
# bound holds for every picture, the unlikeliest included; see the page on what an error means.
#
# What to do
# ----------
#
# * Call ``lowrank.filter_image(image, kernel)``.  Without a tolerance it is exact to rounding.
# * If some error is fine, say how much with ``tolerance``, and look at ``plan_filter`` for what it
#   buys, and at the bound in grey levels for what it may cost.
# * Where values may be NaN or infinite, ask for ``method="direct"`` or ``"separable"``: a transform
#   spreads them over its block.
# * Volumes, cubes, series and colours go through :func:`lowrank.filters.correlate` in the same way.
