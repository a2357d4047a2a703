"""The rows of the comparison with other libraries, over time: ours / best peer, and ours alone."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


def cases():
    """The quick rows that have a peer, by kind and name."""
    from .cases import KINDS

    return {
        f"{kind}: {case.name}": case
        for kind, make in KINDS.items()
        for case in make(THREADS, True)
        if kind != "call" and (kind != "threads" or THREADS > 1)
    }


try:
    NAMES = list(cases())
except ImportError:  # an old commit, whose package has not what the cases need
    NAMES = []


class Compared:
    """One row, measured in turns with its peers."""

    params = (NAMES,)
    param_names = ["case"]
    timeout = 300

    def setup(self, name):
        from .libraries import cv2, torch

        if torch is not None:
            torch.set_num_threads(THREADS)
        if cv2 is not None:
            cv2.setNumThreads(THREADS)
        self.work = cases()[name].make()
        self.work.ours()

    def track_ours_over_best_peer(self, name):
        if not self.work.peers:
            return float("nan")
        from .measure import measured

        ours, *others = measured([self.work.ours, *self.work.peers.values()], 0.3)
        return ours / min(others)

    track_ours_over_best_peer.unit = "ours / best peer, less is better"

    def time_ours(self, name):
        self.work.ours()
