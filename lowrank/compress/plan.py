"""A plan: what every layer is to become, as a table and as a JSON file that people can read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from lowrank import io
from lowrank._typing import Ints
from lowrank.core import tables

VERSION = 1


class Alternative(NamedTuple):
    """One of the options that a layer had; its front is all of them.

    Attributes
    ----------
    name : str
        Family and variant.
    rank : tuple of int
    error : float
        Relative, in the layer's metric.
    macs : float
        Multiply-adds of one example.
    """

    name: str
    rank: Ints
    error: float
    macs: float


@dataclass(frozen=True, slots=True)
class Entry:
    """What one layer is to become.

    Attributes
    ----------
    family, variant, rank : str, str, tuple of int
        ``"dense"`` for a layer that stays.
    error : float
        Relative, in the layer's metric.
    loss : float
        What it does to the network; see :func:`lowrank.compress.options`.
    costs, dense : dict of str to float
        Of one example, of the chain and of the layer as it came: ``"macs"``, ``"params"``,
        ``"bytes"`` and, where times were asked for, ``"seconds"``.
    """

    family: str
    variant: str
    rank: Ints
    error: float
    loss: float
    costs: dict[str, float]
    dense: dict[str, float]

    @property
    def name(self) -> str:
        """Family and variant."""
        return " ".join(filter(None, (self.family, self.variant)))


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What every layer of a network is to become, and what that costs; prints itself as a table.

    Attributes
    ----------
    layers : dict of str to Entry
        In the order in which they run.
    limits : dict of str to float
        What was asked for, in absolute amounts.
    loss, gap : float
        Of the choice; the gap is 0 where it is proven to be the best one.
    about : dict
        How it was made: families, seed, whether gradients counted, batch, threads; ``"factored"``
        has, by layer, how far the Kronecker product of its factors is from the second moment.
    fronts : dict of str to tuple of Alternative
        What each layer could have become, the layer as it came among them; nothing is fitted
        by them, and they may be taken out.

    Examples
    --------
    >>> from lowrank.compress import Entry, Plan
    >>> cost = {"macs": 10.0, "params": 5.0, "bytes": 20.0}
    >>> plan = Plan({"conv": Entry("dense", "", (), 0.0, 0.0, cost, cost)}, {}, 0.0, 0.0, {})
    >>> Plan.from_json(plan.to_json()).layers == plan.layers
    True
    """

    layers: dict[str, Entry]
    limits: dict[str, float]
    loss: float
    gap: float
    about: dict[str, Any]
    fronts: dict[str, tuple[Alternative, ...]] = field(default_factory=dict)

    def total(self, axis: str) -> tuple[float, float]:
        """What the plan costs on one axis, and what the network costs as it came.

        Parameters
        ----------
        axis : str
            ``"macs"``, ``"params"``, ``"bytes"`` or ``"seconds"``.

        Returns
        -------
        tuple of float
        """
        kept = [e for e in self.layers.values() if axis in e.costs]
        return sum(e.costs[axis] for e in kept), sum(e.dense[axis] for e in kept)

    @property
    def changed(self) -> list[str]:
        """Layers that do not stay as they are."""
        return [name for name, e in self.layers.items() if e.family != "dense"]

    def rows(self) -> list[tuple[str, ...]]:
        """The table: a head, a row a layer, the total.

        Returns
        -------
        list of tuple of str
        """
        timed = any("seconds" in e.costs for e in self.layers.values())
        rows: list[tuple[str, ...]] = [
            ("layer", "becomes", "rank", "error", "macs", "of", "params", "of")
            + (("predicted", "of") if timed else ())
        ]
        for name, e in self.layers.items():
            rows.append(
                (
                    name,
                    e.name,
                    ",".join(map(str, e.rank)) or "-",
                    f"{e.error:.4f}" if e.family != "dense" else "-",
                    *_pair(e.costs, e.dense, "macs"),
                    *_pair(e.costs, e.dense, "params"),
                    *(_pair(e.costs, e.dense, "seconds") if timed else ()),
                )
            )
        sums = {a: self.total(a) for a in ("macs", "params", "seconds")}
        now, before = ({a: v[i] for a, v in sums.items()} for i in (0, 1))
        rows.append(
            (
                "all", "", "", "", *_pair(now, before, "macs"), *_pair(now, before, "params"),
                *(_pair(now, before, "seconds") if timed else ()),
            )
        )  # fmt: skip
        return rows

    def title(self) -> str:
        """What the table is of.

        Returns
        -------
        str
        """
        asked = ", ".join(f"{a} <= {_said(a, v)}" for a, v in self.limits.items())
        proof = "proven best" if self.gap < 1e-9 else f"within {self.gap:.2%} of the best"
        return (
            f"{len(self.changed)} of {len(self.layers)} layers change; {asked or 'no limit'}; "
            f"loss {self.loss:.4g}, {proof} of the options"
        )

    def __repr__(self) -> str:
        return "\n".join([self.title(), *tables.align_columns(self.rows()), *self.notes()])

    def _repr_html_(self) -> str:
        return tables.html_table(self.rows(), [self.title(), *self.notes()])

    def notes(self) -> list[str]:
        """What is to be said below the table.

        Returns
        -------
        list of str
        """
        said = []
        for axis, limit in self.limits.items():
            if self.total(axis)[0] > limit * (1 + 1e-9):
                over = _said(axis, limit)
                said.append(f"over its limit of {over} {axis}: the plan has been edited")
        if self.about.get("calibrated") and not self.about.get("gradients"):
            said.append(
                "errors count relative to each layer's output: there is no gradient for every layer"
            )
        off = sorted(self.about.get("factored", {}).values())
        if off:
            said.append(
                f"second moments are {off[0]:.0%} to {off[-1]:.0%} away from a product of factors "
                "for channels and axes; errors are in the full ones"
            )
        if self.about.get("wide"):
            said.append(
                f"of {', '.join(self.about['wide'])} only such factors are kept: too wide for more"
            )
        return said

    def to_json(self) -> str:
        """As text, a line a layer, and a line for each of its alternatives.

        Returns
        -------
        str
        """
        entries = [f"{_text(name)}: {_text(asdict(e))}" for name, e in self.layers.items()]
        fronts = [
            f"{_text(name)}: [{_lines(map(_text, front), 3)}]"
            for name, front in self.fronts.items()
        ]
        whole = {
            "version": _text(VERSION),
            "limits": _text(self.limits),
            "loss": _text(self.loss),
            "gap": _text(self.gap),
            "about": _text(self.about),
            "layers": f"{{{_lines(entries, 2)}}}",
            "fronts": f"{{{_lines(fronts, 2)}}}",
        }
        return f"{{{_lines((f'{_text(k)}: {v}' for k, v in whole.items()), 1)}}}"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """From what :meth:`to_json` gave; a layer may be edited by hand.

        Parameters
        ----------
        text : str

        Returns
        -------
        Plan

        Raises
        ------
        ValueError
            If it is no plan.
        """
        try:
            read = json.loads(text)
            if read["version"] != VERSION:
                raise ValueError(f"a plan of version {read['version']}, not {VERSION}")
            layers = {
                str(name): Entry(
                    str(e["family"]), str(e["variant"]), tuple(_whole(r) for r in e["rank"]),
                    float(e["error"]), float(e["loss"]), _numbers(e["costs"]), _numbers(e["dense"]),
                )
                for name, e in read["layers"].items()
            }  # fmt: skip
            limits, about = _numbers(read["limits"]), dict(read["about"])
            fronts = {
                str(name): tuple(
                    Alternative(str(n), tuple(int(r) for r in rank), float(error), float(macs))
                    for n, rank, error, macs in front
                )
                for name, front in dict(read.get("fronts", {})).items()
            }
            return cls(layers, limits, float(read["loss"]), float(read["gap"]), about, fronts)
        except json.JSONDecodeError as why:
            raise ValueError(f"not a plan: no JSON, {why}") from None
        except KeyError as why:
            raise ValueError(f"not a plan: there is no {why}") from None
        except (TypeError, AttributeError, ValueError, OverflowError, RecursionError) as why:
            raise ValueError(f"not a plan: {why}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON.

        Parameters
        ----------
        path : path
        """
        with io.atomic_write(path) as part:
            part.write_text(self.to_json() + "\n", "utf-8")


def _text(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _lines(parts: Iterable[str], indent: int) -> str:
    """Members of an object or a list, each on a line of its own."""
    pad = "\n" + " " * indent
    body = f",{pad}".join(parts)
    return f"{pad}{body}{pad[:-1]}" if body else ""


def _numbers(given: Mapping[str, Any]) -> dict[str, float]:
    """Costs or limits; finite ones, since no sum could be made of others."""
    found = {str(k): float(v) for k, v in given.items()}
    if not all(map(math.isfinite, found.values())):
        raise ValueError(f"{found} are not all finite numbers")
    return found


def _said(axis: str, amount: float) -> str:
    return tables.format_seconds(amount) if axis == "seconds" else tables.format_count(amount)


def _pair(now: Mapping[str, float], before: Mapping[str, float], axis: str) -> tuple[str, str]:
    whole = before[axis]
    return _said(axis, now[axis]), f"{now[axis] / whole:.0%}" if whole else "-"


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(f"a rank must be a whole number, got {value!r}")
    return int(value)
