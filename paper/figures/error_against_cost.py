"""Weight error against MACs of every family on trained layers, one row of panels per group."""

import csv
import sys
from collections import defaultdict

import style
from matplotlib import pyplot as plt


def main(source, target):
    layers = defaultdict(lambda: defaultdict(list))
    with open(source, newline="") as file:
        for row in csv.DictReader(file):
            point = float(row["macs"]), float(row["error"])
            layers[row["layer"]][style.curve(row)].append(point)
    figure, axes = plt.subplots(
        len(style.GROUPS), len(layers), figsize=(style.PAGE, 5.2), sharey=True, sharex="col",
        squeeze=False,
    )  # fmt: skip
    style.facets(axes, list(layers.values()), labels=True)
    for layer, panel in zip(layers, axes[0]):
        panel.set_title(layer)
    for panel in axes[-1]:
        panel.set_xlabel("MACs / dense")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
