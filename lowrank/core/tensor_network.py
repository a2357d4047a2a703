"""Chains as tensor networks: the modes of each weight, and of the kernel, as einsum letters.

The dense kernel of a chain is multilinear in its weights.  With one letter per mode it is an
``einsum`` of them, from which fits derive gradients and the scaling of modes.
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
    """Letters of the modes of all weights, and of the kernel.

    Attributes
    ----------
    stages : tuple of str
        Modes of each weight, in the order of its axes; of the adjoint for a transposed chain.
    rows, columns, space : str, str, tuple of str
        Modes of the kernel's output channels, of its input channels, and of each spatial axis.
        Letters in both `rows` and `columns` are groups.
    sizes : dict of str to int
        Size of each mode.

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
        """Modes of the kernel: groups, other rows, other columns, space."""
        batch = "".join(m for m in self.rows if m in self.columns)
        columns = "".join(m for m in self.columns if m not in batch)
        return batch + "".join(m for m in self.rows if m not in batch) + columns + self.taps

    @property
    def taps(self) -> str:
        """Modes of all spatial axes."""
        return "".join(self.space)

    def shape(self, modes: str) -> Ints:
        """Return the sizes of `modes`."""
        return tuple(self.sizes[m] for m in modes)

    def size(self, modes: str) -> int:
        """Return the number of entries of a tensor with these modes."""
        return math.prod(self.shape(modes))

    def tensors(self, stages: Sequence[Stage]) -> list[Array]:
        """Return the weights of a chain, one axis per mode."""
        plain = as_plain_chain(stages)
        return [s.weight.reshape(self.shape(m)) for s, m in zip(plain, self.stages)]


def tensor_network(stages: Sequence[Stage]) -> TensorNetwork:
    """Find the modes of a chain from the shapes of its stages.

    Parameters
    ----------
    stages : sequence of Stage
        Plain stages, or transposed ones; weights may be abstract.

    Returns
    -------
    TensorNetwork

    Raises
    ------
    ValueError
        If channels or taps of neighbours do not split into common modes, such as overlapping taps
        along an axis.

    Notes
    -----
    Replicas and groups are modes that pass through a stage unchanged.

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
    joints = _channel_modes(chain)
    letters = iter(string.ascii_letters)
    sizes: dict[str, int] = {}

    def new_mode(n: int) -> str:
        letter = next(letters, None)
        if letter is None:
            raise ValueError(f"a chain must have at most {len(string.ascii_letters)} modes")
        sizes[letter] = n
        return letter

    inputs = {c: new_mode(n) for c, n in joints[0].items()}
    first, modes = inputs, []
    taps: list[list[tuple[int, str]]] = [[] for _ in chain[0].kernel]
    stride = [1] * len(chain[0].kernel)
    for stage, output_sizes in zip(chain, joints[1:]):
        shuffled = {_after_shuffle(stage, c): m for c, m in inputs.items()}
        inner, rows, columns, groups = _matrix_parts(stage)
        outputs, row, column, batch = {}, "", "", ""
        for c in sorted(shuffled, reverse=True):
            if inner <= c < inner * columns:
                column += shuffled[c]
            else:
                outputs[_through(c, inner, columns, rows)] = shuffled[c]
                if inner * columns <= c < inner * columns * groups:
                    batch += shuffled[c]
        for c in sorted((c for c in output_sizes if inner <= c < inner * rows), reverse=True):
            outputs[c] = new_mode(output_sizes[c])
            row += outputs[c]
        space = ""
        for axis, (k, d) in enumerate(zip(stage.kernel, stage.geometry.dilation)):
            if k > 1:
                mode = new_mode(k)
                taps[axis].append((d * stride[axis], mode))
                space += mode
        stride = [a * b for a, b in zip(stride, stage.geometry.stride)]
        modes.append(batch + row + column + space)
        inputs = outputs
    columns_of_kernel = "".join(first[c] for c in sorted(first, reverse=True))
    rows_of_kernel = "".join(inputs[c] for c in sorted(inputs, reverse=True))
    axes = tuple(_order_taps(axis, sizes) for axis in taps)
    return TensorNetwork(tuple(modes), rows_of_kernel, columns_of_kernel, axes, sizes)


# Below, a mode of a channel axis is named by its stride: the number of channels between two
# neighbouring values of its index, as in a mixed-radix number.


def _matrix_parts(s: Stage) -> tuple[int, int, int, int]:
    """Return (inner, rows, columns, groups) of the channel matrix."""
    return s.inner, len(s.weight) // s.groups, s.weight.shape[1], s.groups


def _through(c: int, inner: int, before: int, after: int) -> int:
    """Return the stride on the other side of a matrix from `before` to `after` channels."""
    return c if c < inner else c // before * after


def _after_shuffle(s: Stage, c: int) -> int:
    a, b = s.shuffle
    rest = s.matrix_shape[1] // (a * b)
    if c < rest:
        return c
    return c * a if c < rest * b else c // b


def _before_shuffle(s: Stage, c: int) -> int:
    a, b = s.shuffle
    rest = s.matrix_shape[1] // (a * b)
    if c < rest:
        return c
    return c * b if c < rest * a else c // a


def _channel_modes(chain: Sequence[Stage]) -> list[dict[int, int]]:
    """Return the sizes of the modes of each joint, by their strides.

    A stage splits its inputs and outputs where its matrix begins and ends.  Splits pass through
    stages to the joints beyond, until nothing changes.
    """
    joints: list[set[int]] = [{1} for _ in range(len(chain) + 1)]
    totals = [chain[0].matrix_shape[1], *(s.matrix_shape[0] for s in chain)]
    has_changed = True
    while has_changed:
        has_changed = False
        for k, s in enumerate(chain):
            inner, rows, columns, groups = _matrix_parts(s)
            a, b = s.shuffle
            rest = s.matrix_shape[1] // (a * b)
            ins = {inner, inner * columns, inner * columns * groups, rest, rest * a}
            ins |= {_after_shuffle(s, c) for c in joints[k]}
            outs = {inner, inner * rows, inner * rows * groups} | joints[k + 1]
            ins |= {
                _through(c, inner, rows, columns)
                for c in outs
                if c < inner or (c % (inner * rows) == 0)
            }
            outs |= {
                _through(c, inner, columns, rows)
                for c in ins
                if c < inner or (c % (inner * columns) == 0)
            }
            ins = {_before_shuffle(s, c) for c in ins} | {rest, rest * b}
            for joint, strides in ((joints[k], ins), (joints[k + 1], outs)):
                if not strides <= joint:
                    joint |= strides
                    has_changed = True
            if max(map(len, joints)) > 64:
                raise ValueError("the channels of the stages do not split into common modes")
    return [_mode_sizes(j, n) for j, n in zip(joints, totals)]


def _mode_sizes(strides: set[int], total: int) -> dict[int, int]:
    ends = [*sorted(c for c in strides if c < total), total]
    if any(b % a for a, b in pairwise(ends)):
        raise ValueError(
            f"{total} channels do not split into modes at {ends}: each must divide the next"
        )
    return {a: b // a for a, b in pairwise(ends)}


def _order_taps(modes: list[tuple[int, str]], sizes: dict[str, int]) -> str:
    """Order (step, mode) pairs of an axis, the largest step first; raise if taps overlap."""
    modes = sorted(modes)
    for (step, mode), (next_step, _) in pairwise(modes):
        if next_step != step * sizes[mode]:
            raise ValueError("taps of several stages along an axis overlap")
    return "".join(mode for _, mode in reversed(modes))


def contract(n: TensorNetwork, tensors: Sequence[Array]) -> Array:
    """Contract the weights of a chain to its dense kernel, one axis per mode."""
    return np.asarray(
        np.einsum(",".join(n.stages) + "->" + n.kernel, *tensors, optimize=len(tensors) > 1)
    )
