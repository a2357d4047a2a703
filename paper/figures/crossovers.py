"""Time of direct sums, separable passes and FFTs by kernel size."""

import csv
import sys
from collections import defaultdict

import style
from matplotlib import pyplot as plt

LOOK = {
    "direct": ("#555555", "s"),
    "fft": ("#e69f00", "D"),
    "rank 1": ("#0072b2", "o"),
    "rank 2": ("#56b4e9", "o"),
    "rank 4": ("#009e73", "o"),
    "rank 8": ("#cc79a7", "o"),
}


def label(method):
    """Return what the figure calls a method."""
    if method.startswith("rank"):
        return f"separable, {method}"
    return "FFT" if method == "fft" else f"{method} sums"


def main(source, target):
    curves = defaultdict(list)
    with open(source, newline="") as file:
        for row in csv.DictReader(file):
            times = float(row["predicted"]) * 1e3, float(row["measured"]) * 1e3
            curves[row["method"]].append((int(row["taps"]), *times))
    figure, axes = plt.subplots(figsize=(style.COLUMN, 2.8))
    for method, points in curves.items():
        colour, mark = LOOK[method]
        taps, predicted, measured = zip(*points)
        axes.plot(taps, predicted, color=colour)
        axes.plot(taps, measured, mark, color=colour, markersize=3, fillstyle="none")
        axes.annotate(
            label(method), (taps[-1], predicted[-1]),
            (4, 0), textcoords="offset points", va="center", fontsize=6.5, color=colour,
            annotation_clip=False,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="taps K of a K × K filter")
    axes.set_ylabel("ms for 1024 × 1024, one thread")
    axes.set_xticks([3, 5, 9, 15, 31, 63])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_title("lines: predicted, marks: measured", fontsize=7)
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
