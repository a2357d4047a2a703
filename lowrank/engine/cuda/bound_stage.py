"""A stage bound to the shape of its input, with the tables and arrays that its kernels read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cupy
import numpy as np

from lowrank._typing import Ints
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

    @property
    def sizes(self) -> tuple[Sizes, Sizes]:
        """Spatial sizes of input and output, on three axes."""
        return three(self.in_shape[1:]), three(self.out_shape[1:])

    @property
    def before(self) -> Sizes:
        """Border samples before each of three axes."""
        return three((before for before, _ in self.stage.geometry.padding), 0)

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

    @property
    def activation(self) -> int:
        """Number of the activation, as in kernels.cu."""
        return ACTIVATIONS[self.epilogue.activation]

    def bias(self, sum_dtype: Any) -> Any:
        """Return the bias per output channel in the type of the sums; zeros if there is none."""
        bias = self.epilogue.bias
        if bias is None:
            return cupy.zeros(self.out_shape[0], sum_dtype)
        return cupy.asarray(bias).astype(sum_dtype)
