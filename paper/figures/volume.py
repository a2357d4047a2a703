"""Separable filters of a volume: error by rank, time by taps, and the ratio K^2 / 3."""

import csv
import sys

import style
from matplotlib import pyplot as plt

KERNELS = {
    "rotated": ("#0072b2", "o"), "ball": ("#d55e00", "s"), "Laplacian": ("#009e73", "^"),
    "wave": ("#cc79a7", "D"), "Gaussian": ("#000000", "*"),
}  # fmt: skip
METHODS = {
    "SciPy direct": ("#999999", "v"), "SciPy separable": ("#009e73", "D"),
    "direct": ("#d55e00", "s"), "fft": ("#e69f00", "^"), "separable": ("#0072b2", "o"),
}  # fmt: skip
LEAST = 2e-4  # grey levels; smaller errors are drawn here, with an arrow
SHOWN = "13"  # taps in the error panel


def main(source, target):
    with open(source, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(style.PAGE, 2.7))
    for kernel, (colour, mark) in KERNELS.items():
        some = [r for r in rows if r["kernel"] == kernel and r["taps"] == SHOWN and r["terms"]]
        terms = [int(r["terms"]) for r in some]
        for key, line, fill in (("levelled", "-", "full"), ("rms", ":", "none")):
            if key == "rms" and kernel not in ("rotated", "ball"):
                continue  # equal: these sum to zero or have no error
            errors = [max(float(r[key]), LEAST) for r in some]
            left.plot(terms, errors, line, color=colour, marker=mark, fillstyle=fill,
                      markersize=5 if mark == "*" else 3,
                      label=kernel if key == "levelled" else None)  # fmt: skip
            for n, error in zip(terms, errors):
                if error == LEAST:  # below the axis
                    left.annotate("", (n, 2e-5), (n, LEAST), arrowprops={
                        "arrowstyle": "->", "color": colour, "linewidth": 0.7})  # fmt: skip
    left.axhline(0.5, color="0.7", linewidth=0.6)
    left.set(yscale="log", xlabel="rank", ylim=(1.5e-5, 3e3))
    left.set_ylabel(f"RMS error in grey levels, {SHOWN} taps")
    left.set_xticks([1, 2, 3, 4, 6, 8])
    left.set_yticks([1e-3, 1e-2, 0.1, 1, 10, 100], ["0.001", "0.01", "0.1", "1", "10", "100"])
    left.legend(frameon=False, ncols=2, loc="upper center", columnspacing=1, handlelength=1.5)

    gauss = [r for r in rows if r["kernel"] == "Gaussian"]
    curves = {}
    for method, (colour, mark) in METHODS.items():
        some = [r for r in gauss if r["method"] == method]
        taps, seconds = ([float(r[k]) for r in some] for k in ("taps", "seconds"))
        predicted = [float(r["predicted"]) for r in some if r["predicted"]]
        curves[method] = taps, predicted, seconds
        middle.plot(taps, [s * 1e3 for s in seconds], mark, color=colour, fillstyle="none",
                    markersize=3, label="FFT" if method == "fft" else method)  # fmt: skip
        if predicted:
            middle.plot(taps, [s * 1e3 for s in predicted], color=colour)
    middle.set(yscale="log", xlabel="taps K per axis, Gaussian",
               ylabel="ms for $128^3$, one thread", ylim=(0.8, 1e6))  # fmt: skip
    middle.set_yticks([1, 10, 100, 1e3, 1e4], ["1", "10", "100", "1000", "10 000"])
    middle.legend(frameon=False, ncols=2, loc="upper center", columnspacing=0.8, handletextpad=0.2)

    taps = curves["direct"][0]
    right.plot(taps, [k * k / 3 for k in taps], color="black", label="counted, $K^2 / 3$")
    for i, line, label in ((1, "--", "predicted"), (2, "", "measured")):
        ratio = [a / b for a, b in zip(curves["direct"][i], curves["separable"][i])]
        right.plot(taps, ratio, line, marker="o" if i == 2 else None, color="#0072b2",
                   label=label, markersize=3)  # fmt: skip
    right.set(xlabel="taps K per axis, Gaussian", ylabel="direct / three passes")
    right.legend(frameon=False, loc="upper left")
    for axes in (middle, right):
        axes.set_xticks([3, 5, 7, 9, 11, 13, 15])
    for axes in (left, middle):
        axes.minorticks_off()
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
