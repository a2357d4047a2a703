"""A module imports only from floors below its own.  The list below is the architecture."""

import ast
from pathlib import Path

import lowrank

FLOORS = [
    ["_typing", "_kernels"],
    ["geometry"],
    ["stage"],
    ["algebra", "cost", "reference"],
    ["norms", "report"],
    ["backends", "network"],
    ["factorization"],
    ["machine", "metric"],
    ["blocks", "families", "io"],
    ["certify", "ranks", "search", "weighted", "weights"],
    ["filters", "models"],
    ["interop", "plots", "webpage"],
    ["cli"],
    ["__init__"],
    ["data", "demo"],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
ROOT = Path(lowrank.__file__).parent


def imports():
    """(importing, imported) modules at the top of the house, TYPE_CHECKING left out."""
    for path in ROOT.rglob("*.py"):
        here = path.relative_to(ROOT).parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text())
        tree.body = [n for n in tree.body if not ast.unparse(n).startswith("if TYPE_CHECKING")]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) and any(a.name == "lowrank" for a in node.names):
                yield here, "__init__"
            elif isinstance(node, ast.ImportFrom) and node.module == "lowrank":
                yield from ((here, a.name) for a in node.names if a.name in FLOOR)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lowrank."):
                yield here, node.module.split(".")[1]


def test_every_module_has_a_floor():
    names = {p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert names - {"__pycache__"} == set(FLOOR)


def test_nothing_imports_upwards():
    found = {(a, b) for a, b in imports() if a != b}
    assert len(found) > 30  # the walk above sees something
    assert {(a, b) for a, b in found if FLOOR[b] >= FLOOR[a]} == set()


def test_the_kernels_know_nothing_of_the_library():
    assert not {b for a, b in imports() if a == "_kernels" and b != "_kernels"}
