from collections.abc import Sequence
from typing import Any

from lowrank._kernels.spec import StageSpec, Three

ISAS: tuple[str, ...]
MAX_STAGES: int

def default_isa() -> str: ...
def caches() -> tuple[int, int, int]: ...
def max_threads() -> int: ...
def fork_join_seconds(threads: int) -> float: ...
def peak(n: int, dtype: str = "float32", isa: str | None = None) -> int: ...

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
        isa: str | None = None,
    ) -> None: ...
    def __call__(self, x: Any, out: Any, threads: int = 0) -> None: ...
    def profile(self, x: Any, out: Any, threads: int = 0) -> tuple[float, int, bytearray]: ...
