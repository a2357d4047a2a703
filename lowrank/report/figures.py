"""Figures with matplotlib: error against cost, spectra, and filters with their chains."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.core import chain_algebra, tables
from lowrank.core.files import atomic_write
from lowrank.factorization import Factorization
from lowrank.families import FAMILIES
from lowrank.selection import Candidate, Frontier

_DENSE_LOOK = ("#555555", "*")  # color and marker

#: Metadata without dates and versions, so that equal data give equal files.
METADATA: dict[str, dict[str, Any]] = {
    ".svg": {"Date": None},
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "ModDate": None},
}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "lowrank",
    "pdf.fonttype": 42,
}
_AXIS_LABELS = {
    "seconds": "predicted seconds",
    "bytes": "bytes of weights",
    "macs": "MACs",
    "params": "parameters",
    "traffic": "memory traffic in elements, unfused",
    "fused": "memory traffic in elements, fused",
    "peak": "peak memory in elements",
}


def check_path(path: str | os.PathLike[str]) -> Path:
    """Check that a figure can be written to a path, before the figure is computed.

    Parameters
    ----------
    path : path
        ``.svg``, ``.png`` or ``.pdf``.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        If the file name has another ending.
    OSError
        If the folder does not exist.

    Examples
    --------
    >>> from lowrank.report.figures import check_path
    >>> check_path("front.svg").suffix
    '.svg'
    """
    path = Path(path)
    if path.suffix.lower() not in METADATA:
        raise ValueError(f"{path} must end in {', '.join(METADATA)}, got {path.suffix!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    return path


def error_against_cost(
    fronts: Sequence[Frontier],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    pick: Candidate | None = None,
) -> None:
    """Draw frontiers into one figure, with colors and markers by family.

    Parameters
    ----------
    fronts : sequence of Frontier
        Frontiers, for example one per family.
    path : path
        ``.svg``, ``.png`` or ``.pdf``.
    title : str
        Title of the figure.
    pick : Candidate, optional
        Candidate to highlight.

    Raises
    ------
    ValueError
        If there are no frontiers, or the file name has an unknown ending.
    ImportError
        If matplotlib is missing.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.report import figures
    >>> front = lowrank.frontier(lowrank.dense(np.ones((8, 8, 3, 3))), (16, 16), ["spatial_svd"])
    >>> path = pathlib.Path(tempfile.mkdtemp(), "front.svg")
    >>> figures.error_against_cost([front], path)
    >>> path.exists()
    True
    """
    path = check_path(path)
    if not fronts:
        raise ValueError("fronts must not be empty")
    axis = fronts[0].axis
    figure, axes = _figure(6.4, 4.2)
    dense = fronts[0].dense.amount(axis)
    curves: dict[tuple[str, str], list[Candidate]] = {}
    for front in fronts:
        for c in front:
            curves.setdefault((c.family, c.variant), []).append(c)
    seen: set[str] = set()
    for (family, _), candidates in curves.items():
        is_dense = family == "dense"
        known = FAMILIES.get(family)
        color, marker = (known.color, known.marker) if known else _DENSE_LOOK
        points = sorted((c.amount(axis) / dense, c.error) for c in candidates)
        axes.plot(
            *zip(*points),
            color=color,
            marker=marker,
            markersize=9 if is_dense else 3.5,
            linewidth=0.8 if len(fronts) > 1 else 0,
            alpha=0.9,
            clip_on=not is_dense,
            label="_" if family in seen else (known.label if known else family),
            zorder=3 if is_dense else 2,
        )
        seen.add(family)
    if pick is not None:
        x, y = pick.amount(axis) / dense, pick.error
        axes.plot(
            [x], [y], "o", markersize=12, fillstyle="none", color="black", clip_on=False,
            zorder=4, label="_",
        )  # fmt: skip
        rank = ",".join(map(str, pick.rank))
        axes.annotate(
            f"{pick.name} {rank}".strip(), (x, y), (9, 9), textcoords="offset points", zorder=4
        )
    axes.set(
        xscale="log",
        xlim=(None, 1.0),
        ylim=(0, None),
        xlabel=f"{_AXIS_LABELS[axis]}, share of the dense kernel's {_format(axis, dense)}",
        ylabel="relative error of the weights",
        title=title,
    )
    ticks = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    low = axes.get_xlim()[0]
    axes.set_xticks([t for t in ticks if t >= low], minor=False)
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:.3g}")
    axes.minorticks_off()
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, path)


def spectrum(
    conv: Factorization | Frontier,
    path: str | os.PathLike[str],
    *,
    title: str = "",
) -> None:
    """Draw the truncation error of every matricisation of a kernel against the rank.

    Parameters
    ----------
    conv : Factorization or Frontier
        A dense stage, or a frontier of one.
    path : path
        ``.svg``, ``.png`` or ``.pdf``.
    title : str
        Title of the figure.

    Raises
    ------
    ValueError
        If the kernel has only one mode, or the file name has an unknown ending.
    ImportError
        If matplotlib is missing.

    Notes
    -----
    The norm of the singular values beyond a rank is the error of the best truncation, a lower
    bound for every chain whose matricisation has that rank.  Groups share one rank.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.report import figures
    >>> conv = lowrank.dense(np.random.default_rng(0).standard_normal((8, 6, 3, 3)))
    >>> path = pathlib.Path(tempfile.mkdtemp(), "spectrum.svg")
    >>> figures.spectrum(conv, path)
    >>> path.exists()
    True
    """
    path = check_path(path)
    if isinstance(conv, Frontier):
        conv = conv.dense.build()
    w = conv.to_dense()
    w = w.reshape(conv.groups, -1, *w.shape[1:])
    letters = "ts" + "dhw"[3 - conv.ndim :]
    long = [m for m, n in enumerate(w.shape[1:], start=1) if n > 1]
    if len(long) < 2:
        raise ValueError(f"kernel must have at least two modes, got shape {w.shape[1:]}")
    figure, axes = _figure(6.4, 4.0)
    for n in range(1, len(long) // 2 + 1):
        for rows in itertools.combinations(long, n):
            if 2 * n == len(long) and long[0] not in rows:
                continue  # the transpose was drawn
            errors = chain_algebra.truncation_errors(w, rows, (0,))
            names = ["".join(letters[m - 1] for m in side)
                     for side in (rows, [m for m in long if m not in rows])]  # fmt: skip
            share = np.arange(len(errors)) / (len(errors) - 1)
            axes.plot(
                share, errors, label=f"{names[0]} | {names[1]}, {len(errors) - 1}", linewidth=1.2,
                linestyle=("-", "--", ":")[n - 1],
            )  # fmt: skip
    axes.set(
        xlim=(0, 1), ylim=(0, 1), title=title, xlabel="share of the full rank",
        ylabel="relative error of the best truncation",
    )  # fmt: skip
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(
        title="rows | columns, full rank", frameon=False, fontsize=8, title_fontsize=8,
        loc="center left", bbox_to_anchor=(1.01, 0.5),
    )  # fmt: skip
    _save(figure, path)


def _format(axis: str, amount: float) -> str:
    return tables.format_seconds(amount) if axis == "seconds" else f"{amount:,.0f}"


def filter_and_chain(
    kernel: Array, chain: Factorization, path: str | os.PathLike[str], *, title: str = ""
) -> None:
    """Draw a 2-D filter, the kernel of its separable chain, and their difference.

    Parameters
    ----------
    kernel : ndarray, shape (h, w)
        Filter.
    chain : Factorization
        Chain from :func:`lowrank.filters.separate`.
    path : path
        ``.svg``, ``.png`` or ``.pdf``.
    title : str
        Title of the figure.

    Raises
    ------
    ValueError
        If the kernel is not 2-D, or the file name has an unknown ending.
    ImportError
        If matplotlib is missing.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from lowrank import filters
    >>> from lowrank.report import figures
    >>> kernel = filters.disk(5.0)
    >>> path = pathlib.Path(tempfile.mkdtemp(), "disk.svg")
    >>> figures.filter_and_chain(kernel, filters.separate(kernel, rank=2), path)
    >>> path.exists()
    True
    """
    path = check_path(path)
    kernel = np.asarray(kernel, np.float64)
    if kernel.ndim != 2:
        raise ValueError(f"kernel must be 2-D, got shape {kernel.shape}")
    product = chain.to_dense()[0, 0]
    figure, axes = _figure(7.0, 2.9, 3)
    largest = float(np.abs(kernel).max()) or 1.0
    shapes = " + ".join("x".join(map(str, s.weight.shape[2:])) for s in chain.stages)
    parts = {
        f"filter, {kernel.shape[0]}x{kernel.shape[1]}": kernel,
        f"chain {shapes}": product,
        f"difference, relative error {chain.error(kernel[None, None]):.2g}": product - kernel,
    }
    for ax, (name, values) in zip(axes, parts.items()):
        image = ax.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest)
        ax.set_title(name, fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
    figure.colorbar(image, ax=list(axes), shrink=0.8)
    figure.suptitle(title)
    _save(figure, path)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """Return a figure outside of pyplot's global state."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("figures need matplotlib: pip install 'lowrank[cli]'") from None
    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height), layout="constrained")
        axes = figure.subplots(1, columns)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context(STYLE), atomic_write(path) as part:
        figure.savefig(part, dpi=150, metadata=METADATA[path.suffix.lower()])
