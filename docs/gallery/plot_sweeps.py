r"""
Sweeps over layers and budgets
==============================

A network has many layers, each of them several families, each of those many ranks.  The pieces of
such a sweep have nothing to do with each other, so they can be run beside each other: in processes
of one machine by `joblib <https://joblib.readthedocs.io>`_, and on a cluster by the same lines with
joblib's Dask backend.  Layers, chains, candidates and fronts can be pickled.
"""

import importlib.util
import time
import warnings
from pathlib import Path

import joblib
import matplotlib.pyplot as plt

import lowrank
from lowrank.core import tables
from lowrank.interop import weights
from lowrank.report import figures

plt.rcParams.update(figures.STYLE)
NET = Path(lowrank.__file__).parent / "data" / "digits.safetensors"

# %%
# What is swept
# -------------
#
# The two larger layers of the small network that comes with the package, each with five families.
# A task is one layer and one family: small enough for the load to be even, and large enough (a
# tenth of a second and more) for the sending not to matter.

layers = {layer.name: layer for layer in weights.layers(NET) if layer.name != "conv1"}
families = ("spatial_svd", "channel_svd", "tucker", "tensor_train", "cp")

tasks = [
    joblib.delayed(lowrank.frontier)(layer.conv, layer.input_size, (family,), axis="macs")
    for layer in layers.values()
    for family in families
]

# %%
# In processes
# ------------
#
# ``inner_max_num_threads=1`` gives each process one thread of the engine and of BLAS: there are as
# many processes as cores already, and several threads for each fit would be slower.
# joblib's own processes (its ``loky`` backend) are started anew and not forked, so that threads of
# OpenMP in this one do not matter to them; a forked child of this process would run the engine on
# one thread.

with joblib.parallel_config(backend="loky", n_jobs=2, inner_max_num_threads=1):
    began = time.perf_counter()
    fronts = joblib.Parallel()(tasks)
    print(f"{len(fronts)} fronts in two processes: {time.perf_counter() - began:.1f} s, "
          "with their start")  # fmt: skip

# %%
# Results come back in the order of the tasks.  Fronts of the same layer are merged: what is
# Pareto-optimal among all of their candidates remains.

figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained", sharey=True)
for ax, (name, layer) in zip(axes, layers.items()):
    own = fronts[: len(families)]
    fronts = fronts[len(families) :]
    dense = own[0].dense.cost.macs
    for family, front in zip(families, own):
        found = [c for c in front if c.family != "dense"]
        look = lowrank.FAMILIES[family]
        ax.plot([c.cost.macs / dense for c in found], [c.error for c in found], look.marker,
                color=look.color, markersize=3.5, alpha=0.7, label=look.label)  # fmt: skip
    every = sorted({(c.cost.macs / dense, c.error) for front in own for c in front})
    best, least = [], float("inf")
    for share, error in every:
        if error < least:
            best.append((share, error))
            least = error
    ax.plot(*zip(*best), drawstyle="steps-post", color="black", linewidth=0.8, zorder=0)
    ax.set(xscale="log", xlabel="share of the MACs", xlim=(None, 1.05),
           title=f"{name}, {'×'.join(map(str, layer.conv.stages[0].weight.shape))}")  # fmt: skip
    ax.grid(alpha=0.25, linewidth=0.5)
axes[0].set(ylabel="relative error", ylim=(0, 1))
axes[1].legend(frameon=False, loc="upper right")
plt.show()

# %%
# Budgets
# -------
#
# The same for budgets: each task picks and fits one chain, and the chain itself comes back.  CP is
# left out here, only since its fits to a higher rank take seconds.

budgets = (0.5, 0.25, 0.125)
asked = [(layer, b) for layer in layers.values() for b in budgets]
tasks = [
    joblib.delayed(lowrank.approximate)(
        layer.conv, layer.input_size, macs=budget, families=families[:-1]
    )
    for layer, budget in asked
]
with joblib.parallel_config(backend="loky", n_jobs=2, inner_max_num_threads=1):
    chains = joblib.Parallel()(tasks)
rows = [("layer", "budget", "chain", "error")]
for (layer, budget), f in zip(asked, chains):
    error = f.error(layer.conv.to_dense())
    rows.append((layer.name, f"{budget:g}", f"{f.family} {f.rank}", f"{error:.3f}"))
print("\n".join(tables.align_columns(rows)))

# %%
# On a cluster
# ------------
#
# With ``dask.distributed`` the tasks go to the workers of a cluster.  A client is made, and the
# backend is ``"dask"``: nothing else changes.  Here the cluster is one process of this machine with
# two threads; on a real one the client gets the address of a scheduler.  Each worker needs lowrank,
# and is started with ``OMP_NUM_THREADS=1`` if it has several threads of its own.

if importlib.util.find_spec("distributed"):
    from distributed import Client, LocalCluster

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # messages of a cluster that shuts down
        cluster = LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
        )
        with cluster, Client(cluster), joblib.parallel_config(backend="dask"):
            again = joblib.Parallel()(tasks[:2])
    same = [(a.to_dense() == b.to_dense()).all() for a, b in zip(again, chains)]
    print("the same chains:", all(same))
else:
    print("distributed is not installed: pip install 'dask[distributed]'")

# %%
# What to do
# ----------
#
# * Make a task of a layer and a family, or a layer and a budget, and give all of them to one
#   ``joblib.Parallel``.
# * Set ``inner_max_num_threads=1`` in processes.  With the ``threading`` backend give ``threads=1``
#   to plans that are run: the engine and BLAS release Python's lock, the rest of a fit does not.
# * Times that choices are made by (``axis="seconds"``) are predictions from counts.  They do not
#   depend on how busy the machine is, but on its rates: copy the calibration of the machine that
#   will run the network to all workers, or sweep by ``axis="macs"``.
# * Large networks: send the path of the weights and read them in the task, where all workers see
#   the same files.
