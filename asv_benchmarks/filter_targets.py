"""Measure filters beside OpenCV, SciPy and scikit-image, and compare with the targets.

    python -m asv_benchmarks.filter_targets [--threads 1 2] [--only WORD] [--quick] [--json]

Ends with one line per target: the geometric mean and the least of its ratios (peer over this
library), and whether they are met.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when an OpenMP library is loaded

from asv_benchmarks import filter_work as work
from asv_benchmarks.filter_work import Row


class Target(NamedTuple):
    """Bounds of the ratios of several rows; None where there is none.

    Attributes
    ----------
    mean : float or None
        Smallest geometric mean.
    least : float or None
        Smallest ratio.
    """

    mean: float | None = None
    least: float | None = None


TARGETS = {
    "first call: plan": Target(least=1.0),
    "first call: time": Target(least=1 / 1.2),
    "first call: memory": Target(least=1.0),
    "crops: SciPy": Target(least=1.0),
    "crops: OpenCV": Target(least=0.5),
    "lowrank.ndimage": Target(mean=10.0, least=1.0),
    "float32 outer products": Target(mean=2.5, least=1.2),
    "uint8 outer products": Target(mean=1.2, least=0.9),
    "boxes": Target(least=1.0),
    "Gaussians": Target(least=1 / 1.5),
    "Hessian, structure tensor: 2 threads": Target(least=15.0),
}


def summarize(rows: Iterable[Row]) -> Iterator[str]:
    """Return one line per target that has rows."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        if row.target:
            grouped.setdefault(row.target, []).append(row)
    for name, found in grouped.items():
        target = TARGETS.get(name, Target())
        mean = math.exp(sum(math.log(r.ratio) for r in found) / len(found))
        least = min(found, key=lambda r: r.ratio)
        bounds = [
            f"{text} {bound:.3g}x"
            for text, bound in (("mean", target.mean), ("least", target.least))
            if bound is not None
        ]
        is_met = mean >= (target.mean or 0) and least.ratio >= (target.least or 0)
        verdict = ("met" if is_met else "MISSED") if bounds else "no target"
        slowest = f"{least.work}, {work.count_threads(least.threads)}, {least.peer}"
        yield (
            f"{name:38}mean {mean:7.2f}x  least {least.ratio:7.2f}x ({slowest}); "
            f"target {', '.join(bounds) or 'none'}: {verdict}"
        )


def report(rows: Iterable[Row], as_json: bool) -> None:
    """Print rows as they come and then their targets, or JSON."""
    found = []
    for row in rows:
        found.append(row)
        if not as_json:
            print(row, flush=True)
    if as_json:
        json.dump([row._asdict() | {"ratio": row.ratio} for row in found], sys.stdout, indent=1)
    else:
        print(*summarize(found), sep="\n")


def ndimage_rows(only: str = "", seconds: float = 0.5) -> Iterator[Row]:
    """Return the rows of `asv_benchmarks.ndimage`, which needs a process with one thread."""
    command = [sys.executable, "-m", "asv_benchmarks.ndimage", "--json", "--only", only]
    command += ["--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for row in json.loads(done.stdout):
        row.pop("ratio")
        yield Row(**row)


def sources(threads: Sequence[int], is_quick: bool) -> dict[str, Callable[[], Iterator[Row]]]:
    """Return functions that measure rows, by name.

    Parameters
    ----------
    threads : sequence of int
        Numbers of threads; those against SciPy have one.
    is_quick : bool
        Whether to measure a few sizes of each kind only, briefly.
    """
    brief = {"seconds": 0.05} if is_quick else {}
    few_first = {"sizes": {2: (3, 321), 3: (121,)}, "repeats": 3} if is_quick else {}
    few_taps = {"sides": (512, 2048), "taps": (3, 9, 31)} if is_quick else {}
    few_boxes = {"shapes": work.BOX_SHAPES[::3], "sizes": (3, 31, 201)} if is_quick else {}
    found: dict[str, Callable[[], Iterator[Row]]] = {
        "first": functools.partial(work.first_rows, **few_first),
        "crops": functools.partial(work.crop_rows, **brief),
        "ndimage": functools.partial(ndimage_rows, **brief),
        "uniform": functools.partial(
            work.uniform_rows, **brief, **({"sizes": (3, 31, 101)} if is_quick else {})
        ),
    }
    for n in threads:
        found |= {
            f"outer products, {n}": functools.partial(
                work.outer_product_rows, n, **brief, **few_taps
            ),
            f"boxes, {n}": functools.partial(work.box_rows, n, **brief, **few_boxes),
            f"Gaussians, {n}": functools.partial(work.gaussian_rows, n, **brief),
            f"tensors, {n}": functools.partial(work.tensor_rows, n, **brief),
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the rows and the targets, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads")
    parser.add_argument(
        "--only", default="", help=f"part of a name: {', '.join(sources([1, 2], False))}"
    )
    parser.add_argument("--quick", action="store_true", help="a few sizes of each kind")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    if min(given.threads) < 1:
        parser.error(f"--threads must be at least 1, got {min(given.threads)}")
    chosen = [f for name, f in sources(given.threads, given.quick).items() if given.only in name]
    if not chosen:
        parser.error(f"--only matches no name, got {given.only!r}")
    report(itertools.chain.from_iterable(measure() for measure in chosen), given.json)


if __name__ == "__main__":
    main()
