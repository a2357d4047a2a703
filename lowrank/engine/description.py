"""Tables of planned operations: algorithm, predicted error, MACs and measured time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lowrank._typing import Ints
from lowrank.core.cost import stage_costs
from lowrank.core.stage import Stage
from lowrank.core.tables import align_columns, format_count, format_seconds
from lowrank.engine import StepProfile

NAME_WIDTH = 30


class OperationRow(NamedTuple):
    """Row of a table; a name of several lines takes as many."""

    name: str
    algorithm: str = ""
    error: str = ""
    macs: str = ""


class PlannedStage(NamedTuple):
    """Name of a stage in profiles, shape of its weights, and its MACs per example."""

    name: str
    weight_shape: Ints
    macs: int


def planned_stages(stages: Sequence[Stage], shape: Ints, copies: int) -> tuple[PlannedStage, ...]:
    """Return the stages of a chain that filters `copies` interleaved inputs of `shape`."""
    return tuple(
        PlannedStage(stage_name(n, s.weight.shape), s.weight.shape, copies * cost.macs)
        for n, (s, cost) in enumerate(zip(stages, stage_costs(stages, shape)))
    )


def stage_name(number: int, weight_shape: Ints) -> str:
    """Return the name of a stage in profiles."""
    return f"{number}: {'x'.join(map(str, weight_shape))}"


def planes_rows(stages: Iterable[PlannedStage]) -> list[OperationRow]:
    """Return the rows of stages that kernels on planes compute."""
    kinds = ("depthwise" if s.weight_shape[1] == 1 else "dense" for s in stages)
    return [OperationRow(s.name, k, "", format_count(s.macs)) for s, k in zip(stages, kinds)]


def add_times(
    rows: Sequence[OperationRow], profile: Iterable[StepProfile]
) -> tuple[list[OperationRow], list[float]]:
    """Return rows and their seconds: of the stages, then of each other kind of step."""
    seconds = {row.name: 0.0 for row in rows}
    for step in profile:
        key = step.stage if step.step == "compute" and step.stage in seconds else step.step
        seconds[key] = seconds.get(key, 0.0) + step.seconds
    others = [OperationRow(name) for name in list(seconds)[len(rows) :]]
    return [*rows, *others], list(seconds.values())


def operation_table(
    rows: Sequence[OperationRow], seconds: Sequence[float] | None = None, title: str = "operation"
) -> str:
    """Return a table of operations; with their seconds, also the shares of their sum.

    Long names lose their beginning, which operations of a network share.
    """
    head = (title, "algorithm", "error", "MACs")
    table: list[tuple[str, ...]] = [head if seconds is None else (*head, "time", "share")]
    total = sum(seconds or ()) or 1.0
    for i, row in enumerate(rows):
        *lines, name = row.name.split("\n")
        table += [(line, *[""] * (len(table[0]) - 1)) for line in lines]
        if len(name) > NAME_WIDTH:
            name = f"...{name[3 - NAME_WIDTH :]}"
        times = () if seconds is None else (format_seconds(seconds[i]), f"{seconds[i] / total:.1%}")
        table.append((name, *row[1:], *times))
    if seconds is not None:
        table.append(("total", "", "", "", format_seconds(total), "100.0%"))
    return "\n".join(align_columns(table))
