"""Output errors of data-aware fits relative to those of weight-only fits."""

import csv
import sys
from collections import defaultdict

import style
from matplotlib import pyplot as plt

METRICS = {"factored": ("#e69f00", "^"), "full": ("#0072b2", "o")}


def main(source, target):
    found = defaultdict(dict)
    with open(source, newline="") as file:
        for r in csv.DictReader(file):
            found[r["family"], r["layer"]][r["metric"]] = float(r["output_error"])
    families = list(dict.fromkeys(family for family, _ in found))
    figure, panels = plt.subplots(1, len(families), figsize=(style.PAGE, 2.4), sharey=True)
    for axes, family in zip(panels, families):
        layers = [layer for f, layer in found if f == family]
        axes.axhline(1, color="0.4", linewidth=0.7)
        for metric, (colour, mark) in METRICS.items():
            gain = [found[family, x][metric] / found[family, x]["none"] for x in layers]
            axes.plot(range(len(layers)), gain, color=colour, marker=mark, label=metric)
        names = [x.replace("ResNet-20 layer", "") for x in layers]
        axes.set_xticks(range(len(layers)), names, rotation=60, ha="right", fontsize=6)
        axes.set_title(family, fontsize=8)
        axes.set_ylim(0, 1.25)
        axes.grid(alpha=0.25, linewidth=0.4)
    panels[0].set_ylabel("output error / weight-only fit")
    panels[0].legend(frameon=False, title="second moments", title_fontsize=7, loc="lower right")
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
