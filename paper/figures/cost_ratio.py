"""Exact cost ratio of a separated filter by image size, and its limit 2/m."""

import csv
import sys
from collections import defaultdict

import style
from matplotlib import pyplot as plt

COLOURS = {"3": "#0072b2", "5": "#d55e00", "7": "#009e73", "11": "#cc79a7"}


def main(source, target):
    curves, limits = defaultdict(list), {}
    with open(source, newline="") as file:
        for row in csv.DictReader(file):
            curves[row["taps"]].append((int(row["size"]), float(row["ratio"])))
            limits[row["taps"]] = float(row["limit"])
    figure, axes = plt.subplots(figsize=(style.COLUMN, 2.4))
    for taps, points in curves.items():
        axes.plot(*zip(*points), color=COLOURS[taps])
        axes.axhline(limits[taps], color=COLOURS[taps], linewidth=0.6, linestyle=":")
        axes.annotate(
            f"{taps} × {taps} taps", points[-1], (-2, 3), textcoords="offset points",
            ha="right", fontsize=7, color=COLOURS[taps],
        )  # fmt: skip
    axes.axhline(1, color="0.4", linewidth=0.6)
    axes.set(xscale="log", xlabel="size N of an N × N image", ylim=(0, 1.4))
    axes.set_ylabel("separated / dense MACs")
    axes.set_xticks([4, 8, 16, 32, 64, 128, 256, 512])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.minorticks_off()
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
