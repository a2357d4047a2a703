"""A stage bound to the shape of its input, with the tables and arrays that its kernels read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cupy
import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine import array_api
from lowrank.engine.cuda.steps import Sizes, three

#: An action of a plan: (input, output, scratch memory).
Run = Callable[[Any, Any, Any], None]
ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}  # as in kernels.cu


class BoundStage(NamedTuple):
    """A stage, its epilogue and its shapes, (channels, \\*spatial)."""

    stage: Stage
    epilogue: Epilogue
    in_shape: Ints
    out_shape: Ints
    border: Array | None  # border value per input channel; None for zeros

    @property
    def sizes(self) -> tuple[Sizes, Sizes]:
        """Spatial sizes of input and output, on three axes."""
        return three(self.in_shape[1:]), three(self.out_shape[1:])

    @property
    def weight(self) -> Any:
        """Weights on the GPU, (groups, out, in, taps)."""
        return array_api.weight_matrices(self.stage)

    def padded_tables(self) -> list[Any]:
        """Return :func:`array_api.padded_indices` of each of three axes."""
        tables = [np.zeros(1, np.int32)] * (3 - self.stage.geometry.ndim)
        for axis, size in enumerate(self.in_shape[1:]):
            tables.append(array_api.padded_indices(self.stage, axis, size))
        return [cupy.asarray(np.ascontiguousarray(t)) for t in tables]

    def tap_tables(self) -> list[Any]:
        """Return :func:`array_api.tap_indices` of each of three axes."""
        tables = [np.zeros((1, 1), np.int32)] * (3 - self.stage.geometry.ndim)
        for axis, (size, out) in enumerate(zip(self.in_shape[1:], self.out_shape[1:])):
            tables.append(array_api.tap_indices(self.stage, axis, size, out))
        return [cupy.asarray(np.ascontiguousarray(t)) for t in tables]

    def bias_and_activation(self, sum_dtype: Any) -> tuple[Any, int]:
        """Return the bias in the type of the sums, or None, and the activation's number."""
        bias = self.epilogue.bias
        return (
            None if bias is None else cupy.asarray(bias).astype(sum_dtype),
            ACTIVATIONS[self.epilogue.activation],
        )

    def permutation_and_border(self, sum_dtype: Any) -> tuple[Any, Any]:
        """Return the input channel of each channel of the stage, and border values; or None."""
        is_identity = self.stage.transposed or self.stage.shuffle == (1, 1)
        permutation = None
        if not is_identity:
            permutation = cupy.asarray(self.stage.channel_permutation().astype(np.int32))
        border = None if self.border is None else cupy.asarray(self.border.astype(sum_dtype))
        return permutation, border
