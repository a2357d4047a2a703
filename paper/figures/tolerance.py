"""Loss in top-1 and errors after separating one layer of ResNet-20 at a time."""

import csv
import sys

import style
from matplotlib import pyplot as plt

LINES = {
    "kernel_error": ("#999999", "s", "weight error"),
    "output_error": ("#0072b2", "o", "error of the network output"),
}


def main(source, target):
    with open(source, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(style.PAGE, 2.0))
    at = [int(r["number"]) + 1 for r in rows]
    other = axes.twinx()
    other.bar(at, [float(r["lost"]) for r in rows], color="#d55e00", alpha=0.4, width=0.7)
    other.set_ylabel("top-1 loss (bars),\npercentage points", color="#a34700")
    for key, (colour, mark, label) in LINES.items():
        axes.plot(at, [float(r[key]) for r in rows], color=colour, marker=mark, label=label)
    axes.set(xlabel="layer that is separated", ylabel="relative error", ylim=(0, 1))
    low, high = other.get_ylim()
    other.set_ylim(low, high * 1.15)
    axes.set_zorder(other.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.set_xticks(at)
    axes.legend(frameon=False, loc="upper right")
    other.spines["right"].set_visible(True)
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
