r"""
CP that does not cancel
=======================

Alternating least squares (ALS) lowers the error of a CP sum by all means, and one of them is to
let terms grow until they cancel each other.  Nothing shows while the factors are float64.  It
shows when they are rounded to half precision, or trained further: a small change of a large term
is a large change of the sum.

This page does three things: it watches ALS on a kernel where cancellation cannot be avoided, it
measures cancellation in a chain (:func:`lowrank.certificate`), and it trades a little error for a
chain without (``max_error`` of :func:`lowrank.cp`).  In the end float16 is predicted, and tried.
"""

import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tensorly.decomposition import parafac

import lowrank
from lowrank.interop import weights
from lowrank.report import figures

plt.rcParams.update(figures.STYLE)
NET = Path(lowrank.__file__).parent / "data" / "digits.safetensors"

# %%
# A kernel without a best approximation
# -------------------------------------
#
# Take two orthonormal vectors for each mode of a 1-D kernel of 8 channels out, 8 in and 5 taps,
# and add up
#
# .. math:: W = a_1 \circ b_1 \circ c_2 + a_1 \circ b_2 \circ c_1 + a_2 \circ b_1 \circ c_1 .
#
# Its CP rank is 3.  But two terms come as near to it as one likes: it is the derivative of
# :math:`(a_1 + s a_2) \circ (b_1 + s b_2) \circ (c_1 + s c_2)` at :math:`s = 0`, and a difference
# quotient, which has two terms, approaches a derivative.  So there is no best approximation of rank
# 2, and the nearer one comes, the larger are the two terms that nearly cancel.

rng = np.random.default_rng(0)
(a1, a2), (b1, b2), (c1, c2) = (
    np.linalg.qr(rng.standard_normal((size, 2)))[0].T for size in (8, 8, 5)
)
kernel = sum(np.einsum("t,s,k->tsk", *term) for term in ((a1, b1, c2), (a1, b2, c1), (a2, b1, c1)))
conv = lowrank.dense(kernel, padding=2)

# %%
# Everything that :func:`lowrank.cp` returns has been corrected already.  To see what ALS does by
# itself, its factors, here TensorLy's, are put into the stages of a chain of the same rank.
# Within a term each factor gets entries of the same size, the least sensitive way to write it, so
# that what is left is cancellation and nothing else.


def plain_als(f, kernel, sweeps):
    """Put the factors that ALS ends with into the chain `f`, the result of lowrank.cp."""
    norms, factors = parafac(
        kernel, f.rank[0], n_iter_max=sweeps, tol=0, init="random", random_state=0
    )
    factors = [factors[0] * norms, *factors[1:]]
    sizes = [np.linalg.norm(x, axis=0) / len(x) ** 0.5 for x in factors]
    even = np.prod(sizes, axis=0) ** (1 / len(sizes))
    out, *others = [x * even / size for x, size in zip(factors, sizes)]
    arrays = [*(x.T for x in others), out]  # pointwise, one depthwise stage per axis, pointwise
    stages = zip(f.stages, arrays)
    return replace(f, stages=tuple(replace(s, weight=w.reshape(s.weight.shape)) for s, w in stages))


chain = lowrank.cp(conv, 2, max_error=0.3)
sweeps = (3, 10, 30, 100, 300, 1000, 3000)
als = [lowrank.certificate(conv, plain_als(chain, kernel, n)) for n in sweeps]
print("sweeps   error   terms  sensitivity")
for n, c in zip(sweeps, als):
    print(f"{n:6}  {c.error:.4f}  {c.cancellation:6.2f}  {c.sensitivity:11.1f}")

# %%
# The certificate has two numbers about cancellation:
#
# ``cancellation``
#     The root of the sum of the squared norms of the terms, over the norm of the kernel.  Terms
#     that are orthogonal have 1.  It only says how large they are; at 100 two digits are lost.
# ``sensitivity``
#     Expected squared relative error of the kernel for noise on every weight that is as large as
#     the weights of its stage.  Noise of a share s of that makes a relative error of s times its
#     root.  The dense kernel has 1, a chain in which nothing cancels at most its number of stages.
#
# The error goes to 0, and both grow without end.  ``lowrank.cp`` notices that a fit has not
# settled:

with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always", lowrank.ConvergenceWarning)
    lowrank.cp(conv, 2)
print(warned[0].message)

# %%
# An error to keep to
# -------------------
#
# With ``max_error`` the question has an answer: of the sums of two terms within that error, find
# one of the least sensitivity.  This is the error-preserving correction of Phan et al.
# (:arxiv:`2008.05441`).  A sum that is asked for within 0.1, 0.03, 0.01 shows what each digit of
# accuracy costs for this kernel.  With a third term the cost is gone: on such a kernel the right
# thing to do is to raise the rank by one.

limits = (0.5, 0.3, 0.1, 0.03, 0.01)
corrected = [
    lowrank.certificate(conv, lowrank.cp(conv, 2, max_error=e, iterations=1000)) for e in limits
]
third = lowrank.certificate(conv, lowrank.cp(conv, 3, max_error=0.01))
print("rank  error   terms  sensitivity")
for rank, c in [*((2, c) for c in corrected), (3, third)]:
    print(f"{rank:4}  {c.error:.4f}  {c.cancellation:5.2f}  {c.sensitivity:11.1f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.4), layout="constrained")
left.loglog(sweeps, [c.error for c in als], "o-", color="#0072b2", label="relative error")
left.loglog(sweeps, [c.cancellation for c in als], "s-", color="#d55e00", label="terms")
left.set(xlabel="sweeps of ALS, rank 2", title="less error, larger terms")
left.legend(frameon=False)
right.loglog(
    *zip(*[(c.error, c.sensitivity) for c in als[1:]]), "o-", color="#0072b2", label="ALS, rank 2"
)
right.loglog(
    *zip(*[(c.error, c.sensitivity) for c in corrected]),
    "s--", color="#009e73", label="corrected, rank 2",
)  # fmt: skip
right.loglog(third.error, third.sensitivity, "*", markersize=11, color="black", label="rank 3")
right.set(xlabel="relative error", ylabel="sensitivity", title="what an error costs")
right.legend(frameon=False)
for ax in (left, right):
    ax.grid(alpha=0.25, linewidth=0.5)
plt.show()

# %%
# Both curves of rank 2 on the right are the same: here cancellation lies in the kernel, and nothing
# but error or rank buys it off.  Trained kernels often are not like that.
#
# A trained kernel
# ----------------
#
# The package comes with a small network that reads digits.  Its third convolution has 64 channels
# in and out and 3 × 3 taps.  For each rank, ALS is compared with a sum that may have one
# part in a hundred more error.

layer = next(x for x in weights.layers(NET) if x.name == "conv3")
conv, kernel = layer.conv, layer.conv.to_dense().astype(np.float64)


def rounded(f):
    """Relative change of a chain's kernel when its weights are rounded to float16."""
    return f.astype(np.float16).astype(np.float64).error(f.to_dense())


ranks = (8, 16, 32)
chains = {"ALS": [], "corrected": []}
for rank in ranks:
    chain = lowrank.cp(conv, rank, max_error=0.9, iterations=1)
    plain = plain_als(chain, kernel, sweeps=100)
    limit = 1.01 * plain.error(kernel)
    chains["ALS"].append(plain)
    chains["corrected"].append(lowrank.cp(conv, rank, max_error=limit))
print("            rank   error  terms  sensitivity  float16: predicted  simulated")
for name, found in chains.items():
    for f in found:
        c = lowrank.certificate(conv, f)
        half = lowrank.rounding(f, "float16").weights
        print(
            f"{name:10}  {f.rank[0]:4}  {c.error:.4f}  {c.cancellation:5.2f}  {c.sensitivity:11.1f}"
            f"  {half:18.1e}  {rounded(f):9.1e}"
        )

# %%
# One per cent of the error buys a sensitivity that is several times to ten times smaller: here ALS
# had cancelled for nothing.  Without ``max_error``, ``lowrank.cp`` gives away a hundredth of the
# error, which is part of this gain, sometimes most of it.  Give it more where the chain is going to
# be stored in half precision or trained further: sensitivity is also how much the noise of a step
# of training shakes the kernel.
#
# The last two columns are what rounding the weights to float16 adds, by itself.
# :func:`lowrank.rounding` predicts it from the weights and their spacing, without rounding
# anything; the simulation does round them.  Each is one draw of random rounding errors, so expect a
# few per cent between them, more where few weights carry the error.

figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
looks = {"ALS": ("#0072b2", -0.2), "corrected": ("#009e73", 0.2)}
for name, (colour, shift) in looks.items():
    at = np.arange(len(ranks)) + shift
    axes.bar(at, [rounded(f) for f in chains[name]], 0.36, color=colour, alpha=0.45,
             label=f"{name}, simulated")  # fmt: skip
    predicted = [lowrank.rounding(f, "float16").weights for f in chains[name]]
    axes.plot(at, predicted, "_", markersize=26, markeredgewidth=2.5, color=colour,
              label=f"{name}, predicted")  # fmt: skip
axes.axhline(
    lowrank.rounding(conv, "float16").weights, color="black", linewidth=0.8, linestyle=":",
    label="the dense kernel",
)  # fmt: skip
axes.set(
    xticks=range(len(ranks)), xticklabels=[f"rank {r}" for r in ranks],
    ylabel="relative change of the kernel", title="weights rounded to float16",
)  # fmt: skip
axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
plt.show()

# %%
# The whole prediction, for bfloat16, which has 8 binary digits where float16 has 11:

print(lowrank.rounding(chains["ALS"][1], "bfloat16"))
print()
print(lowrank.rounding(chains["corrected"][1], "bfloat16"))

# %%
# In float16 either chain will do as it is: what rounding adds is far below an error of 0.42.  In
# bfloat16 it is eight times as much; and once a network has been trained with its chains, so that
# their error no longer counts, all of it is felt.
#
# What to do
# ----------
#
# * Look at ``lowrank.certificate(conv, f)`` for every CP chain.  ``cancellation`` near 1: fine.
# * If terms are large, allow a little more error with ``max_error``.
# * If that does not help, the kernel is near one without a best approximation: raise the rank.
# * Before storing in half precision, ask ``lowrank.rounding``.
