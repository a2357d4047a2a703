"""Predicted and measured time of chains outside the calibration workloads; one thread.

Uses this machine's coefficients from `lowrank calibrate`, for lowrank and for PyTorch.
"""

import itertools
import sys

import tables

from asv_benchmarks import predicted

RUNTIMES = ("lowrank", "torch")


def rows(here):
    for runtime in RUNTIMES:
        if runtime not in here.coefficients:
            continue
        remaining = predicted.items(True, runtime)
        while some := list(itertools.islice(remaining, predicted.GROUP)):
            for (kind, f, size, n), took in zip(some, predicted.measure(some, runtime, threads=1)):
                p = here.predict(f, size, batch=n, threads=1, runtime=runtime)
                yield runtime, kind, repr(f), f"{p.seconds:.4g}", f"{took:.4g}", tables.spread(took)


def main(target):
    torch = tables.require_torch()
    torch.set_num_threads(1)
    here = tables.calibrated()
    header = ["runtime", "kind", "chain", "predicted", "measured", "spread"]
    tables.write(target, header, rows(here))


if __name__ == "__main__":
    main(sys.argv[1])
