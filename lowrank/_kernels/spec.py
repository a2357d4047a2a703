"""A stage as the C engine takes it."""

from __future__ import annotations

from typing import Any, NamedTuple

Three = tuple[int, int, int]
# Numbered as in lr.h; chains of the planes engine have the first three.
ACTIVATIONS = (
    "none", "relu", "relu6", "leaky_relu", "hard_swish", "hard_sigmoid", "sigmoid", "silu", "tanh",
    "gelu", "elu", "clip",
)  # fmt: skip
# Kinds of operations, and modes of "combine", numbered as in program.h.
KINDS = (
    "pack", "unpack", "dense", "winograd", "few outputs", "depthwise", "max pool", "mean pool",
    "normalize", "softmax", "combine",
)  # fmt: skip
MODES = ("copy", "add", "multiply", "reorder")


class StageSpec(NamedTuple):
    """A grouped, replicated convolution, never transposed, over three spatial axes.

    Attributes
    ----------
    weight : ndarray, shape (groups * out, in, k0, k1, k2)
        Weights: C-contiguous, of the plan's type.
    outer, groups, inner : int
        Replications and groups: channel (l, g, c, r) has the number
        ((l * groups + g) * in + c) * inner + r.
    stride, dilation : (int, int, int)
        Stride and dilation along each axis.
    before, after : (int, int, int)
        Zeros ahead of and behind the input; negative ones crop it.
    permutation : ndarray of int32 or None
        Channel of the stage's input at each channel that its weights read.
    padded_columns : ndarray of int32 or None
        Column of the input at each column of the padded input, in place of zeros.  Not for the
        first stage; needs stride 1 along the last axis and tiles of whole rows.
    bias : ndarray, shape (outer * groups * out * inner,), or None
        Bias: C-contiguous, of the plan's type.
    activation : str
        Activation after the bias: one of `ACTIVATIONS`.
    """

    weight: Any
    outer: int
    groups: int
    inner: int
    stride: Three
    dilation: Three
    before: Three
    after: Three
    permutation: Any = None
    padded_columns: Any = None
    bias: Any = None
    activation: str = "none"

    @property
    def kernel(self) -> Three:
        """Taps along each axis."""
        d, h, w = self.weight.shape[2:]
        return d, h, w
