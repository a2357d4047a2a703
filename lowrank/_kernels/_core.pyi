from collections.abc import Sequence
from typing import Any

from lowrank._kernels.spec import StageSpec, Three

ISAS: tuple[str, ...]
MAX_STAGES: int

def default_isa() -> str: ...
def caches() -> tuple[int, int, int]: ...
def max_threads() -> int: ...
def wake(threads: int) -> float: ...
def peak(n: int, dtype: str = "float32", isa: str | None = None) -> int: ...

class Plan:
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    tile: Three
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
        parts: int = 1,
        seconds: float = 1.0,
        isa: str | None = None,
    ) -> None: ...
    @property
    def tiles(self) -> int: ...
    @property
    def jobs(self) -> int: ...
    @property
    def workspace(self) -> int: ...
    def __call__(self, x: Any, out: Any, threads: int = 0) -> None: ...
    def breakdown(
        self, x: Any, out: Any, threads: int = 0
    ) -> tuple[float, int, list[tuple[int, str, float, int, int]]]: ...
