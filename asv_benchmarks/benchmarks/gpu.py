"""Cases for the GPU kernels: filters, depthwise layers, blocks, chains.

The peers are cupyx.scipy.ndimage and PyTorch (cuDNN) in both layouts, imported when a row is made.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import lowrank as lr
from lowrank import filters
from lowrank.core.stage import Epilogue
from lowrank.engine import pytorch

from .cases import CHAIN_LAYERS, MOBILENET, chain_shapes, format_shape, random, weight
from .timing import measure_seconds

Call = Callable[[], object]
BATCH = 32


@dataclass
class Work:
    """Our call and the peers' by name; bytes of input, output and weights; operations."""

    ours: Call
    peers: dict[str, Call]
    bytes: float
    flops: float = 0.0


@dataclass
class Case:
    """A row: kind, name, recipe, target speed-up over the best peer, target share of copy rate."""

    kind: str
    name: str
    make: Callable[[], Work]
    target: float | None = None
    copy: float | None = None


def device() -> dict[str, Any]:
    """Return the device's name, versions and copy rate (bytes read and written)."""
    import cupy

    current = cupy.cuda.Device()
    facts = cupy.cuda.runtime.getDeviceProperties(current.id)
    a = cupy.zeros(1 << 28, cupy.float32)  # 1 GiB: larger than every cache
    b = cupy.empty_like(a)
    (seconds,) = measure_gpu_seconds([lambda: cupy.copyto(b, a)], 0.5)
    name = facts["name"]
    return {
        "device": name.decode() if isinstance(name, bytes) else name,
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "cupy": cupy.__version__,
        "copy_gbs": 2 * a.nbytes / seconds * 1e-9,
    }


def measure_gpu_seconds(calls: list[Call], seconds: float) -> list[float]:
    """Return the median seconds per call, in samples that end with an idle device."""
    import cupy

    wait = cupy.cuda.Device().synchronize  # waits for all streams
    # 3 warm-up calls: compile, tune, fill the memory pool
    return measure_seconds(calls, seconds, sample=5e-3, warm_up=3, wait=wait)


def _compiled_call(
    f: lr.Factorization, x: np.ndarray, dtype: str, activation: str = "none"
) -> Call:
    import cupy

    image = cupy.asarray(x).astype(dtype)
    run = f.to("cuda").compile(x.shape[1:], dtype, activation=activation)
    out = run(image)
    return lambda: run(image, out)


def torch_peers(stages: Any, x: np.ndarray, ends: Any, dtype: str, tf32: bool) -> dict[str, Call]:
    """Return the stages as PyTorch layers on the GPU in both layouts, if it is installed."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    torch.backends.cudnn.benchmark = True

    def with_precision(call: Call) -> Call:
        def go() -> object:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
            return call()

        return go

    found = {}
    for name, last in (("torch NCHW", False), ("torch NHWC", True)):
        if last and x.ndim not in (4, 5):
            continue
        call = pytorch.bind_call(stages, ends, x, last, device="cuda", dtype=dtype)
        found[name] = with_precision(call)
    return found


def filter_work(taps: int, rank: int, shape: tuple[int, ...]) -> Work:
    """Return correlation with a sum of separable terms, symmetric borders."""
    import cupy
    from cupyx.scipy import ndimage

    rng = np.random.default_rng(0)
    lines = [[rng.standard_normal(taps).astype(np.float32) for _ in shape] for _ in range(rank)]
    kernel = sum(_outer(line) for line in lines)
    f = filters.separate(kernel, rank=rank)
    x = rng.random((1, 1, *shape), dtype=np.float32)
    image = cupy.asarray(x[0, 0])
    gpu_lines = [[cupy.asarray(v) for v in line] for line in lines]

    def passes() -> object:
        total = None
        for line in gpu_lines:
            y = image
            for axis, v in enumerate(line):
                y = ndimage.correlate1d(y, v, axis, mode="reflect")
            total = y if total is None else total + y
        return total

    peers: dict[str, Call] = {"cupyx correlate1d": passes}
    if taps ** len(shape) <= 1000:
        dense = cupy.asarray(kernel)
        peers["cupyx correlate"] = lambda: ndimage.correlate(image, dense, mode="reflect")
    macs = rank * len(shape) * taps * math.prod(shape)
    return Work(_compiled_call(f, x, "float32"), peers, 8.0 * x.size, 2.0 * macs)


def _outer(line: list[np.ndarray]) -> np.ndarray:
    found = line[0]
    for v in line[1:]:
        found = found[..., None] * v
    return found


def layer_work(
    f: lr.Factorization, n: int, size: tuple[int, ...], dtype: str, tf32: bool,
    activations: tuple[str, ...] = (),
) -> Work:  # fmt: skip
    """Return a chain and the same stages in PyTorch."""
    x = random(n, f.in_channels, *size)
    ends = [Epilogue(None, a) for a in activations or ("none",) * len(f.stages)]
    cost, width = f.cost(size), 8 if dtype == "float64" else 4 if dtype == "float32" else 2
    moved = width * (n * (cost.fused - cost.params) + cost.params)
    return Work(
        _compiled_call(f, x, dtype), torch_peers(f.stages, x, ends, dtype, tf32), moved,
        2.0 * n * cost.macs,
    )  # fmt: skip


def depthwise(c: int, k: int, stride: int) -> lr.Factorization:
    return lr.dense(weight(c, 1, k, k), groups=c, padding=k // 2, stride=stride)


def block(c: int, out: int, stride: int) -> lr.Factorization:
    """Return a depthwise-separable block."""
    g = lr.Geometry.of(2, stride=stride, padding=1)
    first = lr.Stage(weight(c, 1, 3, 3), g, groups=c)
    return lr.chain([first, lr.Stage(weight(out, c, 1, 1), lr.Geometry.of(2))])


def all_blocks(dtype: str, tf32: bool) -> Work:
    works = [
        layer_work(block(c, out, stride), BATCH, (size, size), dtype, tf32)
        for c, out, size, stride, times in MOBILENET
        for _ in range(times)
    ]

    def together(calls: list[Call]) -> Call:
        return lambda: [call() for call in calls]

    return Work(
        together([w.ours for w in works]),
        {name: together([w.peers[name] for w in works]) for name in works[0].peers},
        sum(w.bytes for w in works), sum(w.flops for w in works),
    )  # fmt: skip


#: Precision: dtype, and whether PyTorch may use TF32.
PRECISIONS = {
    "float32": ("float32", False),
    "TF32": ("float32", True),
    "float16": ("float16", False),
}


def cases(quick: bool) -> Iterator[Case]:
    """Yield all rows, or a few of every kind."""
    sizes = ((4096, 4096),) if quick else ((1024, 1024), (2048, 2048), (4096, 4096))
    for shape in sizes:
        for taps in (3, 15) if quick else (3, 5, 9, 15, 31):
            name = f"filter {taps}x{taps} of rank 1, {shape[0]}x{shape[1]}"
            copy = 0.7 if taps <= 5 else None  # longer kernels are compute-bound
            yield Case("filter", name, lambda t=taps, s=shape: filter_work(t, 1, s), 3.0, copy)
        for rank in (2,) if quick else (2, 3):
            name = f"filter 15x15 of rank {rank}, {shape[0]}x{shape[1]}"
            yield Case("filter", name, lambda r=rank, s=shape: filter_work(15, r, s), 3.0)
    for taps in (9,) if quick else (3, 9, 15):
        name = f"filter {taps}x{taps}x{taps} of rank 1, 256^3"
        yield Case("volume", name, lambda t=taps: filter_work(t, 1, (256,) * 3), 3.0)
    for word, (dtype, tf32) in PRECISIONS.items():
        layers_of = [b for b in MOBILENET if word != "TF32"]
        for c, _, size, stride, _ in layers_of[::3] if quick else layers_of:
            name = f"depthwise 3x3 stride {stride}, {c} at {size}x{size}, N={BATCH}, {word}"

            def make(c: int = c, s: int = size, t: int = stride, d: str = dtype) -> Work:
                return layer_work(depthwise(c, 3, t), BATCH, (s, s), d, False)

            yield Case("depthwise", name, make, None, 0.7)
        for c, out, size, stride, _ in MOBILENET[::3] if quick else MOBILENET:
            name = (
                f"depthwise + pointwise {c} -> {out} at {size} stride {stride}, N={BATCH}, {word}"
            )

            def pair(
                c: int = c, o: int = out, s: int = size, t: int = stride, d: str = dtype,
                f: bool = tf32,
            ) -> Work:  # fmt: skip
                return layer_work(block(c, o, t), BATCH, (s, s), d, f)

            yield Case("block", name, pair)
        name = f"all 13 blocks of MobileNetV1, N={BATCH}, {word}"
        target = 1.3 if word == "float32" else None
        yield Case("blocks", name, lambda d=dtype, f=tf32: all_blocks(d, f), target)
    for row in CHAIN_LAYERS:
        c, kernel, size = row["channels"], row["kernel"], row["size"]
        for family, shapes in chain_shapes(row).items():
            for word, (dtype, tf32) in PRECISIONS.items():
                if quick and word != "float32":
                    continue

                def make_chain(
                    row: Any = row, shapes: Any = shapes, d: str = dtype, f: bool = tf32
                ) -> Work:
                    stages, channels = [], row["channels"]
                    for shape in shapes:
                        g = lr.Geometry.of(len(shape) - 2, padding=[k // 2 for k in shape[2:]])
                        stages.append(lr.Stage(weight(*shape), g, channels // shape[1]))
                        channels = shape[0]
                    return layer_work(lr.chain(stages), BATCH, row["size"], d, f)

                where = f"{c} {format_shape(kernel)} at {format_shape(size)}"
                target = 1.3 if word == "float32" else None
                yield Case("chain", f"{family}, {where}, N={BATCH}, {word}", make_chain, target)


def rows(quick: bool, only: str, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure the selected cases."""
    for case in cases(quick):
        if only not in f"{case.kind}: {case.name}":
            continue
        work = case.make()
        ours, *others = measure_gpu_seconds(
            [work.ours, *work.peers.values()], 0.1 if quick else 0.3
        )
        seen = dict(zip(work.peers, others))
        best = min(seen, key=seen.__getitem__) if seen else None
        yield {
            "kind": case.kind,
            "name": case.name,
            "ours_s": ours,
            "peer": best,
            "peer_s": None if best is None else seen[best],
            "speedup": None if best is None else seen[best] / ours,
            "target": case.target,
            "copy_share": work.bytes / ours * 1e-9 / about["copy_gbs"],
            "copy_target": case.copy,
            "gflops": work.flops / ours * 1e-9,
            "peers_s": seen,
        }


def verdicts(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield geometric means by kind and precision with their targets."""

    def group(r: dict[str, Any]) -> tuple[str, str]:
        word = r["name"].rsplit(", ", 1)[-1]
        return r["kind"], word if word in PRECISIONS else "float32"

    for key in dict.fromkeys(map(group, found)):
        these = [r for r in found if group(r) == key]
        for figure, target, word in (
            ("speedup", "target", "best peer"),
            ("copy_share", "copy_target", "copy rate"),
        ):
            of = [r for r in these if r[figure] is not None]
            of = [r for r in of if figure == "speedup" or r[target] is not None]
            if not of:
                continue
            mean = statistics.geometric_mean(r[figure] for r in of)
            wanted = next((r[target] for r in of if r[target] is not None), None)
            goal = "" if wanted is None else f"of {wanted} {'met' if mean >= wanted else 'MISSED'}"
            low = min(of, key=lambda r: r[figure])
            yield (
                f"{key[0]:10} {key[1]:8} {word:10} {mean:6.2f} {goal:14} {len(of):3} rows, least "
                f"{low[figure]:.2f}: {low['name']}"
            )
