"""Top-1 accuracy of a network against its MACs and its measured time."""

import csv
import sys
from collections import defaultdict

import style
from matplotlib import pyplot as plt

METHODS = {
    "uniform spatial_svd": ("#d55e00", "s", "uniform rank share, spatial SVD"),
    "uniform tucker": ("#56b4e9", "v", "uniform rank share, Tucker-2"),
    "uniform spatial_svd, on data": ("#009e73", "D", "uniform rank share, spatial SVD, data-aware"),
    "optimised, weights only": ("#e69f00", "^", "optimised, weights only"),
    "optimised, on data": ("#0072b2", "o", "optimised and fitted on data"),
}


def draw(source, target, unit, times):
    """Draw accuracies times `unit` (percent); `times` maps columns of seconds to labels."""
    curves, dense = defaultdict(list), None
    with open(source, newline="") as file:
        for r in csv.DictReader(file):
            row = [unit * float(r["accuracy"]), float(r["macs"]), *(float(r[t]) for t in times)]
            if r["method"] == "dense":
                dense = row
            else:
                curves[r["method"]].append(row)
    is_wide = len(times) > 1
    figure, panels = plt.subplots(
        1, 1 + len(times), figsize=(style.PAGE, 2.5 if is_wide else 2.4), sharey=True
    )
    for i, (axes, label_x) in enumerate(zip(panels, ["MACs / dense", *times.values()])):
        for method, rows in curves.items():
            colour, mark, label = METHODS[method]
            rows = sorted(rows, key=lambda r, i=i: r[1 + i])
            axes.plot([r[1 + i] for r in rows], [r[0] for r in rows], color=colour, marker=mark,
                      linestyle="-" if i == 0 else "", label=label)  # fmt: skip
        axes.axhline(dense[0], color="0.45", linewidth=0.7, linestyle=":")
        if i:
            axes.plot(dense[1 + i], dense[0], "*", color="#555555", markersize=5)
        axes.set(xlabel=label_x, xlim=(0, None))
        axes.grid(alpha=0.25, linewidth=0.4)
    panels[0].set_ylabel("top-1, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False, fontsize=6.5)  # fmt: skip
    style.save(figure, target)


if __name__ == "__main__":
    draw(*sys.argv[1:], 100, {"seconds": "measured time / dense, 64 images"})
