"""Weight error against measured time, one row of panels per group of families."""

import csv
import sys
from collections import defaultdict

import style
from matplotlib import pyplot as plt


def main(source, target):
    layers = defaultdict(lambda: defaultdict(list))
    with open(source, newline="") as file:
        for row in csv.DictReader(file):
            point = float(row["seconds"]), float(row["error"])
            layers[row["layer"]][style.curve(row)].append(point)
    figure, axes = plt.subplots(
        len(style.GROUPS), len(layers), figsize=(style.PAGE, 5.0), sharey=True, sharex="col",
        squeeze=False,
    )  # fmt: skip
    style.facets(axes, list(layers.values()), labels=True)
    for layer, column in zip(layers, axes.T):
        column[0].set_title(layer.replace(" ", "\n", 1), fontsize=7.5)
        for panel in column:
            panel.axvline(1, color="0.5", linewidth=0.6, linestyle=":")
        column[-1].set_xlabel("time / dense")
        limits = column[-1].get_xlim()
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5) if style.within(limits, t)]
        column[-1].set_xticks(ticks, [f"{t:g}" for t in ticks])
        column[-1].minorticks_off()
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
