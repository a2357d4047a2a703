"""This machine: its processor, its calibration file, and the fork/join latency stored there."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import platformdirs

from lowrank._kernels import _core

VERSION = 6  # of calibration files: coefficients of another version mean nothing

# Latencies that a program must save: threads that wake up late keep others waiting at its barriers.
# Two threads made networks of 160 to 350 us slower by up to 70 us, and one of 420 us faster by 150.
FORK_JOINS = 3

WaitPolicy = Literal["passive", "active"]
WAIT_POLICIES: tuple[WaitPolicy, ...] = ("passive", "active")


def wait_policy() -> WaitPolicy:
    """Return what idle threads of OpenMP do: sleep (passive) or spin (active).

    Without the variable OMP_WAIT_POLICY they spin for a few milliseconds before they sleep.
    """
    is_passive = os.environ.get("OMP_WAIT_POLICY", "").strip().lower() == "passive"
    return "passive" if is_passive else "active"


@functools.cache
def cpu() -> str:
    """Return the name of the processor, with family and model if the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            facts: dict[str, str] = {}
            for line in lines:
                name, _, value = line.partition(":")
                facts.setdefault(name.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    if "CPU part" in facts:  # of ARM, which tells no name
        implementer, part = facts.get("CPU implementer"), facts["CPU part"]
        return f"{platform.machine()}, implementer {implementer}, part {part}"
    if "model name" not in facts:
        return platform.machine()
    return f"{facts['model name']}, family {facts.get('cpu family')}, model {facts.get('model')}"


def calibration_file() -> Path:
    """Return the calibration file of this machine, named by processor, ISA and version."""
    return platformdirs.user_cache_path("lowrank") / _file_name(_core.default_isa())


@functools.cache
def _file_name(isa: str) -> str:
    key = hashlib.sha256(f"{cpu()}|{isa}|{VERSION}".encode()).hexdigest()[:12]
    return f"machine-{key}.json"


@functools.cache
def shipped_calibration() -> str:
    """Return the calibration of the machine on which the package was made, as JSON."""
    return resources.files("lowrank").joinpath("data/machine.json").read_text("utf-8")


def fork_join_seconds() -> float:
    """Return the fork/join latency of a parallel region under the wait policy in force, in seconds.

    It was measured by the calibration of this machine; without one, by that shipped with the
    package: it is the same in every process.
    """
    file = calibration_file()
    try:
        modified = file.stat().st_mtime_ns
    except OSError:
        modified = 0
    return _stored_latencies(file, modified)[wait_policy()]


def least_saving() -> float:
    """Return the seconds that a program must save on several threads to run on them."""
    return FORK_JOINS * fork_join_seconds()


@functools.lru_cache(4)
def _stored_latencies(file: Path, modified: int) -> dict[WaitPolicy, float]:
    """Return the latencies in `file`, last modified at `modified`, or the shipped ones."""
    try:
        return read_latencies(json.loads(file.read_text("utf-8") if modified else "")["fork_join"])
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        # A damaged file is reported where coefficients are read.
        return read_latencies(json.loads(shipped_calibration())["fork_join"])


def read_latencies(entry: Any) -> dict[WaitPolicy, float]:
    """Return fork/join latencies in seconds by wait policy; ValueError unless they are positive."""
    latencies: dict[WaitPolicy, float] = {p: float(entry[p]) for p in WAIT_POLICIES}
    if not all(0 < v < float("inf") for v in latencies.values()):
        raise ValueError(f"fork/join latencies must be positive, got {latencies}")
    return latencies
