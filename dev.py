"""Set up the project and run its tasks; needs only Python, pip and a C compiler.

    python3 dev.py demo             compress a small trained network: a table and a picture
    python3 dev.py test             the tests, in parallel; further arguments go to pytest
    python3 dev.py test --quick     a subset for every change, in less than a minute
    python3 dev.py test --full      all tests, with the optional libraries (several 100 MB)
    python3 dev.py test --oldest    the quick tests with the oldest supported dependencies
    python3 dev.py lint             formatting, lint, types and language; --commits RANGE
    python3 dev.py paper            measure, draw and typeset the paper; --from-data: no measuring
    python3 dev.py docs             the documentation, in docs/_build/index.html
    python3 dev.py wheel            a wheel for other Linux machines, in dist/: built and tested
    python3 dev.py bench            compare the speed with main: minutes, on an idle machine
    python3 dev.py gpu              check and time the kernels on a GPU; --seconds S, --output FILE
    python3 dev.py gpu --wheels DIR the same without an index, from wheels; --dry-run: without a GPU

The first call creates the environment .venv; later calls renew it if its inputs have changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
BUILD = ROOT / "build"
#: Dependency groups of pyproject.toml that each command needs.
GROUPS = {
    "demo": ["demo"],
    "test": ["test"],
    "full": ["full"],
    "oldest": ["sdist"],
    "wheel": ["wheel"],
    "lint": ["test", "lint"],
    "paper": ["demo", "paper"],
    "docs": ["demo", "pages"],
    "bench": ["demo", "bench"],
    "gpu": ["test"],
}

#: Extras whose oldest releases are not tested: PyTorch's bring gigabytes of CUDA libraries.
LARGE_EXTRAS = ("torch", "keras", "gpu")
#: Tests that need a compiler or git, or read the source tree and not the installed package.
TESTS_OF_THE_TREE = (
    "benchmarks", "compare", "headline", "cuda", "cross_builds", "docs", "language",
)  # fmt: skip


def missing() -> list[str]:
    """Return one sentence per missing requirement, with the Debian package that has it."""
    compiler = os.environ.get("CC", "gcc").split()[0]
    problems = []
    if sys.version_info < (3, 11):  # noqa: UP036 - an older Python can run this file
        version = ".".join(map(str, sys.version_info[:2]))
        problems.append(f"Python 3.11 or newer is needed, this is {version}.")
    if not shutil.which(compiler):
        problems.append(f"The C compiler {compiler} is missing: apt install gcc libc6-dev.")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        problems.append("Python's headers (Python.h) are missing: apt install python3-dev.")
    if not importlib.util.find_spec("pip"):
        problems.append("pip is missing: apt install python3-pip.")
    if not importlib.util.find_spec("venv"):
        problems.append("The module venv is missing: apt install python3-venv.")
    return problems


def set_up(groups: list[str]) -> None:
    """Create or renew .venv with the project and the newest releases of these groups."""
    kernels = ROOT / "lowrank" / "_kernels"
    sources = (p for end in ("*.pyx", "*.pxi", "*.c", "*.h", "*.inc") for p in kernels.glob(end))
    inputs = sorted(p for p in sources if p.name != "_core.c")
    digest = hashlib.sha256(sys.version.encode())
    for path in [ROOT / "pyproject.toml", ROOT / "setup.py", *inputs]:
        digest.update(path.read_bytes())
    # The extension takes a minute to compile: once for all groups.
    project, stamp = VENV / "ready", VENV / f"ready-{'-'.join(groups)}"
    old = [p for p in (project, stamp) if not p.exists() or p.read_text() != digest.hexdigest()]
    if not old:
        return
    print(f"setting up {VENV} (about a minute)", file=sys.stderr)
    if not PYTHON.exists():
        make_venv(VENV)
    options = [word for group in groups for word in ("--group", group)]
    install(PYTHON, "--upgrade", *(["-e", "."] if project in old else []), *options)
    for path in old:
        path.write_text(digest.hexdigest())


def set_up_gpu(arguments: list[str]) -> tuple[Path, list[str]]:
    """Install what a GPU needs; return the Python to use and the arguments of the benchmarks.

    A folder of wheels replaces the index; packages of this Python are used where they suffice.
    """
    if "--wheels" not in arguments:
        if "--dry-run" in arguments:
            return Path(sys.executable), arguments
        set_up(GROUPS["gpu"])
        install(PYTHON, "-e", ".[gpu]")
        return PYTHON, arguments
    place = arguments.index("--wheels")
    wheels = Path(*arguments[place + 1 : place + 2]).resolve()
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise SystemExit(f"--wheels must be a folder that has wheels, got {wheels}")
    if not PYTHON.exists():
        run(sys.executable, "-m", "venv", "--without-pip", VENV)
        (site,) = VENV.glob("lib/python*/site-packages")
        site.joinpath("packages_of_python.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", PYTHON]
    offline = ["install", "--no-index", "--find-links", wheels]
    quietly(*pip, *offline, *found, "pytest", "hypothesis")
    quietly(*pip, *offline, "--no-build-isolation", "-e", ".")
    return PYTHON, arguments[:place] + arguments[place + 2 :]


def make_venv(folder: Path) -> Path:
    """Create an environment with a recent pip; return its Python."""
    python = folder / "bin" / "python"
    # Debian's venv cannot make a pip of its own without python3-venv.
    own_pip = importlib.util.find_spec("ensurepip") is not None
    run(sys.executable, "-m", "venv", *([] if own_pip else ["--without-pip"]), folder)
    if not own_pip:
        run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "pip")
    install(python, "--upgrade", "pip>=25.1")
    return python


def install(python: Path, *words: str | Path) -> None:
    """Install with the pip of an environment."""
    quietly(python, "-m", "pip", "--disable-pip-version-check", "install", *words)


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> None:
    """Run a command, by default in the project's folder; exit with its status if it fails."""
    # cython-lint and auditwheel look for their tools on the path
    path = {"PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"}
    words = [str(word) for word in command]
    status = subprocess.run(
        words, cwd=cwd, env=os.environ | path | (env or {}), check=False
    ).returncode
    if status:
        raise SystemExit(status)


def quietly(*command: str | Path) -> None:
    """Run a command and print its output only if it fails."""
    words = [str(word) for word in command]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{process.stdout}{process.stderr}\nfailed: {' '.join(words)}")


def declared() -> dict:
    """Return pyproject.toml."""
    import tomllib  # not in the Pythons that `missing` refuses

    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def oldest_releases() -> list[str]:
    """Return the lower bound of each dependency in pyproject.toml, as pinned requirements."""
    table = declared()
    extras = table["project"]["optional-dependencies"]
    wanted = [*table["build-system"]["requires"], *table["project"]["dependencies"]]
    wanted += [r for name in extras if name not in LARGE_EXTRAS for r in extras[name]]
    groups = ["test"]
    for name in groups:  # grows
        entries = table["dependency-groups"][name]
        wanted += [entry for entry in entries if isinstance(entry, str)]
        groups += [entry["include-group"] for entry in entries if isinstance(entry, dict)]
    own = f"{table['project']['name']}["
    return sorted({re.sub(">=([^,]*).*", r"==\1", r) for r in wanted if not r.startswith(own)})


def unpack_sdist(name: str) -> Path:
    """Build the source archive and unpack it in a new folder of build/; return its tree."""
    folder = BUILD / name
    shutil.rmtree(folder, ignore_errors=True)
    quietly(PYTHON, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    return archive.with_suffix("").with_suffix("")


def check_oldest(arguments: list[str]) -> None:
    """Build the source archive with the oldest releases of all it needs, and run its tests."""
    tree = unpack_sdist("oldest")
    python = make_venv(tree.parent / "venv")
    install(python, "--only-binary", ":all:", *oldest_releases())
    install(python, "--no-build-isolation", "--no-deps", "-e", tree)
    run(python, "-m", "pip", "list", "--format=freeze")
    run(
        python, "-m", "pytest", *pytest_options(arguments), "--quick", "tests", *arguments, cwd=tree
    )


def check_wheel(arguments: list[str]) -> None:
    """Build a wheel with all it links, and test it where there is neither source nor compiler."""
    tree = unpack_sdist("wheel")
    quietly(PYTHON, "-m", "build", "--wheel", "--no-isolation", "--outdir", tree.parent, tree)
    (built,) = tree.parent.glob("*.whl")
    run(PYTHON, "-m", "auditwheel", "repair", "--wheel-dir", ROOT / "dist", built)
    wheel = max((ROOT / "dist").glob("*.whl"), key=lambda p: p.stat().st_mtime)
    with tempfile.TemporaryDirectory() as folder:
        python = make_venv(Path(folder, "venv"))
        install(python, f"{wheel}[cli]", "--group", f"{ROOT / 'pyproject.toml'}:test")
        # The installed package is imported, not that of the tree.
        env = {"PATH": str(python.parent), "PYTHONSAFEPATH": "1"}
        run(python, "-m", "lowrank", "--version", env=env, cwd=Path(folder))
        ignored = [f"--ignore=tests/test_{name}.py" for name in TESTS_OF_THE_TREE]
        options = [*pytest_options(arguments), "--quick", *ignored, "tests", *arguments]
        run(python, "-m", "pytest", *options, env=env, cwd=tree)
    print(f"wrote {wheel}")


def pytest_options(arguments: list[str]) -> list[str]:
    """Return the options for parallel workers, unless the arguments choose or exclude them."""
    own = ("-n", "--numprocesses", "--dist", "--pdb", "--trace", "-p")
    if any(a.startswith(own) for a in arguments):
        return []
    # More than 8 workers spend their time on imports; without psutil, "logical" is the affinity.
    return ["-n", "logical", "--maxprocesses", "8", "--dist", "worksteal", "--durations", "20"]


def main(arguments: list[str]) -> None:
    """Run the task that the command line names."""
    command, *rest = arguments or ["help"]
    if command not in GROUPS or command in ("full", "oldest"):
        print(__doc__, file=sys.stderr)
        raise SystemExit(0 if command in ("help", "-h", "--help") else 2)
    problems = missing()
    if problems:
        raise SystemExit("\n".join(problems))
    if command == "gpu":
        python, rest = set_up_gpu(rest)
        run(python, "-m", "asv_benchmarks.gpu", *rest)
        return
    oldest = command == "test" and "--oldest" in rest
    full = command == "test" and "--full" in rest
    set_up(GROUPS["oldest" if oldest else "full" if full else command])
    if command == "demo":
        run(PYTHON, "-m", "lowrank.demo", *rest)
    elif command == "paper":
        if not shutil.which("make"):
            raise SystemExit("make is missing: apt install make.")
        # -k: a figure without its data does not keep the others from being drawn.
        run("make", "-k", "-C", "paper", "from-data" if "--from-data" in rest else "all")
    elif oldest:
        check_oldest([word for word in rest if word != "--oldest"])
    elif command == "wheel":
        check_wheel(rest)
    elif command == "test":
        run(PYTHON, "-m", "pytest", *pytest_options(rest), *rest)
    elif command == "docs":
        run(PYTHON, "-m", "sphinx", "-W", "-b", "html", "docs", "docs/_build", *rest)
        print(f"wrote {ROOT / 'docs' / '_build' / 'index.html'}")
    elif command == "bench":
        run(PYTHON, "-m", "asv_benchmarks.gate", *rest)
    else:
        run(PYTHON, "-m", "ruff", "check")
        run(PYTHON, "-m", "ruff", "format", "--check")
        run(PYTHON, "-m", "mypy")
        run(VENV / "bin" / "cython-lint", "--max-line-length=100", "lowrank/_kernels")
        run(VENV / "bin" / "codespell")
        run(PYTHON, "tests/language.py", *rest)


if __name__ == "__main__":
    main(sys.argv[1:])
