"""Cases of the comparison with other libraries.

A case is a name and a recipe; arrays and plans are made when it is measured.  Shapes of layers,
and ranks of tensor trains and Kronecker sums, are in compared.csv.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage as ndi
import scipy.signal

try:
    import lowrank as lr
    from lowrank import blocks, filters
except ImportError:  # asv imports every module of this folder on older commits as well
    lr = blocks = filters = None

from .compat import family_function
from .libraries import Call, cv2, onnx_peer, opencv_separable, tensorly_torch_peer, torch_peers

LAYERS = Path(__file__).with_name("compared.csv")


@dataclass
class Work:
    """Our call and the peers' by name; operations, and bytes of input, weights and output."""

    ours: Call
    peers: dict[str, Call]
    flops: float = 0.0
    bytes: float = 0.0
    dense: dict[str, Call] = field(default_factory=dict)  # PyTorch's dense layer
    fewer: float = 0.0  # ratio of the dense layer's MACs to ours


@dataclass
class Case:
    """One row: name, recipe and target speed-up over the best peer."""

    name: str
    make: Callable[[], Work]
    target: float
    least: float | None = None  # required of every single row


def random(*shape: int) -> np.ndarray:
    """Return normal float32 numbers, the same for the same shape."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def weight(*shape: int) -> np.ndarray:
    """Return a random kernel that keeps the magnitude of its input."""
    return random(*shape) / np.float32(math.sqrt(math.prod(shape[1:])))


def layer(f: lr.Factorization, n: int, size: tuple[int, ...], threads: int) -> Work:
    """Return a chain and the same chain in other libraries, for `n` examples."""
    x = random(n, f.in_channels, *size)
    run = f.compile(size, np.float32, threads=threads)
    out = run(x)
    cost = f.cost(size)
    moved = 4.0 * (n * (cost.fused - cost.params) + cost.params)
    peers = torch_peers(f.stages, x) | onnx_peer(f.stages, x, threads)
    return Work(lambda: run(x, out), peers, 2.0 * n * cost.macs, moved)


def read_layers() -> Iterator[dict[str, Any]]:
    """Yield the rows of compared.csv with parsed numbers."""
    with LAYERS.open(newline="") as file:
        for row in csv.DictReader(file):
            numbers = {k: tuple(map(int, row[k].split("x"))) for k in ("kernel", "size")}
            batches = tuple(map(int, row["batches"].split()))
            ranks = tuple(map(int, row["tensor_train"].split()))
            yield row | numbers | {
                "channels": int(row["channels"]), "batches": batches, "tensor_train": ranks,
            }  # fmt: skip


CHAIN_LAYERS = tuple(read_layers())


def format_shape(values: tuple[int, ...]) -> str:
    """Return a shape as 3x3."""
    return "x".join(map(str, values))


def taps_along(kernel: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the taps along some axes, 1 along the others."""
    return tuple(k if a in axes else 1 for a, k in enumerate(kernel))


def dense_rows(threads: int, quick: bool) -> Iterator[Case]:
    for row in CHAIN_LAYERS:
        for n in row["batches"][:1] if quick else row["batches"]:
            c, kernel, size = row["channels"], row["kernel"], row["size"]

            def make(c: int = c, kernel: Any = kernel, size: Any = size, n: int = n) -> Work:
                f = lr.dense(weight(c, c, *kernel), padding=[k // 2 for k in kernel])
                return layer(f, n, size, threads)

            name = f"dense {format_shape(kernel)}, {c} at {format_shape(size)}, N={n}"
            yield Case(name, make, 2.0, least=1.0)


def depthwise_rows(threads: int, quick: bool) -> Iterator[Case]:
    shapes = [(32, 112, 1), (64, 112, 2), (128, 56, 1), (128, 56, 2), (256, 28, 1), (256, 28, 2),
              (512, 14, 1), (512, 14, 2), (1024, 7, 1)]  # fmt: skip
    for k in (3, 5):
        for c, size, stride in shapes if not quick else shapes[::3]:

            def make(k: int = k, c: int = c, size: int = size, stride: int = stride) -> Work:
                f = lr.dense(weight(c, 1, k, k), padding=k // 2, stride=stride, groups=c)
                return layer(f, 1, (size, size), threads)

            name = f"depthwise {k}x{k} stride {stride}, {c} at {size}x{size}"
            yield Case(name, make, 1.2, least=0.9)


def series_rows(threads: int, quick: bool) -> Iterator[Case]:
    for c, length in [(64, 4096)] if quick else [(64, 4096), (256, 1024), (16, 100_000)]:

        def make(c: int = c, length: int = length) -> Work:
            f = lr.dense(weight(c, 1, 9), padding=4, groups=c)
            return layer(f, 1, (length,), threads)

        yield Case(f"depthwise 9 taps, {c} series of {length}", make, 1.2, least=0.9)


#: MobileNetV1's blocks: input channels, output channels, input size, stride, repeats.
MOBILENET = [
    (32, 64, 112, 1, 1), (64, 128, 112, 2, 1), (128, 128, 56, 1, 1), (128, 256, 56, 2, 1),
    (256, 256, 28, 1, 1), (256, 512, 28, 2, 1), (512, 512, 14, 1, 5), (512, 1024, 14, 2, 1),
    (1024, 1024, 7, 1, 1),
]  # fmt: skip


def mobilenet_rows(threads: int, quick: bool) -> Iterator[Case]:
    """Yield fused depthwise + pointwise pairs, plain and with bias and ReLU6, and all 13 pairs."""

    def block(c: int, out: int, size: int, stride: int, n: int, ends: bool) -> Work:
        w = weight(c, 1, 3, 3), weight(out, c, 1, 1)
        biases = [np.full(len(a), 0.1, np.float32) if ends else None for a in w]
        words = ["relu6" if ends else "none"] * 2
        whole = blocks.fused_separable(*w, bias=biases, activation=words, stride=stride)
        stages = [s for f in whole.chains for s in f.stages]
        x = random(n, c, size, size)
        run = whole.compile((size, size), np.float32, threads=threads)
        result = run(x)
        given = list(zip(biases, words))
        peers = torch_peers(stages, x, given) | onnx_peer(stages, x, threads, given)
        costs = whole.costs((c, size, size))
        flops = 2.0 * n * sum(k.macs for k in costs)
        moved = 4.0 * (x.size + result.size + sum(a.size for a in w))
        return Work(lambda: run(x, result), peers, flops, moved)

    def together(n: int) -> Work:
        works = [block(*b[:4], n, False) for b in MOBILENET for _ in range(b[4])]

        def all_of(calls: list[Call]) -> Call:
            def go() -> None:
                for call in calls:
                    call()

            return go

        names = works[0].peers
        return Work(
            all_of([w.ours for w in works]),
            {name: all_of([w.peers[name] for w in works]) for name in names},
            sum(w.flops for w in works),
            sum(w.bytes for w in works),
        )

    for n in (1,) if quick else (1, 8):
        for c, out, size, stride, _ in MOBILENET[::3] if quick else MOBILENET:
            for ends in (False, True):
                word = " with bias and ReLU6" if ends else ""
                name = f"depthwise + pointwise{word} {c} -> {out} at {size} stride {stride}, N={n}"

                def make(
                    c: int = c, out: int = out, size: int = size, stride: int = stride,
                    n: int = n, ends: bool = ends,
                ) -> Work:  # fmt: skip
                    return block(c, out, size, stride, n, ends)

                yield Case(name, make, 1.2, least=0.9)
        name = f"all 13 blocks of MobileNetV1, N={n}"
        yield Case(name, lambda n=n: together(n), 1.2, least=0.9)


def chain_shapes(row: dict[str, Any]) -> dict[str, list[tuple[int, ...]]]:
    """Return the weight shapes of a layer's chains by family and rank."""
    c, kernel = row["channels"], row["kernel"]
    axes = tuple(range(len(kernel)))
    q, h, one = c // 4, c // 2, taps_along(kernel, ())
    passes = [(c, 1, *taps_along(kernel, (a,))) for a in axes]
    first, others = taps_along(kernel, axes[:1]), taps_along(kernel, axes[1:])
    ranks = row["tensor_train"]
    train = [(ranks[0], c, *one)]
    train += [
        (b, a, *taps_along(kernel, (k,))) for k, (a, b) in enumerate(itertools.pairwise(ranks))
    ]
    return {
        f"tucker {q},{q}": [(q, c, *one), (q, q, *kernel), (c, q, *one)],
        f"cp {c}": [(c, c, *one), *passes, (c, c, *one)],
        f"cp3 {c}": [(c, c, *one), (c, 1, *kernel), (c, c, *one)],
        f"spatial_svd {h}": [(h, c, *first), (c, h, *others)],
        f"channel_svd output {h}": [(h, c, *kernel), (c, h, *one)],
        "network_decoupling dw-pw 1": [(c, 1, *kernel), (c, c, *one)],
        "network_decoupling dw-pw 3": [(3 * c, 1, *kernel), (c, 3 * c, *one)],
        "network_decoupling pw-dw 1": [(c, c, *one), (c, 1, *kernel)],
        f"tensor train {','.join(map(str, ranks))}": [*train, (c, ranks[-1], *one)],
    }


def chain_rows(threads: int, quick: bool) -> Iterator[Case]:
    for row in CHAIN_LAYERS:
        c, kernel, size = row["channels"], row["kernel"], row["size"]
        *variant, rank = row["kronecker"].split()
        names = [*chain_shapes(row), f"kronecker {' '.join(variant)} {rank}"]
        for n in row["batches"][:1] if quick else row["batches"]:
            for family in names:

                def make(row: Any = row, n: int = n, family: str = family) -> Work:
                    return chain_work(row, n, family, threads)

                where = f"{c} {format_shape(kernel)} at {format_shape(size)}, N={n}"
                yield Case(f"{family}, {where}", make, 1.4, least=0.9)


def chain_work(row: dict[str, Any], n: int, family: str, threads: int) -> Work:
    c, kernel, size = row["channels"], row["kernel"], row["size"]
    whole = lr.dense(weight(c, c, *kernel), padding=[k // 2 for k in kernel])
    if family.startswith("kronecker"):
        *variant, rank = row["kronecker"].split()
        f = lr.kronecker(whole, int(rank), " ".join(variant))
    else:
        stages, channels = [], c
        for shape in chain_shapes(row)[family]:
            pads = [k // 2 for k in shape[2:]]
            geometry = lr.Geometry.of(len(kernel), padding=pads)
            stages.append(lr.Stage(weight(*shape), geometry, channels // shape[1]))
            channels = shape[0]
        f = lr.chain(stages)
    work = layer(f, n, size, threads)
    work.peers |= tensorly_torch_peer(family, f.stages, random(n, c, *size))
    work.dense = torch_peers(whole.stages, random(n, c, *size), name="dense")
    work.fewer = whole.cost(size).macs / f.cost(size).macs
    return work


def image_rows(threads: int, quick: bool) -> Iterator[Case]:
    for taps in (3, 9, 31) if quick else (3, 5, 9, 15, 31):
        for size in (512, 2048) if quick else (512, 1024, 2048, 4096):

            def make(taps: int = taps, size: int = size) -> Work:
                line = bell(taps)
                image = np.random.default_rng(0).random((size, size), dtype=np.float32)
                peers = opencv_separable(image, line)
                f = filters.separate(np.outer(line, line), rank=1)
                return filtered(f, image, peers, 4.0 * taps, threads)

            yield Case(f"filter {taps}x{taps} of rank 1, {size}x{size}", make, 3.5, least=2.0)


def type_rows(threads: int, quick: bool) -> Iterator[Case]:
    """Yield images of other types and of several channels."""
    for taps in (9,) if quick else (3, 9, 31):
        for shape, dtype in [((2048, 2048), "uint8"), ((2048, 2048), "uint16"),
                             ((1024, 1024, 3), "float32"), ((1024, 1024, 3), "uint8")]:  # fmt: skip

            def make(taps: int = taps, shape: Any = shape, dtype: str = dtype) -> Work:
                line = bell(taps)
                image = (np.random.default_rng(0).random(shape) * 200).astype(dtype)
                kernel, out = np.outer(line, line), np.empty_like(image)
                peers = opencv_separable(image, line)
                moved = 2.0 * image.nbytes
                return Work(
                    lambda: filters.correlate(image, kernel, out=out, threads=threads),
                    peers, 4.0 * taps * image.size, moved,
                )  # fmt: skip

            yield Case(f"filter {taps}x{taps} of rank 1, {format_shape(shape)} {dtype}", make, 1.0)


def rank_rows(threads: int, quick: bool) -> Iterator[Case]:
    for rank, taps in ((2, 15), (3, 15)):
        for size in (512,) if quick else (512, 2048):

            def make(rank: int = rank, taps: int = taps, size: int = size) -> Work:
                image = np.random.default_rng(0).random((size, size), dtype=np.float32)
                f = filters.separate(random(taps, taps), rank=rank)
                kernel = f.to_dense()[0, 0]
                u, s, v = np.linalg.svd(kernel)
                peers: dict[str, Call] = {}
                if cv2 is not None:
                    border = cv2.BORDER_REFLECT
                    out = np.empty_like(image)
                    pairs = [(u[:, r] * s[r], v[r]) for r in range(rank)]

                    def sums() -> object:
                        total = np.zeros_like(image)
                        for a, b in pairs:
                            total += cv2.sepFilter2D(image, -1, b, a, borderType=border)
                        return total

                    peers["cv2.filter2D"] = lambda: cv2.filter2D(
                        image, -1, kernel, out, borderType=border
                    )
                    peers["R x cv2.sepFilter2D"] = sums
                peers["scipy FFT"] = lambda: scipy.signal.fftconvolve(image, kernel, "same")
                return filtered(f, image, peers, 4.0 * taps * rank, threads)

            yield Case(f"filter {taps}x{taps} of rank {rank}, {size}x{size}", make, 3.0)


def volume_rows(threads: int, quick: bool) -> Iterator[Case]:
    for taps in (9,) if quick else (3, 9, 15):

        def make(taps: int = taps) -> Work:
            line = bell(taps)
            side = 128 if quick else 256
            volume = np.random.default_rng(0).random((side,) * 3, dtype=np.float32)

            def passes() -> object:
                result = volume
                for axis in range(3):
                    result = ndi.correlate1d(result, line, axis)
                return result

            f = filters.separate(np.multiply.outer(np.outer(line, line), line), rank=1)
            peers = {"scipy.ndimage (1 thread)": passes}
            return filtered(f, volume, peers, 6.0 * taps, threads)

        side = 128 if quick else 256
        yield Case(f"filter {taps}x{taps}x{taps} of rank 1, {side}^3", make, 15.0)


def bell(taps: int) -> np.ndarray:
    line: np.ndarray = np.hanning(taps + 2)[1:-1].astype(np.float32)
    return line / line.sum()


def filtered(
    f: lr.Factorization, image: np.ndarray, peers: dict[str, Call], flops: float, threads: int
) -> Work:
    """Return a filter of one image; `flops` are per sample."""
    x = image[None, None]
    run = f.compile(image.shape, np.float32, threads=threads)
    out = run(x)
    return Work(lambda: run(x, out), peers, flops * image.size, 8.0 * image.size)


def scaling_rows(threads: int, quick: bool) -> Iterator[Case]:
    """Yield compute-bound calls relative to the same call on one thread."""
    if threads == 1:
        return
    for row in CHAIN_LAYERS[:2] if quick else CHAIN_LAYERS:
        c, kernel, size = row["channels"], row["kernel"], row["size"]

        def make(c: int = c, kernel: Any = kernel, size: Any = size) -> Work:
            f = lr.dense(weight(c, c, *kernel), padding=[k // 2 for k in kernel])
            all_, one = (f.compile(size, np.float32, threads=n) for n in (threads, 1))
            x = random(1, c, *size)
            out = one(x)
            peers = {"one thread": lambda: one(x, out)}
            cost = f.cost(size)
            return Work(lambda: all_(x, out), peers, 2.0 * cost.macs, 4.0 * cost.fused)

        name = f"{threads} threads, dense {format_shape(kernel)}, {c} at {format_shape(size)}"
        yield Case(name, make, 0.9 * threads)


def call_rows(threads: int, quick: bool) -> Iterator[Case]:
    def make() -> Work:
        f = family_function("spatial_svd")(lr.dense(weight(4, 4, 3, 3), padding=1), 2)
        x = random(1, 4, 4, 4)
        run = f.compile((4, 4), np.float32, threads=threads)
        out = run(x)
        return Work(lambda: run(x, out), {}, 2.0 * f.cost((4, 4)).macs, 4.0 * 2 * x.size)

    yield Case("call of a planned chain on a tiny input, at most 5 us", make, 5e-6)


KINDS: dict[str, Callable[[int, bool], Iterator[Case]]] = {
    "dense": dense_rows,
    "depthwise": depthwise_rows,
    "series": series_rows,
    "mobilenet": mobilenet_rows,
    "chain": chain_rows,
    "image": image_rows,
    "rank": rank_rows,
    "volume": volume_rows,
    "type": type_rows,
    "threads": scaling_rows,
    "call": call_rows,
}
