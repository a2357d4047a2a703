"""Cases for the GPU kernels: filters, depthwise layers, blocks and chains, and their peers.

The peers are cupyx.scipy.ndimage and PyTorch (cuDNN) in both layouts, imported when a row is made.
Every case has several sets of arrays, so that runs do not find their input in the L2 cache.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import lowrank as lr
from lowrank import filters
from lowrank.core.stage import Epilogue
from lowrank.engine import pytorch

from .cases import CHAIN_LAYERS, MOBILENET, chain_shapes, format_shape, random, weight

Call = Callable[[], object]
BATCH = 32
MAX_SETS = 24  # of arrays per row
#: Precision: dtype, and whether products may use TF32.
PRECISIONS = {
    "TF32": ("float32", True),
    "float16": ("float16", False),
    "float32": ("float32", False),
}


@dataclass
class Work:
    """Calls of lowrank and of the peers by name, one per set of arrays; bytes and operations."""

    ours: list[Call]
    peers: dict[str, list[Call]]
    bytes: float
    flops: float = 0.0


@dataclass
class Case:
    """A row: name, recipe, target speed-up over the best peer, target share of the copy rate."""

    name: str
    make: Callable[[], Work]
    target: float | None = None
    copy: float | None = None


@dataclass
class Scale:
    """Size of the rows: all of it, or little for a dry run; and the bytes of the L2 cache."""

    largest: int
    cache: int

    def size(self, n: int) -> int:
        """Return a side of an image, a batch or a number of channels, limited."""
        return min(n, self.largest)

    def sets(self, moved: float) -> int:
        """Return the number of sets of arrays that exceed twice the cache in sum."""
        return max(1, min(MAX_SETS, math.ceil(2 * self.cache / moved)))


def _compiled_calls(f: lr.Factorization, x: np.ndarray, dtype: str, sets: int) -> list[Call]:
    """Return calls on arrays in the layout in which the steps run: the peers have both, too."""
    import cupy

    run = f.to("cuda").compile(x.shape[1:], dtype)
    found: list[Call] = []
    for _ in range(sets):
        image = cupy.asarray(x).astype(dtype)
        out = run(image)
        if run.steps[0].name == "channels last":
            image = _channels_last(image)
        if run.steps[-1].name == "channels first":
            out = _channels_last(out)
        found.append(lambda image=image, out=out: run(image, out))
    return found


def _channels_last(a: Any) -> Any:
    """Return an array of the same shape whose memory is channels-last."""
    import cupy

    return cupy.moveaxis(cupy.ascontiguousarray(cupy.moveaxis(a, 1, -1)), -1, 1)


def torch_calls(
    stages: Any, x: np.ndarray, dtype: str, tf32: bool, sets: int
) -> dict[str, list[Call]]:
    """Return the stages as PyTorch layers on the GPU in both layouts, if it is installed."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    ends = [Epilogue()] * len(stages)
    return {
        f"torch {'NHWC' if last else 'NCHW'}": [
            pytorch.bind_call(stages, ends, x, last, device="cuda", dtype=dtype)
            for _ in range(sets)
        ]
        for last in (False, True)
    }


def filter_work(taps: int, rank: int, shape: tuple[int, ...], dtype: str, scale: Scale) -> Work:
    """Return correlation with a sum of separable terms, symmetric borders."""
    import cupy

    shape = tuple(map(scale.size, shape))
    rng = np.random.default_rng(0)
    lines = [[rng.random(taps, np.float32) / taps for _ in shape] for _ in range(rank)]
    kernel = sum(_outer(line) for line in lines)
    x = rng.integers(0, 256, (1, 1, *shape)).astype(dtype)
    moved = 2.0 * x.nbytes
    sets = scale.sets(moved)
    run = filters.separate(kernel, rank=rank).astype(np.float32).to("cuda").compile(shape)
    peers: dict[str, list[Call]] = {"cupyx correlate1d": []}
    ours: list[Call] = []
    gpu_lines = [[cupy.asarray(v) for v in line] for line in lines]
    try:
        from cupyx.scipy import ndimage
    except ImportError:
        ndimage = None

    def passes(image: Any) -> object:
        total = None
        for line in gpu_lines:
            y = image
            for axis, v in enumerate(line):
                y = ndimage.correlate1d(y, v, axis, mode="reflect")
            total = y if total is None else total + y
        return total

    for _ in range(sets):
        image, out = cupy.asarray(x), cupy.empty(x.shape, dtype)
        ours.append(lambda image=image, out=out: run(image, out))
        peers["cupyx correlate1d"].append(lambda image=image[0, 0]: passes(image))
    macs = rank * len(shape) * taps * math.prod(shape)
    return Work(ours, peers if ndimage else {}, moved, 2.0 * macs)


def _outer(line: list[np.ndarray]) -> np.ndarray:
    found = line[0]
    for v in line[1:]:
        found = found[..., None] * v
    return found


def layer_work(f: lr.Factorization, size: tuple[int, ...], precision: str, scale: Scale) -> Work:
    """Return a chain and the same stages in PyTorch."""
    dtype, tf32 = PRECISIONS[precision]
    batch, size = scale.size(BATCH), tuple(map(scale.size, size))
    x = random(batch, f.in_channels, *size)
    cost, width = f.cost(size), np.dtype(dtype).itemsize
    moved = width * (batch * (cost.fused - cost.params) + cost.params)
    sets = scale.sets(moved)
    os.environ["CUPY_TF32"] = str(int(tf32))  # read when the plan is made
    ours = _compiled_calls(f, x, dtype, sets)
    peers = torch_calls(f.stages, x, dtype, tf32, sets)
    return Work(ours, peers, moved, 2.0 * batch * cost.macs)


def depthwise(c: int, k: int, stride: int) -> lr.Factorization:
    return lr.dense(weight(c, 1, k, k), groups=c, padding=k // 2, stride=stride)


def block(c: int, out: int, stride: int) -> lr.Factorization:
    """Return a depthwise-separable block."""
    g = lr.Geometry.of(2, stride=stride, padding=1)
    first = lr.Stage(weight(c, 1, 3, 3), g, groups=c)
    return lr.chain([first, lr.Stage(weight(out, c, 1, 1), lr.Geometry.of(2))])


def family_chain(channels: int, shapes: list[tuple[int, ...]]) -> lr.Factorization:
    """Return a chain of stages with weights of these shapes."""
    stages = []
    for shape in shapes:
        g = lr.Geometry.of(len(shape) - 2, padding=[k // 2 for k in shape[2:]])
        stages.append(lr.Stage(weight(*shape), g, channels // shape[1]))
        channels = shape[0]
    return lr.chain(stages)


def _filters(scale: Scale) -> Iterator[Case]:
    for dtype, (taps, rank) in itertools.product(
        ("float32", "uint8"), ((5, 1), (15, 1), (3, 1), (9, 1), (31, 1), (15, 2), (15, 3))
    ):
        copy = 0.7 if taps <= 5 and rank == 1 else None  # longer ones are bound by instructions
        name = f"filter: {taps}x{taps} of rank {rank}, 4096x4096, {dtype}"
        make = _make(filter_work, taps, rank, (4096, 4096), dtype, scale)
        yield Case(name, make, 3.0, copy)
    for taps in (9, 3, 15):
        make = _make(filter_work, taps, 1, (256,) * 3, "float32", scale)
        yield Case(f"volume: {taps}x{taps}x{taps} of rank 1, 256^3, float32", make, 3.0)


def _blocks(scale: Scale) -> Iterator[Case]:
    for (c, out, size, stride, _), (word, _) in itertools.product(
        (MOBILENET[i] for i in (2, 0, 4, 6, 1, 3, 5, 7, 8)), PRECISIONS.items()
    ):
        name = f"block: {c} -> {out} at {size}x{size}, stride {stride}, N={BATCH}, {word}"
        make = _make(layer_work, block(c, out, stride), (size, size), word, scale)
        yield Case(name, make, None if word == "float32" else 1.3)  # strict: reported only


def _depthwise(scale: Scale) -> Iterator[Case]:
    for (c, _, size, stride, _), word in itertools.product(
        (MOBILENET[i] for i in (2, 0, 4, 1)), ("float32", "float16")
    ):
        name = f"depthwise: 3x3, stride {stride}, {c} at {size}x{size}, N={BATCH}, {word}"
        make = _make(layer_work, depthwise(c, 3, stride), (size, size), word, scale)
        yield Case(name, make, None, 0.7)


def _chains(scale: Scale) -> Iterator[Case]:
    for row in CHAIN_LAYERS:
        for (family, shapes), word in itertools.product(chain_shapes(row).items(), PRECISIONS):
            where = (
                f"{row['channels']} {format_shape(row['kernel'])} at {format_shape(row['size'])}"
            )
            f = family_chain(row["channels"], shapes)
            make = _make(layer_work, f, row["size"], word, scale)
            yield Case(f"chain: {family}, {where}, N={BATCH}, {word}", make, 1.3)


def _make(work: Callable[..., Work], *arguments: Any) -> Callable[[], Work]:
    return lambda: work(*arguments)


def cases(scale: Scale) -> list[Case]:
    """Return all rows, in order of importance: the kinds take turns."""
    kinds = (_filters(scale), _blocks(scale), _depthwise(scale), _chains(scale))
    turns = itertools.zip_longest(*kinds)
    return [case for turn in turns for case in turn if case is not None]
