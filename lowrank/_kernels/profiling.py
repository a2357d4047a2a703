"""Totals of a profiled run: its records are one lr_step (see lr.h) per thread and step."""

from __future__ import annotations

import struct
from typing import NamedTuple

LR_STEP = struct.Struct("dqq")
STEPS = ("pack", "compute")  # of each stage, numbered as in lr.h; "store" follows, once per chain


class StepTotal(NamedTuple):
    """One step of a stage, summed over threads; "store" has the number of stages as its stage."""

    stage: int
    step: str
    seconds: float
    macs: int
    bytes: int


def step_totals(records: bytes | bytearray, stages: int) -> list[StepTotal]:
    """Sum the records of a run of `stages` stages over its threads."""
    rows = list(LR_STEP.iter_unpack(records))
    count = stages * len(STEPS) + 1
    totals = []
    for k in range(count):
        seconds, macs, moved = (sum(column) for column in zip(*rows[k::count]))
        step = "store" if k == count - 1 else STEPS[k % len(STEPS)]
        totals.append(StepTotal(k // len(STEPS), step, seconds, macs, moved))
    return totals
