r"""
Larger than memory
==================

A stack of a microscope or a scanner may be many times as large as the memory.  Kept in chunks, in a
`Zarr <https://zarr.readthedocs.io>`_ store, it can be read as a `Dask <https://docs.dask.org>`_
array: a plan of what to compute, chunk by chunk.  :func:`lowrank.filters.correlate`,
:func:`lowrank.filter_image` and every :class:`lowrank.Factorization` take such arrays and give such
arrays, and what is computed in the end has **the same bits** as the call on the whole array in
memory.  This page computes a bank of features of a volume, from one store into another, and
measures how much memory that takes.  It needs ``pip install 'lowrank[dask]'``.
"""

import tempfile
import threading
import time
from pathlib import Path

import dask
import dask.array as da
import matplotlib.pyplot as plt
import numpy as np
import zarr

import lowrank
from lowrank import filters
from lowrank.report import figures

plt.rcParams.update(figures.STYLE)
folder = tempfile.TemporaryDirectory()
source, target = (str(Path(folder.name) / name) for name in ("volume.zarr", "features.zarr"))
dask.config.set(scheduler="threads", num_workers=2)

# %%
# The volume
# ----------
#
# A sponge with some noise, in 8 bits, written chunk by chunk.  It is small, so that this page is
# quick; nothing below would change if it were a terabyte.

shape, chunks = (360, 256, 256), (40, 64, 128)
z, y, x = (da.arange(n, chunks=c, dtype=np.float32) / 9 for n, c in zip(shape, chunks))
z, y, x = z[:, None, None], y[None, :, None], x[None, None, :]
sponge = da.sin(x) * da.cos(y) + da.sin(y) * da.cos(z) + da.sin(z) * da.cos(x + y / 7)
noise = da.random.default_rng(0).standard_normal(shape, chunks=chunks, dtype=np.float32)
((sponge > 0.2) * 120 + 60 + 20 * noise).clip(0, 255).astype(np.uint8).to_zarr(source)

volume = da.from_zarr(source).astype(np.float32)
print(volume)

# %%
# Results have the type of the image.  Features have signs and fractions, so the 8 bits are made
# float32 first: lazily, a chunk at a time, as everything here.
#
# The features
# ------------
#
# At each of two scales, how strongly the volume changes (the length of the gradient of Gaussians)
# and how much of a blob is there (the Laplacian of a Gaussian).  All four filters of a scale are
# sums of a few separable terms, and run as such.


def derivative(sigma, axis):
    """Derivative of a Gaussian along an axis of three."""
    g = filters.gauss(sigma, ndim=3)
    steps = np.arange(g.shape[axis]) - g.shape[axis] // 2
    return g * np.expand_dims(steps, [a for a in range(3) if a != axis]) / sigma**2


scales = (1.0, 2.0)
names, features = [], []
for sigma in scales:
    gradient = [filters.correlate(volume, derivative(sigma, axis)) for axis in range(3)]
    features += [da.sqrt(sum(g * g for g in gradient)),
                 filters.correlate(volume, -filters.log(sigma, ndim=3))]  # fmt: skip
    names += [f"edges, σ = {sigma:g}", f"blobs, σ = {sigma:g}"]
bank = da.stack(features)
print(bank)

# %%
# Nothing has been computed yet.  The ways to run the filters have been chosen, though, each once
# and for the whole volume: a choice by chunks might differ from chunk to chunk.  Chunks overlap
# by half a kernel where they are read.  The borders of the volume are what ``mode`` says, and all
# other borders of chunks are data.
#
# From store to store
# -------------------
#
# ``bank.to_zarr(...)`` would do.  Dask holds a chunk until all that see it have been computed, and
# goes through an array in an order of its own: what it holds grows with the array, though more
# slowly.  Storing slab after slab leaves it no choice, and costs the reading of a few chunks once
# more.  Another thread looks at this process's memory meanwhile.


class Watch:
    """Resident memory of this process above what it was before, in MB, every few milliseconds."""

    def __enter__(self):
        self.before, self.seconds, self.megabytes = self.resident(), [], []
        self.start, self.done = time.perf_counter(), threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def resident(self):
        """Resident memory in MB, as Linux counts it."""
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1000

    def look(self):
        """Note time and memory until it is over."""
        while not self.done.wait(0.005):
            self.seconds.append(time.perf_counter() - self.start)
            self.megabytes.append(self.resident() - self.before)

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


stored = zarr.open(target, mode="w", shape=bank.shape, chunks=bank.chunksize, dtype=bank.dtype)
slabs = [slice(a, a + 2 * chunks[0]) for a in range(0, shape[0], 2 * chunks[0])]
with Watch() as watch:
    for slab in slabs:
        da.store(bank[:, slab], stored, regions=(slice(None), slab), lock=False)
size = {"volume": volume.nbytes / 1e6, "features": bank.nbytes / 1e6}
print(f"{watch.seconds[-1]:.1f} s, {max(watch.megabytes):.0f} MB at the most, for a volume of "
      f"{size['volume']:.0f} MB and features of {size['features']:.0f} MB")  # fmt: skip

figure, axes = plt.subplots(figsize=(6.6, 2.8), layout="constrained")
axes.fill_between(watch.seconds, watch.megabytes, color="#0072b2", alpha=0.6, linewidth=0)
total = sum(size.values())
axes.axhline(total, color="black", linewidth=0.8, linestyle="--")
axes.text(watch.seconds[-1], total, "volume and features in memory", ha="right", va="bottom")
axes.set(xlabel="seconds", ylabel="MB above the start", xlim=(0, watch.seconds[-1]),
         ylim=(0, 1.15 * total))  # fmt: skip
plt.show()

# %%
# What is in memory is a slab and its neighbours, however many slabs there are.  Workers of Dask's
# pool are threads of their own, so each of them runs its chunk on one thread of the engine.  With
# ``scheduler="synchronous"`` there is a chunk at a time, on all threads; ``threads=`` says it
# outright.

middle = shape[0] // 2
figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.7), layout="constrained")
planes = [("volume", volume[middle].compute())] + [(names[i], stored[i, middle]) for i in (0, 2, 3)]
for ax, (name, plane) in zip(axes, planes):
    signed = name.startswith("blobs")
    most = np.abs(plane).max()
    ax.imshow(plane, cmap="RdBu_r" if signed else "gray", vmin=-most if signed else 0, vmax=most)
    ax.set_title(name)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
plt.show()

# %%
# The same bits
# -------------
#
# This volume does fit into memory, so it can be said whether the chunks show.

whole = volume.compute()
for index, sigma in ((1, scales[0]), (3, scales[1])):
    in_memory = filters.correlate(whole, -filters.log(sigma, ndim=3))
    same = np.array_equal(stored[index], in_memory)
    print(names[index], "equal, bit for bit:", same)

# %%
# The engine adds the taps of an output in the same order wherever the output lies, so nothing but
# the decisions for the whole array has to be kept out of the chunks.  **Transforms** are the
# exception: the rounding of an output depends on the block that it was transformed in, and a NaN
# fills the block.  A Dask array is filtered without them; where they would be fastest in memory,
# it gets the bits of the fastest other way.
#
# Layers, too
# -----------
#
# Chains of networks take (batch, channels, and spatial axes) in any chunks; strides, dilation,
# groups and transposed convolutions included.  Channels become one chunk, chunks are moved to
# whole strides, and joined where they are smaller than what an output sees.

rng = np.random.default_rng(0)
weight = rng.standard_normal((8, 1, 3, 3, 3)).astype(np.float32)
conv = lowrank.dense(weight, stride=2, padding=1, padding_mode="replicate")
layer = lowrank.spatial_svd(conv, rank=2)
lazy = layer(volume[None, None])
print(lazy)
print("equal, bit for bit:", np.array_equal(lazy.compute(), layer(whole[None, None])))
folder.cleanup()

# %%
# What to do
# ----------
#
# * Open the store with ``da.from_zarr``, call what you would call on an array, and store slabs of
#   the result, or all of it with ``to_zarr`` where that is not too much.  Other sources, such as
#   ``da.from_array(np.memmap(...))``, do as well.
# * Chunks of some tens of samples more than the kernel along each axis waste little: what they
#   overlap is read and computed more than once.
# * Compute features of one volume together, as here: chunks are read once for all of them.
# * On a cluster start a client of ``dask.distributed`` first.  Nothing else changes.
