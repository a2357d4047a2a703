"""Benchmarks of lowrank over its history; lower is better for all of them.

A suite is a module in SUITES.  Its WORK maps names to recipes of timed calls, its TRACKED maps
names to functions that return machine-independent numbers; asv, asv_benchmarks.gate and the tests
read both.  The other modules are shared with the comparisons in the parent folder.
"""

import os

SUITES = (
    "kernels", "chains", "programs", "filters", "decompositions", "search", "models", "imports",
    "memory",
)  # fmt: skip

# Several libraries' thread pools share the cores: waiting threads sleep, and NumPy uses one thread.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
