r"""
Choosing by time
================

Half the MACs are not half the time.  A thin stage has less work for each number that is
moved; a depthwise stage has hardly any; and every stage more is one more to be fed.  So
:func:`lowrank.frontier` compares candidates by the seconds that they are predicted to take on this
machine, before anything is built, and :func:`lowrank.approximate` takes budgets of time, which it
measures.  This page shows where that changes a choice.
"""

import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import lowrank
from lowrank import perfmodel
from lowrank.core import tables
from lowrank.core.cost import speed_up_efficiency
from lowrank.interop import weights
from lowrank.report import figures

plt.rcParams.update(figures.STYLE)
NET = Path(lowrank.__file__).parent / "data" / "digits.safetensors"

# %%
# The performance model of this machine
# -------------------------------------
#
# The model counts operations of a chain (MACs in vectors, samples loaded, lines from each cache,
# calls, forks of the thread pool) and multiplies each count by a cost coefficient.
# ``lowrank calibrate`` on the command line, or :func:`lowrank.perfmodel.calibrate`, measures the
# coefficients once, in less than a minute, and stores them in the user's cache folder.
# **This page does not calibrate.**  It uses :func:`lowrank.perfmodel.current`: the coefficients of
# this machine if they have been measured, else those that ship with the package, which are good
# for comparing chains with each other, and not for seconds.

here = perfmodel.current()
print(f"{here.cpu}, {here.isa}")
print("measured on this machine" if here.calibrated else "rates that ship with the package")
print(f"median error of a prediction: {here.coefficients['lowrank'].error:.0%}")

# %%
# A prediction says what the time goes to.  The layer is from the small network that comes with the
# package, on a plane of 14 × 14, on one thread, so that the page means the same everywhere.

layer = next(x for x in weights.layers(NET) if x.name == "conv2")
conv, shape, threads = layer.conv, (32, 14, 14), 1
predicted = here.predict(conv, shape, threads=threads)
print(conv)
print(predicted)
for part, seconds in sorted(predicted.parts.items(), key=lambda x: -x[1])[:4]:
    print(f"  {part:12} {seconds / predicted.seconds:.0%}")

# %%
# Two fronts
# ----------
#
# A front holds the candidates that are Pareto-optimal in error and cost.  The cost is an ``axis``:
# ``"seconds"`` by default; ``"macs"``, ``"params"``, ``"traffic"`` (elements read and
# written, stage by stage) and others are the same on every machine.  One family is left out here,
# only since it takes a few seconds more.

families = [name for name in lowrank.FAMILIES if name != "tucker_full"]
by_seconds = lowrank.frontier(conv, shape, families, threads=threads)
by_macs = lowrank.frontier(conv, shape, families, axis="macs", threads=threads)
print(by_seconds)

# %%
# ``faster`` is what the time model promises; ``efficiency`` is log(speed-up) / log(MAC ratio):
# 100 % where half of the MACs take half the time, 0 % where they take all of it, and less where
# they take longer.  No chain on the front by seconds is slower than the dense kernel; on the
# other, ``!`` marks those that are.
#
# Which candidates are on one front only?

fronts = {"seconds": by_seconds, "macs": by_macs}
keys = {name: {(c.name, c.rank): c for c in front} for name, front in fronts.items()}
both = keys["seconds"].keys() & keys["macs"].keys()
only = {name: [c for k, c in found.items() if k not in both] for name, found in keys.items()}
print(f"on both fronts: {len(both)}")
for name, found in only.items():
    of = ", ".join(sorted({c.family for c in found}))
    efficiency = np.median([c.efficiency(fronts[name].dense) for c in found])
    print(f"by {name} only: {len(found)} ({of}), median efficiency {efficiency:.0%}")
slower = sum(c.is_slower(by_macs.dense) for c in by_macs)
print(f"by macs, and predicted to take longer than the dense layer: {slower}")

# %%
# In one picture, on the left, both fronts at their predicted times.  What only MACs would
# choose lies above the front: something else has its error in less time.  On the right is what
# that costs: for every error that one may allow, the time of the candidate with the fewest
# MACs over that of the fastest.

figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.8), layout="constrained")
dense = by_seconds.dense
groups = {
    "only by MACs": ("#d55e00", "D", only["macs"]),
    "only by seconds": ("#0072b2", "o", only["seconds"]),
    "on both fronts": ("#999999", "o", [keys["seconds"][k] for k in both]),
}
for name, (colour, mark, found) in groups.items():
    left.plot([c.seconds / dense.seconds for c in found], [c.error for c in found], mark,
              color=colour, markersize=3.5, label=name)  # fmt: skip
left.set(xlim=(0, 1.05), xlabel="predicted seconds, share of the dense layer's", ylim=(0, 0.8),
         ylabel="relative error of the weights")  # fmt: skip
left.legend(frameon=False)
allowed = np.linspace(0.08, 0.7, 400)
lost = [by_macs.within(e).seconds / by_seconds.within(e).seconds - 1 for e in allowed]
right.plot(allowed, np.multiply(lost, 100), color="#d55e00", linewidth=1.2)
right.set(ylim=(0, None), xlabel="error allowed", ylabel="% more time than the fastest",
          title="chosen by MACs")  # fmt: skip
for ax in (left, right):
    ax.grid(alpha=0.25, linewidth=0.5)
plt.show()

# %%
# A budget of time
# ----------------
#
# ``seconds="50%"`` is a share of the dense layer's time; ``"2ms"`` and ``"300us"`` are amounts.
# The dense layer, some candidates of every variant, and those near the budget are measured, until
# the pick is one that was measured; the measurements are kept on disk, so that the same call
# returns the same chain.
# With ``measure=False`` it is the candidate that :meth:`lowrank.Frontier.affordable` finds, built.

half = lowrank.approximate(
    conv, shape, seconds="50%", families=families, threads=threads, measure=False
)
by_work = by_macs.affordable(by_macs.dense.cost.macs / 2).build()
for name, f in {"half of the time": half, "half of the MACs": by_work}.items():
    seconds = here.predict(f, shape, threads=threads).seconds
    print(f"{name:25}  {f.family} {f.rank}, error {f.error(conv.to_dense()):.4f}, "
          f"{seconds / predicted.seconds:.0%} of the time, "
          f"{f.cost(shape).share_of(conv.cost(shape)):.0%} of the MACs")  # fmt: skip

# %%
# :func:`lowrank.report.figures.error_against_cost` draws a front with a colour per family, marks
# the chosen candidate, and writes a file.

pick = by_seconds.affordable(by_seconds.dense.seconds / 2)
figures.error_against_cost([by_seconds], "front.png", title="conv2 at 14 × 14", pick=pick)

# %%
# The clock
# ---------
#
# A prediction is a claim, so here are a few chains of about equal MACs, predicted and
# timed: the fastest of a hundred runs.

chains = {"dense": conv}
for family in ("spatial_svd", "tucker", "cp3", "network_decoupling"):
    front = lowrank.frontier(conv, shape, [family], axis="macs", threads=threads)
    chains[family] = front.affordable(front.dense.cost.macs / 3).build()
x = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)


def clocked(f):
    """Least seconds of a run."""
    run, least = f.compile(shape, np.float32, threads=threads), np.inf
    out = run(x)
    for _ in range(100):
        start = time.perf_counter()
        run(x, out)
        least = min(least, time.perf_counter() - start)
    return least


rows = [("chain", "MACs", "predicted", "clock", "efficiency by the clock")]
dense_seconds = clocked(conv)
for name, f in chains.items():
    share = f.cost(shape).share_of(conv.cost(shape))
    seconds = clocked(f)
    expected = here.predict(f, shape, threads=1).seconds
    times = (tables.format_seconds(t) for t in (expected, seconds))
    efficiency = 1.0 if f is conv else speed_up_efficiency(dense_seconds / seconds, 1 / share)
    rows.append((name, f"{share:.0%}", *times, f"{efficiency:.0%}"))
print("\n".join(tables.align_columns(rows)))

# %%
# What to do
# ----------
#
# * Calibrate once on the machine that is going to run the network, when it has nothing else to do.
# * Leave ``axis`` alone if speed is the aim.  Give ``batch``, ``threads`` and ``runtime``
#   (``"lowrank"``, ``"onnxruntime"``, ``"torch"`` or ``"torch-channels-last"``) as they will be:
#   all of them change what is fastest.
# * Use ``axis="macs"`` for tables that others are to compare with, ``"params"`` for memory.
# * Look at ``efficiency`` before believing a saving in MACs.
