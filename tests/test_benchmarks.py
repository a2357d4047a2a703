"""asv's suites run, the gate tells steps from noise, the published site can be opened."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from asv_benchmarks import gate, publish  # noqa: E402
from asv_benchmarks.benchmarks import SUITES, measure  # noqa: E402

#: What asv takes for a benchmark, by the start of a function's name.
KINDS = re.compile(r"(time|timeraw|track|mem|peakmem)_")
#: A work of each suite that takes milliseconds.
CHEAP = {
    "kernels": "call of a planned chain",
    "chains": "tucker",
    "filters": "gauss 4",
    "decompositions": "spatial_svd",
    "search": "compile",
    "models": "run, dense",
    "imports": "import lowrank",
}


def suite(name):
    return importlib.import_module(f"asv_benchmarks.benchmarks.{name}")


def benchmarks(name):
    """(class or None, function) of a suite."""
    for word, thing in vars(suite(name)).items():
        if inspect.isclass(thing) and not inspect.isabstract(thing):
            for method, function in inspect.getmembers(thing, inspect.isfunction):
                if KINDS.match(method):
                    yield thing, function
        elif inspect.isfunction(thing) and KINDS.match(word):
            yield None, thing


def cheap(name, what="WORK"):
    recipes = getattr(suite(name), what)
    return next(recipes[key] for key in recipes if CHEAP.get(name, "") in key)


@pytest.mark.parametrize("name", SUITES)
def test_suites_are_what_asv_takes(name):
    found = list(benchmarks(name))
    assert found
    for home, function in found:
        if home is None:
            assert not inspect.signature(function).parameters
            continue
        params = getattr(home, "params", ())
        names = getattr(home, "param_names", ["?"] * len(params))
        assert len(names) == len(params)
        assert all(len(set(p)) == len(p) > 0 for p in params)
        # asv gives the cache first, to setup as well; `*what` takes any number of parameters
        given = [*params, *([{}] if hasattr(home, "setup_cache") else [])]
        for called in (function, getattr(home, "setup", None)):
            if called is not None:
                inspect.signature(called).bind(home, *given)


@pytest.mark.parametrize("name", CHEAP)
def test_work_is_made_and_runs(name):
    call = cheap(name)()
    call()
    assert gate.sample(call, 1, 2) >= 0


@pytest.mark.parametrize(
    "name", [name for name in SUITES if hasattr(suite(name), "TRACKED") and name != "models"]
)
def test_tracked_is_a_number_and_the_same_again(name):
    value = list(suite(name).TRACKED.values())[-1]
    first = value()
    assert np.isfinite(first)
    assert not gate.worse((name, ""), first, value())


@pytest.mark.parametrize("name", ["kernels", "search", "models"])
def test_a_benchmark_of_asv_runs(name):
    home = {"kernels": "Calls", "search": "Search", "models": "Models"}[name]
    benchmark = getattr(suite(name), home)()
    key = next(k for k in benchmark.params[0] if CHEAP[name] in k)
    benchmark.setup(key)
    for _, function in benchmarks(name):
        if function.__qualname__.startswith(f"{home}."):
            getattr(benchmark, function.__name__)(key)


def test_a_table_has_our_time_and_those_of_peers():
    table = measure.table(["volume"], seconds=0.01)
    ((name, row),) = table.items()
    assert row["lowrank"] > 0
    assert row["SciPy"] > 0
    volumes = suite("filters").Filters()
    volumes.setup(table, name, "SciPy")
    assert volumes.track_ours_over_peer(table, name, "SciPy") == row["lowrank"] / row["SciPy"]
    with pytest.raises(NotImplementedError):
        volumes.setup(table, name, "OpenCV")


def test_what_a_commit_lacks_is_not_applicable():
    def absent():
        raise AttributeError("module 'lowrank' has no attribute 'frontier'")

    with pytest.raises(NotImplementedError, match="frontier"):
        measure.available(absent)


OLD = """
import importlib
from asv_benchmarks import gate
from asv_benchmarks.benchmarks import SUITES, measure
gate.from_the_path()
for name in SUITES:
    module = importlib.import_module(f"asv_benchmarks.benchmarks.{name}")
    for work, make in getattr(module, "WORK", {}).items():
        if name != "imports":
            try:
                measure.available(measure.available(make))
            except NotImplementedError:
                continue
            raise SystemExit(f"{name}: {work} was made of nothing")
print("all imported")
"""


def test_suites_import_on_a_commit_that_had_next_to_nothing(tmp_path):
    package = tmp_path / "lowrank"
    package.mkdir()
    (package / "__init__.py").write_text("")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-c", OLD]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "all imported", done.stdout + done.stderr


def pairs(rng, truth, spread, step=gate.STEP):
    """Whether the gate finds a step in pairs of processes that are off by a spread."""
    first, *more = truth * np.exp(rng.normal(0, spread, gate.PAIRS + 1))
    if first <= 1 + step / 2:
        return False
    for k in range(1, gate.PAIRS + 1):
        verdict = gate.decided(more[:k], step)
        if verdict is not None:
            return verdict
    raise AssertionError("undecided")


def test_noise_passes_and_a_step_fails():
    rng = np.random.default_rng(0)
    # Pairs of one build were seen to be off by 1 to 3 % on a busy machine.
    for spread in (0.01, 0.03, 0.06):
        assert not any(pairs(rng, 1.0, spread) for _ in range(2000))
    for spread in (0.01, 0.03):
        assert sum(pairs(rng, 1.15, spread) for _ in range(500)) >= 490
    # faster is no fault, and a pair that is far off decides nothing
    assert not any(pairs(rng, 0.8, 0.03) for _ in range(500))
    assert gate.decided([1.2] * 8 + [0.7, 1.2], 0.05) is True
    assert gate.decided([1.2, 1.0, 1.0, 1.0], 0.05) is False
    assert gate.decided([1.2] * 9, 0.05) is None


def test_a_limit_is_below_the_median():
    assert gate.lower_limit([1.3, 1.1, 1.2, 0.9]) == 1.2


def test_tracked_values_may_be_off_by_rounding_only():
    assert not gate.worse(("decompositions", ""), 0.3, 0.3 * (1 + 1e-6))
    assert gate.worse(("decompositions", ""), 0.3, 0.303)
    assert not gate.worse(("decompositions", ""), 0.3, 0.2)
    assert not gate.worse(("memory", ""), 10_000, 10_100)
    assert gate.worse(("memory", ""), 10_000, 11_000)
    assert not gate.worse(("imports", ""), 0, 0)
    assert gate.worse(("imports", ""), 0, 1)


def config(name):
    text = (ROOT / "asv_benchmarks" / name).read_text()
    return json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.M))


def test_the_two_configurations_differ_by_pytorch_alone():
    plain, more = config("asv.conf.json"), config("asv.torch.conf.json")
    for name in ("torch", "tensorly-torch"):
        del more["matrix"]["req"][name]
    assert plain == more


def test_results_name_no_path_and_no_host():
    for path in (ROOT / "asv_benchmarks" / "results").rglob("*.json"):
        if path.name == "benchmarks.json":  # the code of the suites
            continue
        text = path.read_text()
        assert "existing-py" not in path.name + text
        assert not re.search(r'"/\w|/home/|/root/', text), path


def test_the_site_takes_nothing_from_elsewhere():
    page = (
        '<script src="https://code.jquery.com/jquery-3.3.1.min.js" integrity="x" '
        'onerror="js_load_failure()"></script>\n'
        '<link rel="stylesheet" href="https://cdn/bootstrap.min.css" integrity="y">\n'
        '<a href="https://asv.readthedocs.io/">asv</a>'
    )
    made = publish.ASKED.sub(publish.local, page)
    assert '<script src="vendor/jquery-3.3.1.min.js"></script>' in made
    assert '<link rel="stylesheet" href="css/bootstrap.min.css">' in made
    assert '<a href="https://asv.readthedocs.io/">' in made
    with pytest.raises(SystemExit, match=r"unknown\.js"):
        publish.ASKED.sub(publish.local, '<script src="https://cdn/unknown.js"></script>')


@pytest.mark.full
def test_the_site_is_drawn_in_a_browser(tmp_path):
    pytest.importorskip("asv")
    if not list((ROOT / "asv_benchmarks" / "results").glob("*/machine.json")):
        pytest.skip("no results")
    if publish.browser() is None or not publish.shutil.which("npm"):
        pytest.skip("needs Chromium and npm")
    publish.publish()
    assert publish.check(tmp_path) == []
    assert (tmp_path / "index.png").stat().st_size > 20_000
