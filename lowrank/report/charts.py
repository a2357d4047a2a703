"""Charts of the report as inline SVG, in the colours of its style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from lowrank._typing import Array
from lowrank.core.tables import thinned
from lowrank.selection import Candidate

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 38, 20, 10, 38  # around the plot
POINTS = 48  # per curve
#: Unfoldings in the order of the style sheet's colours.
CURVES = ("outputs", "inputs", "one axis", "taps")

Position = Callable[[float], float]
Format = Callable[[float], str]


def front(options: Sequence[Candidate], macs: float, chosen: tuple[float, float]) -> str:
    """Draw error against MACs of the options of a layer.

    Parameters
    ----------
    options : sequence of Candidate
        The layer as it came among them.
    macs : float
        Of the layer as it came.
    chosen : (float, float)
        Error and MACs of the choice.

    Returns
    -------
    str
        ``<svg>`` element.

    Examples
    --------
    >>> from lowrank import Cost
    >>> from lowrank.report.charts import front
    >>> from lowrank.selection import Candidate
    >>> dense = Candidate("dense", "", (), 0.0, 0.0, Cost(8, 0, 0, 0, 0))
    >>> thin = Candidate("spatial_svd", "h-w", (1,), 0.5, 0.5, Cost(2, 0, 0, 0, 0))
    >>> options = [dense, thin]
    >>> front(options, 8.0, (0.5, 2.0)).count("<circle")
    3
    """
    shares = [max(o.cost.macs / macs, 1e-9) for o in options] or [1.0]
    # Chains that save parameters may need more MACs than the dense layer.
    low, high = min(0.1, *shares), max(1.0, *shares)
    decades = math.log10(high / low)
    top = max(0.1, *(o.error for o in options)) if options else 1.0

    def at(share: float, error: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * math.log10(max(share, low) / low) / decades
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(error / top, 1))

    ticks = [t for n in range(-9, 3) for t in _ticks(n, decades) if low <= t <= high]
    parts = [*_grid(_levels(top), lambda v: at(1, v)[1], lambda v: f"{v:.2g}")]
    parts += _x_ticks(ticks, lambda v: at(v, 0)[0], lambda v: f"{100 * v:g}%")
    parts.append(_axis_title("MACs, share of the dense layer's"))
    best, steps = math.inf, []
    for o in sorted(options, key=lambda o: (o.cost.macs, o.error)):
        if o.error < best:
            steps.append(at(o.cost.macs / macs, o.error))
            best = o.error
    parts.append(_line(steps, "front"))
    for o in options:
        x, y = at(o.cost.macs / macs, o.error)
        rank = f" of rank {','.join(map(str, o.rank))}" if o.rank else ""
        text = f"{o.name}{rank}: error {o.error:.4f}, {o.cost.macs / macs:.1%} of the MACs"
        parts.append(
            f'<circle class="option" cx="{x:.1f}" cy="{y:.1f}" r="3">'
            f"<title>{escape(text)}</title></circle>"
        )
    x, y = at(chosen[1] / macs, chosen[0])
    parts.append(
        f'<circle class="chosen" cx="{x:.1f}" cy="{y:.1f}" r="5.5">'
        f"<title>chosen: error {chosen[0]:.4f}, {chosen[1] / macs:.1%} of the MACs"
        "</title></circle>"
    )
    label = (
        f"Error against MACs of {len(options)} options; chosen: error {chosen[0]:.3f} at "
        f"{chosen[1] / macs:.0%} of the MACs"
    )
    return _svg(parts, label)


def spectrum(curves: Mapping[str, Array]) -> str:
    """Draw relative singular values against the share of the full rank.

    Parameters
    ----------
    curves : mapping of str to ndarray
        Singular values by unfolding, descending from 1.

    Returns
    -------
    str
        ``<svg>`` element.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.report.charts import spectrum
    >>> spectrum({"outputs": np.array([1.0, 0.5, 0.25])}).count("<polyline")
    1
    """

    def at(share: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * share
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (1 - value)

    parts = _grid((0.0, 0.5, 1.0), lambda v: at(0, v)[1], lambda v: f"{v:.2g}")
    parts += _x_ticks((0.0, 0.25, 0.5, 0.75, 1.0), lambda v: at(v, 0)[0], lambda v: f"{v:.0%}")
    parts.append(_axis_title("share of the full rank"))
    for name, values in curves.items():
        last = len(values) - 1
        ranks = thinned(range(last + 1), POINTS)
        points = [at(r / last, float(values[r])) for r in ranks]
        text = f"{name}: {last + 1} singular values"
        parts.append(_line(points, f"curve {_color_class(name)}", text))
    return _svg(parts, f"Singular values of the kernel unfolded by {', '.join(curves)}")


def legend(curves: Iterable[str]) -> str:
    """Return the legend of curves.

    Parameters
    ----------
    curves : iterable of str
        Names of unfoldings.

    Returns
    -------
    str
        ``<ul>`` element.

    Examples
    --------
    >>> from lowrank.report.charts import legend
    >>> legend(["outputs"])
    '<ul class="legend"><li class="c0">outputs</li></ul>'
    """
    items = (f'<li class="{_color_class(name)}">{escape(name)}</li>' for name in curves)
    return f'<ul class="legend">{"".join(items)}</ul>'


def _color_class(name: str) -> str:
    return f"c{CURVES.index(name) if name in CURVES else CURVES.index('one axis')}"


def _svg(parts: Iterable[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _grid(values: Iterable[float], position: Position, label: Format) -> list[str]:
    """Return horizontal grid lines with their labels."""
    return [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{position(v):.1f}" '
        f'y2="{position(v):.1f}"/><text x="{LEFT - 6}" y="{position(v) + 3.5:.1f}" '
        f'text-anchor="end">{label(v)}</text>'
        for v in values
    ]


def _x_ticks(values: Iterable[float], position: Position, label: Format) -> list[str]:
    """Return ticks and labels of the horizontal axis."""
    y = HEIGHT - BOTTOM
    return [
        f'<line class="tick" x1="{position(v):.1f}" x2="{position(v):.1f}" y1="{y}" y2="{y + 4}"/>'
        f'<text x="{position(v):.1f}" y="{y + 16}" text-anchor="middle">{label(v)}</text>'
        for v in values
    ]


def _axis_title(text: str) -> str:
    middle = (LEFT + WIDTH - RIGHT) / 2
    return f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(text)}</text>'


def _line(points: Sequence[tuple[float, float]], class_: str, text: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    title = f"<title>{escape(text)}</title>" if text else ""
    return f'<polyline class="{class_}" points="{path}">{title}</polyline>'


def _ticks(decade: int, decades: float) -> tuple[float, ...]:
    """Return the ticks of one decade: 1, 2 and 5 if there are few decades, else 1."""
    one = 10.0**decade
    return (one, 2 * one, 5 * one) if decades < 2.2 else (one,)


def _levels(top: float) -> list[float]:
    """Return at most six round values from 0 to `top`."""
    step = next(s * 10.0**e for e in range(-3, 2) for s in (1, 2, 5) if top / (s * 10.0**e) <= 5.5)
    return [i * step for i in range(int(top / step + 1e-9) + 1)]
