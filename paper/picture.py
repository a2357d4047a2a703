"""Pictures of the README and the landing page: a chain, and times beside other libraries.

    python picture.py [../docs/picture.svg]     also ../docs/picture-phone.svg, for narrow screens

Times are those of the README's table, relative to the fastest other library.
"""

import hashlib
import json
import sys
from pathlib import Path

import style
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

from lowrank.report import figures

HERE = Path(__file__).parent
RESULTS = HERE / "data" / "headline.json"
#: Compressed networks, and the networks as they were, whose fastest other library counts as 1.
ORIGINALS = {
    "ResNet-20 for 70 % of its time on one thread": "ResNet-20, 32²",
    "ResNet-18 at half of its MACs": "ResNet-18, 224²",
    "style transfer at half of its MACs": "style transfer, 256²",
}


def main(target=HERE.parent / "docs" / "picture.svg"):
    target = Path(target)
    draw(target, (9.6, 3.8), {"ncols": 2, "width_ratios": (1, 1.25)})
    phone = target.with_stem(f"{target.stem}-phone")
    draw(phone, (4.2, 7.6), {"nrows": 2, "height_ratios": (1.1, 2)})


def draw(target, size, layout):
    figure, (first, second) = plt.subplots(figsize=size, **layout)
    chain(first)
    times(second, json.loads(RESULTS.read_text())["rows"], is_narrow="nrows" in layout)
    figure.legend(*second.get_legend_handles_labels(), frameon=False, fontsize=6.5, ncols=5,
                  loc="outside lower right", handletextpad=0.1, columnspacing=1)  # fmt: skip
    about = figures.METADATA[".svg"] | {"Description": f"of results {digest()}"}
    figure.savefig(target, metadata=about, transparent=False)
    plt.close(figure)


def digest():
    """Return a digest of the results, which identifies an outdated picture."""
    return hashlib.sha256(RESULTS.read_bytes()).hexdigest()[:16]


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


def times(axes, rows, is_narrow):
    """Draw the times of every row, relative to the fastest other library.

    Names are beside the axes, or above the marks if it is narrow.
    """
    names = list(rows)
    for y, name in enumerate(names):
        others = {k: c["ms"] for k, c in rows[name].items() if k != "lowrank"}
        dense = rows[ORIGINALS.get(name, name)]
        unit = min(c["ms"] for k, c in dense.items() if k != "lowrank")
        ours = rows[name]["lowrank"]["ms"] / unit
        axes.plot([ours, 1], [y, y], color=style.LIBRARIES["lowrank"][0], linewidth=5, alpha=0.25,
                  solid_capstyle="butt")  # fmt: skip
        for library, ms in others.items():
            colour, mark = style.LIBRARIES[library]
            axes.plot(ms / unit, y, mark, color=colour, markersize=4)
        axes.plot(ours, y, "o", color=style.LIBRARIES["lowrank"][0], markersize=5)
        axes.annotate(f"{1 / ours:.1f}×", (ours, y), (-6, 0), textcoords="offset points",
                      ha="right", va="center", fontsize=7)  # fmt: skip
        if is_narrow:
            axes.annotate(name, (0, y), (2, 7), xycoords=("axes fraction", "data"),
                          textcoords="offset points", fontsize=7, va="center")  # fmt: skip
    axes.axvline(1, color="0.4", linewidth=0.7)
    axes.set(xscale="log", xlim=(0.006, 30), ylim=(len(names) - 0.4, -0.9))
    axes.set_xlabel("time / fastest other library (networks: exact)")
    axes.set_yticks([] if is_narrow else range(len(names)), [] if is_narrow else names)
    axes.set_xticks([0.02, 0.1, 0.5, 1, 5, 20], ["0.02", "0.1", "0.5", "1", "5", "20"])
    axes.minorticks_off()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25, linewidth=0.4)
    axes.set_title("time of a call on two cores")
    drawn = {library for name in names for library in rows[name]}
    for library in sorted(drawn, key=list(style.LIBRARIES).index):
        colour, mark = style.LIBRARIES[library]
        axes.plot([], [], mark, color=colour, markersize=4, label=library)


if __name__ == "__main__":
    main(*sys.argv[1:])
