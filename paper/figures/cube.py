"""PSNR of a denoised cube against rank, number of patches and time."""

import csv
import sys

import style
from matplotlib import pyplot as plt

LOOK = {
    ("separable_sum", "weights"): ("#cc79a7", "D", ":", "lines, weights"),
    ("spatial_svd", "weights"): ("#d55e00", "o", ":", "image | bands, weights"),
    ("separable_sum", "output"): ("#cc79a7", "D", "-", "lines, output"),
    ("spatial_svd", "output"): ("#d55e00", "o", "-", "image | bands, output"),
}
MAIN = "40000"


def main(source, target):
    with open(source, newline="") as file:
        rows = list(csv.DictReader(file))
    for r in rows:  # merge the two stage orders
        r["variant"] = "spatial_svd" if r["variant"] in ("dh-w", "w-dh") else r["variant"]
    dense = {r["patches"]: float(r["psnr"]) for r in rows if r["variant"] == "dense"}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(style.PAGE, 2.7))
    handles = []
    for (variant, fit), (colour, mark, line, label) in LOOK.items():
        some = [r for r in rows if (r["variant"], r["fit"]) == (variant, fit)]
        here = [r for r in some if r["patches"] == MAIN]
        points = [(int(r["rank"]), float(r["psnr"])) for r in here]
        look = {"color": colour, "marker": mark, "linestyle": line, "label": label}
        handles += left.plot(*zip(*points), **look)
        points = [(int(r["patches"]), float(r["psnr"])) for r in some if r["rank"] == "2"]
        middle.plot(*zip(*points), **look)
        if fit == "weights":
            points = [(1e3 * float(r["seconds"]), float(r["psnr"])) for r in here]
            right.plot(*zip(*points[1:]), color=colour, marker=mark, linestyle=line)
            for r, point in zip(here[1:], points[1:]):
                if r["rank"] in "248":
                    right.annotate(r["rank"], point, (-3, -8), textcoords="offset points",
                                   fontsize=6, color=colour)  # fmt: skip
    handles.append(left.axhline(dense[MAIN], color="#555555", label="full filter"))
    middle.plot([int(p) for p in dense], dense.values(), "s-", color="#555555")
    left.set(xlabel="rank", ylabel="PSNR in dB")
    left.set_xticks([1, 2, 3, 4, 6, 8])
    middle.set(xscale="log", xlabel="training patches")
    middle.set_ylabel("PSNR in dB, rank 2")
    lowest = max(dense["2500"] - 2.5, 0)
    for line in middle.lines:
        for x, y in zip(*line.get_data()):
            if y < lowest:
                middle.annotate("", (x, lowest), (x, lowest + 0.5), arrowprops={
                    "arrowstyle": "->", "color": line.get_color(), "lw": 0.7})  # fmt: skip
    middle.set_ylim(lowest, None)
    middle.set_xticks([2500, 10000, 40000, 160000], ["2500", "10 000", "40 000", "160 000"])
    full = {r["variant"]: r for r in rows if r["patches"] == MAIN and not r["rank"]}
    methods = (("dense", "s", "direct"), ("fft", "^", "FFT"), ("SciPy", "v", "SciPy"))
    for variant, mark, label in methods:
        at = 1e3 * float(full[variant]["seconds"]), dense[MAIN]
        right.plot(*at, mark, color="#555555", markersize=4)
        right.annotate(label, at, (0, 5 if variant != "dense" else -9), textcoords="offset points",
                       fontsize=6.5, ha="center", color="#555555")  # fmt: skip
    right.set(xscale="log", xlabel="ms for the cube, one thread", ylabel="PSNR in dB")
    right.margins(0.12, 0.15)
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    middle.minorticks_off()
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    style.save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
