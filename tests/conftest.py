"""Environment, options and fixtures of all tests."""

import atexit
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

# One thread per worker in libraries: results are repeatable, and workers do not share cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Choices by time use the coefficients that ship with the package, whoever runs the tests.
# Matplotlib keeps its own folder: without it every worker would search the fonts again.
os.environ.setdefault("MPLCONFIGDIR", str(Path("~/.cache/matplotlib").expanduser()))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="lowrank-tests-")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

#: Test functions whose cases take a second or more in all; `--update-slow` writes the file.
SLOW_FILE = Path(__file__).with_name("slow.txt")
SLOW_SECONDS = 1.0
#: `--quick` runs one case in so many of a slow function.
THINNING = 20
#: Key in pytest's cache of the tests that passed in the last run.
PASSED = "lowrank/passed"

# The same examples every time: a failure elsewhere is a failure here.
settings.register_profile(
    "steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the tests marked full, too")
    parser.addoption("--quick", action="store_true", help="thin out the tests in tests/slow.txt")
    parser.addoption("--update-slow", action="store_true", help="write tests/slow.txt anew")
    parser.addoption("--rest", action="store_true", help="leave out what passed in the last run")


def pytest_configure(config):
    # The controller of parallel workers receives their reports; a worker has no file to write.
    if config.getoption("--update-slow") and config.getoption("--quick"):
        raise pytest.UsageError("--update-slow needs every test: leave out --quick")
    if hasattr(config, "workerinput"):
        return
    if config.getoption("--update-slow"):
        config.pluginmanager.register(SlowTests())
    if not config.getoption("--rest"):
        config.pluginmanager.register(PassedTests())


def function_of(nodeid):
    """Return the node of a test without its parameters."""
    return nodeid.partition("[")[0]


class SlowTests:
    """Add up the time of every test function, and write tests/slow.txt in the end."""

    def __init__(self):
        self.seconds = Counter()

    def pytest_runtest_logreport(self, report):
        self.seconds[function_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self):
        slow = sorted(name for name, s in self.seconds.items() if s >= SLOW_SECONDS)
        SLOW_FILE.write_text("".join(f"{name}\n" for name in slow))


class PassedTests:
    """Write the names of the tests that passed to pytest's cache in the end."""

    def __init__(self):
        self.names = []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.names.append(report.nodeid)

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "cache"):
            session.config.cache.set(PASSED, self.names)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: "first" not in item.keywords)
    if config.getoption("--rest"):
        passed = set(config.cache.get(PASSED, ()))
        config.hook.pytest_deselected(items=[i for i in items if i.nodeid in passed])
        items[:] = [i for i in items if i.nodeid not in passed]
    if not config.getoption("--full"):
        skip = pytest.mark.skip(reason="only with --full")
        for item in items:
            if "full" in item.keywords:
                item.add_marker(skip)
    if config.getoption("--quick"):
        slow = set(SLOW_FILE.read_text().split("\n"))
        cases, chosen, left_out = defaultdict(int), [], []
        for item in items:
            name = function_of(item.nodeid)
            cases[name] += 1
            is_chosen = name not in slow or cases[name] % THINNING == THINNING // 2
            (chosen if is_chosen else left_out).append(item)
        config.hook.pytest_deselected(items=left_out)
        items[:] = chosen


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
