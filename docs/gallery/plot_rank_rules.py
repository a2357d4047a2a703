r"""
Rules that pick a rank
======================

A rank has to come from somewhere: from an error, from a budget, from a share of the energy, or
from a model of noise that is fitted to the weights.  This page compares the rules of
:mod:`lowrank.selection.ranks` on one trained layer in one family, and then shows where variational
Bayes (EVBMF) has nothing to go by.
"""

import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import lowrank
from lowrank.core import tables
from lowrank.interop import weights
from lowrank.report import figures
from lowrank.selection import ranks

plt.rcParams.update(figures.STYLE)
NET = Path(lowrank.__file__).parent / "data" / "digits.safetensors"
layer = next(x for x in weights.layers(NET) if x.name == "conv3")
conv, shape = layer.conv, layer.input_size
kernel = conv.to_dense().astype(np.float64)
print(conv, shape)

# %%
# Five rules, one layer
# ---------------------
#
# The family is Tucker-2, with a rank for the channels out and one for the channels in.  Each rule
# answers a question of its own:
#
# ``for_error(conv, "tucker", 0.2)``
#     What is the smallest rank whose relative error is at most 0.2?
# ``for_ratio(conv, "tucker", params=0.1)``
#     What is the most accurate rank with a tenth of the parameters?
# ``energy(conv, "tucker", 0.95)``
#     How many singular values of each unfolding keep 95 % of its squared norm?
# ``evbmf(conv)``
#     How many singular values of each unfolding stand out of white noise?
# ``relaxed_evbmf(conv, relaxation=0.6)``
#     What rank lies three fifths of the way from the full rank to that of EVBMF?

picks = {
    "for_error 0.2": ranks.for_error(conv, "tucker", 0.2),
    "for_ratio 0.1": ranks.for_ratio(conv, "tucker", params=0.1),
    "energy 0.95": ranks.energy(conv, "tucker", 0.95),
    "evbmf": ranks.evbmf(conv),
    "relaxed_evbmf 0.6": ranks.relaxed_evbmf(conv, relaxation=0.6),
}
chains = {name: lowrank.tucker(conv, rank) for name, rank in picks.items()}
rows = [("rule", "rank", "error", "energy kept", "parameters", "MACs")]
for name, f in chains.items():
    error = f.error(kernel)
    macs = f.cost(shape).share_of(conv.cost(shape))
    rank = ",".join(map(str, f.rank))
    rows.append((name, rank, f"{error:.3f}", f"{1 - error**2:.3f}", f"{f.params / conv.params:.3f}",
                 f"{macs:.3f}"))  # fmt: skip
print("\n".join(tables.align_columns(rows)))

# %%
# Only the first two keep a promise that one can check in the table: an error of at most 0.2, at
# most a tenth of the parameters.  ``energy`` is about each unfolding by itself, and what two of
# them lose may add up: the chain keeps less than 0.95, though at least 1 - 2 (1 - 0.95).  The
# last two promise nothing about error or cost.  An energy is the square of what an error is: 0.95
# sounds like a lot and is an error of :math:`\sqrt{0.05} = 0.22` in each unfolding.
#
# All picks lie on or near the same curve, the best that Tucker-2 has for each cost.  A rule is only
# a way to choose a point of it, so the curve is worth more than any rule: look at it, and decide.

front = lowrank.frontier(conv, shape, ["tucker"], axis="params")
figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
axes.plot([c.cost.params / conv.params for c in front], [c.error for c in front], "-",
          color="#999999", linewidth=1.2, label="the front of Tucker-2")  # fmt: skip
looks = zip(("#0072b2", "#009e73", "#e69f00", "#d55e00", "#cc79a7"), "osD^v")
for (name, f), (colour, mark) in zip(chains.items(), looks):
    rank = ", ".join(map(str, f.rank))
    axes.plot(f.params / conv.params, f.error(kernel), mark, color=colour, markersize=8,
              label=f"{name}: {rank}")  # fmt: skip
axes.axhline(0.2, color="#0072b2", linewidth=0.8, linestyle=":")
axes.axvline(0.1, color="#009e73", linewidth=0.8, linestyle=":")
axes.set(xlim=(0, 1), xlabel="parameters, share of the dense kernel's", ylim=(0, 0.7),
         ylabel="relative error of the weights", title="the same layer, five rules")  # fmt: skip
axes.grid(alpha=0.25, linewidth=0.5)
axes.legend(frameon=False)
plt.show()

# %%
# What EVBMF sees
# ---------------
#
# The model of EVBMF is a low-rank matrix plus white noise.  It estimates the noise, and counts the
# singular values that noise of this size cannot explain.
# :func:`lowrank.selection.ranks.evbmf_of` does it for any matrix and returns its threshold.
# Four matrices of 64 × 576, the size of this
# layer's unfolding: one that fits the model, one of noise alone, the layer's, and one of full rank
# whose singular values decay without any noise.

rng = np.random.default_rng(0)
rows, columns = 64, 576
noise = rng.standard_normal((rows, columns))
signal = rng.standard_normal((rows, 8)) @ rng.standard_normal((8, columns)) / np.sqrt(8)
left, right = (np.linalg.qr(rng.standard_normal((n, rows)))[0] for n in (rows, columns))
matrices = {
    "rank 8 and noise": signal + noise,
    "noise alone": noise,
    "trained layer, channels out": kernel.reshape(rows, columns),
    "decay, no noise": (left * 0.93 ** np.arange(rows)) @ right.T,
}
figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.9), layout="constrained", sharey=True)
for ax, (name, matrix) in zip(axes, matrices.items()):
    found = ranks.evbmf_of(matrix)
    values = np.linalg.svd(matrix, compute_uv=False)
    ax.semilogy(np.arange(1, rows + 1), values / values[0], ".", color="#0072b2", markersize=4)
    ax.axhline(found.threshold / values[0], color="#d55e00", linewidth=1)
    ax.set(title=f"{name}\nrank {found.rank}", xlabel="singular value")
    ax.title.set_fontsize(9)
axes[0].set(ylabel="over the largest", ylim=(3e-3, 1.5))
axes[0].annotate("threshold", (0.97, 0.5), xycoords="axes fraction", ha="right", color="#d55e00")
plt.show()

# %%
# The first is what it is made for: there is a gap, the threshold lies in it, the rank is right.  Of
# noise it finds nothing, which is right as well.  The trained layer's spectrum has a bend and no
# gap.  EVBMF takes what is below the bend for noise; to the network it is not noise just because it
# is small and flat, and leaving it out costs the error in the table above.  The last matrix has no
# noise at all, and still a line is drawn, somewhere in a smooth decay: there the rank is a property
# of the model, not of the matrix.
#
# Where it fails
# --------------
#
# *Nothing stands out.*  For a layer whose weights look like noise, such as one that has not been
# trained, the rank is 0, and no chain has rank 0.  The rule returns 1 and warns; rank 1 is no
# approximation.

untrained = lowrank.dense(rng.standard_normal((64, 64, 3, 3)), padding=1)
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always", ranks.RankWarning)
    rank = ranks.evbmf(untrained)
error = lowrank.tucker(untrained, rank).error(untrained.to_dense())
print(f"rank {rank}, error {error:.3f}")
print(warned[0].message)

# %%
# *Too much noise.*  True components are given up for the sake of few false ones.  With rank 8 and
# more and more noise, the rank found falls from 8 to 0 while much of it could still be had: a
# singular value that cannot be told from noise with certainty is not worthless.
#
# *Too high a rank.*  It cannot find more than a limit, a little less than half of a square matrix,
# and near the limit it falls back.

print("signal over noise, squared norms:", end="")
for ratio in (1, 0.3, 0.1, 0.03):
    found = ranks.evbmf_of(signal + noise / np.sqrt(ratio))
    print(f"  {ratio}: rank {found.rank}", end="")
print("\n64 x 64, true rank, hardly any noise:", end="")
for true in (8, 24, 31, 40, 64):
    square = rng.standard_normal((64, true)) @ rng.standard_normal((true, 64))
    found = ranks.evbmf_of(square + 1e-3 * rng.standard_normal((64, 64)))
    print(f"  {true}: rank {found.rank}", end="")
print()

# %%
# What to do
# ----------
#
# * If you know what error or cost you can afford, use ``for_error`` or ``for_ratio``, and
#   :func:`lowrank.approximate` to have them over all families at once.
# * ``energy`` is a compromise for many layers: each loses about the same share.  Remember that 0.9
#   of the energy is an error of 0.32.
# * EVBMF needs no number from you, which is why it is popular; it is a guess to start from, with
#   training afterwards.  Look at the error of what it picks.  ``relaxed_evbmf`` compresses less
#   per round, for several rounds of compression and training.
# * None of the rules looks at data.  One share for every layer is simple, not good: layers differ
#   in what they lose.
