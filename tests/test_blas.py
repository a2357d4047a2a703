"""Fits do not depend on the threads of BLAS, whose number is restored."""

import hashlib
import os
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg  # noqa: F401 - loads a BLAS of its own
from threadpoolctl import threadpool_info, threadpool_limits

import lowrank as lr
from lowrank.core.blas import one_blas_thread

FITS = """
import hashlib
import numpy as np
import lowrank as lr
found = hashlib.sha256()
for seed in range(3):
    conv = lr.dense(np.random.default_rng(seed).standard_normal((48, 40, 3, 3)))
    for family, rank in (("cp", 7), ("tucker", (9, 8)), ("channel_svd", 11)):
        for stage in lr.FAMILIES[family].fit(conv, rank).stages:
            found.update(stage.weight.tobytes())
print(found.hexdigest())
"""


def _threads():
    return {x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"}


@pytest.fixture
def two_threads():
    with threadpool_limits(2, user_api="blas"):
        if _threads() != {2}:
            pytest.skip("BLAS has one thread")
        yield


@pytest.mark.usefixtures("two_threads")
def test_the_last_of_several_threads_restores_the_number():
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    def other():
        with one_blas_thread():
            entered.set()
            leave.wait(60)
        left.set()

    thread = threading.Thread(target=other)
    with one_blas_thread():
        thread.start()
        assert entered.wait(60)
        assert _threads() == {1}
    assert _threads() == {1}
    leave.set()
    assert left.wait(60)
    thread.join()
    assert _threads() == {2}


@pytest.mark.usefixtures("two_threads")
def test_the_number_is_restored_after_an_error():
    with pytest.raises(ZeroDivisionError), one_blas_thread():
        raise ZeroDivisionError
    assert _threads() == {2}


@pytest.mark.usefixtures("two_threads")
def test_fits_and_sweeps_run_on_one_thread():
    conv = lr.dense(np.random.default_rng(0).standard_normal((16, 12, 3, 3)))
    seen = []

    def record(*_):
        seen.append(_threads())
        raise ZeroDivisionError

    family = replace(lr.FAMILIES["spatial_svd"], fit_white=record, sweep_white=_sweep_of(record))
    for call in (lambda: family.fit(conv, 3), lambda: next(family.sweep(conv, "h-w"))):
        with pytest.raises(ZeroDivisionError):
            call()
        assert _threads() == {2}
    assert seen == [{1}, {1}]


def _sweep_of(record):
    def sweep(*_):
        yield record()

    return sweep


def test_fits_do_not_depend_on_the_number_of_threads():
    def run(threads):
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = os.environ | dict.fromkeys(names, str(threads))
        return subprocess.run(
            [sys.executable, "-c", FITS], env=environment, capture_output=True, text=True,
            timeout=300, check=True,
        ).stdout  # fmt: skip

    one = run(1)
    assert len(one.strip()) == 2 * hashlib.sha256().digest_size
    assert run(2) == one
