"""The report as one HTML file without scripts or external resources."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.metadata import version

from lowrank.core import tables
from lowrank.core.files import atomic_write
from lowrank.report import charts
from lowrank.report.comparison import Comparison, LayerComparison
from lowrank.report.style import STYLE


def save(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Write the report atomically.

    Parameters
    ----------
    comparison : Comparison
        Comparison from :func:`compare`.
    path : path
        Target file.

    Raises
    ------
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from lowrank import demo, compress, report
    >>> from lowrank.interop.weights import WeightsModel
    >>> net = WeightsModel(demo.WEIGHTS)
    >>> result = compress.compress_model(net, macs=0.5, families=["spatial_svd"])
    >>> path = pathlib.Path(tempfile.mkdtemp(), "report.html")
    >>> report.save(report.compare(net, result, measure=False), path)
    >>> path.read_text("utf-8")[:15]
    '<!doctype html>'
    """
    with atomic_write(path) as part:
        part.write_text(render(comparison), "utf-8")


def render(comparison: Comparison) -> str:
    """Return the report as HTML.

    Parameters
    ----------
    comparison : Comparison
        Comparison from :func:`compare`.

    Returns
    -------
    str

    Examples
    --------
    >>> from lowrank import demo, compress, report
    >>> from lowrank.interop.weights import WeightsModel
    >>> net = WeightsModel(demo.WEIGHTS)
    >>> result = compress.compress_model(net, macs=0.5, families=["spatial_svd"])
    >>> "conv2" in report.render(report.compare(net, result, measure=False))
    True
    """
    title = f"{comparison.name}, compressed"
    changed = sum(x.changed for x in comparison.layers)
    budget = ", ".join(_limit(comparison, a, v) for a, v in comparison.plan.limits.items())
    lead = f"{changed} of {len(comparison.layers)} layers changed; budget: {budget or 'none'}."
    sections = (
        _summary(comparison),
        _times(comparison),
        _errors(comparison),
        _costs(comparison),
        _cards(comparison),
        _notes(comparison),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p></header>\n'
        + "\n".join(sections)
        + f"\n<footer>lowrank {escape(version('lowrank'))}</footer>\n</main>\n</body>\n</html>\n"
    )


_AXES = {
    "seconds": "predicted time", "macs": "MACs", "params": "parameters",
    "bytes": "weight bytes",
}  # fmt: skip
_SLOWER = '<strong class="slower">slower</strong>'


def _summary(comparison: Comparison) -> str:
    """Return the main numbers: latency, then accuracy, then costs."""
    latency = comparison.latency
    tiles = [_tile("Latency", latency.before, latency.after, "seconds", "faster")]
    if comparison.scores is not None:
        before, after = comparison.scores
        tiles.append(_plain_tile("Your evaluation", f"{after:.6g}", f"was {before:.6g}"))
    tiles += [
        _tile(label[0].upper() + label[1:], *comparison.total(axis), axis)
        for axis, label in _axes(comparison).items()
        if axis != "seconds"
    ]
    measured = comparison.measured()
    if measured is not None:
        label = f"Measured time{comparison.measured_layers or ' of layers'}"
        tiles.append(_tile(label, *measured[:2], "seconds", "faster"))
    if not math.isnan(comparison.efficiency):
        tiles.append(_plain_tile("Speed-up efficiency", f"{comparison.efficiency:.0%}", "measured"))
    spread = f", spread {latency.spread:.0%}" if latency.is_measured else ""
    how = "measured" if latency.is_measured else "predicted"
    what = "the whole network" if latency.is_network else "the layers alone"
    call = _call(latency.batch, latency.runtime, latency.threads)
    lead = f"Latency: per call of {call}; {how}{spread}, {what}."
    body = f'<p class="lead">{escape(lead)}</p>\n<div class="tiles">{"".join(tiles)}</div>'
    return _section("Summary", "summary", body)


def _axes(comparison: Comparison) -> dict[str, str]:
    """Return the costs that are shown; weight bytes only if they were limited."""
    return {a: s for a, s in _AXES.items() if a != "bytes" or a in comparison.plan.limits}


def _call(batch: int, runtime: str, threads: int | None) -> str:
    """Describe the call that times are for."""
    number = _plural(threads, "thread") if threads else "all threads"
    return f"{_plural(batch, 'example')} in {runtime} on {number}"


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _tile(label: str, before: float, after: float, axis: str, less: str = "less") -> str:
    share = after / before if before else 1.0
    bar = f'<span class="bar"><span style="width:{100 * min(share, 1):.1f}%"></span></span>'
    ratio = f"{before / after:.2f}× {less}" if after < before else "not reduced"
    change = f"{_amount(axis, before)} → {_amount(axis, after)}"
    return (
        f'<div class="tile"><h3>{escape(label)}</h3><p class="big">{share:.0%}</p>{bar}'
        f"<p>{escape(change)}</p><p>{ratio}</p></div>"
    )


def _plain_tile(label: str, value: str, detail: str) -> str:
    return (
        f'<div class="tile"><h3>{escape(label)}</h3><p class="big">{escape(value)}</p>'
        f"<p>{escape(detail)}</p></div>"
    )


def _costs(comparison: Comparison) -> str:
    """Return the table of costs per layer."""
    axes = _axes(comparison)
    head = ("layer", "becomes", "rank", *axes.values())
    rows = []
    for x in comparison.layers:
        becomes = _text(x.becomes) + (_small(x.chain) if x.changed else "")
        rank = ", ".join(map(str, x.rank)) or "–"
        pairs = [_change(a, x.before[a], x.after[a]) for a in axes]
        if x.measured is None and x.is_slower:
            pairs[0] += f" {_SLOWER}"
        rows.append((_text(x.name) + _small(x.dense), becomes, rank, *pairs))
    last = ("all", "", "", *(_change(a, *comparison.total(a)) for a in axes))
    caption = (
        f"Before → after, and after as a share of before. Predicted time: per call of "
        f"{_call(comparison.batch, comparison.runtime, comparison.threads)}; costs: per example."
    )
    body = _table("costs", caption, head, rows, last, words=3)
    return _section("Costs per layer", "costs", body)


def _errors(comparison: Comparison) -> str:
    """Return the table of errors per changed layer."""
    changed = [x for x in comparison.layers if x.changed]
    if not changed:
        return _section("Errors per layer", "errors", "<p>No layer changed.</p>")
    head = ("layer", "becomes", "output error, planned", "output error, fitted", "kernel error",
            "kernel error, lower bound")  # fmt: skip
    rows = [
        (_text(x.name), _text(x.becomes), *(_number(v) for v in
         (x.planned, x.fitted, x.kernel_error, x.kernel_bound)))
        for x in changed
    ]  # fmt: skip
    caption = "Relative errors; the notes below define them."
    return _section("Errors per layer", "errors", _table("errors", caption, head, rows, words=2))


def _times(comparison: Comparison) -> str:
    """Return the table of predicted and measured times."""
    measured = comparison.measured()
    timed = [x for x in comparison.layers if x.measured is not None]
    if measured is None:
        message = "<p>No changed layer was measured; the table of costs has predicted times.</p>"
        return _section("Time, measured and predicted", "times", message)
    longest = max(max(x.measured or (0.0,)) for x in timed)
    head = (
        "layer",
        "measured, before and after",
        "measured",
        "speed-up",
        "efficiency",
        "predicted",
    )
    rows = [_timed_row(x, longest) for x in timed]
    predicted = [math.fsum(getattr(x, w)["seconds"] for x in timed) for w in ("before", "after")]
    last = (
        "all", "", f"{_time(measured[0])} → {_time(measured[1])}", _ratio(*measured[:2]),
        _efficiency(comparison.efficiency),
        f"{_time(predicted[0])} → {_time(predicted[1])}",
    )  # fmt: skip
    left = len(comparison.layers) - len(timed)
    slower = sum(x.is_slower for x in timed)
    call = _call(comparison.batch, comparison.runtime, comparison.threads)
    caption = (
        f"Per call of {call}, layer by layer. Bars: grey before, coloured after."
        + (f" Slower than the dense layer: {_plural(slower, 'layer')}." if slower else "")
        + (f" Too large to measure: {_plural(left, 'layer')}." if left else "")
    )
    body = _table("times", caption, head, rows, last, words=2)
    return _section("Time, measured and predicted", "times", body)


def _timed_row(x: LayerComparison, longest: float) -> tuple[str, ...]:
    before, after = x.measured or (0.0, 0.0)
    bars = "".join(
        f'<span class="bar {class_}"><span style="width:{100 * t / longest:.2f}%"></span></span>'
        for class_, t in (("before", before), ("after", after))
    )
    speed_up = _ratio(before, after) if x.changed else "–"
    return (
        _text(x.name), bars, f"{_time(before)} → {_time(after)}",
        speed_up + (f" {_SLOWER}" if x.is_slower else ""),
        _efficiency(x.efficiency) if x.changed else "–",
        f"{_time(x.before['seconds'])} → {_time(x.after['seconds'])}",
    )  # fmt: skip


def _cards(comparison: Comparison) -> str:
    """Return the Pareto front and the spectra of every layer."""
    cards = []
    for x in comparison.layers:
        parts = []
        if len(x.front) > 1:
            chosen = (x.planned or 0.0, x.after["macs"])
            parts.append("<h4>Error against MACs</h4>")
            parts.append(charts.front(x.front, x.before["macs"], chosen))
        if x.spectra:
            parts.append("<h4>Singular values, relative to the largest</h4>")
            parts.append(charts.spectrum(x.spectra))
            parts.append(charts.legend(x.spectra))
        if parts:
            cards.append(
                f'<article class="card"><h3>{_text(x.name)}</h3>{"".join(parts)}</article>'
            )
    if not cards:
        return ""
    key = (
        '<ul class="legend"><li class="option">an option</li><li class="front">Pareto front'
        '</li><li class="chosen">chosen</li></ul>'
    )
    title = "Options per layer"
    return _section(title, "fronts", f'{key}<div class="cards">{"".join(cards)}</div>')


def _notes(comparison: Comparison) -> str:
    """Return the definitions of all numbers, and their limits."""
    if comparison.batches:
        data = (
            f"Calibration data: {comparison.examples} examples in {comparison.batches} batch"
            f"{'es' if comparison.batches > 1 else ''}. Output "
            "errors are relative errors of a layer's outputs on these data, with respect to the "
            "outputs minus their mean"
        )
        if comparison.plan.about.get("gradients"):
            data += ", each output weighted by its effect on the outputs of the network"
        data += ". Errors on other data may differ."
    else:
        data = (
            "There were no calibration data: kernels are approximated for white-noise inputs, and "
            "output errors are errors on white noise."
        )
    gap = comparison.plan.gap
    proof = "proven optimal" if gap < 1e-9 else f"within {gap:.2%} of the optimum"
    model = tables.model(comparison.model_error)
    notes = [
        *comparison.notes,
        data,
        "Planned: on inputs of the original network. Fitted: on the inputs that the compressed "
        "network gives the layer, with the bias corrected; dense layers with new weights have "
        "only this error.",
        "Kernel errors do not depend on the inputs. Lower bound: no chain of that family, variant "
        "and rank has a smaller kernel error, by the singular values of the kernel. A chain fitted "
        "to outputs does not minimise the kernel error.",
        f"The choice is {proof} over the options in the charts, a selection of all candidates; its "
        f"estimated loss is {comparison.plan.loss:.4g}.",
        f"Predicted times come from the performance model ({model}). Measured times of layers are "
        "medians, as in a network of the runtime, without what runs between layers; the latency "
        "includes it if the whole network was measured. Spread: interquartile range over median.",
        "Other layers, such as pooling or normalisation, and layers left out are not counted.",
        "Spectra are those of the kernels, groups combined. A curve that falls early belongs to a "
        "kernel of low rank in that unfolding.",
    ]
    if not math.isnan(comparison.efficiency):
        notes.append(
            "Speed-up efficiency: log(speed-up) / log(MAC ratio), measured. 100%: time falls as "
            "much as MACs; 0%: it does not fall; negative: slower than before."
        )
    if comparison.scores is not None:
        notes.append("Your evaluation: the number that your function returned for each file.")
    return _section("Notes", "notes", f"<ul>{''.join(f'<li>{escape(n)}</li>' for n in notes)}</ul>")


def _section(title: str, name: str, body: str) -> str:
    return f'<section id="{name}"><h2 id="{name}-title">{escape(title)}</h2>\n{body}\n</section>'


def _table(
    name: str,
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    last: Sequence[str] = (),
    words: int = 1,
) -> str:
    """Return a table of HTML cells; the first `words` columns hold text, the others numbers."""

    def cells(row: Sequence[str]) -> str:
        first = f'<th scope="row">{row[0]}</th>'
        rest = (
            f"<td>{cell}</td>" if i < words else f'<td class="n">{cell}</td>'
            for i, cell in enumerate(row[1:], start=1)
        )
        return f"<tr>{first}{''.join(rest)}</tr>"

    heads = (
        f'<th scope="col"{" class=n" if i >= words else ""}>{escape(h)}</th>'
        for i, h in enumerate(head)
    )
    foot = f"<tfoot>{cells(last)}</tfoot>" if last else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}-title"><table>'
        f"<caption><span>{escape(caption)}</span></caption><thead><tr>{''.join(heads)}</tr></thead>"
        f"<tbody>{''.join(map(cells, rows))}</tbody>{foot}</table></div>"
    )


def _text(text: str) -> str:
    """Escape a name, with line breaks allowed between its parts."""
    return re.sub(r"(?<=[/._])(?=\w)", "<wbr>", escape(text))


def _limit(comparison: Comparison, axis: str, amount: float) -> str:
    whole = comparison.plan.total(axis)[1]
    share = f" ({amount / whole:.0%})" if whole else ""
    return f"{_AXES.get(axis, axis)} ≤ {_amount(axis, amount)}{share}"


def _small(text: str) -> str:
    return f"<small>{escape(text)}</small>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _time(seconds: float) -> str:
    return tables.format_seconds(seconds).replace("us", "µs")


def _amount(axis: str, amount: float) -> str:
    return _time(amount) if axis == "seconds" else tables.format_count(amount)


def _change(axis: str, before: float, after: float) -> str:
    if before == after:
        return f'{_amount(axis, after)} <span class="share">100%</span>'
    share = f'<span class="share">{after / before:.0%}</span>' if before else ""
    return f"{_amount(axis, before)} → {_amount(axis, after)} {share}"


def _efficiency(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"


def _ratio(before: float, after: float) -> str:
    return f"{before / after:.2f}×" if after else "–"
