"""Draw the change of accuracy against the measured time, one panel per runtime."""

import csv
import sys
from collections import defaultdict

import style
from matplotlib import pyplot as plt

#: Label, colour, marker and whether it is ours, in the order of the legend.
METHODS = {
    "ours, by time": ("ours, by time", "#0072b2", "o"),
    "ours, by MACs": ("ours, by MACs", "#56b4e9", "s"),
    "uniform spatial SVD": ("uniform spatial SVD", "#009e73", "^"),
    "BALF": ("BALF", "#d55e00", "D"),
    "Tucker-2, second moment": ("Tucker-2 in the second moment", "#cc79a7", "v"),
    "EVBMF Tucker": ("Tucker-2, ranks by EVBMF", "#777777", "P"),
}
LOWEST = -20.0  # points, of the axis


def main(table, target):
    panels = defaultdict(lambda: defaultdict(list))
    with open(table, newline="") as file:
        for row in csv.DictReader(file):
            panels[row["runtime"]][row["method"]].append(row)
    names = {"lowrank": "lowrank", "onnxruntime": "onnxruntime", "torch": "PyTorch"}
    times = [float(r["time"]) for some in panels.values() for rows in some.values() for r in rows]
    limits = 0.85 * min(times), 1.2 * max(times)
    figure, axes = plt.subplots(1, len(panels), figsize=(style.PAGE, 2.5), sharey=True)
    for axis, (runtime, methods) in zip(axes, panels.items()):
        original = float(methods["original"][0]["milliseconds"])
        axis.set_title(f"{names[runtime]} (original: {original:.2f} ms)", fontsize=8)
        for method, (label, colour, mark) in METHODS.items():
            draw(axis, methods.get(method, []), label, colour, mark)
        axis.plot(1, 0, "*", color="0.2", markersize=6)
        axis.axvline(1, color="0.6", linewidth=0.6, linestyle=":")
        axis.set(xscale="log", xlim=limits, ylim=(LOWEST - 1.5, 2))
        ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8) if style.within(limits, t)]
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25, linewidth=0.4)
        axis.set_xlabel("time / original")
    axes[0].set_ylabel("change of top-1,\npercentage points")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False)  # fmt: skip
    style.save(figure, target)


def draw(axis, rows, label, colour, mark):
    """Draw a method with its intervals; an arrow marks points below the axis."""
    points = sorted((float(r["time"]), r) for r in rows)
    shown = [(t, r) for t, r in points if float(r["change"]) >= LOWEST]
    below = [t for t, r in points if float(r["change"]) < LOWEST]
    axis.errorbar(
        [t for t, _ in shown], [float(r["change"]) for _, r in shown],
        xerr=spread(shown, "time"), yerr=spread(shown, "change"),
        color=colour, marker=mark, markersize=3.5, elinewidth=0.6, label=label,
    )  # fmt: skip
    for time in below:
        axis.annotate("", (time, LOWEST - 1.4), (time, LOWEST - 0.1),
                      arrowprops={"arrowstyle": "->", "color": colour, "lw": 0.7})  # fmt: skip


def spread(points, key):
    """Return the distances to the ends of the intervals."""
    low = [float(r[key]) - float(r[f"{key}_low"]) for _, r in points]
    high = [float(r[f"{key}_high"]) - float(r[key]) for _, r in points]
    return [[max(x, 0) for x in low], [max(x, 0) for x in high]]


if __name__ == "__main__":
    main(*sys.argv[1:])
