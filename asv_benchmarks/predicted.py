"""Errors of the performance model by kind of workload.

    python -m asv_benchmarks.predicted [--runtime NAME] [--threads N] [--in-network] [--quick]
                                       [--worst N] [--json]

The coefficients are those of `lowrank calibrate`, whose workloads have other shapes.  Workloads
are the cases of the comparison with other libraries and a few ranks of every family.  Each row
has the median and the 90th percentile of the relative error of predicted times, and the median of
predicted / measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

import lowrank as lr
from asv_benchmarks.benchmarks import cases
from asv_benchmarks.benchmarks.timing import measure_seconds
from lowrank._kernels import _core
from lowrank.families import FAMILIES, NotApplicable
from lowrank.perfmodel.measurement import Measurements
from lowrank.perfmodel.runtimes import bind_call, threads_of

Item = tuple[str, lr.Factorization, tuple[int, ...], int]  # kind, chain, input size, batch
GROUP = 24  # chains that are measured interleaved


def chain(channels: int, shapes: Any, stride: int = 1) -> lr.Factorization:
    """Return stages of these weight shapes that keep the size; the first has the stride."""
    stages = []
    for k, shape in enumerate(shapes):
        pads = [n // 2 for n in shape[2:]]
        geometry = lr.Geometry.of(len(pads), 1 if k else stride, pads)
        stages.append(lr.Stage(cases.weight(*shape), geometry, channels // shape[1]))
        channels = shape[0]
    return lr.chain(stages)


def items(quick: bool, runtime: str = "lowrank") -> Iterator[Item]:
    """Yield layers, chains and families; images and volumes for lowrank only."""
    for row in cases.CHAIN_LAYERS:
        c, kernel, size = row["channels"], row["kernel"], row["size"]
        whole = lr.dense(cases.weight(c, c, *kernel), padding=[k // 2 for k in kernel])
        *variant, rank = row["kronecker"].split()
        for n in row["batches"][:1] if quick else row["batches"]:
            yield "dense", whole, size, n
            for name, shapes in cases.chain_shapes(row).items():
                yield name.rsplit(" ", 1)[0], chain(c, shapes), size, n
            yield "kronecker", lr.kronecker(whole, int(rank), " ".join(variant)), size, n
    for c, out, size, stride, _ in cases.MOBILENET:
        for k in (3, 5):
            yield "depthwise", chain(c, [(c, 1, k, k)], stride), (size, size), 1
        for n in (1,) if quick else (1, 8):
            shapes = [(c, 1, 3, 3), (out, c, 1, 1)]
            yield "MobileNet block", chain(c, shapes, stride), (size, size), n
    for c, length in [(64, 4096), (256, 1024), (16, 100_000)]:
        yield "series", chain(c, [(c, 1, 9)]), (length,), 1
    yield from families(quick)
    if runtime != "lowrank":
        return
    for k, size in itertools.product((3, 5, 9, 15, 31), (512, 1024, 2048, 4096)):
        yield "image", chain(1, [(1, 1, k, 1), (1, 1, 1, k)]), (size, size), 1
    for rank, size in itertools.product((2, 3), (512, 2048)):
        yield "image of rank 2, 3", chain(1, [(rank, 1, 15, 1), (1, rank, 1, 15)]), (size, size), 1
    for k in (3, 9, 15):
        passes = [(1, 1, k, 1, 1), (1, 1, 1, k, 1), (1, 1, 1, 1, k)]
        yield "volume", chain(1, passes), (256,) * 3, 1


def families(quick: bool) -> Iterator[Item]:
    """Yield a few ranks of every variant of every family, on layers with fast fits."""
    rng = np.random.default_rng(0)
    for c, size, k in [(32, 56, 3)] if quick else [(32, 56, 3), (64, 28, 3), (48, 14, 5)]:
        weight = cases.weight(c, c, k, k)
        conv = lr.dense(weight, padding=k // 2)
        for name, family in FAMILIES.items():
            try:
                variants = family.variants(conv)
            except NotApplicable:
                continue
            for variant in variants[:: max(1, len(variants) // 3)][:3]:
                whole = conv.cost((size, size)).macs
                found = [lr.chain(p.stages) for p in family.sweep(conv, variant)]
                found = [f for f in found if f.cost((size, size)).macs < whole]
                for i in rng.choice(len(found), min(2, len(found)), replace=False):
                    shapes = [s.weight.shape for s in found[i].stages]
                    stages = [
                        lr.Stage(cases.weight(*w), s.geometry, s.groups, s.outer, s.inner)
                        for w, s in zip(shapes, found[i].stages)
                    ]
                    yield name, lr.chain(stages), (size, size), 1


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runtime", default="lowrank")
    parser.add_argument("--threads", type=int, default=min(2, _core.max_threads()))
    parser.add_argument("--in-network", action="store_true", help="chains as parts of a network")
    parser.add_argument("--quick", action="store_true", help="fewer batches and families")
    parser.add_argument("--worst", type=int, default=0, help="number of worst rows to print")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    here = lr.perfmodel.current()
    if not here.calibrated:
        sys.exit("this machine is not calibrated: run 'lowrank calibrate' first")
    found = []
    remaining = items(given.quick, given.runtime)
    while some := list(itertools.islice(remaining, GROUP)):
        for (kind, f, size, n), took in zip(
            some, measure(some, given.runtime, given.threads, given.in_network)
        ):
            p = here.predict(f, size, batch=n, threads=given.threads, runtime=given.runtime,
                             in_network=given.in_network)  # fmt: skip
            found.append({"kind": kind, "chain": repr(f), "size": size, "batch": n,
                          "seconds": took, "predicted": p.seconds})  # fmt: skip
    if given.json:
        json.dump({"cpu": here.cpu, "runtime": given.runtime, "rows": found}, sys.stdout, indent=1)
        return
    report(found, here, given)


def measure(some: list[Item], runtime: str, threads: int, in_network: bool = False) -> list[float]:
    """Return the seconds of some items, alone in alternation, or one by one as in a network."""
    if in_network:
        measured = (Measurements(runtime, n, threads) for *_, n in some)
        return [
            one.measure([f.stages], f.input_shape(size))[0].seconds
            for one, (_, f, size, _) in zip(measured, some)
        ]
    with threads_of(runtime, threads):
        calls = [
            bind_call(runtime, f.stages, cases.random(n, *f.input_shape(size)), threads)
            for _, f, size, n in some
        ]
        return measure_seconds(calls, 0.05 * len(calls), rewarm=True)  # as in calibrations


def report(found: list[dict[str, Any]], here: lr.perfmodel.PerformanceModel, given: Any) -> None:
    rates = here.coefficients[given.runtime]
    place = ", in a network" if given.in_network else ""
    print(f"{here.cpu}, {given.threads} threads, run by {given.runtime}{place}")
    print(f"as calibrated: median error {rates.error:.1%}, 90th percentile {rates.spread:.1%}")
    print(f"{'kind':20} {'rows':>4} {'median':>7} {'90 %':>7} {'predicted/measured':>18}")
    kinds = defaultdict(list)
    for row in found:
        ratio = row["predicted"] / row["seconds"]
        kinds[row["kind"]].append(ratio)
        kinds["all"].append(ratio)
    for kind, ratios in sorted(kinds.items(), key=lambda k: k[0] == "all"):
        off = np.abs(np.array(ratios) - 1)
        print(
            f"{kind:20} {len(off):4} {np.median(off):7.1%} {np.quantile(off, 0.9):7.1%} "
            f"{np.median(ratios):18.2f}"
        )
    by_kind = np.median(
        [np.median(np.abs(np.array(r) - 1)) for k, r in kinds.items() if k != "all"]
    )
    verdict = "met" if np.median(np.abs(np.array(kinds["all"]) - 1)) <= 0.15 else "MISSED"
    print(f"median of the kinds' medians {by_kind:.1%}; of all rows at most 15 %: {verdict}")
    found.sort(key=lambda r: -abs(math.log(r["predicted"] / r["seconds"])))
    for row in found[: given.worst]:
        ratio = row["predicted"] / row["seconds"]
        print(f"{ratio:6.2f}  {row['chain']} {row['size']} N={row['batch']}")


if __name__ == "__main__":
    main()
