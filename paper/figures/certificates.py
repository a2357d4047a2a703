"""Errors at a third of the MACs by depth, and their ratio to the lower bounds."""

import csv
import sys
from collections import defaultdict

import style
from matplotlib import pyplot as plt


def main(source, target):
    curves, gaps = defaultdict(list), defaultdict(list)
    nets = []
    with open(source, newline="") as file:
        for r in csv.DictReader(file):
            error, bound = float(r["error"]), float(r["bound"])
            curves[r["net"], r["family"]].append((int(r["number"]) + 1, error))
            if bound > 0:
                gaps[r["family"]].append(error / bound)
            if r["net"] not in nets:
                nets.append(r["net"])
    deep = nets[-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(style.PAGE, 2.6))
    for (net, family), points in curves.items():
        if net == deep:
            colour, mark = style.LOOK[family]
            left.plot(*zip(*points), color=colour, marker=mark, label=family)
    left.set(xlabel=f"layer of {deep}", ylabel="relative error of the weights", ylim=(0, 1))
    left.set_xticks(range(1, 1 + max(n for (net, _), p in curves.items() if net == deep
                                     for n, _ in p), 3))  # fmt: skip
    left.grid(alpha=0.25, linewidth=0.4)
    left.legend(ncols=2, frameon=False)
    names = [f for f in style.LOOK if f in gaps]
    right.boxplot(
        [gaps[f] for f in names], whis=(0, 100), widths=0.5, medianprops={"color": "#d55e00"}
    )
    right.set_xticks(range(1, len(names) + 1), names, rotation=30, ha="right")
    right.set(yscale="log", ylabel="error / lower bound")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.grid(axis="y", alpha=0.25, linewidth=0.4)
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
