import os

# Timings are no business of the tests: one BLAS thread keeps them repeatable, and waiting
# teams of threads must not take the cores from each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import tempfile
from pathlib import Path

# Choices by time are made with the rates that come with the package, whoever runs the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="lowrank-tests-")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# The same examples every time: a failure elsewhere is a failure here.
settings.register_profile(
    "steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the tests marked full, too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        skip = pytest.mark.skip(reason="only with --full")
        for item in items:
            if "full" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def data():
    """Weights, images and conformance cases of others: the folder LOWRANK_DATA."""
    folder = os.environ.get("LOWRANK_DATA")
    if not folder:
        pytest.skip("LOWRANK_DATA is not set")
    return Path(folder)
