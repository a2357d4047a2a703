"""MACs of separable blocks under compound scaling, beside the stated doubling."""

import csv
import math
import sys

import style
from matplotlib import pyplot as plt

FACTOR, FINER = 1.2 * 1.1**2 * 1.15**2, 1.15
NETS = {
    "dense inside": ("#d55e00", "s", "dense instead of depthwise"),
    "blocks": ("#0072b2", "o", "depthwise inside"),
    "dense blocks": ("#555555", "^", "one dense 3 × 3 per block"),
}


def main(source, target):
    with open(source, newline="") as file:
        rows = list(csv.DictReader(file))

    def select(net, rounding):
        found = [r for r in rows if r["net"] == net and r["rounding"] == rounding]
        return found, [int(r["macs"]) for r in found]

    base, macs = select("blocks", "multiples of 8")
    phi = [int(r["step"]) for r in base]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(style.PAGE, 2.5))

    left.axhline(1, color="0.6", linewidth=0.6)
    left.plot(phi, [(FACTOR / 2) ** p for p in phi], ":", color="#555555",
              label="no rounding")  # fmt: skip
    for rounding, line, colour, label in (
        ("multiples of 8", "o-", "#0072b2", "channels rounded to 8"),
        ("integer", "s--", "#d55e00", "channels rounded to 1"),
    ):
        _, found = select("blocks", rounding)
        left.plot(phi, [m / macs[0] / 2**p for p, m in zip(phi, found)], line, color=colour,
                  label=label)  # fmt: skip
    published, found = select("blocks", "published")
    at = [math.log(int(r["image"]) / 224) / math.log(FINER) for r in published]
    left.plot(at, [m / macs[0] / 2**p for p, m in zip(at, found)], "x", color="#009e73",
              markersize=4, label="B0 to B7, counted")  # fmt: skip
    left.set(xlabel="φ", ylabel="growth of MACs / $2^φ$", ylim=(0.6, 1.75))
    left.legend(frameon=False, loc="upper right")

    shares = {p: [int(r[p]) / int(r["macs"]) for r in base]
              for p in ("pointwise", "depthwise", "ends")}  # fmt: skip
    colours = ("#56b4e9", "#e69f00", "#bbbbbb")
    middle.stackplot(phi, *shares.values(), colors=colours, edgecolor="white", linewidth=0.5)
    places = (("pointwise", 3.5, 0.8), ("depthwise", 3.5, 0.93), ("first, last", 1.0, 0.975))
    for text, x, y in places:
        middle.text(x, y, text, ha="center", va="center", fontsize=6.5)
    # Below 0.7 everything is pointwise.
    middle.set(xlabel="φ", ylabel="share of MACs", xlim=(0, 7), ylim=(0.7, 1))

    for net, (colour, mark, label) in NETS.items():
        _, found = select(net, "multiples of 8")
        right.plot(phi, [m / 1e9 for m in found], color=colour, marker=mark, label=label)
    stated = [float(r["stated_macs"]) / 1e9 for r in published]
    right.plot(at, stated, "x", color="#009e73", markersize=4, label="stated, B0 to B7")
    right.set(yscale="log", xlabel="φ", ylabel="MACs, billions", ylim=(0.2, 3e5))
    right.set_yticks([1, 10, 100, 1000, 1e4], ["1", "10", "100", "1000", "10 000"])
    right.minorticks_off()
    right.legend(frameon=False, loc="upper left")
    for axes in (left, middle, right):
        axes.set_xticks(phi)
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
