"""Ratio of stated to counted values of each claim: 1 where the claim is correct."""

import csv
import sys

import style
from matplotlib import pyplot as plt


def main(source, target):
    with open(source, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(style.PAGE, 2.9))
    for i, r in enumerate(reversed(rows)):
        ratio = float(r["stated"]) / float(r["counted"])
        is_correct = abs(ratio - 1) < 5e-3
        colour = "#0072b2" if is_correct else "#d55e00"
        axes.plot([1, ratio], [i, i], color=colour, linewidth=1.2)
        axes.plot(ratio, i, "o" if is_correct else "s", color=colour, markersize=3.5)
    axes.axvline(1, color="0.4", linewidth=0.6)
    axes.set(xscale="log", xlabel="stated / counted")
    axes.set_yticks(range(len(rows)), [f"{r['article']}: {r['claim']}" for r in reversed(rows)])
    axes.tick_params(axis="y", labelsize=6, length=0)
    axes.set_xticks([0.5, 1, 2, 5, 20, 50], ["0.5", "1", "2", "5", "20", "50"])
    axes.minorticks_off()
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
