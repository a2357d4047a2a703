"""MACs and time of layers (linear in the positions) and of attention (quadratic)."""

import csv
import sys
from collections import defaultdict

import numpy as np
import style
from matplotlib import pyplot as plt

LOOK = {
    "separable": ("#0072b2", "o"), "dense": ("#555555", "s"), "attention": ("#d55e00", "^"),
}  # fmt: skip
SHADES = {32: "#56b4e9", 64: "#0072b2", 128: "#009e73", 256: "#cc79a7"}
SHOWN = 64  # channels in the two panels over L
FROM, TO = 1024, 4096  # positions between which exponents are taken, as in the text


def main(source, target):
    table = defaultdict(list)
    with open(source, newline="") as file:
        for r in csv.DictReader(file):
            key = r["layer"], int(r["channels"])
            table[key].append((int(r["positions"]), int(r["macs"]), float(r["seconds"])))
    table = {key: np.array(found).T for key, found in table.items()}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(style.PAGE, 2.5))
    for layer, (colour, mark) in LOOK.items():
        n, macs, seconds = table[layer, SHOWN]
        for axes, values in ((left, macs / 1e6), (middle, seconds * 1e3)):
            first, last = values[n == FROM].item(), values[n == TO].item()
            power = np.log(last / first) / np.log(TO / FROM)
            axes.plot(n, values, color=colour, marker=mark, label=f"{layer}, $L^{{{power:.2f}}}$")
    for axes, what in ((left, "MACs, millions"), (middle, "ms, one thread")):
        axes.set(xscale="log", yscale="log", xlabel=f"positions L, {SHOWN} channels", ylabel=what)
        axes.set_xticks([16, 64, 256, 1024, 4096])
        axes.legend(frameon=False, loc="upper left", handlelength=1.5)
    left.set_ylim(None, 3e4)
    middle.set_ylim(None, 2e3)
    for c, colour in SHADES.items():
        n, _, seconds = table["attention", c]
        right.plot(n / c, seconds / table["dense", c][2], "o-", color=colour, linewidth=0.6,
                   label=f"{c} channels")  # fmt: skip
    x = np.geomspace(0.06, 130, 50)
    right.plot(x, (4 + 2 * x) / 9, color="black", label="counted")
    right.axhline(1, color="0.6", linewidth=0.6)
    right.set(xscale="log", yscale="log", xlabel="positions per channel, L / D")
    right.set_ylabel("attention over dense 3 × 3")
    right.set_xticks([0.1, 1, 10, 100])
    right.legend(frameon=False, loc="upper left", handlelength=1.5)
    for axes in (left, middle, right):
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
