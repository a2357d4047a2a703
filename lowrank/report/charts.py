"""Small charts as inline SVG; colours are the page's, so that they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from lowrank._typing import Array
from lowrank.core.tables import thinned
from lowrank.selection.candidates import Candidate

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 38, 20, 10, 38  # around the plot
POINTS = 48  # of a curve
#: Unfoldings that have a colour of their own, the same in every picture.
CURVES = ("outputs", "inputs", "one axis", "taps")

Place = Callable[[float], float]
Said = Callable[[float], str]


def front(options: Sequence[Candidate], macs: float, chosen: tuple[float, float]) -> str:
    """Error against multiply-adds of what a layer could have become.

    Parameters
    ----------
    options : sequence of Candidate
        The layer as it came among them.
    macs : float
        Of the layer as it came.
    chosen : (float, float)
        Error and multiply-adds of the choice.

    Returns
    -------
    str
        An ``<svg>``.

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
    low, high = min(0.1, *shares), max(1.0, *shares)  # what saves parameters may take more work
    decades = math.log10(high / low)
    top = max(0.1, *(o.error for o in options)) if options else 1.0

    def at(share: float, error: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * math.log10(max(share, low) / low) / decades
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(error / top, 1))

    ticks = [t for n in range(-9, 3) for t in _ticks(n, decades) if low <= t <= high]
    parts = [*_grid(_levels(top), lambda v: at(1, v)[1], lambda v: f"{v:.2g}")]
    parts += _under(ticks, lambda v: at(v, 0)[0], lambda v: f"{100 * v:g}%")
    parts.append(_axis_title("multiply-adds, share of the layer's"))
    best, steps = math.inf, []
    for o in sorted(options, key=lambda o: (o.cost.macs, o.error)):
        if o.error < best:
            steps.append(at(o.cost.macs / macs, o.error))
            best = o.error
    parts.append(_line(steps, "front"))
    for o in options:
        x, y = at(o.cost.macs / macs, o.error)
        rank = f" of rank {','.join(map(str, o.rank))}" if o.rank else ""
        said = f"{o.name}{rank}: error {o.error:.4f}, {o.cost.macs / macs:.1%} of the multiply-adds"
        parts.append(
            f'<circle class="option" cx="{x:.1f}" cy="{y:.1f}" r="3">'
            f"<title>{escape(said)}</title></circle>"
        )
    x, y = at(chosen[1] / macs, chosen[0])
    parts.append(
        f'<circle class="chosen" cx="{x:.1f}" cy="{y:.1f}" r="5.5">'
        f"<title>chosen: error {chosen[0]:.4f}, {chosen[1] / macs:.1%} of the multiply-adds"
        "</title></circle>"
    )
    label = (
        f"Error against multiply-adds of {len(options)} options; chosen: error {chosen[0]:.3f} at "
        f"{chosen[1] / macs:.0%} of the multiply-adds"
    )
    return _svg(parts, label)


def spectrum(curves: Mapping[str, Array]) -> str:
    """Singular values over the largest, against the share of the full rank.

    Parameters
    ----------
    curves : mapping of str to ndarray
        By unfolding; values from 1 down.

    Returns
    -------
    str
        An ``<svg>``.

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
    parts += _under((0.0, 0.25, 0.5, 0.75, 1.0), lambda v: at(v, 0)[0], lambda v: f"{v:.0%}")
    parts.append(_axis_title("rank, share of the full one"))
    for name, values in curves.items():
        last = len(values) - 1
        kept = thinned(range(last + 1), POINTS)
        points = [at(r / last, float(values[r])) for r in kept]
        parts.append(_line(points, f"curve {_colour(name)}", f"{name}: {last + 1} singular values"))
    return _svg(parts, f"Singular values of the kernel unfolded by {', '.join(curves)}")


def legend(curves: Iterable[str]) -> str:
    """Names of curves beside their colours.

    Parameters
    ----------
    curves : iterable of str

    Returns
    -------
    str
        A ``<ul>``.

    Examples
    --------
    >>> from lowrank.report.charts import legend
    >>> legend(["outputs"])
    '<ul class="legend"><li class="c0">outputs</li></ul>'
    """
    items = (f'<li class="{_colour(name)}">{escape(name)}</li>' for name in curves)
    return f'<ul class="legend">{"".join(items)}</ul>'


def _colour(name: str) -> str:
    return f"c{CURVES.index(name) if name in CURVES else CURVES.index('one axis')}"


def _svg(parts: Iterable[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _grid(values: Iterable[float], place: Place, said: Said) -> list[str]:
    """Lines across, each with its value to the left."""
    return [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place(v):.1f}" '
        f'y2="{place(v):.1f}"/><text x="{LEFT - 6}" y="{place(v) + 3.5:.1f}" '
        f'text-anchor="end">{said(v)}</text>'
        for v in values
    ]


def _under(values: Iterable[float], place: Place, said: Said) -> list[str]:
    """Values below the plot."""
    y = HEIGHT - BOTTOM
    return [
        f'<line class="tick" x1="{place(v):.1f}" x2="{place(v):.1f}" y1="{y}" y2="{y + 4}"/>'
        f'<text x="{place(v):.1f}" y="{y + 16}" text-anchor="middle">{said(v)}</text>'
        for v in values
    ]


def _axis_title(text: str) -> str:
    middle = (LEFT + WIDTH - RIGHT) / 2
    return f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(text)}</text>'


def _line(points: Sequence[tuple[float, float]], look: str, said: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    title = f"<title>{escape(said)}</title>" if said else ""
    return f'<polyline class="{look}" points="{path}">{title}</polyline>'


def _ticks(decade: int, decades: float) -> tuple[float, ...]:
    """Of one decade: more of them where there are few decades."""
    one = 10.0**decade
    return (one, 2 * one, 5 * one) if decades < 2.2 else (one,)


def _levels(top: float) -> list[float]:
    """A few round values from 0 up to `top`."""
    step = next(s * 10.0**e for e in range(-3, 2) for s in (1, 2, 5) if top / (s * 10.0**e) <= 5.5)
    return [i * step for i in range(int(top / step + 1e-9) + 1)]
