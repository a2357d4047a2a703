"""The page itself: one file without scripts, pictures or anything that is fetched."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.metadata import version

from lowrank import io
from lowrank.core import tables
from lowrank.report import charts
from lowrank.report.facts import Facts, LayerFacts
from lowrank.report.style import STYLE


def save(facts: Facts, path: str | os.PathLike[str]) -> None:
    """Write the page, whole or not at all.

    Parameters
    ----------
    facts : Facts
    path : path

    Raises
    ------
    OSError
        If it cannot be written.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from lowrank import demo, compress, report
    >>> from lowrank.interop.weights import WeightsModel
    >>> net = WeightsModel(demo.WEIGHTS)
    >>> small = compress.compress_model(net, macs=0.5, families=["spatial_svd"])
    >>> path = pathlib.Path(tempfile.mkdtemp(), "report.html")
    >>> report.save(report.gather(net, small, measured=False), path)
    >>> path.read_text("utf-8")[:15]
    '<!doctype html>'
    """
    with io.atomic_write(path) as part:
        part.write_text(page(facts), "utf-8")


def page(facts: Facts) -> str:
    """The page as text.

    Parameters
    ----------
    facts : Facts
        From :func:`gather`.

    Returns
    -------
    str
        HTML.

    Examples
    --------
    >>> from lowrank import demo, compress, report
    >>> from lowrank.interop.weights import WeightsModel
    >>> net = WeightsModel(demo.WEIGHTS)
    >>> small = compress.compress_model(net, macs=0.5, families=["spatial_svd"])
    >>> "conv2" in report.page(report.gather(net, small, measured=False))
    True
    """
    title = f"{facts.name}, compressed"
    changed = sum(x.changed for x in facts.layers)
    asked = ", ".join(_limit(facts, a, v) for a, v in facts.plan.limits.items())
    lead = f"{changed} of {len(facts.layers)} layers changed; asked for: {asked or 'no limit'}."
    sections = (
        _summary(facts),
        _costs(facts),
        _errors(facts),
        _times(facts),
        _cards(facts),
        _notes(facts),
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
    "macs": "multiply-adds", "params": "parameters", "bytes": "bytes of weights",
    "seconds": "predicted time",
}  # fmt: skip


def _summary(facts: Facts) -> str:
    tiles = []
    if facts.scores is not None:
        before, after = facts.scores
        tiles.append(_plain_tile("Your evaluation", f"{after:.6g}", f"was {before:.6g}"))
    tiles += [_tile(label.capitalize(), *facts.total(axis), axis) for axis, label in _AXES.items()]
    timed = facts.timed()
    if timed is not None:
        tiles.append(_tile(f"Measured time{facts.measured_layers}", *timed[:2], "seconds"))
    if facts.realised is not None:
        said = "of the speed that fewer multiply-adds promise was measured"
        tiles.append(_plain_tile("Realised", f"{facts.realised:.0%}", said))
    return _section("Summary", "summary", f'<div class="tiles">{"".join(tiles)}</div>')


def _tile(label: str, before: float, after: float, axis: str) -> str:
    share = after / before if before else 1.0
    bar = f'<span class="bar"><span style="width:{100 * min(share, 1):.1f}%"></span></span>'
    fewer = f"{before / after:.2f} times less" if after < before else "no less"
    said = f"{_said(axis, before)} → {_said(axis, after)}"
    return (
        f'<div class="tile"><h3>{escape(label)}</h3><p class="big">{share:.0%}</p>{bar}'
        f"<p>{escape(said)}</p><p>{fewer}</p></div>"
    )


def _plain_tile(label: str, value: str, said: str) -> str:
    return (
        f'<div class="tile"><h3>{escape(label)}</h3><p class="big">{escape(value)}</p>'
        f"<p>{escape(said)}</p></div>"
    )


def _costs(facts: Facts) -> str:
    """What every layer was and is, and what that saves."""
    head = ("layer", "becomes", "rank", *_AXES.values())
    rows = []
    for x in facts.layers:
        becomes = _text(x.becomes) + (_small(x.chain) if x.changed else "")
        rank = ", ".join(map(str, x.rank)) or "–"
        pairs = [_pair(a, x.before[a], x.after[a]) for a in _AXES]
        rows.append((_text(x.name) + _small(x.dense), becomes, rank, *pairs))
    last = ("all", "", "", *(_pair(a, *facts.total(a)) for a in _AXES))
    caption = "Of one example, before → after, and the share that is left; time as predicted."
    body = _table("costs", caption, head, rows, last, words=3)
    return _section("What was gained, layer by layer", "costs", body)


def _errors(facts: Facts) -> str:
    """What every layer paid."""
    changed = [x for x in facts.layers if x.changed]
    if not changed:
        return _section("What was paid", "errors", "<p>No layer changed.</p>")
    head = ("layer", "becomes", "output error, planned", "output error, fitted", "kernel error",
            "kernel error, at least")  # fmt: skip
    rows = [
        (_text(x.name), _text(x.becomes), *(_number(v) for v in
         (x.planned, x.fitted, x.kernel_error, x.kernel_bound)))
        for x in changed
    ]  # fmt: skip
    caption = "Relative errors. The notes below say of what."
    return _section("What was paid", "errors", _table("errors", caption, head, rows, words=2))


def _times(facts: Facts) -> str:
    """Predicted beside measured, as bars of one scale and as numbers."""
    found = facts.timed()
    timed = [x for x in facts.layers if x.measured is not None]
    if found is None:
        said = (
            "<p>No layer that changed was measured; predicted times stand in the tables above.</p>"
        )
        return _section("Time, predicted and measured", "times", said)
    whole = max(max(x.measured or (0.0,)) for x in timed)
    head = ("layer", "measured, before and after", "measured", "predicted", "faster", "realised")
    rows = [_timed_row(x, whole) for x in timed]
    predicted = [math.fsum(getattr(x, w)["seconds"] for x in timed) for w in ("before", "after")]
    last = (
        "all", "", f"{_time(found[0])} → {_time(found[1])}",
        f"{_time(predicted[0])} → {_time(predicted[1])}", _times_as(found[0], found[1]),
        "–" if facts.realised is None else f"{facts.realised:.0%}",
    )  # fmt: skip
    left = len(facts.layers) - len(timed)
    caption = (
        f"Of one example, batch of {facts.batch}, "
        f"{'all' if facts.threads is None else facts.threads} threads, on lowrank's engine, layer "
        "by layer. Bars: grey before, coloured after. Realised: how many times faster over how "
        "many times fewer multiply-adds."
        + (f" {left} layers would have taken too much time or memory to measure." if left else "")
    )
    body = _table("times", caption, head, rows, last, words=2)
    return _section("Time, predicted and measured", "times", body)


def _timed_row(x: LayerFacts, whole: float) -> tuple[str, ...]:
    before, after = x.measured or (0.0, 0.0)
    bars = "".join(
        f'<span class="bar {look}"><span style="width:{100 * t / whole:.2f}%"></span></span>'
        for look, t in (("before", before), ("after", after))
    )
    faster, realised = _times_as(before, after), "–"
    if x.changed and after and x.after["macs"] and x.before["macs"]:
        realised = f"{(before / after) / (x.before['macs'] / x.after['macs']):.0%}"
    if not x.changed:
        faster = "–"
    return (
        _text(x.name), bars, f"{_time(before)} → {_time(after)}",
        f"{_time(x.before['seconds'])} → {_time(x.after['seconds'])}", faster, realised,
    )  # fmt: skip


def _cards(facts: Facts) -> str:
    """The front and the spectra of every layer."""
    cards = []
    for x in facts.layers:
        parts = []
        if len(x.front) > 1:
            chosen = (x.planned or 0.0, x.after["macs"])
            parts.append("<h4>Error against multiply-adds</h4>")
            parts.append(charts.front(x.front, x.before["macs"], chosen))
        if x.spectra:
            parts.append("<h4>Singular values, over the largest</h4>")
            parts.append(charts.spectrum(x.spectra))
            parts.append(charts.legend(x.spectra))
        if parts:
            cards.append(
                f'<article class="card"><h3>{_text(x.name)}</h3>{"".join(parts)}</article>'
            )
    if not cards:
        return ""
    key = (
        '<ul class="legend"><li class="option">an option</li><li class="front">what nothing beats'
        '</li><li class="chosen">chosen</li></ul>'
    )
    title = "What every layer could have become"
    return _section(title, "fronts", f'{key}<div class="cards">{"".join(cards)}</div>')


def _notes(facts: Facts) -> str:
    """What the numbers are, and what they are not."""
    if facts.batches:
        data = (
            f"Calibration data: {facts.examples} examples in {facts.batches} batch"
            f"{'es' if facts.batches > 1 else ''}. Output "
            "errors are of the layer's outputs for its inputs from these data, relative to those "
            "outputs less their mean"
        )
        if facts.plan.about.get("gradients"):
            data += ", each output weighted by what it does to the outputs of the whole network"
        data += ". Other data may give other errors."
    else:
        data = (
            "There were no calibration data: kernels are approximated as for white noise, and "
            "an output error is one for inputs that are such noise."
        )
    gap = facts.plan.gap
    proof = "proven to be the best" if gap < 1e-9 else f"within {gap:.2%} of the best"
    model = tables.model(facts.model_error)
    notes = [
        *facts.notes,
        data,
        "Planned: for inputs of the original network. Fitted: for the inputs that the compressed "
        "network gives the layer, biases made up for; dense layers with new weights have only "
        "that.",
        "Kernel errors take no account of the inputs. At least: no chain of that family, "
        "form and rank has a smaller one, by the singular values of the kernel. A chain that was "
        "fitted to outputs is further from the kernel than it would have to be.",
        f"The choice is {proof} of the options in the pictures, which are few of all that there "
        f"are; its estimated loss is {facts.plan.loss:.4g}.",
        f"Predicted times come from a model of the machine: {model}. Measured ones are medians of "
        "runs, each layer alone with its input in memory; the network elsewhere, or in another "
        "engine, takes other times.",
        "What was not counted: layers of other kinds, such as pooling or norms, and layers that "
        "were left out.",
        "Spectra are of the kernels, groups together. A curve that falls early is a kernel that "
        "can be cut there.",
    ]
    if facts.scores is not None:
        notes.append("Your evaluation: the number that your function gave for either file.")
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
    """Cells are HTML already; the first columns are words, the others numbers."""

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
    """Escaped; a long name may be broken where it has parts."""
    return re.sub(r"(?<=[/._])(?=\w)", "<wbr>", escape(text))


def _limit(facts: Facts, axis: str, amount: float) -> str:
    whole = facts.plan.total(axis)[1]
    share = f" ({amount / whole:.0%})" if whole else ""
    return f"{_AXES.get(axis, axis)} ≤ {_said(axis, amount)}{share}"


def _small(text: str) -> str:
    return f"<small>{escape(text)}</small>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _time(seconds: float) -> str:
    return tables.format_seconds(seconds).replace("us", "µs")


def _said(axis: str, amount: float) -> str:
    return _time(amount) if axis == "seconds" else tables.format_count(amount)


def _pair(axis: str, before: float, after: float) -> str:
    if before == after:
        return f'{_said(axis, after)} <span class="share">100%</span>'
    share = f'<span class="share">{after / before:.0%}</span>' if before else ""
    return f"{_said(axis, before)} → {_said(axis, after)} {share}"


def _times_as(before: float, after: float) -> str:
    return f"{before / after:.2f}×" if after else "–"
