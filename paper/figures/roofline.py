"""Roofline: measured rates against arithmetic intensity."""

import csv
import sys
from collections import defaultdict

import numpy as np
import style
from matplotlib import pyplot as plt

LOOK = {
    "dense": ("#0072b2", "o", "dense layers"),
    "chain": ("#009e73", "s", "fused chains"),
    "mobilenet": ("#56b4e9", "^", "depthwise + pointwise"),
    "depthwise": ("#e69f00", "v", "depthwise layers"),
    "series": ("#cc79a7", "D", "series"),
    "image": ("#d55e00", "P", "image filters"),
    "rank": ("#000000", "X", "filters of rank 2, 3"),
    "volume": ("#999999", "*", "volume filters"),
}


def main(source, target):
    points = defaultdict(list)
    with open(source, newline="") as file:
        for r in csv.DictReader(file):
            flops, moved = float(r["flops"]), float(r["bytes"])
            points[r["kind"]].append((flops / moved, 1e-9 * flops / float(r["seconds"])))
            peak, copy = float(r["peak_gflops"]), float(r["copy_gbs"])
    figure, axes = plt.subplots(figsize=(style.COLUMN, 2.9))
    every = [x for some in points.values() for x, _ in some]
    x = np.geomspace(min(every) / 1.5, max(every) * 1.5, 200)
    axes.plot(x, np.minimum(peak, copy * x), color="0.3")
    axes.annotate(f"{peak:.0f} GFLOP/s", (x[-1], peak), (-2, 3), textcoords="offset points",
                  ha="right", fontsize=7)  # fmt: skip
    low = x[0] * 1.2
    axes.annotate(f"{copy:.0f} GB/s", (low, copy * low), (4, 0), textcoords="offset points",
                  ha="left", va="top", fontsize=7)  # fmt: skip
    for kind, some in points.items():
        colour, mark, name = LOOK[kind]
        axes.plot(*zip(*some), mark, color=colour, label=name, markersize=3.5, markeredgewidth=0)
    axes.set(xscale="log", yscale="log", ylim=(min(y for s in points.values() for _, y in s) / 3,
             peak * 1.8), xlabel="operations per byte of compulsory traffic",
             ylabel="GFLOP/s, one thread")  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.25, linewidth=0.4)
    axes.legend(frameon=False, ncols=2, fontsize=6, loc="lower right", columnspacing=1)
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
