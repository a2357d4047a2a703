"""Memory traffic of chains relative to the dense layer, and the speed-up from fusion."""

import csv
import sys

import style
from matplotlib import pyplot as plt

LOOK = {"depthwise + pointwise": style.LOOK["network_decoupling"]} | style.LOOK


def main(source, target):
    with open(source, newline="") as file:
        rows = list(csv.DictReader(file))
    layers, names = (list(dict.fromkeys(r[key] for r in rows)) for key in ("layer", "chain"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(style.PAGE, 2.5), width_ratios=(3, 2))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        colour, mark = LOOK[name]
        these = [r for r in rows if r["chain"] == name]
        at = [layers.index(r["layer"]) + (i - (len(names) - 1) / 2) * width for r in these]
        apart, fused = ([float(r[k]) / float(r["dense"]) for r in these]
                        for k in ("unfused", "fused"))  # fmt: skip
        left.bar(at, apart, width * 0.9, color=colour, alpha=0.35, label=name)
        left.bar(at, fused, width * 0.9, color=colour)
        saved = [float(r["unfused"]) / float(r["fused"]) for r in these]
        gain = [float(r["seconds_unfused"]) / float(r["seconds_fused"]) for r in these]
        right.plot(saved, gain, mark, color=colour, label=name, markersize=3.5)
    left.axhline(1, color="0.3", linewidth=0.6)
    left.set_xticks(range(len(layers)), [x.replace(" at", "\nat") for x in layers], fontsize=6)
    left.set_ylabel("elements moved / dense")
    left.legend(
        frameon=False,
        loc="upper right",
        title="light: stage by stage, solid: fused",
        title_fontsize=7,
    )
    right.axhline(1, color="0.3", linewidth=0.6)
    right.set(xlabel="traffic, stage by stage / fused", ylabel="time, stage by stage / fused")
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.25, linewidth=0.4)
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
