"""A stage in the engine's words."""

from __future__ import annotations

from typing import Any, NamedTuple

Three = tuple[int, int, int]
ACTIVATIONS = ("none", "relu", "relu6")  # numbered as in lr.h


class StageSpec(NamedTuple):
    """A plain grouped, tied convolution over three spatial axes.

    Attributes
    ----------
    weight : ndarray, shape (groups * out, in, k0, k1, k2)
        C-contiguous, of the plan's type.
    left, groups, right : int
        Channel (l, g, c, r) has the number ((l * groups + g) * in + c) * right + r.
    stride, dilation : (int, int, int)
        An axis each.
    before, after : (int, int, int)
        Samples ahead of and behind the input; negative ones crop it.
    fold : ndarray of int32 or None
        For a stage that is not the first, of stride 1 along the last axis: column of its input
        that stands at each padded one.  Tiles must then have whole rows.
    source : ndarray of int32 or None
        Input channel j of this stage is channel source[j] of what comes before.
    bias : ndarray, shape (left * groups * out * right,), or None
        C-contiguous, of the plan's type; added to what the stage gives.
    activation : str
        What follows: one of `ACTIVATIONS`.
    """

    weight: Any
    left: int
    groups: int
    right: int
    stride: Three
    dilation: Three
    before: Three
    after: Three
    source: Any = None
    fold: Any = None
    bias: Any = None
    activation: str = "none"
