"""Forked, spawned and served processes: the engine runs in them, serially where it was forked."""

import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

LIMIT = 120  # seconds: a hang, not a slow machine

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
is_linux = sys.platform == "linux"

#: Start of a script: an engine run whose result is compared, and threads of a library.
HEAD = """
import os, sys
import numpy as np

def run(threads=2):
    import lowrank as lr
    w = np.random.default_rng(0).standard_normal((8, 6, 3, 3)).astype("f4")
    x = np.random.default_rng(1).standard_normal((2, 6, 96, 96)).astype("f4")
    f = lr.spatial_svd(lr.dense(w, padding=1), 3)
    y = f.compile((6, 96, 96), threads=threads)(x)
    image = lr.filters.correlate(np.ones((600, 600), "f4"), np.ones((5, 5), "f4"))
    return float(y.sum()) + float(image.sum())

def count():
    from lowrank import engine
    return engine.max_threads()

def start_openmp(library):
    if library == "torch":
        import torch
        torch.set_num_threads(2)
        x = torch.ones(400, 400)
        for _ in range(3):
            torch.exp(x @ x * 1e-6).sum()
        torch.nn.functional.conv2d(torch.ones(2, 8, 64, 64), torch.ones(8, 8, 3, 3))
    else:
        from lowrank._kernels import _core
        _core.measure_fork_join()

def fork(call):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, repr(call()).encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    return os.read(read, 10_000).decode()
"""


def run_script(tmp_path, body):
    """Run a script on two threads of OpenMP; return what it prints."""
    script = Path(tmp_path, "script.py")
    script.write_text(HEAD + textwrap.dedent(body))
    command = [sys.executable, "-W", "ignore", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
    found = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.split()


def needs(library):
    if library != "lowrank" and find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


@needs_fork
@pytest.mark.parametrize("library", ["torch", "lowrank"])
@pytest.mark.parametrize("order", ["lowrank first", "library first"])
def test_forked_children_run_serially_whoever_had_threads(tmp_path, library, order):
    needs(library)
    first = "count()" if order == "lowrank first" else "start_openmp(library)"
    before, *children = run_script(
        tmp_path,
        f"""
        library = {library!r}
        {first}
        start_openmp(library)
        print(count())
        print(fork(count), fork(lambda: fork(count)).strip("'"))  # children of children, too
        print(fork(lambda: abs(run() - run(1)) < 1e-3), fork(lambda: fork(run) != "").strip("'"))
        """,
    )
    assert before == "2"
    assert children == ["1", "1", "True", "True"]


@needs_fork
def test_models_are_compressed_in_a_forked_child(tmp_path):
    needs("torch")
    found = run_script(
        tmp_path,
        """
        import torch
        from lowrank.interop.torch import compress

        model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.Conv2d(16, 16, 3)).eval()
        data = [torch.ones(4, 8, 64, 64)]
        start_openmp("torch")
        model(data[0])
        print(fork(lambda: compress(model, data, macs=0.5, families=["tucker"]).plan is not None))
        print(torch.get_num_threads())
        """,
    )
    assert found == ["True", "2"]


@needs_fork
@pytest.mark.skipif(not is_linux, reason="only Linux tells whether a process was forked")
def test_a_child_that_imports_the_engine_after_the_fork_runs_serially(tmp_path):
    needs("torch")
    found = run_script(
        tmp_path,
        """
        start_openmp("torch")
        assert "lowrank" not in sys.modules
        print(fork(count), fork(lambda: run() == run(1)))
        print(count())
        """,
    )
    assert found == ["1", "True", "2"]


@pytest.mark.parametrize("library", ["torch", "lowrank"])
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing(tmp_path, library, method):
    needs(library)
    found = run_script(
        tmp_path,
        f"""
        if __name__ == "__main__":
            import multiprocessing
            start_openmp({library!r})
            run()
            with multiprocessing.get_context({method!r}).Pool(2) as pool:
                results = [pool.apply_async(run) for _ in range(4)]
                print(len({{round(r.get(100), 1) for r in results}}), pool.apply(count))
        """,
    )
    assert found[0] == "1"
    if method == "fork":
        assert found[1] == "1"
    if method == "spawn":
        assert found[1] == "2"


@pytest.mark.parametrize("backend", ["loky", "multiprocessing", "threading"])
def test_joblib(tmp_path, backend):
    needs("joblib")
    found = run_script(
        tmp_path,
        f"""
        if __name__ == "__main__":
            import joblib
            run()
            calls = (joblib.delayed(run)() for _ in range(4))
            found = joblib.Parallel(2, backend={backend!r}, timeout=100)(calls)
            print(len({{round(x, 1) for x in found}}))
        """,
    )
    assert found == ["1"]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader(tmp_path, context):
    needs("torch")
    found = run_script(
        tmp_path,
        f"""
        class Filtered:
            def __len__(self):
                return 4
            def __getitem__(self, i):
                return run()

        if __name__ == "__main__":
            import torch
            start_openmp("torch")
            run()
            loader = torch.utils.data.DataLoader(
                Filtered(), num_workers=2, multiprocessing_context={context!r}, timeout=100
            )
            print(len({{round(float(x), 1) for x in loader}}))
        """,
    )
    assert found == ["1"]
