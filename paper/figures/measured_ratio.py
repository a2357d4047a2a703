"""Three cost ratios: stated, counted, and as measured time per library."""

import csv
import sys
from collections import defaultdict

import style
from matplotlib import pyplot as plt

#: Claim in the letters of its article: label of the axis and formula in those of the paper.
PANELS = {
    "2/m": ("taps K, image of 1024²", "2/K"),
    "3/K²": ("taps K, volume of 96³", "3/K²"),
    "1/N + 1/h²": ("channels T of a 3 × 3 layer at 28²", "1/T + 1/9"),
}


def main(source, target):
    curves, counted = defaultdict(lambda: defaultdict(list)), defaultdict(dict)
    with open(source, newline="") as file:
        for r in csv.DictReader(file):
            size, time = int(r["size"]), float(r["separated"]) / float(r["dense"])
            curves[r["claim"]][r["library"]].append((size, time))
            counted[r["claim"]][size] = float(r["limit"]), float(r["counted"])
    figure, panels = plt.subplots(1, 3, figsize=(style.PAGE, 2.5))
    for axes, (claim, (what, formula)) in zip(panels, PANELS.items()):
        sizes = sorted(counted[claim])
        axes.plot(sizes, [counted[claim][n][0] for n in sizes], color="0.45", linestyle=":",
                  label=formula)  # fmt: skip
        axes.plot(sizes, [counted[claim][n][1] for n in sizes], "x", color="0.3", markersize=4,
                  label="counted")  # fmt: skip
        for library, points in curves[claim].items():
            colour, mark = style.LIBRARIES[library]
            axes.plot(*zip(*points), color=colour, marker=mark, label=library)
        axes.set(xscale="log", yscale="log", xlabel=what)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.minorticks_off()
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * 2)  # room for the legend
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_yticks([v for v in (0.02, 0.05, 0.1, 0.2, 0.5, 1) if style.within((low, high), v)])
        axes.grid(alpha=0.25, linewidth=0.4)
        axes.legend(frameon=False, fontsize=6)
    panels[0].set_ylabel("separated / dense time")
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
