"""Pictures: error against cost, and a filter with its separable form.  Needs matplotlib."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowrank._typing import Array
from lowrank.core import chain_algebra, tables
from lowrank.factorization import Factorization
from lowrank.selection import Candidate, Frontier

#: A colour and a mark a family: Okabe and Ito's palette, which the colour-blind tell apart,
#: and the mark for those that share a colour.
LOOK = {
    "dense": ("#555555", "*"),
    "channel_svd": ("#0072b2", "o"),
    "channel_svd": ("#0072b2", "s"),
    "spatial_svd": ("#d55e00", "o"),
    "filter_basis": ("#d55e00", "s"),
    "network_decoupling": ("#009e73", "o"),
    "kronecker": ("#e69f00", "o"),
    "cp": ("#cc79a7", "o"),
    "cp3": ("#cc79a7", "s"),
    "jaderberg": ("#cc79a7", "^"),
    "separable_sum": ("#cc79a7", "D"),
    "tucker": ("#56b4e9", "o"),
    "tucker_full": ("#56b4e9", "s"),
    "tucker_cp": ("#56b4e9", "^"),
    "tensor_train": ("#000000", "o"),
}

#: The same data give the same file, byte for byte.
STEADY: dict[str, dict[str, Any]] = {
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
    "macs": "multiply-adds",
    "params": "parameters",
    "traffic": "elements moved, stage by stage",
    "fused": "elements moved, fused",
    "peak": "elements held at once",
}


def check_path(path: str | os.PathLike[str]) -> Path:
    """Check that a picture can be written to a path; before the work, not after it.

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
        If the ending is another one.
    OSError
        If the folder is not there.

    Examples
    --------
    >>> from lowrank.report.figures import check_path
    >>> check_path("front.svg").suffix
    '.svg'
    """
    path = Path(path)
    if path.suffix.lower() not in STEADY:
        raise ValueError(f"{path}: a picture ends in {', '.join(STEADY)}, not {path.suffix!r}")
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
    """Draw frontiers into one picture, each candidate with the look of its family.

    Parameters
    ----------
    fronts : sequence of Frontier
        Such as one of each family, which draws what every family can do.
    path : path
        ``.svg``, ``.png`` or ``.pdf``.
    title : str
        Above the picture.
    pick : Candidate, optional
        Ringed and named.

    Raises
    ------
    ValueError
        If there is nothing to draw, or the ending is unknown.
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
        raise ValueError("there are no frontiers to draw")
    axis = fronts[0].axis
    figure, axes = _figure(6.4, 4.2)
    whole = fronts[0].dense.amount(axis)
    curves: dict[tuple[str, str], list[Candidate]] = {}
    for front in fronts:
        for c in front:
            curves.setdefault((c.family, c.variant), []).append(c)
    seen: set[str] = set()
    for (family, _), candidates in curves.items():
        colour, mark = LOOK[family]
        points = sorted((c.amount(axis) / whole, c.error) for c in candidates)
        axes.plot(
            *zip(*points),
            color=colour,
            marker=mark,
            markersize=9 if family == "dense" else 3.5,
            linewidth=0.8 if len(fronts) > 1 else 0,
            alpha=0.9,
            clip_on=family != "dense",
            label="_" if family in seen else family,
            zorder=3 if family == "dense" else 2,
        )
        seen.add(family)
    if pick is not None:
        x, y = pick.amount(axis) / whole, pick.error
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
        xlabel=f"{_AXIS_LABELS[axis]}, share of the dense kernel's {_said(axis, whole)}",
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
    """Draw what every matricisation of a kernel leaves out at each rank: how separable it is.

    Parameters
    ----------
    conv : Factorization or Frontier
        A dense stage, or a frontier of one.
    path : path
        ``.svg``, ``.png`` or ``.pdf``.
    title : str
        Above the picture.

    Raises
    ------
    ValueError
        If the kernel has one mode only, or the ending is unknown.
    ImportError
        If matplotlib is missing.

    Notes
    -----
    A curve that falls early is a cheap family: the tail of the singular values is the error of
    the best truncation, and no chain whose matricisation has that rank is nearer.  Groups are cut
    at one rank together.

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
        raise ValueError(f"a kernel of shape {w.shape[1:]} has nothing to separate")
    figure, axes = _figure(6.4, 4.0)
    for n in range(1, len(long) // 2 + 1):
        for rows in itertools.combinations(long, n):
            if 2 * n == len(long) and long[0] not in rows:
                continue  # the other half was drawn
            tails = chain_algebra.truncation_errors(w, rows, (0,))
            names = ["".join(letters[m - 1] for m in side)
                     for side in (rows, [m for m in long if m not in rows])]  # fmt: skip
            share = np.arange(len(tails)) / (len(tails) - 1)
            axes.plot(
                share, tails, label=f"{names[0]} | {names[1]}, {len(tails) - 1}", linewidth=1.2,
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


def _said(axis: str, amount: float) -> str:
    return tables.format_seconds(amount) if axis == "seconds" else f"{amount:,.0f}"


def filter_and_form(
    kernel: Array, chain: Factorization, path: str | os.PathLike[str], *, title: str = ""
) -> None:
    """Draw a 2-D filter, its separable form multiplied out, and what is left between them.

    Parameters
    ----------
    kernel : ndarray, shape (h, w)
        The filter.
    chain : Factorization
        From :func:`lowrank.filters.separate`.
    path : path
        ``.svg``, ``.png`` or ``.pdf``.
    title : str
        Above the picture.

    Raises
    ------
    ValueError
        If the kernel has not two axes, or the ending is unknown.
    ImportError
        If matplotlib is missing.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from lowrank import filters
    >>> from lowrank.report import figures
    >>> kernel = filters.disk(5.0)
    >>> path = pathlib.Path(tempfile.mkdtemp(), "disk.svg")
    >>> figures.filter_and_form(kernel, filters.separate(kernel, rank=2), path)
    >>> path.exists()
    True
    """
    path = check_path(path)
    kernel = np.asarray(kernel, np.float64)
    if kernel.ndim != 2:
        raise ValueError(f"only filters over two axes are drawn, got shape {kernel.shape}")
    variant = chain.to_dense()[0, 0]
    figure, axes = _figure(7.0, 2.9, 3)
    largest = float(np.abs(kernel).max()) or 1.0
    passes = " + ".join("x".join(map(str, s.weight.shape[2:])) for s in chain.stages)
    parts = {
        f"filter, {kernel.shape[0]}x{kernel.shape[1]}": kernel,
        f"passes {passes}": variant,
        f"difference, {chain.error(kernel[None, None]):.2g} of it": variant - kernel,
    }
    for ax, (name, values) in zip(axes, parts.items()):
        shown = ax.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest)
        ax.set_title(name, fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
    figure.colorbar(shown, ax=list(axes), shrink=0.8)
    figure.suptitle(title)
    _save(figure, path)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure of its own, which no global state of matplotlib knows of."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'lowrank[cli]'") from None
    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height), layout="constrained")
        axes = figure.subplots(1, columns)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=150, metadata=STEADY[path.suffix.lower()])
