"""Rank that trained layers need by depth, beside random kernels of the same shapes."""

import csv
import sys
from collections import defaultdict

import style
from matplotlib import pyplot as plt

LOOK = {
    "digits": ("#555555", "o"), "ResNet-20": ("#0072b2", "o"), "cifar10_full": ("#d55e00", "s"),
    "style": ("#009e73", "^"), "SRCNN": ("#cc79a7", "D"), "ESPCN": ("#e69f00", "v"),
    "CNN-L": ("#56b4e9", "P"), "CREPE (1-D)": ("#999999", "X"), "MeshNet (3-D)": ("#000000", "*"),
}  # fmt: skip
PANELS = {
    "spatial": "spatial SVD:\nshare of full rank for 20 % error",
    "channels": "channel SVD:\nshare of full rank for 20 % error",
    "depthwise": "one depthwise filter per channel:\nrelative error",
}


def main(source, target):
    with open(source, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, panels = plt.subplots(1, 3, figsize=(style.PAGE, 2.9), sharex=True, sharey=True)
    for axes, (key, title) in zip(panels, PANELS.items()):
        curves, noise = defaultdict(list), []
        for r in rows:
            if r[key] and float(r[f"{key}_noise"]) < 1:  # full rank 1 cannot be reduced
                curves[r["net"]].append((float(r["depth"]), float(r[key])))
                noise.append(float(r[f"{key}_noise"]))
        axes.axhspan(min(noise), max(noise), color="0.88", linewidth=0)
        axes.annotate("random, same shapes", (0.02, max(noise)), (0, -2), va="top", fontsize=6,
                      textcoords="offset points", color="0.35")  # fmt: skip
        for net, points in curves.items():
            colour, mark = LOOK[net]
            axes.plot(*zip(*sorted(points)), color=colour, marker=mark, linewidth=0.7, label=net)
        axes.set(xlabel="depth of the layer, first to last", ylim=(0, 1.03))
        axes.set_title(title, fontsize=8)
        axes.grid(alpha=0.25, linewidth=0.4)
    handles = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    names = [n for n in LOOK if n in handles]
    figure.legend([handles[n] for n in names], names, loc="outside lower center", ncols=len(names),
                  frameon=False, fontsize=6.5, handlelength=1.5, columnspacing=1)  # fmt: skip
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
