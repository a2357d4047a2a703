"""Charts of the report: SVG by matplotlib, in the colours of its style sheet."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Literal

import numpy as np

from lowrank._typing import Array
from lowrank.core.tables import format_seconds, thinned
from lowrank.report import figures
from lowrank.selection import Candidate

POINTS = 48  # per curve
#: Colours that are drawn, and the variables of the style sheet in their place: light and dark.
COLOURS = {
    "#010101": "--ink", "#020202": "--soft", "#030303": "--line", "#040404": "--one",
    "#050505": "--two", "#060606": "--three", "#070707": "--four", "#080808": "--old",
}  # fmt: skip
INK, SOFT, LINE, ONE, TWO, THREE, FOUR, OLD = COLOURS
STYLE = figures.STYLE | {
    "svg.fonttype": "none", "font.size": 8, "text.color": SOFT, "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE, "xtick.color": SOFT, "ytick.color": SOFT, "axes.grid": True,
    "grid.color": LINE, "grid.linewidth": 0.5, "axes.titlesize": 8, "axes.titlelocation": "left",
    "axes.titlecolor": INK, "legend.frameon": False, "legend.fontsize": 7, "axes.axisbelow": True,
}  # fmt: skip
SIZE = 2.6, 1.9  # inches of a panel
FENCE = 1.5  # interquartile ranges beyond the quartiles from which on a sample is an outlier

Panel = tuple[Literal["times", "front", "spectrum"], Any]


def draw(panels: Sequence[Panel], name: str) -> str:
    """Draw the charts of a layer beside one another.

    Parameters
    ----------
    panels : sequence of (str, arguments)
        ``("times", samples)``: repeated measurements before and after, in seconds.
        ``("front", (options, macs, error))``: options of the plan, MACs of the layer as it came,
        error and MACs of the choice.  ``("spectrum", curves)``: singular values by unfolding.
    name : str
        Prefix of all identifiers, unique in a page.

    Returns
    -------
    str
        ``<svg>`` element with a description.

    Examples
    --------
    >>> from lowrank.report.charts import draw
    >>> svg = draw([("times", ((1e-3, 1.1e-3), (5e-4, 6e-4)))], "a")
    >>> svg[:19], "1.05 ms before" in svg
    ('<svg role="img" ari', True)
    """
    import matplotlib
    from matplotlib.figure import Figure

    label = "; ".join(_describe(kind, data) for kind, data in panels)
    with matplotlib.rc_context(STYLE):
        width, height = SIZE
        figure = Figure((width * len(panels), height), layout="constrained")
        for axes, (kind, data) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            _DRAW[kind](axes, data)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata=figures.METADATA[".svg"])
    return _inline(text.getvalue(), label, name)


def outliers(samples: Sequence[float]) -> list[bool]:
    """Return whether each sample is an outlier by Tukey's fences.

    Parameters
    ----------
    samples : sequence of float
        Repeated measurements.

    Returns
    -------
    list of bool

    Examples
    --------
    >>> from lowrank.report.charts import outliers
    >>> outliers([1.0, 1.1, 0.9, 1.0, 3.0])
    [False, False, False, False, True]
    """
    first, third = np.quantile(samples, (0.25, 0.75))
    reach = FENCE * (third - first)
    return [not first - reach <= s <= third + reach for s in samples]


def _inline(svg: str, label: str, name: str) -> str:
    """Return a file of matplotlib's as an element of a page."""
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2)
    svg = svg.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "", 1)
    svg = re.sub(r' xmlns="[^"]*"| version="1.1"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1).strip()


def _describe(kind: str, data: Any) -> str:
    """Return what a screen reader says."""
    if kind == "times":
        words = ("before", "after")
        return "Repeated measurements: medians " + ", ".join(
            f"{format_seconds(float(np.median(s)))} {word}, {sum(outliers(s))} outliers"
            for s, word in zip(data, words)
        )
    if kind == "front":
        options, macs, (error, chosen) = data
        where = f"error {error:.3f} at {chosen / macs:.0%} of the MACs"
        return f"Error against MACs of {len(options)} options; chosen: {where}"
    return f"Singular values of the kernel unfolded by {', '.join(data)}"


def _times(axes: Any, data: Sequence[Sequence[float]]) -> None:
    """Draw repeated measurements as points, outliers as crosses and medians as lines."""
    largest = max(max(s) for s in data)
    unit, scale = next((u, f) for u, f in (("µs", 1e6), ("ms", 1e3), ("s", 1.0))
                       if largest * f < 1e3 or u == "s")  # fmt: skip
    for row, (samples, colour) in enumerate(zip(data, (OLD, ONE))):
        times, far = scale * np.array(samples), np.array(outliers(samples))
        shift = 0.18 * np.sin(2.4 * np.arange(len(times)))  # overlapping points are seen
        kwargs = {"color": colour, "linestyle": "none", "markersize": 3}
        axes.plot(times[~far], (row + shift)[~far], marker="o", alpha=0.6, **kwargs)
        axes.plot(times[far], (row + shift)[far], marker="x", **(kwargs | {"color": TWO}))
        axes.plot([np.median(times)] * 2, [row - 0.35, row + 0.35], color=colour, linewidth=2)
    axes.set(title="Repeated measurements (× outliers)", xlabel=f"{unit} per call", xlim=(0, None))
    axes.set_yticks(range(len(data)), ("before", "after")[: len(data)])
    axes.set_ylim(len(data) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def _front(axes: Any, data: tuple[Sequence[Candidate], float, tuple[float, float]]) -> None:
    """Draw the options of the plan, their Pareto front and the choice."""
    options, macs, (error, chosen) = data
    points = sorted((o.cost.macs / macs, o.error) for o in options)
    best = np.minimum.accumulate([e for _, e in points])
    front = [p for p, b, a in zip(points, best, [np.inf, *best]) if p[1] == b < a]
    axes.plot(*zip(*points), "o", color=ONE, markersize=3, label="option")
    axes.plot(*zip(*front), color=ONE, linewidth=1, label="Pareto front")
    axes.plot(chosen / macs, error, "o", color=TWO, markersize=5, label="chosen")
    axes.set(title="Options", xlabel="MACs / dense", ylabel="relative error", xscale="log")
    axes.set_ylim(0, None)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.minorticks_off()
    axes.legend(loc="upper right")


def _spectrum(axes: Any, data: Mapping[str, Array]) -> None:
    """Draw relative singular values against the share of the full rank."""
    for (name, values), colour, line in zip(
        data.items(), (ONE, TWO, THREE, FOUR), ("-", "--", ":", "-.")
    ):
        last = len(values) - 1
        ranks = thinned(range(last + 1), POINTS)
        axes.plot([r / last for r in ranks], values[ranks], line, color=colour, label=name)
    axes.set(title="Singular values / largest", xlabel="rank / full rank", ylim=(0, 1.02))
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.legend(loc="upper right", title="rows of the unfolding", title_fontsize=7)


_DRAW: dict[str, Any] = {"times": _times, "front": _front, "spectrum": _spectrum}
