"""Sensitivity and float16 error of CP chains with and without error-preserving correction."""

import csv
import sys
from collections import defaultdict

import style
from matplotlib import pyplot as plt

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def main(source, target):
    pairs = defaultdict(lambda: defaultdict(dict))
    with open(source, newline="") as file:
        for r in csv.DictReader(file):
            pairs[r["layer"]][int(r["rank"])][r["fit"]] = r
    figure, panels = plt.subplots(1, 2, figsize=(style.PAGE, 2.4))
    for colour, (layer, ranks) in zip(COLOURS, pairs.items()):
        for axes, key in zip(panels, ("sensitivity", "float16")):
            for fit, line in (("without", "o:"), ("with", "s-")):
                values = [float(pair[fit][key]) for pair in ranks.values()]
                label = f"{layer}, {fit} correction" if key == "sensitivity" else None
                axes.plot(list(ranks), values, line, color=colour, label=label)
    panels[0].set(yscale="log", xlabel="rank", ylabel="sensitivity")
    panels[1].set(yscale="log", xlabel="rank", ylabel="float16 error of the output")
    for axes, ticks in zip(panels, ((1, 2, 5, 10, 20, 50), (2e-4, 5e-4, 1e-3, 2e-3, 5e-3))):
        seen = [t for t in ticks if style.within(axes.get_ylim(), t)]
        axes.set_yticks(seen, [f"{t:g}" for t in seen])
        axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=len(pairs), frameon=False, fontsize=6.5)
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
