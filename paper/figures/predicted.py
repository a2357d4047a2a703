"""Predicted against measured time on two runtimes."""

import csv
import sys
from collections import defaultdict

import numpy as np
import style
from matplotlib import pyplot as plt

LOOK = {
    "dense": ("#555555", "*"), "families": ("#0072b2", "o"), "MobileNet block": ("#009e73", "s"),
    "depthwise": ("#e69f00", "v"), "series": ("#cc79a7", "D"), "filters": ("#d55e00", "P"),
}  # fmt: skip


def kind(name):
    if name in LOOK:
        return name
    return "filters" if name.startswith(("image", "volume")) else "families"


def main(source, target):
    points = defaultdict(lambda: defaultdict(list))
    with open(source, newline="") as file:
        for r in csv.DictReader(file):
            pair = float(r["measured"]), float(r["predicted"])
            points[r["runtime"]][kind(r["kind"])].append(pair)
    figure, panels = plt.subplots(1, 2, figsize=(style.PAGE, 2.7), sharex=True, sharey=True)
    ends = [t for some in points.values() for pairs in some.values() for p in pairs for t in p]
    line = np.array([min(ends) / 1.3, max(ends) * 1.3])
    for axes, (runtime, kinds) in zip(panels, points.items()):
        axes.plot(line, line, color="0.3", linewidth=0.6)
        axes.fill_between(line, line / 1.25, line * 1.25, color="0.85", linewidth=0)
        for name in LOOK:
            if name in kinds:
                colour, mark = LOOK[name]
                axes.plot(*zip(*kinds[name]), mark, color=colour, label=name, markeredgewidth=0,
                          markersize=2.8)  # fmt: skip
        off = np.abs([b / a - 1 for pairs in kinds.values() for a, b in pairs])
        axes.annotate(
            f"{'PyTorch' if runtime == 'torch' else runtime}: median {np.median(off):.0%}, "
            f"90th percentile {np.quantile(off, 0.9):.0%}",
            (0.03, 0.94), xycoords="axes fraction", fontsize=7,
        )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="measured seconds")
        axes.grid(alpha=0.25, linewidth=0.4)
    panels[0].set_ylabel("predicted seconds")
    panels[0].legend(frameon=False, fontsize=6.5, loc="lower right")
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
