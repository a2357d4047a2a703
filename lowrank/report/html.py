"""The report as one HTML file without external resources."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
from collections.abc import Iterator
from importlib import resources
from importlib.metadata import version
from typing import Any

from lowrank.core import tables
from lowrank.core.files import atomic_write
from lowrank.report import charts
from lowrank.report.comparison import Comparison, LayerComparison

_AXES = {
    "seconds": "predicted time", "macs": "MACs", "params": "parameters",
    "bytes": "weight bytes",
}  # fmt: skip
NONE = "–"


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
    ImportError
        If Jinja or matplotlib is missing.

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

    Raises
    ------
    ImportError
        If Jinja or matplotlib is missing.

    Examples
    --------
    >>> from lowrank import demo, compress, report
    >>> from lowrank.interop.weights import WeightsModel
    >>> net = WeightsModel(demo.WEIGHTS)
    >>> result = compress.compress_model(net, macs=0.5, families=["spatial_svd"])
    >>> "conv2" in report.render(report.compare(net, result, measure=False))
    True
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup, escape
    except ImportError:
        raise ImportError("reports need Jinja: pip install 'lowrank[cli]'") from None
    folder = resources.files("lowrank.report")
    style, script, page = (
        folder.joinpath(f"report.{end}").read_text("utf-8") for end in ("css", "js", "html.jinja")
    )

    def breaks(text: str) -> Markup:
        """Allow line breaks between the parts of a name."""
        return Markup(re.sub(r"(?<=[/._])(?=\w)", "<wbr>", str(escape(text))))

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["breaks"] = breaks
    columns = _columns(comparison)
    shown = [x for x in comparison.layers if x.changed or x.spectra]
    return environment.from_string(page).render(
        digest=base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode(),
        style=Markup(style),
        script=Markup(script),
        version=version("lowrank"),
        title=f"{comparison.name}, compressed",
        lead=_lead(comparison),
        latency_note=_latency_note(comparison),
        tiles=list(_tiles(comparison)),
        changed=any(x.changed for x in comparison.layers),
        table_note=_table_note(comparison),
        head=[{"text": text, "numeric": i > 1} for i, text in enumerate(columns)],
        rows=[_row(comparison, x) for x in comparison.layers],
        total=_total(comparison),
        details=[_details(x, i, Markup) for i, x in enumerate(shown)],
        notes=list(_notes(comparison)),
    )


def _lead(comparison: Comparison) -> str:
    changed = sum(x.changed for x in comparison.layers)
    budget = ", ".join(_limit(comparison, a, v) for a, v in comparison.plan.limits.items())
    return f"{changed} of {len(comparison.layers)} layers changed; budget: {budget or 'none'}."


def _latency_note(comparison: Comparison) -> str:
    latency = comparison.latency
    spread = f", spread {latency.spread:.0%}" if latency.is_measured else ""
    how = "measured" if latency.is_measured else "predicted"
    what = "the whole network" if latency.is_network else "the layers alone"
    call = _call(latency.batch, latency.runtime, latency.threads)
    return f"Latency: per call of {call}; {how}{spread}, {what}."


def _tiles(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Yield the main numbers: latency, then accuracy, then costs."""
    latency = comparison.latency
    yield _tile("Latency", latency.before, latency.after, "seconds", "faster")
    if comparison.scores is not None:
        before, after = comparison.scores
        yield {
            "label": "Your evaluation", "value": f"{after:.6g}", "detail": f"was {before:.6g}"
        }  # fmt: skip
    for axis, label in _axes(comparison).items():
        if axis != "seconds":
            yield _tile(label[0].upper() + label[1:], *comparison.total(axis), axis)
    measured = comparison.measured()
    if measured is not None:
        label = f"Measured time{comparison.measured_layers or ' of layers'}"
        yield _tile(label, *measured[:2], "seconds", "faster")
    if not math.isnan(comparison.efficiency):
        value = _efficiency(comparison.efficiency)
        yield {"label": "Speed-up efficiency", "value": value, "detail": "measured"}


def _tile(label: str, before: float, after: float, axis: str, less: str = "less") -> dict[str, Any]:
    share = after / before if before else 1.0
    ratio = f"{before / after:.2f}× {less}" if after < before else "not reduced"
    detail = f"{_amount(axis, before)} → {_amount(axis, after)}, {ratio}"
    return {"label": label, "value": f"{share:.0%}", "detail": detail, "share": share}


def _axes(comparison: Comparison) -> dict[str, str]:
    """Return the costs that are shown; weight bytes only if they were limited."""
    return {a: s for a, s in _AXES.items() if a != "bytes" or a in comparison.plan.limits}


def _call(batch: int, runtime: str, threads: int | None) -> str:
    """Describe the call that times are for."""
    number = _plural(threads, "thread") if threads else "all threads"
    return f"{_plural(batch, 'example')} in {runtime} on {number}"


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _columns(comparison: Comparison) -> tuple[str, ...]:
    """Return the headings of the table of layers."""
    costs = [text for axis, text in _axes(comparison).items() if axis != "seconds"]
    return ("layer", "becomes", "time before", "time after", "speed-up", "output error", *costs)


def _table_note(comparison: Comparison) -> str:
    timed = [x for x in comparison.layers if x.measured is not None]
    slower = sum(x.is_slower for x in comparison.layers)
    left = len(comparison.layers) - len(timed)
    call = _call(comparison.batch, comparison.runtime, comparison.threads)
    what = "measured" if not left else "measured, or predicted (~)" if timed else "predicted (~)"
    return (
        f"Times per call of {call}, layer by layer: {what}. Output error: relative, of the fitted "
        "layer. Costs per example, and as a share of before. Headings sort."
        + (f" Slower than the dense layer: {_plural(slower, 'layer')}." if slower else "")
    )


def _row(comparison: Comparison, x: LayerComparison) -> dict[str, Any]:
    """Return the cells of a layer with the values by which they are sorted."""
    before, after = x.measured or (x.before["seconds"], x.after["seconds"])
    about = "" if x.measured else "~"
    rank = f" {','.join(map(str, x.rank))}" if x.rank else ""
    cells = [
        _cell(x.name, x.name),
        _cell(f"{x.becomes}{rank}", x.becomes),
        _cell(about + _time(before), before),
        _cell(about + _time(after), after) | {"mark": x.is_slower},
        _cell(_ratio(before, after) if x.changed else NONE, before / after if after else 0),
        _cell(_number(x.fitted), -1 if x.fitted is None else x.fitted),
    ]
    for axis in _axes(comparison):
        if axis != "seconds":
            cells.append(_cell(_share(axis, x.before[axis], x.after[axis]), x.after[axis]))
    return {"cells": cells, "slower": x.is_slower}


def _cell(text: str, value: object) -> dict[str, Any]:
    return {"text": text, "value": value, "mark": False}


def _total(comparison: Comparison) -> list[str]:
    latencies = [x.measured or (x.before["seconds"], x.after["seconds"]) for x in comparison.layers]
    before, after = (math.fsum(column) for column in zip(*latencies))
    about = "" if all(x.measured for x in comparison.layers) else "~"
    costs = [
        _share(a, *comparison.total(a)) for a in _axes(comparison) if a != "seconds"
    ]  # fmt: skip
    times = [about + _time(before), about + _time(after), _ratio(before, after)]
    return ["all layers", "", *times, "", *costs]


def _details(x: LayerComparison, number: int, markup: Any) -> dict[str, Any]:
    """Return the facts and charts of a layer."""
    facts = [("before", x.dense)]
    if x.changed:
        facts += [
            ("after", x.chain),
            ("output error, planned", _number(x.planned)),
            ("output error, fitted", _number(x.fitted)),
            ("kernel error", _number(x.kernel_error)),
            ("kernel error, lower bound", _number(x.kernel_bound)),
        ]
    facts.append(("predicted time", _change("seconds", x.before["seconds"], x.after["seconds"])))
    if x.measured is not None:
        facts.append(("measured time", _change("seconds", *x.measured)))
        for word, samples in zip(("before", "after"), x.samples):
            far = sum(charts.outliers(samples))
            facts.append((
                f"repeated {word}",
                f"{len(samples)} times, {_time(min(samples))} to {_time(max(samples))}, "
                f"{_plural(far, 'outlier')}",
            ))  # fmt: skip
    if x.changed and not math.isnan(x.efficiency):
        facts.append(("speed-up efficiency", _efficiency(x.efficiency)))
    panels: list[charts.Panel] = []
    if any(x.samples):
        panels.append(("times", [s for s in x.samples if s]))
    if len(x.front) > 1:
        chosen = x.planned or 0.0, x.after["macs"]
        panels.append(("front", (x.front, x.before["macs"], chosen)))
    if x.spectra:
        panels.append(("spectrum", x.spectra))
    chart = markup(charts.draw(panels, f"layer{number}")) if panels else ""
    return {"name": x.name, "short": x.becomes, "facts": facts, "chart": chart}


def _notes(comparison: Comparison) -> Iterator[str]:
    """Yield the definitions of all numbers, and their limits."""
    yield from comparison.notes
    if comparison.batches:
        data = (
            f"Calibration data: {comparison.examples} examples in {comparison.batches} batch"
            f"{'es' if comparison.batches > 1 else ''}. Output "
            "errors are relative errors of a layer's outputs on these data, with respect to the "
            "outputs minus their mean"
        )
        if comparison.plan.about.get("gradients"):
            data += ", each output weighted by its effect on the outputs of the network"
        yield f"{data}. Errors on other data may differ."
    else:
        yield (
            "There were no calibration data: kernels are approximated for white-noise inputs, and "
            "output errors are errors on white noise."
        )
    gap = comparison.plan.gap
    proof = "proven optimal" if gap < 1e-9 else f"within {gap:.2%} of the optimum"
    model = tables.model(comparison.model_error)
    yield (
        "Planned: on inputs of the original network. Fitted: on the inputs that the compressed "
        "network gives the layer, with the bias corrected; dense layers with new weights have "
        "only this error."
    )
    yield (
        "Kernel errors do not depend on the inputs. Lower bound: no chain of that family, variant "
        "and rank has a smaller kernel error, by the singular values of the kernel. A chain fitted "
        "to outputs does not minimise the kernel error."
    )
    yield (
        f"The choice is {proof} over the options in the charts, a selection of all candidates; its "
        f"estimated loss is {comparison.plan.loss:.4g}."
    )
    yield (
        f"Predicted times come from the performance model ({model}). Measured times of layers are "
        "medians of repeated measurements before and after in alternation, as in a network of the "
        "runtime, without what runs between layers; the latency includes it if the whole network "
        "was measured. Spread: interquartile range over median. Outliers: more than 1.5 "
        "interquartile ranges beyond the quartiles."
    )
    yield "Other layers, such as pooling or normalisation, and layers left out are not counted."
    yield (
        "Spectra are those of the kernels, groups combined. A curve that falls early belongs to a "
        "kernel of low rank in that unfolding."
    )
    if not math.isnan(comparison.efficiency):
        yield (
            "Speed-up efficiency: log(speed-up) / log(MAC ratio), measured. 100%: time falls as "
            "much as MACs; 0%: it does not fall; negative: slower than before."
        )
    if comparison.scores is not None:
        yield "Your evaluation: the number that your function returned for each file."


def _limit(comparison: Comparison, axis: str, amount: float) -> str:
    whole = comparison.plan.total(axis)[1]
    share = f" ({amount / whole:.0%})" if whole else ""
    return f"{_AXES.get(axis, axis)} ≤ {_amount(axis, amount)}{share}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _time(seconds: float) -> str:
    return tables.format_seconds(seconds).replace("us", "µs")


def _amount(axis: str, amount: float) -> str:
    return _time(amount) if axis == "seconds" else tables.format_count(amount)


def _share(axis: str, before: float, after: float) -> str:
    share = f" {after / before:.0%}" if before else ""
    return f"{_amount(axis, after)}{share}"


def _change(axis: str, before: float, after: float) -> str:
    return f"{_amount(axis, before)} → {_share(axis, before, after)}"


def _efficiency(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:.0%}"


def _ratio(before: float, after: float) -> str:
    return f"{before / after:.2f}×" if after else NONE
