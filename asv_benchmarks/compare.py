"""Every kind of work that the engine does, beside the libraries that people use for it today.

    python -m asv_benchmarks.compare [--quick] [--only WORD] [--threads N] [--json]

Contestants of a row run in turns in one process, each on N threads (2 if not given; SciPy has one);
times are medians.  A peer that is not installed is left out.  PyTorch runs in both layouts, and
the faster one counts, unless the row says which.  The roofline is what arithmetic at the measured
peak, or the bytes of input, weights and output at the measured copy rate, would take.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # teams that spin take each other's cores

import numpy as np

import lowrank as lr
from lowrank import filters
from lowrank._kernels import _core

try:
    import torch
except ImportError:
    torch = None
try:
    import cv2
except ImportError:
    cv2 = None
import scipy.ndimage as ndi
import scipy.signal

rng = np.random.default_rng(0)
Call = Callable[[], object]


@dataclass
class Case:
    """One row: our call, the peers' calls by name, what is to be reached, and its size."""

    name: str
    ours: Call
    peers: dict[str, Call]
    target: float
    flops: float
    bytes: float
    dense: dict[str, Call] = field(default_factory=dict)  # PyTorch's dense layer, for `realised`
    fewer: float = 0.0  # times fewer multiply-adds than the dense layer


def torch_layouts(run: Callable[..., Any], x: np.ndarray, *weights: Any) -> dict[str, Call]:
    """PyTorch on x in both layouts, under the names of the layouts."""
    if torch is None:
        return {}

    def call(format_: Any) -> Call:
        def of(a: np.ndarray) -> Any:
            t = torch.tensor(a)
            return t.contiguous(memory_format=format_) if t.ndim == 4 else t

        given, kept = of(x), [of(w) for w in weights]

        def go() -> object:
            with torch.inference_mode():
                return run(given, *kept)

        return go

    found = {"torch NCHW": call(torch.contiguous_format)}
    if x.ndim == 4:
        found["torch NHWC"] = call(torch.channels_last)
    return found


def layer(f: lr.Factorization, x: np.ndarray, threads: int) -> tuple[Call, float, float]:
    """Our call of a chain, its operations and its bytes."""
    run = f.compile(x.shape[1:], np.float32, threads=threads)
    out = run(x)
    cost = f.cost(x.shape[1:])
    n = len(x)
    size = 4 * (n * (cost.fused - cost.params) + cost.params)
    return lambda: run(x, out), 2.0 * n * cost.macs, size


def conv(t: Any, w: Any, s: lr.Stage) -> Any:
    """A stage as a layer of PyTorch."""
    g = s.geometry
    pads = [a for a, _ in g.padding]
    run = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)
    return run[g.ndim - 1](t, w, None, list(g.stride), pads, list(g.dilation), s.groups)


def random_conv(out: int, channels: int, size: int, kernel: int = 3) -> lr.Factorization:
    w = rng.standard_normal((out, channels, kernel, kernel)).astype("f4")
    return lr.dense(w / math.sqrt(w[0].size), padding=kernel // 2)


def dense_rows(threads: int, quick: bool) -> Iterator[Case]:
    shapes = [(64, 56), (128, 28), (256, 14), (512, 7)]
    for n in (1,) if quick else (1, 8):
        for c, size in shapes:
            f = random_conv(c, c, size)
            x = rng.standard_normal((n, c, size, size)).astype("f4")
            ours, flops, moved = layer(f, x, threads)
            s = f.stages[0]
            peers = torch_layouts(lambda t, w, s=s: conv(t, w, s), x, s.weight)
            yield Case(f"dense 3x3 {c} at {size}, N={n}", ours, peers, 0.9, flops, moved)


def depthwise_rows(threads: int, quick: bool) -> Iterator[Case]:
    shapes = [(32, 112, 1), (64, 112, 2), (128, 56, 1), (256, 28, 1), (512, 14, 1), (1024, 7, 1)]
    for k in (3, 5):
        for c, size, stride in shapes if not quick else shapes[::2]:
            w = rng.standard_normal((c, 1, k, k)).astype("f4")
            f = lr.dense(w, padding=k // 2, stride=stride, groups=c)
            x = rng.standard_normal((1, c, size, size)).astype("f4")
            ours, flops, moved = layer(f, x, threads)
            s = f.stages[0]
            peers = torch_layouts(lambda t, w, s=s: conv(t, w, s), x, w)
            name = f"depthwise {k}x{k} stride {stride}, {c} at {size}"
            yield Case(name, ours, peers, 1.0, flops, moved)
    for c, length in [(64, 4096), (256, 1024)]:
        w = rng.standard_normal((c, 1, 9)).astype("f4")
        f = lr.dense(w, padding=4, groups=c)
        x = rng.standard_normal((1, c, length)).astype("f4")
        ours, flops, moved = layer(f, x, threads)
        s = f.stages[0]
        peers = torch_layouts(lambda t, w, s=s: conv(t, w, s), x, w)
        yield Case(f"depthwise 9 taps, {c} series of {length}", ours, peers, 2.0, flops, moved)


#: MobileNetV1's blocks: input channels, output channels, input size, stride.
MOBILENET = [
    (32, 64, 112, 1), (64, 128, 112, 2), (128, 128, 56, 1), (128, 256, 56, 2), (256, 256, 28, 1),
    (256, 512, 28, 2), (512, 512, 14, 1), (512, 1024, 14, 2), (1024, 1024, 7, 1),
]  # fmt: skip


def separable_rows(threads: int, quick: bool) -> Iterator[Case]:
    for n in (1,) if quick else (1, 8):
        for c, out, size, stride in MOBILENET[::2] if quick else MOBILENET:
            d = rng.standard_normal((c, 1, 3, 3)).astype("f4")
            p = rng.standard_normal((out, c, 1, 1)).astype("f4")
            f = lr.blocks.separable(d, p, stride=stride)
            x = rng.standard_normal((n, c, size, size)).astype("f4")
            ours, flops, moved = layer(f, x, threads)
            a, b = f.stages

            def both(t: Any, w: Any, v: Any, a: lr.Stage = a, b: lr.Stage = b) -> Any:
                return conv(conv(t, w, a), v, b)

            name = f"depthwise + pointwise {c} -> {out} at {size} stride {stride}, N={n}"
            yield Case(name, ours, torch_layouts(both, x, d, p), 1.15, flops, moved)


def chain_rows(threads: int, quick: bool) -> Iterator[Case]:
    for n in (1,) if quick else (1, 8):
        for c, size in [(64, 56), (128, 28), (256, 14), (512, 7)]:
            whole = random_conv(c, c, size)
            x = rng.standard_normal((n, c, size, size)).astype("f4")
            q, h = c // 4, c // 2
            chains = {
                f"tucker {q},{q}": [(q, c, 1, 1), (q, q, 3, 3), (c, q, 1, 1)],
                f"cp {c}": [(c, c, 1, 1), (c, 1, 3, 1), (c, 1, 1, 3), (c, c, 1, 1)],
                f"cp3 {c}": [(c, c, 1, 1), (c, 1, 3, 3), (c, c, 1, 1)],
                f"spatial {h}": [(h, c, 3, 1), (c, h, 1, 3)],
                f"encode {h}": [(h, c, 3, 3), (c, h, 1, 1)],
                "decouple dw-pw 1": [(c, 1, 3, 3), (c, c, 1, 1)],
                "decouple dw-pw 3": [(3 * c, 1, 3, 3), (c, 3 * c, 1, 1)],
                "decouple pw-dw 1": [(c, c, 1, 1), (c, 1, 3, 3)],
                f"tensor train {q},{h},{q}": [
                    (q, c, 1, 1), (h, q, 3, 1), (q, h, 1, 3), (c, q, 1, 1),
                ],
            }  # fmt: skip
            s = whole.stages[0]
            dense = torch_layouts(lambda t, w, s=s: conv(t, w, s), x, s.weight)
            for name, shapes in chains.items():
                stages = []
                channels = c
                for shape in shapes:
                    w = (rng.standard_normal(shape) / math.sqrt(np.prod(shape[1:]))).astype("f4")
                    pads = [(k - 1) // 2 for k in shape[2:]]
                    stages.append(
                        lr.Stage(w, lr.Geometry.of(2, padding=pads), channels // shape[1])
                    )
                    channels = shape[0]
                f = lr.chain(stages)
                ours, flops, moved = layer(f, x, threads)

                def go(t: Any, *ws: Any, stages: tuple[lr.Stage, ...] = f.stages) -> Any:
                    for w, stage in zip(ws, stages):
                        t = conv(t, w, stage)
                    return t

                peers = torch_layouts(go, x, *(s.weight for s in stages))
                fewer = whole.cost((size, size)).macs / f.cost((size, size)).macs
                row = f"{name}, {c} at {size}, N={n}"
                yield Case(row, ours, peers, 1.5, flops, moved, dense, fewer)


def filter_rows(threads: int, quick: bool) -> Iterator[Case]:
    def planned(f: lr.Factorization, image: np.ndarray) -> Call:
        x = image[None, None]
        run = f.compile(image.shape, np.float32, threads=threads)
        out = run(x)
        return lambda: run(x, out)

    def cv(kind: str, image: np.ndarray, *kernels: np.ndarray) -> dict[str, Call]:
        if cv2 is None:
            return {}
        out = np.empty_like(image)
        border = cv2.BORDER_REFLECT
        if kind == "sep":
            a, b = kernels
            return {
                "cv2.sepFilter2D": lambda: cv2.sepFilter2D(image, -1, b, a, out, borderType=border)
            }
        return {"cv2.filter2D": lambda: cv2.filter2D(image, -1, kernels[0], out, borderType=border)}

    for taps in (3, 9, 31) if quick else (3, 5, 9, 15, 31):
        for size in (512, 2048) if quick else (512, 1024, 2048, 4096):
            line = np.hanning(taps + 2)[1:-1].astype("f4")
            image = rng.random((size, size), dtype=np.float32)
            kernel = np.outer(line, line)
            ours = planned(filters.separate(kernel, rank=1), image)
            flops, moved = 4.0 * taps * size**2, 8.0 * size**2
            name = f"filter {taps}x{taps} of rank 1, {size}x{size}"
            yield Case(name, ours, cv("sep", image, line, line), 3.5, flops, moved)
    for rank, taps in ((2, 15), (3, 15)):
        for size in (1024,) if quick else (512, 2048):
            image = rng.random((size, size), dtype=np.float32)
            f = filters.separate(rng.standard_normal((taps, taps)).astype("f4"), rank=rank)
            kernel = f.to_dense()[0, 0]
            u, s, v = np.linalg.svd(kernel)
            peers = cv("full", image, kernel)
            if cv2 is not None:
                pairs = [(u[:, r] * s[r], v[r]) for r in range(rank)]

                def sums(pairs: Any = pairs, image: np.ndarray = image) -> object:
                    total = np.zeros_like(image)
                    for a, b in pairs:
                        total += cv2.sepFilter2D(image, -1, b, a, borderType=cv2.BORDER_REFLECT)
                    return total

                peers["R x cv2.sepFilter2D"] = sums
            peers["scipy FFT"] = lambda image=image, kernel=kernel: scipy.signal.fftconvolve(
                image, kernel, "same"
            )
            flops, moved = 4.0 * taps * rank * size**2, 8.0 * size**2
            name = f"filter {taps}x{taps} of rank {rank}, {size}x{size}"
            yield Case(name, planned(f, image), peers, 3.0, flops, moved)
    for taps in (9,) if quick else (3, 9, 15):
        size = 128 if quick else 256
        line = np.hanning(taps + 2)[1:-1].astype("f4")
        volume = rng.random((size,) * 3, dtype=np.float32)
        f = filters.separate(np.multiply.outer(np.outer(line, line), line), rank=1)

        def passes(volume: np.ndarray = volume, line: np.ndarray = line) -> object:
            for axis in range(3):
                volume = ndi.correlate1d(volume, line, axis)
            return volume

        name = f"filter {taps}x{taps}x{taps} of rank 1, {size}^3"
        flops, moved = 6.0 * taps * size**3, 8.0 * size**3
        yield Case(
            name, planned(f, volume), {"scipy.ndimage (1 thread)": passes}, 15.0, flops, moved
        )


def measured(calls: list[Call], seconds: float) -> list[float]:
    """Medians of seconds a call: samples of at least a millisecond, in turns."""
    each, times = [], [[] for _ in calls]
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        each.append(max(1, math.ceil(1e-3 / max(time.perf_counter() - start, 1e-7))))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, n, seen in zip(calls, each, times):
            start = time.perf_counter()
            for _ in range(n):
                call()
            seen.append((time.perf_counter() - start) / n)
    return [statistics.median(t) for t in times]


def machine(threads: int) -> dict[str, Any]:
    """Peak of arithmetic and of copying, measured."""
    _core.peak(100_000)
    rates = []
    for _ in range(7):
        start = time.perf_counter()
        done = _core.peak(1_000_000)
        rates.append(done / (time.perf_counter() - start))
    a, b = np.zeros(32_000_000, np.float32), np.zeros(32_000_000, np.float32)
    (copy,) = measured([lambda: np.copyto(a, b)], 0.5)
    return {
        "cpu": platform.processor() or platform.machine(),
        "isa": _core.default_isa(),
        "threads": threads,
        "peak_gflops": max(rates) * threads * 1e-9,
        "copy_gbs": 8 * a.size / copy * 1e-9,
    }


KINDS = {
    "dense": dense_rows,
    "depthwise": depthwise_rows,
    "separable": separable_rows,
    "chain": chain_rows,
    "filter": filter_rows,
}


def rows(threads: int, quick: bool, only: str, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure every case; a row a peer, the fastest last."""
    for kind, cases in KINDS.items():
        for case in cases(threads, quick):
            if only not in f"{kind} {case.name}":
                continue
            names = [*case.peers, *(f"dense {k}" for k in case.dense)]
            calls = [case.ours, *case.peers.values(), *case.dense.values()]
            ours, *others = measured(calls, 0.15 if quick else 0.6)
            seen = dict(zip(names, others))
            least = max(
                case.flops / (about["peak_gflops"] * 1e9), case.bytes / (about["copy_gbs"] * 1e9)
            )
            peer_names = list(case.peers)
            best = min(peer_names, key=seen.__getitem__) if peer_names else None
            dense = min((seen[f"dense {k}"] for k in case.dense), default=None)
            yield {
                "kind": kind,
                "name": case.name,
                "ours_s": ours,
                "peer": best,
                "peer_s": None if best is None else seen[best],
                "speedup": None if best is None else seen[best] / ours,
                "peers_s": {k: seen[k] for k in peer_names},
                "target": case.target,
                "realised": dense / ours / case.fewer if dense else None,
                "roofline_share": least / ours,
                "gflops": case.flops / ours * 1e-9,
            }


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter runs")
    parser.add_argument("--only", default="", metavar="WORD", help="rows whose name has this word")
    parser.add_argument("--threads", type=int, default=min(2, _core.max_threads()))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if torch is not None:
        torch.set_num_threads(given.threads)
    if cv2 is not None:
        cv2.setNumThreads(given.threads)
    about = machine(given.threads)
    found = []
    if not given.json:
        print(
            f"{about['isa']}, {about['threads']} threads, peak {about['peak_gflops']:.0f} GFLOP/s, "
            f"copy {about['copy_gbs']:.0f} GB/s"
        )
        head = f"{'work':52} {'ours us':>9} {'best peer':>26} {'speed-up':>8} {'target':>6}"
        print(head + f" {'realised':>8} {'roofline':>8} {'GFLOP/s':>7}")
    for row in rows(given.threads, given.quick, given.only, about):
        found.append(row)
        if not given.json:
            peer = row["peer"] or "-"
            speed = "-" if row["speedup"] is None else f"{row['speedup']:.2f}"
            real = "-" if row["realised"] is None else f"{row['realised']:.2f}"
            print(
                f"{row['name']:52} {row['ours_s'] * 1e6:9.1f} {peer:>26} {speed:>8} "
                f"{row['target']:6.2f} {real:>8} {row['roofline_share']:8.2f} {row['gflops']:7.1f}",
                flush=True,
            )
    if given.json:
        json.dump({"machine": about, "rows": found}, sys.stdout, indent=1)
        print()
        return
    for kind in KINDS:
        speeds = [r["speedup"] for r in found if r["kind"] == kind and r["speedup"]]
        nchw = [
            r["peers_s"]["torch NCHW"] / r["ours_s"]
            for r in found
            if r["kind"] == kind and "torch NCHW" in r["peers_s"]
        ]
        real = [r["realised"] for r in found if r["kind"] == kind and r["realised"]]
        for name, values in (("best peer", speeds), ("torch NCHW", nchw), ("realised", real)):
            if values:
                mean = statistics.geometric_mean(values)
                print(f"{kind}: {name} {mean:.2f}, least {min(values):.2f}, of {len(values)}")


if __name__ == "__main__":
    main()
