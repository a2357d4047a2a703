"""Accuracy of a compressed series classifier against MACs and measured time."""

import csv
import sys

import style
from matplotlib import pyplot as plt

LOOK = {
    "gradients": ("#0072b2", "o", "-", "optimised, inputs and gradients"),
    "inputs": ("#56b4e9", "s", "-", "optimised, inputs"),
    "weights": ("#d55e00", "^", "--", "optimised, weights only"),
    "uniform": ("#e69f00", "v", "--", "channel SVD, uniform rank share"),
    "thinner": ("#555555", "D", ":", "fewer channels, trained from scratch"),
}


def main(source, target):
    with open(source, newline="") as file:
        rows = list(csv.DictReader(file))
    dense = rows[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(style.PAGE, 2.7), sharey=True)
    for axes, key, scale in ((left, "macs", 1), (right, "seconds", 1e3)):
        for method, (colour, mark, line, label) in LOOK.items():
            points = [
                (scale * float(r[key]), float(r["accuracy"])) for r in rows if r["method"] == method
            ]
            axes.plot(*zip(*points), color=colour, marker=mark, linestyle=line, label=label)
        axes.plot(scale * float(dense[key]), float(dense["accuracy"]), "*", color="black",
                  markersize=6, label="original network", zorder=3)  # fmt: skip
        axes.set(xscale="log", ylim=(0, 1))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.25, linewidth=0.4)
    left.set(xlabel="MACs / original", ylabel="top-1")
    left.set_xticks([0.05, 0.1, 0.2, 0.5, 1])
    right.set(xlabel="ms for 64 series, one thread")
    right.set_xticks([0.5, 1, 2, 3])
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False)  # fmt: skip
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
