"""How calls are timed beside one another, and how a table of them is kept for asv."""

import math
import statistics
import time
from abc import ABC, abstractmethod


def measured(calls: list, seconds: float) -> list[float]:
    """Medians of seconds a call: samples of at least a millisecond, in turns.

    At least five of each; three where they take longer than all the time that was given.
    """
    each, times = [], [[] for _ in calls]
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        each.append(max(1, math.ceil(1e-3 / max(time.perf_counter() - start, 1e-7))))
    begin = time.perf_counter()
    while (past := time.perf_counter() - begin) < seconds or len(times[0]) < (
        5 if past < 5 * seconds else 3
    ):
        for call, n, seen in zip(calls, each, times):
            start = time.perf_counter()
            for _ in range(n):
                call()
            seen.append((time.perf_counter() - start) / n)
    return [statistics.median(t) for t in times]


#: What an older commit raises where it has not what a benchmark needs.
ABSENT = (ImportError, AttributeError, TypeError)


def available(make, *given):
    """What `make` gives, or asv's word for n/a on a commit that cannot."""
    try:
        return make(*given)
    except ABSENT as why:
        raise NotImplementedError(str(why)) from why


def library(name):
    """Whose a peer of `cases` is, by its name there."""
    known = {"torch": "PyTorch", "cv2": "OpenCV", "scipy": "SciPy", "R x cv2": "OpenCV"}
    return next((who for start, who in known.items() if name.startswith(start)), name)


def rows(kinds, wanted=""):
    """The quick rows of `cases` with a word of `wanted` in their names, one thread."""
    from .cases import KINDS

    words = wanted.split("|")
    found = (case for kind in kinds for case in KINDS[kind](1, True))
    return {case.name: case for case in found if any(word in case.name for word in words)}


def names(kinds, wanted=""):
    """Their names."""
    return list(rows(kinds, wanted))


def works(kinds, wanted=""):
    """Recipes of our own calls in them."""
    return {name: lambda case=case: case.make().ours for name, case in rows(kinds, wanted).items()}


def table(kinds, wanted="", seconds=0.25):
    """Seconds of every row by library, the better of a library's ways.

    What a commit or an environment cannot run is left out.  One process measures them all, in
    turns with their peers: asv starts one for each number that it keeps.
    """
    from .libraries import keep_to

    keep_to(1)
    found = {}
    for name, case in rows(kinds, wanted).items():
        try:
            work = case.make()
            calls = [("lowrank", work.ours), *((library(n), c) for n, c in work.peers.items())]
            calls += [("dense layer, PyTorch", c) for c in work.dense.values()]
            times = measured([call for _, call in calls], seconds)
        except ABSENT:
            continue
        row = found[name] = {}
        for (who, _), took in zip(calls, times):
            row[who] = min(took, row.get(who, took))
    return found


class Beside(ABC):
    """Rows of a table: our time over that of a peer; abstract, so that asv passes it over."""

    param_names = ["work", "peer"]

    @abstractmethod
    def setup_cache(self):
        """The table."""

    def setup(self, found, name, peer):
        if peer not in found.get(name, {}):
            raise NotImplementedError

    def track_ours_over_peer(self, found, name, peer):
        return found[name]["lowrank"] / found[name][peer]

    track_ours_over_peer.unit = "ours / peer"


class Alone(ABC):
    """Rows of the same table: our time."""

    param_names = ["work"]

    @abstractmethod
    def setup_cache(self):
        """The table."""

    def setup(self, found, name):
        if name not in found:
            raise NotImplementedError

    def track_time(self, found, name):
        return found[name]["lowrank"]

    track_time.unit = "seconds"
