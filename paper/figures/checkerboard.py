"""Checkerboards of transposed convolutions: generated kernels, and trained ones as chains."""

import csv
import sys

import style
from matplotlib import pyplot as plt

KINDS = {
    "ones": ("#555555", "s"), "1 + normal": ("#009e73", "^"), "normal": ("#0072b2", "o"),
}  # fmt: skip
LINES = {2: "-", 3: "--"}


def main(source, target):
    with open(source, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(style.PAGE, 2.7))
    for stride, line in LINES.items():
        for kind, (colour, mark) in KINDS.items():
            some = [r for r in rows if r["kernel"] == kind and int(r["stride"]) == stride]
            points = [(int(r["taps"]), float(r["strength"])) for r in some]
            left.plot(*zip(*points), line, color=colour, marker=mark,
                      label=f"taps {kind}" if stride == 2 else None)  # fmt: skip
    for stride, y in ((2, 1.72), (3, 2.82)):
        left.annotate(f"stride {stride}", (6, y), (0, 3), textcoords="offset points", ha="right",
                      fontsize=6.5)  # fmt: skip
    left.set(xlabel="taps K of a K × K kernel", ylabel="pattern / mean", ylim=(-0.1, 4.6))
    left.set_xticks(range(2, 7))
    left.legend(frameon=False, loc="upper right")

    trained = [
        r for r in rows if r["kernel"] not in KINDS and not r["family"].startswith("equal phases")
    ]
    names = list(dict.fromkeys(r["kernel"] for r in trained))
    dense = {r["kernel"]: float(r["strength"]) for r in trained if r["family"] == "dense"}
    for name, line in zip(names, ("-", ":")):
        for family, (colour, mark) in style.LOOK.items():
            some = [r for r in trained if (r["kernel"], r["family"]) == (name, family)]
            if not some or family == "dense":
                continue
            points = sorted((float(r["macs"]), float(r["strength"])) for r in some)
            middle.plot(*zip(*points, (1, dense[name])), line, color=colour, marker=mark,
                        label=family if line == "-" else None)  # fmt: skip
    if trained:
        middle.plot([1] * len(dense), dense.values(), "*", color="#555555", markersize=6,
                    label="dense", clip_on=False)  # fmt: skip
        middle.legend(frameon=False, loc="lower right", ncols=2, handlelength=1, fontsize=6,
                      columnspacing=0.8)  # fmt: skip
    middle.set(xscale="log", xlabel="MACs / dense", ylabel="pattern / mean",
               ylim=(0.4, None), xlim=(0.035, 1.05))  # fmt: skip
    middle.set_xticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"])
    middle.minorticks_off()

    chains = [r for r in trained if r["family"] != "dense"]
    error = [float(r["error"]) for r in chains]
    for key, colour, mark in (("mean", "#e69f00", "o"), ("pattern", "#0072b2", "^")):
        whole = [1 if key == "mean" else dense[r["kernel"]] for r in chains]
        right.plot(error, [float(r[key]) / w for r, w in zip(chains, whole)], mark, color=colour,
                   fillstyle="none", label=f"of the {key}")  # fmt: skip
    x = [i / 100 for i in range(101)]
    right.plot(x, [(1 - e * e) ** 0.5 for e in x], color="#555555", label="of the weights")
    right.set(xlabel="relative error of the weights", ylabel="norm / dense", xlim=(0, 1),
              ylim=(0, 1.02))  # fmt: skip
    right.legend(frameon=False, loc="lower left")
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
