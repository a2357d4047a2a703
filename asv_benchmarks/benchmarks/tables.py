"""Tables of cases for asv: times beside other libraries, measured by one process.

The classes are abstract, so that asv does not collect them here.
"""

import math
from abc import ABC, abstractmethod

from .cases import KINDS
from .compat import MISSING, require
from .libraries import set_threads
from .timing import measure_seconds


def library(name):
    """Return the library of a peer of `cases`."""
    prefixes = {"torch": "PyTorch", "cv2": "OpenCV", "scipy": "SciPy", "R x cv2": "OpenCV"}
    return next((who for prefix, who in prefixes.items() if name.startswith(prefix)), name)


def select_cases(kinds, words=""):
    """Return the quick cases by name whose names contain one of `words` (separated by |)."""
    found = (case for kind in kinds for case in KINDS[kind](1, True))
    return {c.name: c for c in found if any(word in c.name for word in words.split("|"))}


def case_names(kinds, words=""):
    """Return the names of the selected cases."""
    return list(select_cases(kinds, words))


def case_recipes(kinds, words=""):
    """Return recipes of our own calls of the selected cases."""
    selected = select_cases(kinds, words)
    return {name: lambda case=case: case.make().ours for name, case in selected.items()}


def measure_table(kinds, words="", seconds=0.25):
    """Return seconds by case and library, each library in its fastest configuration.

    Cases that this commit or environment cannot run are left out.  One process measures them all
    interleaved with their peers, since asv starts a process per number.
    """
    set_threads(1)
    table = {}
    for name, case in select_cases(kinds, words).items():
        try:
            work = case.make()
            calls = [("lowrank", work.ours), *((library(n), c) for n, c in work.peers.items())]
            calls += [("dense layer, PyTorch", c) for c in work.dense.values()]
            times = measure_seconds([call for _, call in calls], seconds)
        except MISSING:
            continue
        row = table[name] = {}
        for (who, _), took in zip(calls, times):
            # asv hands the table to other processes; only the median is needed there.
            row[who] = min(float(took), row.get(who, math.inf))
    return table


class PeerRatios(ABC):
    """Our time relative to a peer's, from a table."""

    param_names = ["work", "peer"]

    @abstractmethod
    def setup_cache(self):
        """Return the table."""

    def setup(self, table, name, peer):
        if peer not in table.get(name, {}):
            raise NotImplementedError

    def track_ours_over_peer(self, table, name, peer):
        return table[name]["lowrank"] / table[name][peer]

    track_ours_over_peer.unit = "ours / peer"


class OwnTimes(ABC):
    """Our time, from a table."""

    param_names = ["work"]

    @abstractmethod
    def setup_cache(self):
        """Return the table."""

    def setup(self, table, name):
        if name not in table:
            raise NotImplementedError

    def track_time(self, table, name):
        return table[name]["lowrank"]

    track_time.unit = "seconds"


class Recipes(ABC):
    """Benchmarks of calls that recipes make, by name."""

    timeout = 120

    @property
    @abstractmethod
    def recipes(self):
        """Functions that return a call, by name."""

    def setup(self, name):
        self.call = require(self.recipes[name])
        require(self.call)
