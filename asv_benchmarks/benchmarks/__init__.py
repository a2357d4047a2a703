"""Benchmarks of lowrank over its history; lower is better for every one of them.

A suite is a module of SUITES.  What its times are of lies in its WORK, recipes of calls by name,
and what does not depend on the machine in its TRACKED, functions to numbers; asv_benchmarks.gate
and the tests read the two as well.  The other modules are what suites share with the comparisons
beside this folder.
"""

import os

SUITES = (
    "kernels", "chains", "filters", "decompositions", "search", "models", "imports", "memory",
)  # fmt: skip

# Teams of several libraries share the cores: those that wait should sleep, NumPy's has one thread.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
