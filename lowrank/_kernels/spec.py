"""Stages as the C engine takes them, and what it reports about them."""

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


class PlaneLimits(NamedTuple):
    """Limits and block sizes of the kernels on planes, of one instruction set and type.

    Attributes
    ----------
    lanes : int
        Elements of a vector.
    block_rows : int
        Output channels that one micro-kernel call computes, at most.
    overread : int
        Elements that a run may read past the end of a buffer.
    max_remainder : int
        Samples at the end of a run, at most, that get no vector.
    packed_channels : int
        Channels that a depthwise stage packs at a time, at most.
    max_stages : int
        Stages of a chain, at most.
    """

    lanes: int
    block_rows: int
    overread: int
    max_remainder: int
    packed_channels: int
    max_stages: int


class StagePath(NamedTuple):
    """How the C engine runs a stage on planes; lr.h describes the paths.

    Attributes
    ----------
    input : str
        Where it reads its input: "buffer" (of the previous stage), "in place", "packed", "packed by
        channels" or "transposed" (and computed channels-last).
    kernel : str
        Kernel of a block of output channels: "depthwise rows", "depthwise planes", "dense flat",
        "dense rows" or "dense scatter".
    keeps_rows : bool
        Whether a first stage reads tiles inside the image in place, if x is contiguous.
    """

    input: str
    kernel: str
    keeps_rows: bool
