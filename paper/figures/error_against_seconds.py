"""Weight error against MACs and against measured time, by family."""

import csv
import sys
from collections import defaultdict

import style
from matplotlib import pyplot as plt


def main(source, target):
    points = defaultdict(lambda: defaultdict(list))
    with open(source, newline="") as file:
        for r in csv.DictReader(file):
            row = float(r["macs"]), float(r["seconds"]), float(r["error"])
            points[r["layer"]][style.curve(r)].append(row)
    figure, grid = plt.subplots(
        2, len(points), figsize=(style.PAGE, 4.2), sharey=True, squeeze=False
    )
    seen = {}
    for column, (layer, families) in zip(grid.T, points.items()):
        for k, axes in enumerate(column):
            for family, rows in families.items():
                colour, mark = style.LOOK[family]
                rows = sorted(rows)
                (line,) = axes.plot([r[k] for r in rows], [r[2] for r in rows], color=colour,
                                    marker=mark, linewidth=0.6)  # fmt: skip
                seen.setdefault(family, line)
            axes.axvline(1, color="0.5", linewidth=0.6, linestyle=":")
            axes.set(xscale="log", ylim=(0, 1))
            ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5) if style.within(axes.get_xlim(), t)]
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.25, linewidth=0.4)
            axes.set_xlabel(("MACs / dense", "measured time / dense")[k])
        column[0].set_title(layer.replace(" ", "\n", 1), fontsize=7.5)
    for axes in grid[:, 0]:
        axes.set_ylabel("relative error")
    figure.legend(seen.values(), seen, loc="outside lower center", ncols=5, frameon=False,
                  fontsize=6.5)  # fmt: skip
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
