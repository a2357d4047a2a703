"""A chain as a tensor network: which modes of the kernel each stage's weight holds.

The dense kernel of a chain is linear in every one of its weights.  Written with one letter a mode,
it is an ``einsum`` of them, from which fits take gradients and by which they scale modes.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core.chain_algebra import as_plain_chain
from lowrank.core.stage import Stage


class TensorNetwork(NamedTuple):
    """Letters of every weight's modes, and of the kernel's.

    Attributes
    ----------
    stages : tuple of str
        Modes of each weight in the order of its axes, of the plain chain: a transposed one is
        read backwards.
    rows, columns, space : str, str, tuple of str
        Modes of the kernel: of its output channels, of its input channels, of each spatial axis.
        Letters that are in both of the first two are groups.
    sizes : dict of str to int
        By letter.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.core.tensor_network import tensor_network
    >>> f = lowrank.spatial_svd(lowrank.dense(np.ones((8, 4, 3, 3))), rank=2)
    >>> n = tensor_network(f.stages)
    >>> n.stages, n.rows, n.columns, n.space
    (('bac', 'dbe'), 'd', 'a', ('c', 'e'))
    """

    stages: tuple[str, ...]
    rows: str
    columns: str
    space: tuple[str, ...]
    sizes: dict[str, int]

    @property
    def kernel(self) -> str:
        """All modes of the kernel: groups, other rows, other columns, space."""
        batch = "".join(m for m in self.rows if m in self.columns)
        columns = "".join(m for m in self.columns if m not in batch)
        return batch + "".join(m for m in self.rows if m not in batch) + columns + self.taps

    @property
    def taps(self) -> str:
        """Modes of all spatial axes."""
        return "".join(self.space)

    def shape(self, modes: str) -> Ints:
        """Sizes of these modes."""
        return tuple(self.sizes[m] for m in modes)

    def size(self, modes: str) -> int:
        """Number of entries of a tensor with these modes."""
        return math.prod(self.shape(modes))

    def tensors(self, stages: Sequence[Stage]) -> list[Array]:
        """Weights of the chain, an axis a mode."""
        return [s.weight.reshape(self.shape(m)) for s, m in zip(as_plain_chain(stages), self.stages)]


def tensor_network(stages: Sequence[Stage]) -> TensorNetwork:
    """Modes of a chain's weights, found from the shapes of its stages alone.

    Parameters
    ----------
    stages : sequence of Stage
        Plain, or all transposed; blank ones do.

    Returns
    -------
    TensorNetwork

    Raises
    ------
    ValueError
        If channels or taps of neighbours do not split into common modes, as where two stages
        overlap along an axis.

    Notes
    -----
    Tied copies, groups and everything that a stage leaves alone are modes that go through it;
    every joint of the chain is cut wherever any stage needs it to be.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import Geometry, Stage
    >>> from lowrank.core.tensor_network import tensor_network
    >>> shared = Stage(np.ones((2, 1, 3)), Geometry.of(1), outer=4)
    >>> tensor_network([shared, Stage(np.ones((5, 8, 1)), Geometry.of(1))]).stages
    ('bc', 'dab')
    """
    chain = as_plain_chain(stages)
    cuts = _cuts(chain)
    letters = iter(string.ascii_letters)
    sizes: dict[str, int] = {}

    def fresh(n: int) -> str:
        letter = next(letters, None)
        if letter is None:
            raise ValueError("the chain has more modes than there are letters")
        sizes[letter] = n
        return letter

    joint = {c: fresh(n) for c, n in cuts[0].items()}
    first, modes = joint, []
    last_of_axes: list[list[tuple[int, str]]] = [[] for _ in chain[0].kernel]
    stride = [1] * len(chain[0].kernel)
    for stage, given in zip(chain, cuts[1:]):
        shuffled = {_shuffled(stage, c): m for c, m in joint.items()}
        right, rows, columns, groups = _parts(stage)
        after, row, column, batch = {}, "", "", ""
        for c in sorted(shuffled, reverse=True):
            if right <= c < right * columns:
                column += shuffled[c]
            else:
                moved = _moved(c, right, columns, rows)
                after[moved] = shuffled[c]
                if right * columns <= c < right * columns * groups:
                    batch += shuffled[c]
        for c in sorted((c for c in given if right <= c < right * rows), reverse=True):
            after[c] = fresh(given[c])
            row += after[c]
        space = ""
        for axis, (k, d) in enumerate(zip(stage.kernel, stage.geometry.dilation)):
            if k > 1:
                mode = fresh(k)
                last_of_axes[axis].append((d * stride[axis], mode))
                space += mode
        stride = [a * b for a, b in zip(stride, stage.geometry.stride)]
        modes.append(batch + row + column + space)
        joint = after
    order = "".join(first[c] for c in sorted(first, reverse=True))
    last = "".join(joint[c] for c in sorted(joint, reverse=True))
    axes = tuple(_nested(found, sizes) for found in last_of_axes)
    return TensorNetwork(tuple(modes), last, order, axes, sizes)


def _parts(s: Stage) -> tuple[int, int, int, int]:
    """(right, rows, columns, groups) of a stage's channel matrix."""
    return s.inner, len(s.weight) // s.groups, s.weight.shape[1], s.groups


def _moved(c: int, right: int, before: int, after: int) -> int:
    """Where a mode that goes through a stage begins on the other side: samples inside of it."""
    return c if c < right else c // before * after


def _shuffled(s: Stage, c: int) -> int:
    """Where the mode that begins at `c` begins after the stage's shuffle."""
    a, b = s.shuffle
    rest = s.matrix_shape[1] // (a * b)
    if c < rest:
        return c
    return c * a if c < rest * b else c // b


def _unshuffled(s: Stage, c: int) -> int:
    a, b = s.shuffle
    rest = s.matrix_shape[1] // (a * b)
    if c < rest:
        return c
    return c * b if c < rest * a else c // a


def _cuts(chain: Sequence[Stage]) -> list[dict[int, int]]:
    """For each joint of a chain: where its modes begin, in entries, and their sizes."""
    joints: list[set[int]] = [{1} for _ in range(len(chain) + 1)]
    totals = [chain[0].matrix_shape[1], *(s.matrix_shape[0] for s in chain)]
    changed = True
    while changed:
        changed = False
        for k, s in enumerate(chain):
            right, rows, columns, groups = _parts(s)
            a, b = s.shuffle
            rest = s.matrix_shape[1] // (a * b)
            seen = {right, right * columns, right * columns * groups, rest, rest * a}
            seen |= {_shuffled(s, c) for c in joints[k]}
            given = {right, right * rows, right * rows * groups} | joints[k + 1]
            seen |= {
                _moved(c, right, rows, columns)
                for c in given
                if c < right or (c % (right * rows) == 0)
            }
            given |= {
                _moved(c, right, columns, rows)
                for c in seen
                if c < right or (c % (right * columns) == 0)
            }
            before = {_unshuffled(s, c) for c in seen} | {rest, rest * b}
            for joint, found in ((joints[k], before), (joints[k + 1], given)):
                if not found <= joint:
                    joint |= found
                    changed = True
            if max(map(len, joints)) > 64:
                raise ValueError("the channels of the stages do not split into common modes")
    return [_sizes(j, n) for j, n in zip(joints, totals)]


def _sizes(joint: set[int], total: int) -> dict[int, int]:
    begins = [*sorted(c for c in joint if c < total), total]
    if any(b % a for a, b in pairwise(begins)):
        raise ValueError(
            f"channels split at {begins} of {total}, which are no modes: each must divide the next"
        )
    return {a: b // a for a, b in pairwise(begins)}


def _nested(found: list[tuple[int, str]], sizes: dict[str, int]) -> str:
    """Modes of one axis from the outermost in, if the taps of its stages do not overlap."""
    found = sorted(found)
    for (step, mode), (outer, _) in pairwise(found):
        if outer != step * sizes[mode]:
            raise ValueError("taps of several stages along an axis overlap")
    return "".join(mode for _, mode in reversed(found))


def contract(n: TensorNetwork, tensors: Sequence[Array]) -> Array:
    """The dense kernel, an axis a mode: what the network's weights make together."""
    return np.asarray(
        np.einsum(",".join(n.stages) + "->" + n.kernel, *tensors, optimize=len(tensors) > 1)
    )
