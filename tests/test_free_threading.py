"""Sixteen threads share plans, kernels and caches: same bits, with and without the GIL."""

import subprocess
import sys
import sysconfig
import threading

import numpy as np
import pytest

import lowrank as lr
from lowrank import filters

THREADS = 16
CALLS = 6  # per thread and function


def hammer(functions):
    """Call every function in all threads, which start together; return the results of each."""
    start = threading.Barrier(THREADS)
    results, errors = [[] for _ in functions], []

    def work(me):
        try:
            start.wait()
            for call in range(CALLS * len(functions)):
                i = (call + me) % len(functions)  # different functions at the same time
                results[i].append(np.asarray(functions[i]()).tobytes())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    return results


@pytest.fixture
def functions(rng):
    """Return calls that share one plan per kind of kernel, and calls that make their own plans."""
    w = rng.standard_normal((8, 6, 3, 3)).astype("f4")
    x = rng.standard_normal((2, 6, 24, 24)).astype("f4")
    image = rng.standard_normal((64, 65)).astype("f4")
    picture = rng.integers(0, 256, (64, 65, 3), dtype=np.uint8)
    conv = lr.dense(w, padding=1)
    chain = lr.spatial_svd(conv, 3)
    cp = lr.cp(conv, 2)
    shared = [f.compile((6, 24, 24), threads=n) for f in (conv, chain, cp) for n in (1, 2)]
    return [
        *(lambda run=run: run(x) for run in shared),
        lambda: chain.compile((6, 24, 24), threads=1)(x),
        lambda: filters.correlate(image, filters.gauss(2.0)),
        lambda: filters.correlate(image, filters.box(5)),
        lambda: filters.filter_image(picture, filters.disk(3.5), tolerance=0.05),
        lambda: lr.spatial_svd(conv, 2).stages[0].weight,
        lambda: lr.cp3(conv, 2).stages[0].weight,
    ]


def test_threads_that_share_plans_agree_to_the_bit(functions):
    expected = [np.asarray(f()).tobytes() for f in functions]
    for found, want in zip(hammer(functions), expected):
        assert len(found) == THREADS * CALLS
        assert set(found) == {want}


def test_the_first_calls_of_a_process_may_be_concurrent():
    """Imports at first use, caches and the table of instruction sets are filled by one thread."""
    code = """
import threading, numpy as np
import lowrank as lr
start, found = threading.Barrier(16), []
def work():
    start.wait()
    conv = lr.dense(np.arange(108.0).reshape(4, 3, 3, 3) % 7, padding=1)
    y = lr.spatial_svd(conv, 2).compile((3, 9, 9), threads=2)(np.ones((1, 3, 9, 9)))
    z = lr.filter_image(np.eye(40, dtype="f4"), lr.filters.gauss(1.5))
    found.append((y.tobytes(), z.tobytes()))
threads = [threading.Thread(target=work) for _ in range(16)]
[t.start() for t in threads]
[t.join() for t in threads]
print(len(found), len(set(found)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["16", "1"], done.stderr


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="needs a free build")
def test_the_extension_leaves_the_gil_disabled():
    code = "import sys, lowrank._kernels._core; print(sys._is_gil_enabled())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False", done.stderr
