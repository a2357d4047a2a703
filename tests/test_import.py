"""Importing the package: what it loads, and that its tables of names agree."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank


def loaded_by(code):
    """Return the modules that are loaded after `code` in a new process."""
    code = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_loads_neither_numpy_nor_any_package_of_its_own():
    loaded = loaded_by("import lowrank")
    assert "numpy" not in loaded
    assert {m for m in loaded if m.startswith("lowrank.")} == set()


def test_a_choice_by_predicted_time_loads_no_solver():
    """scipy.optimize, scipy.sparse and TensorLy take longer to import than all the rest."""
    loaded = loaded_by(
        "import numpy, scipy.linalg\nbefore = set(sys.modules)\nimport lowrank\n"
        "conv = lowrank.dense(numpy.ones((8, 8, 3, 3)))\n"
        "lowrank.frontier(conv, (8, 8), ['spatial_svd']).within(0.1).build()"
    )
    heavy = {
        "scipy.optimize",
        "scipy.sparse",
        "scipy.spatial",
        "scipy.fft",
        "tensorly",
        "opt_einsum",
    }
    assert heavy & loaded == set()


def test_every_public_name_is_found_where_type_checkers_look():
    tree = ast.parse(Path(lowrank.__file__).read_text())
    guard = next(n for n in tree.body if isinstance(n, ast.If))
    imported = {a.asname: f"{n.module}.{a.name}" for n in guard.body for a in n.names}
    homes = lowrank._MODULES | {n: f"{home}.{n}" for n, home in lowrank._NAMES.items()}
    assert imported == homes
    assert set(homes) == set(lowrank.__all__) <= set(dir(lowrank))
    for name in homes:
        assert getattr(lowrank, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'spatial'"):
        _ = lowrank.spatial
