"""Alternating least squares over the weights of a chain, in a metric."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from lowrank._typing import Array
from lowrank.core.tensor_network import contract
from lowrank.families.contraction import Contraction
from lowrank.metric import Metric

STEPS = 6  # conjugate-gradient steps per stage
RESIDUAL = 0.03  # share of the gradient norm at which they stop
BONDS = 700  # largest number of unknowns that a preconditioner couples: one inverse per update


def alternate(
    chain: Contraction,
    metric: Metric,
    target: Array,
    tensors: list[Array],
    sweeps: int,
    tolerance: float,
) -> tuple[list[Array], float, float]:
    """Fit the weights of a chain, one stage after another, until the error settles.

    Parameters
    ----------
    chain : Contraction
        Tensor network of the chain.
    metric : Metric
        Quadratic form of the error.
    target : ndarray, shape (groups, out, in, \\*taps)
        Kernel that is approximated.
    tensors : list of ndarray
        Weights to start from, with one axis per mode; replaced in the list.
    sweeps : int
        Largest number of sweeps over the stages.
    tolerance : float
        Relative decrease of the squared error below which the sweeps stop.

    Returns
    -------
    tensors : list of ndarray
        Fitted weights.
    energy : float
        Squared error in the metric.
    whole : float
        Squared norm of the target in the metric.
    """
    pull = metric.apply(target)
    whole = float(np.vdot(target, pull))
    energy = metric.energy(chain.unroll(contract(chain.network, tensors)) - target)
    for _ in range(sweeps):
        before = energy
        for k in reversed(range(len(tensors))):
            tensors[k], energy = _solve_stage(chain, metric, pull, tensors, k, energy)
        if before - energy <= tolerance * before or energy <= 1e-12 * whole:
            break
    return tensors, energy, whole


def _solve_stage(
    chain: Contraction, metric: Metric, pull: Array, tensors: list[Array], k: int, energy: float
) -> tuple[Array, float]:
    """Fit stage `k` by preconditioned conjugate gradients, with the others fixed."""
    others = [t for i, t in enumerate(tensors) if i != k]
    names = [m for i, m in enumerate(chain.network.stages) if i != k]
    own, kernel = chain.network.stages[k], chain.network.kernel

    def forward(x: Array) -> Array:
        return chain.unroll(chain.contract(("f", k), [*names, own], kernel, [*others, x]))

    def backward(z: Array) -> Array:
        return chain.contract(("b", k), [*names, kernel], own, [*others, chain.roll(z)])

    precondition = _preconditioner(chain, names, others, own, k)
    x = tensors[k]
    residual = backward(pull - metric.apply(forward(x)))
    z = precondition(residual)
    direction, rho = z, float(np.vdot(residual, z))
    first = rho
    if not rho > 0:
        return x, energy
    for _ in range(STEPS):
        step = backward(metric.apply(forward(direction)))
        curvature = float(np.vdot(direction, step))
        if not curvature > 0:
            break
        a = rho / curvature
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
    chain: Contraction, names: list[str], others: list[Array], own: str, k: int
) -> Callable[[Array], Array]:
    """Return the inverse of the normal matrix for white inputs, over the bonds of stage `k`."""
    network = chain.network
    elsewhere = set("".join(names))
    bonds = "".join(m for m in own if m in elsewhere and m not in network.kernel)
    batch = "".join(m for m in own if m in elsewhere and m in network.kernel)
    if not bonds or math.prod(network.shape(bonds)) > BONDS:
        return lambda z: z
    free = iter(
        m for m in map(chr, range(ord("A"), 0x180)) if m.isalpha() and m not in network.sizes
    )
    inner = {m for m in elsewhere if m not in network.kernel}
    twin = {m: next(free) for m in sorted(inner)}
    copies = ["".join(twin.get(m, m) for m in name) for name in names]
    out = batch + bonds + "".join(twin[m] for m in bonds)
    gram = chain.contract(("n", k), [*names, *copies], out, [*others, *others])
    size = math.prod(network.shape(bonds))
    gram = gram.reshape(-1, size, size)
    mean = np.trace(gram, axis1=1, axis2=2)[:, None, None] / size
    if not (mean > 0).all():
        return lambda z: z
    inverse = np.linalg.inv(gram + 1e-7 * mean * np.eye(size, dtype=gram.dtype))
    order = batch + bonds + "".join(m for m in own if m not in batch + bonds)
    to_order, to_own = [own.index(m) for m in order], [order.index(m) for m in own]

    def apply(z: Array) -> Array:
        moved = z.transpose(to_order)
        flat = inverse @ moved.reshape(len(inverse), size, -1)
        return np.asarray(flat.reshape(moved.shape).transpose(to_own))

    return apply
