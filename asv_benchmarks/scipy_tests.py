"""Run SciPy's own tests of its filters with lowrank.ndimage in the place of scipy.ndimage.

    python -m asv_benchmarks.scipy_tests [pytest options]

The file is scipy/ndimage/tests/test_filters.py of the installed SciPy.  Functions are replaced
while a test runs: SciPy looks up the originals when the file is imported.  Prints how many tests
call a replaced function, how many of these pass, and the failures with their reasons.  The exit
status is 1 if less than 99 % pass.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from scipy import ndimage as scipy_ndimage

from lowrank import ndimage
from lowrank.ndimage.arguments import NAMES

TARGET = 0.99


class Replacement:
    """Plugin of pytest that replaces functions while tests run, and counts their results."""

    def __init__(self) -> None:
        self.calls = 0
        self.ours = {name: self._count(getattr(ndimage, name)) for name in NAMES}
        self.passed: list[str] = []
        self.failed: dict[str, str] = {}
        self.others = 0

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: Any) -> Iterator[None]:
        for values in (item.funcargs, getattr(getattr(item, "callspec", None), "params", {})):
            for name, value in values.items():
                if getattr(value, "__name__", None) in NAMES:
                    values[name] = self.ours[value.__name__]
        before = self.calls
        with ndimage.patched():
            for name, function in self.ours.items():
                setattr(scipy_ndimage, name, function)
            outcome = yield
        if self.calls == before:
            self.others += 1
        elif outcome.excinfo is None:
            self.passed.append(item.nodeid)
        elif not issubclass(outcome.excinfo[0], pytest.skip.Exception):
            reason = str(outcome.excinfo[1]).strip() or outcome.excinfo[0].__name__
            self.failed[item.nodeid] = " ".join(reason.split())

    def _count(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return function(*args, **kwargs)

        return functools.wraps(function)(call)


def main() -> int:
    """Run the tests and print the counts."""
    found = Replacement()
    options = [
        "-q",
        "--no-header",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "-c",
        "/dev/null",
    ]
    pytest.main([*options, "--pyargs", "scipy.ndimage.tests.test_filters", *sys.argv[1:]], [found])
    total = len(found.passed) + len(found.failed)
    print(
        f"{total} tests call a replaced function: {len(found.passed)} passed, "
        f"{len(found.failed)} failed ({len(found.passed) / max(total, 1):.2%}); "
        f"{found.others} tests of other functions"
    )
    for name, reason in found.failed.items():
        print(f"  {name.rpartition('::')[2]}: {reason[:200]}")
    return int(len(found.passed) < TARGET * total or not total)


if __name__ == "__main__":
    sys.exit(main())
