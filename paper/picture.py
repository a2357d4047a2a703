"""Picture of the landing page and the README, drawn from the paper's tables.

    python picture.py [../docs/picture.svg]

Left: a chain.  Middle: error of each family against measured time, with lower bounds.  Right:
accuracy of a whole network against time, on lowrank and in PyTorch.
"""

import csv
import hashlib
import sys
from collections import defaultdict
from pathlib import Path

import style
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

from lowrank.report import figures

HERE = Path(__file__).parent
TABLES = [HERE / "data" / f"{name}.csv" for name in ("error_against_seconds", "accuracy_resnet")]
LAYER = "ResNet-20 layer3.1.conv2"
SHOWN = (
    "spatial_svd", "tucker", "cp3", "network_decoupling", "tensor_train", "channel_svd output",
)  # fmt: skip


def main(target=HERE.parent / "docs" / "picture.svg"):
    layers, network = map(read, TABLES)
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(9.6, 3.0), width_ratios=(1.15, 1, 1)
    )
    chain(left)
    families(middle, [r for r in layers if r["layer"] == LAYER and style.curve(r) in SHOWN])
    accuracy(right, network)
    about = figures.METADATA[".svg"] | {"Description": f"of tables {digest()}"}
    figure.savefig(target, metadata=about, transparent=False)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def digest():
    """Return a digest of the tables, which identifies an outdated picture."""
    return hashlib.sha256(b"".join(p.read_bytes() for p in TABLES)).hexdigest()[:16]


def chain(axes):
    """Draw a layer and three stages that replace it."""
    axes.set(xlim=(0, 10), ylim=(-1.2, 8.6), aspect="equal")
    axes.axis("off")
    axes.set_title("a layer becomes a chain of small layers")
    block(axes, 0.2, 2.2, 2.7, 3.4, "3 × 3", "64 → 64", "#555555")
    axes.add_patch(FancyArrowPatch((3.1, 3.9), (4.1, 3.9), arrowstyle="-|>", mutation_scale=9,
                                   color="0.3"))  # fmt: skip
    for x, h, top, below, colour in (
        (4.4, 3.4, "1 × 1", "64 → 16", "#0072b2"),
        (6.35, 1.9, "3 × 3", "16 → 16", "#d55e00"),
        (8.3, 3.4, "1 × 1", "16 → 64", "#009e73"),
    ):
        block(axes, x, 3.9 - h / 2, 1.5, h, top, below, colour)
    counts = [64 * 16, 16 * 16 * 9, 16 * 64]
    dense = 64 * 64 * 9
    text = " + ".join(f"{n:,}" for n in counts) + f" = {sum(counts):,}:"
    text += f"\n{dense / sum(counts):.1f} times fewer"
    below = {"ha": "center", "va": "top", "fontsize": 7}
    axes.text(1.55, 1.2, f"{dense:,}\nMACs per sample", **below)
    axes.text(7.1, 1.2, text, **below)
    axes.text(5, 8, "run fused, tile by tile: intermediate\nresults stay in the cache",
              color="0.25", **below)  # fmt: skip


def block(axes, x, y, w, h, top, below, colour):
    axes.add_patch(Rectangle((x, y), w, h, facecolor=colour, alpha=0.25, edgecolor=colour))
    axes.text(x + w / 2, y + h / 2, f"{top}\n{below}", ha="center", va="center", fontsize=6.5)


def families(axes, rows):
    """Draw error against time; a thin line goes down to the lower bound of the variant and rank."""
    for family in SHOWN:
        colour, mark = style.LOOK[family]
        some = sorted((float(r["seconds"]), float(r["error"]), float(r["bound"])) for r in rows
                      if style.curve(r) == family)  # fmt: skip
        for seconds, error, bound in some:
            axes.plot([seconds] * 2, [bound, error], color=colour, linewidth=0.5, alpha=0.6)
        axes.plot([s[0] for s in some], [s[1] for s in some], mark, color=colour, label=family,
                  markersize=4)  # fmt: skip
    axes.axvline(1, color="0.5", linewidth=0.6, linestyle=":")
    axes.set(xscale="log", ylim=(0, 1), xlabel="measured time / dense", ylabel="relative error")
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2) if style.within(axes.get_xlim(), t)]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_title("errors and their lower bounds")
    axes.grid(alpha=0.25, linewidth=0.4)
    axes.legend(frameon=False, fontsize=6.5, ncols=2, loc="upper right")


def accuracy(axes, rows):
    points = defaultdict(list)
    for r in rows:
        for who in ("lowrank", "torch"):
            points[r["method"], who].append((float(r[f"{who}_1"]), float(r["accuracy"])))
    for who, name, where in (("lowrank", "lowrank", (0, 5)), ("torch", "PyTorch", (0, 5))):
        colour, mark = style.LIBRARIES[name]
        axes.plot(*zip(*sorted(points["optimised, on data", who])), color=colour, marker=mark,
                  markersize=4, label=f"optimised and fitted on data, {name}")  # fmt: skip
        at = points["dense", who][0]
        axes.plot(*at, "*", color=colour, markersize=7)
        axes.annotate("dense", at, where, textcoords="offset points", fontsize=6.5, ha="center",
                      color=colour)  # fmt: skip
    plain = sorted(points["uniform spatial_svd", "lowrank"])
    axes.plot(*zip(*plain), color="0.6", marker="s", markersize=3, linewidth=0.6,
              label="uniform rank share, lowrank")  # fmt: skip
    axes.set(ylim=(0, 100), xlim=(0, None), ylabel="top-1, %",
             xlabel="time per image / PyTorch's dense network")  # fmt: skip
    axes.set_title("ResNet-20, without fine-tuning")
    axes.grid(alpha=0.25, linewidth=0.4)
    axes.legend(frameon=False, fontsize=6.5, loc="center right")


if __name__ == "__main__":
    main(*sys.argv[1:])
