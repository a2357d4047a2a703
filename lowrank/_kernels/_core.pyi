from collections.abc import Sequence
from typing import Any, NamedTuple

from lowrank._kernels.spec import PlaneLimits, StagePath, StageSpec, Three

ISAS: tuple[str, ...]
MIN_UNITS: int
MAX_ARRAYS: int

def default_isa() -> str: ...
def caches() -> tuple[int, int, int]: ...
def max_threads() -> int: ...
def measure_fork_join() -> float: ...
def peak(n: int, dtype: str = "float32", isa: str | None = None) -> int: ...
def plane_limits(dtype: str = "float32", isa: str | None = None) -> PlaneLimits: ...
def stage_paths(
    stages: Sequence[StageSpec],
    shape: Sequence[int],
    tile: Sequence[int] | None = None,
    *,
    dtype: str = "float32",
    border: Sequence[Any] | None = None,
    isa: str | None = None,
) -> tuple[StagePath, ...]: ...
def block_limits(dtype: str = "float32", isa: str | None = None) -> BlockLimits: ...

class BlockLimits(NamedTuple):
    lanes: int
    vectors: int
    pixels: tuple[int, ...]

class KernelPlan:
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    tile: Three
    tiles: int
    tasks: int
    workspace: int
    dtype: str
    isa: str
    def __init__(
        self,
        stages: Sequence[StageSpec],
        shape: Sequence[int],
        *,
        dtype: str,
        border: Sequence[Any] | None = None,
        fill: float = 0.0,
        tile: Sequence[int] | None = None,
        splits: int = 1,
        seconds: float = 1.0,
        fork_join: float = 0.0,
        isa: str | None = None,
    ) -> None: ...
    def __call__(self, x: Any, out: Any, threads: int = 0) -> None: ...
    def profile(self, x: Any, out: Any, threads: int = 0) -> tuple[float, int, bytearray]: ...

class Program:
    shapes: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    outputs: frozenset[int]
    dtype: str
    isa: str
    def __init__(
        self,
        ops: Sequence[Any],
        steps: Sequence[Sequence[int]],
        shapes: Sequence[Sequence[int]],
        outputs: Sequence[int],
        *,
        arena: int,
        group: int = 1,
        seconds: float = 1.0,
        fork_join: float = 0.0,
        dtype: str = "float32",
        isa: str | None = None,
        names: Sequence[str] = (),
    ) -> None: ...
    def __call__(self, arrays: Sequence[Any], threads: int = 0) -> None: ...
    def profile(self, arrays: Sequence[Any], threads: int = 0) -> list[float]: ...

BORDERS: tuple[str, ...]

class Passes:
    dtype: str
    def __init__(self, factors: Sequence[Any], dtype: str, isa: str | None = None) -> None: ...
    def __call__(
        self,
        x: Any,
        out: Any,
        axes: Sequence[int],
        before: Sequence[int],
        border: str | Sequence[str],
        fill: float | Sequence[float] = 0.0,
        threads: int = 1,
        fork_join: float = 0.0,
    ) -> bool: ...
    def takes_integers(self, shape: Sequence[int], axes: Sequence[int]) -> bool: ...

BOX_TYPES: dict[str, tuple[int, int]]

def box(
    x: Any,
    out: Any,
    dtype: str,
    shape: Sequence[int],
    down: tuple[int, int, str, float],
    across: tuple[int, int, str, float],
    *,
    before: float = 1.0,
    after: float = 1.0,
    divisor: float = 1.0,
    multiplier: int = 0,
    shift: int = 0,
    is_single: bool = False,
    threads: int = 0,
    seconds: float = 1.0,
    fork_join: float = 0.0,
    isa: str | None = None,
) -> None: ...
def resample(
    x: Any,
    out: Any,
    dtype: str,
    shape: Sequence[int],
    starts: Sequence[int],
    lists: Sequence[int],
    weights: Any,
    before: int,
    border: str,
    fill: float = 0.0,
    *,
    threads: int = 0,
    seconds: float = 1.0,
    fork_join: float = 0.0,
    isa: str | None = None,
) -> None: ...
def weight_gradient(
    x: Any,
    grad: Any,
    weight: Any,
    bias: Any,
    taps: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    before: Sequence[int],
    *,
    threads: int = 0,
    seconds: float = 1.0,
    fork_join: float = 0.0,
    isa: str | None = None,
) -> None: ...
