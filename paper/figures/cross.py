"""The two-channel cross and its best rank-1 separable approximation."""

import csv
import sys

import numpy as np
import style
from matplotlib import pyplot as plt


def main(source, target):
    kernels = {}
    with open(source, newline="") as file:
        rows = list(csv.DictReader(file))
    for r in rows:
        if r["what"] != "bipartition":
            at = tuple(int(r[k]) for k in "sij")
            kernels.setdefault(r["what"], {})[at] = float(r["value"])
    error = next(float(r["value"]) for r in rows if r["bipartition"] == "tj|si")
    figure, every = plt.subplots(1, 4, figsize=(style.COLUMN, 1.25))
    for i, (what, entries) in enumerate(kernels.items()):
        array = np.zeros(1 + np.array(list(entries)).max(0))
        for at, value in entries.items():
            array[at] = value
        for s in range(2):
            axes = every[2 * i + s]
            axes.imshow(array[s], cmap="Blues", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"input {s + 1}", fontsize=7)
            axes.spines[["top", "right"]].set_visible(True)
        what = what if what == "kernel" else f"one term, error {error:.3f}"
        text = every[2 * i].annotate(what, (1.1, -0.18), xycoords="axes fraction", ha="center",
                                     fontsize=7, va="top")  # fmt: skip
        text.set_in_layout(False)  # its width would move the panels apart
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
