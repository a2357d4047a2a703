"""Right answers of a network against its multiply-adds and against its measured seconds."""

import csv
import sys
from collections import defaultdict

import style
from matplotlib import pyplot as plt

WAYS = {
    "uniform spatial": ("#d55e00", "s", "one share a layer, two passes"),
    "uniform tucker": ("#56b4e9", "v", "one share a layer, Tucker"),
    "uniform spatial, on data": ("#009e73", "D", "one share a layer, two passes, on data"),
    "chosen, kernels alone": ("#e69f00", "^", "chosen together, kernels alone"),
    "chosen, on data": ("#0072b2", "o", "chosen and fitted on data"),
}


def draw(source, target, unit, times):
    """`unit` makes percents of scores; `times` are columns of seconds, with their labels."""
    curves, dense = defaultdict(list), None
    with open(source, newline="") as file:
        for r in csv.DictReader(file):
            row = [unit * float(r["accuracy"]), float(r["macs"]), *(float(r[t]) for t in times)]
            if r["way"] == "dense":
                dense = row
            else:
                curves[r["way"]].append(row)
    wide = len(times) > 1
    figure, every = plt.subplots(
        1, 1 + len(times), figsize=(style.PAGE, 2.5 if wide else 2.4), sharey=True
    )
    for i, (axes, what) in enumerate(zip(every, ["multiply-adds / dense", *times.values()])):
        for way, rows in curves.items():
            colour, mark, label = WAYS[way]
            rows = sorted(rows, key=lambda r, i=i: r[1 + i])
            axes.plot([r[1 + i] for r in rows], [r[0] for r in rows], color=colour, marker=mark,
                      linestyle="-" if i == 0 else "", label=label)  # fmt: skip
        axes.axhline(dense[0], color="0.45", linewidth=0.7, linestyle=":")
        if i:
            axes.plot(dense[1 + i], dense[0], "*", color="#555555", markersize=5)
        axes.set(xlabel=what, xlim=(0, None))
        axes.grid(alpha=0.25, linewidth=0.4)
    every[0].set_ylabel("right answers, %")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False, fontsize=6.5)  # fmt: skip
    style.save(figure, target)


if __name__ == "__main__":
    draw(*sys.argv[1:], 100, {"seconds": "measured seconds / dense, 64 images"})
