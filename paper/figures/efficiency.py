"""Draw the speed-up efficiency, by kind of chain and library."""

import csv
import statistics
import sys
from collections import defaultdict

import style
from matplotlib import pyplot as plt

#: Column: library, vertical offset of its markers.
LIBRARIES = {
    "torch": ("PyTorch", -0.22),
    "onnxruntime": ("onnxruntime", 0),
    "lowrank": ("lowrank", 0.22),
}


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
                if r[f"{column}_efficiency"]:
                    found.append(float(r[f"{column}_efficiency"]))
    figure, axes = plt.subplots(figsize=(style.COLUMN, 2.9))
    for i, every in enumerate(reversed(kinds.values())):
        for found, (library, shift) in zip(every, LIBRARIES.values()):
            if not found:
                continue
            colour, mark = style.LIBRARIES[library]
            axes.plot(found, [i + shift] * len(found), mark, color=colour, alpha=0.35,
                      markersize=2.5, markeredgewidth=0)  # fmt: skip
            axes.plot(statistics.geometric_mean(found), i + shift, mark, color=colour,
                      markersize=4.2, label=library if i == len(kinds) - 1 else None)  # fmt: skip
    axes.axvline(1, color="0.4", linewidth=0.6)
    axes.set_yticks(range(len(kinds)), list(reversed(kinds)))
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, None), xlabel="speed-up efficiency")
    axes.grid(axis="x", alpha=0.25, linewidth=0.4)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
