"""Each package of lowrank imports only from packages below its own."""

import ast
import re
from pathlib import Path

import lowrank

#: From the bottom up.  A package may import from those before it; those in one row are independent.
#: Factorization stands above engine, since a chain compiles itself.
LAYERS = [
    ["_typing", "_kernels"],
    ["core"],
    ["engine"],
    ["factorization"],
    ["io", "blocks", "perfmodel", "metric"],
    ["families"],
    ["certify", "selection"],
    ["filters", "compress"],
    ["interop", "ndimage"],
    ["report"],
    ["cli"],
    ["__init__"],
    ["__main__", "data", "demo"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ROOT = Path(lowrank.__file__).parent
MODULE = re.compile(r"lowrank\.(\w+)(\.\w+)*")


def imported_names(tree):
    """Yield the names of imported modules, including those in functions and in strings."""
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports must be absolute"
            if node.module == "lowrank":
                yield from (
                    f"lowrank.{a.name}" if a.name in RANK else "lowrank" for a in node.names
                )
            else:
                yield node.module
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node not in docstrings
            and MODULE.fullmatch(node.value)
        ):
            yield node.value


def package_imports():
    """Return (importing package, imported package, file) of all imports within lowrank."""
    found = set()
    for path in ROOT.rglob("*.py"):
        package = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in imported_names(ast.parse(path.read_text())):
            if name == "lowrank":
                found.add((package, "__init__", str(path.relative_to(ROOT))))
            elif match := MODULE.fullmatch(name):
                found.add((package, match[1], str(path.relative_to(ROOT))))
    return {(a, b, file) for a, b, file in found if a != b}


def test_every_package_has_a_layer():
    names = {p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert names - {"__pycache__"} == set(RANK)


def test_packages_import_only_from_lower_layers():
    found = package_imports()
    assert len(found) > 30
    unknown = {(b, file) for _, b, file in found if b not in RANK}
    assert unknown == set()
    assert {(a, b, file) for a, b, file in found if RANK[b] >= RANK[a]} == set()


def test_imports_in_functions_and_strings_are_found():
    code = '''
"""A docstring that names lowrank.cli."""
MODULES = {"cupy": "lowrank.engine.cuda.plan"}
def f():
    """lowrank.report"""
    from lowrank import io, dense
    import lowrank.filters
'''
    assert sorted(imported_names(ast.parse(code))) == [
        "lowrank", "lowrank.engine.cuda.plan", "lowrank.filters", "lowrank.io",
    ]  # fmt: skip


def test_kernels_import_nothing_else():
    assert not {b for a, b, _ in package_imports() if a == "_kernels"}
