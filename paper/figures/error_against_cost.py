"""Weight error against MACs of every family on trained layers."""

import csv
import sys
from collections import defaultdict

import style
from matplotlib import pyplot as plt


def main(source, target):
    curves = defaultdict(list)
    with open(source, newline="") as file:
        for row in csv.DictReader(file):
            curves[row["layer"], style.curve(row)].append((float(row["macs"]), float(row["error"])))
    layers = list(dict.fromkeys(layer for layer, _ in curves))
    figure, panels = plt.subplots(
        1, len(layers), figsize=(style.PAGE, 2.9), sharey=True, squeeze=False
    )
    for layer, axes in zip(layers, panels[0]):
        for family, (colour, mark) in style.LOOK.items():
            points = sorted(curves.get((layer, family), []))
            if points:
                every = max(1, len(points) // 10)
                axes.plot(*zip(*points), color=colour, marker=mark, markevery=every, label=family)
        axes.set(xscale="log", xlabel="MACs / dense", title=layer, ylim=(0, 1))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.25, linewidth=0.4)
    panels[0, 0].set_ylabel("relative error of the weights")
    marks, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(marks, names, loc="outside lower center", ncols=5, frameon=False)
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
