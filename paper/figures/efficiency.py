"""Draw the speed-up efficiency, by kind of chain and library."""

import csv
import statistics
import sys
from collections import defaultdict

import style
from matplotlib import pyplot as plt

from lowrank.core.cost import speed_up_efficiency

#: Column: library, vertical offset of its markers.
LIBRARIES = {
    "torch": ("PyTorch", -0.22),
    "onnxruntime": ("onnxruntime", 0),
    "lowrank": ("lowrank", 0.22),
}
LOWEST = -0.5  # of the axis: chains that are much slower than the dense layer get arrows


def main(source, target):
    kinds = defaultdict(lambda: tuple([] for _ in LIBRARIES))
    with open(source, newline="") as file:
        for r in csv.DictReader(file):
            if "3x3x3" in r["layer"]:  # PyTorch's dense 3-D layer is no measure of the saving
                continue
            name = r["chain"].split()
            kind = " ".join(name[:-1]) if name[0] == "channel_svd" else name[0]
            if name[0] == "network_decoupling":  # ranks 1 and 3 differ most
                kind = " ".join(name)
            if name[:2] == ["tensor", "train"]:
                kind = "tensor train"
            for found, column in zip(kinds[kind], LIBRARIES):
                if r[column]:
                    speed_up = float(r["dense"]) / float(r[column])
                    found.append(speed_up_efficiency(speed_up, float(r["fewer"])))
    figure, axes = plt.subplots(figsize=(style.COLUMN, 2.9))
    for i, every in enumerate(reversed(kinds.values())):
        for found, (library, shift) in zip(every, LIBRARIES.values()):
            if not found:
                continue
            colour, mark = style.LIBRARIES[library]
            for _ in (x for x in found if x < LOWEST):
                arrow = {"arrowstyle": "->", "color": colour, "lw": 0.7}
                axes.annotate("", (LOWEST, i + shift), (LOWEST + 0.12, i + shift), arrowprops=arrow)
            shown = [x for x in found if x >= LOWEST]
            axes.plot(shown, [i + shift] * len(shown), mark, color=colour, alpha=0.35,
                      markersize=2.5, markeredgewidth=0)  # fmt: skip
            axes.plot(statistics.median(found), i + shift, mark, color=colour,
                      markersize=4.2, label=library if i == len(kinds) - 1 else None)  # fmt: skip
    for x in (0, 1):
        axes.axvline(x, color="0.4", linewidth=0.6)
    axes.set_yticks(range(len(kinds)), list(reversed(kinds)))
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(LOWEST, None), xlabel="speed-up efficiency")
    axes.grid(axis="x", alpha=0.25, linewidth=0.4)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
