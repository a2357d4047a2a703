"""The compression plan: one candidate per layer, as a table and as a readable JSON file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowrank.compress.latency import Latency
from lowrank.compress.model import OmittedLayer
from lowrank.core import tables
from lowrank.core.cost import AXES, Cost
from lowrank.core.files import atomic_write
from lowrank.selection.budget import format_budget, parse_budget
from lowrank.selection.candidates import Candidate
from lowrank.selection.tables import PREDICTED, SLOWER

VERSION = 3


@dataclass(frozen=True, slots=True, eq=False)
class CompressionPlan:
    """Candidate chosen for every layer of a network, and their total cost.

    Prints itself as a table.

    Attributes
    ----------
    layers : dict of str to Candidate
        Chosen candidates, in the order in which the layers run; dense for a layer that stays.
        Costs are per example of the network, seconds per call.  Candidates of a plan that was
        just made carry their fits; those of a plan read from a file do not.
    dense : dict of str to Candidate
        The original layers.
    limits : dict of str to float
        Budgets, as amounts.
    loss, gap : float
        Total loss, and its optimality gap; 0 if the choice is proven optimal.
    about : dict
        Settings: families, seed, whether gradients were used, batch, threads, runtime;
        ``"factored"`` has, per layer, the distance of the Kronecker-factored second moment.
    alternatives : dict of str to tuple of Candidate
        Pareto front of every layer, the dense layer first; for information, may be deleted.
    latency : Latency or None
        Seconds of a call before and after, measured or predicted; None if unknown.
    left_out : dict of str to OmittedLayer
        Layers that were seen and stay as they are, outside of every budget, with the reasons.

    Examples
    --------
    >>> from lowrank import Cost
    >>> from lowrank.compress import CompressionPlan
    >>> from lowrank.selection import Candidate
    >>> dense = Candidate("dense", "", (), 0.0, 0.0, Cost(10, 5, 20, 20, 10), loss=0.0)
    >>> about = {"batch": 1, "seed": 0, "threads": None, "runtime": "lowrank"}
    >>> plan = CompressionPlan({"conv": dense}, {"conv": dense}, {}, 0.0, 0.0, about)
    >>> CompressionPlan.from_json(plan.to_json()).layers["conv"].cost == dense.cost
    True
    """

    layers: dict[str, Candidate]
    dense: dict[str, Candidate]
    limits: dict[str, float]
    loss: float
    gap: float
    about: dict[str, Any]
    alternatives: dict[str, tuple[Candidate, ...]] = field(default_factory=dict)
    latency: Latency | None = None
    left_out: dict[str, OmittedLayer] = field(default_factory=dict)

    def total(self, axis: str) -> tuple[float, float]:
        """Return the total cost on one axis, of the plan and of the original network.

        Parameters
        ----------
        axis : str
            ``"macs"``, ``"params"``, ``"bytes"`` or ``"seconds"``.

        Returns
        -------
        tuple of float
            NaN for seconds that were not predicted.
        """
        return (
            math.fsum(c.amount(axis) for c in self.layers.values()),
            math.fsum(c.amount(axis) for c in self.dense.values()),
        )

    @property
    def changed(self) -> list[str]:
        """Names of the layers that do not stay dense."""
        return [name for name, c in self.layers.items() if not c.is_dense]

    @property
    def slower(self) -> list[str]:
        """Names of the layers whose chain takes longer than the dense layer."""
        return [name for name, c in self.layers.items() if c.is_slower(self.dense[name])]

    def headline(self) -> str:
        """Return the latency before and after, and what is left of the MACs, in one line.

        Returns
        -------
        str
        """
        after, before = self.total("macs")
        macs = f"{after / before:.1%} of the MACs" if before else "no MACs"
        return macs if self.latency is None else f"latency {self.latency}; {macs}"

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table: a head, one row per layer, the total.

        Returns
        -------
        list of tuple of str
        """
        axes = ("seconds", "macs", "params")
        head = ["layer", "becomes", "rank", "error"]
        for axis in axes:
            head += ["time" if axis == "seconds" else axis, "of"]
        rows = [tuple(head)]
        for name, c in self.layers.items():
            dense = self.dense[name]
            cells = [name, c.name, ",".join(map(str, c.rank)) or "-"]
            cells.append("-" if c.is_dense else f"{c.error:.4f}")
            for axis in axes:
                cells += _cost_and_share(axis, c.amount(axis), dense.amount(axis))
            if not (c.is_measured or math.isnan(c.seconds)):
                cells[4] = PREDICTED + cells[4]
            if c.is_slower(dense):
                cells[5] += f" {SLOWER}"
            rows.append(tuple(cells))
        cells = ["all layers", "", "", ""]
        for axis in axes:
            cells += _cost_and_share(axis, *self.total(axis))
        return [*rows, tuple(cells)]

    def title(self) -> str:
        """Return the line above the table.

        Returns
        -------
        str
        """
        budget = ", ".join(f"{a} <= {self._limit(a, v)}" for a, v in self.limits.items())
        proof = ", proven optimal" if self.gap < 1e-9 else f", within {self.gap:.2%} of the optimum"
        if "seconds" in self.limits:  # a limit on layers that the clock of the network corrected
            proof = ""
        loss = f"; loss {self.loss:.4g}{proof}" if self.loss == self.loss else ""
        return (
            f"{len(self.changed)} of {len(self.layers)} layers change; {budget or 'no limit'}{loss}"
        )

    def _limit(self, axis: str, amount: float) -> str:
        """Return a budget as an amount and as a share of what it is a share of."""
        dense = _dense_amount(axis, self.dense, self.latency)
        if not (self.left_out and dense > 0):
            return _format(axis, amount)
        whole = "the network" if axis == "seconds" else "the layers in the table"
        return f"{_format(axis, amount)} ({amount / dense:.0%} of {whole})"

    def _omissions(self) -> list[str]:
        """Return the lines about layers that were left out, those of most MACs first."""
        if not self.left_out:
            return []
        own = self.total("macs")[1]
        whole = own + sum(x.macs or 0 for x in self.left_out.values())
        counted = [x.macs for x in self.left_out.values() if x.macs is not None]
        share = f" with {1 - own / whole:.0%} of the MACs" if counted and whole else ""
        layers = "1 layer" if len(self.left_out) == 1 else f"{len(self.left_out)} layers"
        lines = [f"left out, unchanged and in no budget: {layers}{share}"]
        for name, x in sorted(self.left_out.items(), key=lambda item: -(item[1].macs or 0)):
            of = f" ({x.macs / whole:.1%} of the MACs)" if x.macs and whole else ""
            lines.append(f"{name or 'the model itself'}{of}: {x.reason}")
        return lines

    def __repr__(self) -> str:
        lines = [self.headline(), self.title(), *tables.align_columns(self.rows())]
        return "\n".join([*lines, *self.notes()])

    def _repr_html_(self) -> str:
        return tables.html_table(self.rows(), [self.headline(), self.title(), *self.notes()])

    def notes(self) -> list[str]:
        """Return the lines below the table.

        Returns
        -------
        list of str
        """
        notes = []
        if any(not (c.is_measured or math.isnan(c.seconds)) for c in self.layers.values()):
            is_own = self.about.get("own_coefficients", True)
            theirs = "" if is_own else f"; {tables.model(math.nan)}"
            notes.append(f"{PREDICTED} predicted, not measured{theirs}")
        if self.slower:
            notes.append(
                f"{SLOWER} slower than the dense layer: a budget of seconds leaves such chains out"
            )
        if edited := self.about.get("edited"):
            notes.append(
                f"edited after the choice, so that its loss is unknown: {', '.join(edited)}"
            )
        for axis, limit in self.limits.items():
            if axis != "seconds" and self.total(axis)[0] > limit * (1 + 1e-9):
                notes.append(
                    f"over its limit of {_format(axis, limit)} {axis}: the plan was edited"
                )
        if self.about.get("calibrated") and not self.about.get("gradients"):
            notes.append(
                "losses are relative to each layer's output: not every layer has a gradient"
            )
        distances = sorted(self.about.get("factored", {}).values())
        if distances:
            ends = dict.fromkeys(f"{d:.0%}" for d in (distances[0], distances[-1]))
            notes.append(
                f"second moments are {' to '.join(ends)} away from a "
                "Kronecker product of channel and tap factors; errors are in the full moments"
            )
        if self.about.get("wide"):
            notes.append(
                f"too wide for full second moments, only factors kept: "
                f"{', '.join(self.about['wide'])}"
            )
        if without := self.about.get("without_gradient"):
            notes.append(f"no gradient reaches {', '.join(without)}")
        return [*notes, *self._omissions()]

    def to_json(self) -> str:
        """Return the plan as JSON text, one line per layer and per alternative.

        Returns
        -------
        str
        """
        entries = [
            f"{_text(name)}: "
            + _text(candidate_as_dict(c) | {"dense": candidate_as_dict(self.dense[name])})
            for name, c in self.layers.items()
        ]
        fronts = [
            f"{_text(name)}: [{_lines((_text(candidate_as_dict(c)) for c in front), 3)}]"
            for name, front in self.alternatives.items()
        ]
        omitted = [f"{_text(n)}: {_text(x._asdict())}" for n, x in self.left_out.items()]
        whole = {
            "version": _text(VERSION),
            "limits": _text({a: format_budget(a, v) for a, v in self.limits.items()}),
            "loss": _text(known(self.loss)),
            "gap": _text(known(self.gap)),
            "about": _text(self.about),
            "latency": _text(_latency_as_dict(self.latency)),
            "left_out": f"{{{_lines(omitted, 2)}}}",
            "layers": f"{{{_lines(entries, 2)}}}",
            "alternatives": f"{{{_lines(fronts, 2)}}}",
        }
        return f"{{{_lines((f'{_text(k)}: {v}' for k, v in whole.items()), 1)}}}"

    @classmethod
    def from_json(cls, text: str) -> CompressionPlan:
        """Read what :meth:`to_json` returned; layers may have been edited by hand.

        Parameters
        ----------
        text : str
            JSON text.

        Returns
        -------
        CompressionPlan

        Raises
        ------
        ValueError
            If the text is not a plan.
        """
        try:
            read = json.loads(text)
            if read["version"] != VERSION:
                raise ValueError(f"version must be {VERSION}, got {read['version']}")
            layers = {str(name): read_candidate(e) for name, e in read["layers"].items()}
            dense = {str(name): read_candidate(e["dense"]) for name, e in read["layers"].items()}
            latency = _read_latency(read.get("latency"))
            limits = {
                str(a): parse_budget(a, v).amount(_dense_amount(a, dense, latency))
                for a, v in read["limits"].items()
            }
            alternatives = {
                str(name): tuple(map(read_candidate, front))
                for name, front in dict(read.get("alternatives", {})).items()
            }
            loss, gap = (math.nan if read[k] is None else float(read[k]) for k in ("loss", "gap"))
            about = _read_about(read["about"])
            left_out = {
                str(name): OmittedLayer(
                    str(x["reason"]), None if x["macs"] is None else _integer("macs", x["macs"])
                )
                for name, x in dict(read.get("left_out", {})).items()
            }
            return cls(layers, dense, limits, loss, gap, about, alternatives, latency, left_out)
        except json.JSONDecodeError as why:
            raise ValueError(f"not a plan: not JSON, {why}") from None
        except KeyError as why:
            raise ValueError(f"not a plan: {why} is missing") from None
        except (TypeError, AttributeError, ValueError, OverflowError, RecursionError) as why:
            raise ValueError(f"not a plan: {why}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON.

        Parameters
        ----------
        path : path
            File to write; an existing one is replaced.
        """
        with atomic_write(path) as part:
            part.write_text(self.to_json() + "\n", "utf-8")


def _read_about(read: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a plan was made, with the values that runs and notes need."""
    about = dict(read)
    for name in ("batch", "seed"):
        about[name] = _integer(name, about[name])
    if about["threads"] is not None:
        about["threads"] = _integer("threads", about["threads"])
    about["runtime"] = str(about["runtime"])
    for name, kind in (("factored", dict), ("wide", list), ("without_gradient", list)):
        if not isinstance(about.get(name, kind()), kind):
            raise ValueError(f"{name} must be a {kind.__name__}, got {about[name]!r:.80}")
    return about


def _dense_amount(axis: str, dense: Mapping[str, Candidate], latency: Latency | None) -> float:
    """Return the cost that a share in a plan file refers to."""
    if axis == "seconds" and latency is not None:
        return latency.before
    return math.fsum(c.amount(axis) for c in dense.values())


def _latency_as_dict(latency: Latency | None) -> dict[str, Any] | None:
    """Return a latency as plain values; the spread is None if it was predicted."""
    if latency is None:
        return None
    spread = latency.spread if latency.is_measured else None
    return latency._asdict() | {"spread": spread}


def _read_latency(read: Mapping[str, Any] | None) -> Latency | None:
    if read is None:
        return None
    return Latency(
        _finite(read["before"]), _finite(read["after"]), str(read["runtime"]),
        _integer("batch", read["batch"]), _integer("threads", read["threads"]),
        math.nan if read["spread"] is None else _finite(read["spread"]),
        bool(read["is_network"]),
    )  # fmt: skip


def candidate_as_dict(c: Candidate) -> dict[str, Any]:
    """Return a candidate as plain values, without what is not known."""
    values = {
        "family": c.family, "variant": c.variant, "rank": list(c.rank), "error": c.error,
        "bound": c.bound, "loss": c.loss, "seconds": c.seconds, "is_measured": c.is_measured,
        "itemsize": c.itemsize,
        **{axis: getattr(c.cost, axis) for axis in AXES},
    }  # fmt: skip
    return {k: v for k, v in values.items() if v == v and v != math.inf}


def read_candidate(e: Mapping[str, Any]) -> Candidate:
    """Return the candidate that :func:`candidate_as_dict` wrote, without its weights."""
    return Candidate(
        str(e["family"]),
        str(e["variant"]),
        tuple(_integer("rank", r) for r in e["rank"]),
        _finite(e["error"]),
        _finite(e["bound"]),
        Cost(**{axis: _integer(axis, e[axis]) for axis in AXES}),
        itemsize=_integer("itemsize", e["itemsize"]),
        seconds=_finite(e["seconds"]) if "seconds" in e else math.nan,
        is_measured=bool(e.get("is_measured", False)),
        loss=_finite(e["loss"]) if "loss" in e else math.inf,
    )


def known(number: float) -> float | None:
    """Return a number, or None for NaN, which JSON has no word for."""
    return None if math.isnan(number) else number


def _text(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _lines(parts: Iterable[str], indent: int) -> str:
    """Put the members of an object or a list on lines of their own."""
    pad = "\n" + " " * indent
    body = f",{pad}".join(parts)
    return f"{pad}{body}{pad[:-1]}" if body else ""


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"costs and errors must be finite, got {value!r}")
    return number


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def _format(axis: str, amount: float) -> str:
    return tables.format_seconds(amount) if axis == "seconds" else tables.format_count(amount)


def _cost_and_share(axis: str, cost: float, dense: float) -> list[str]:
    return [_format(axis, cost), f"{cost / dense:.0%}" if dense else "-"]
