"""The share of saved multiply-adds that becomes time, by kind of chain: ours and PyTorch's."""

import csv
import statistics
import sys
from collections import defaultdict

import style
from matplotlib import pyplot as plt


def main(source, target):
    kinds = defaultdict(lambda: ([], []))
    with open(source, newline="") as file:
        for r in csv.DictReader(file):
            if "3x3x3" in r["layer"]:  # PyTorch's dense 3-D layer is no measure of the saving
                continue
            name = r["chain"].split()
            kind = " ".join(name) if name[0] == "decouple" else name[0]
            if name[:2] == ["tensor", "train"]:
                kind = "tensor train"
            for shares, who in zip(kinds[kind], ("torch", "lowrank")):
                shares.append(float(r[f"{who}_share"]))
    figure, axes = plt.subplots(figsize=(style.COLUMN, 2.9))
    for i, (torch, ours) in enumerate(reversed(kinds.values())):
        for shares, who, shift in ((ours, "lowrank", 0.14), (torch, "PyTorch", -0.14)):
            colour, mark = style.WHO[who]
            label = who if i == 0 else None
            axes.plot(shares, [i + shift] * len(shares), mark, color=colour, alpha=0.35,
                      markersize=2.5, markeredgewidth=0)  # fmt: skip
            axes.plot(statistics.geometric_mean(shares), i + shift, mark, color=colour,
                      markersize=4.5, label=label)  # fmt: skip
    axes.axvline(1, color="0.4", linewidth=0.6)
    axes.set_yticks(range(len(kinds)), list(reversed(kinds)))
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, None), xlabel="realised share of saved multiply-adds")
    axes.grid(axis="x", alpha=0.25, linewidth=0.4)
    axes.legend(frameon=False, loc="upper right")
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
