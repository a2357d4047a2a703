"""Set up the project and run its tasks; needs only Python, pip and a C compiler.

    python3 dev.py demo             compress a small trained network: a table and a picture
    python3 dev.py test             the tests, in parallel; further arguments go to pytest
    python3 dev.py test --quick     a subset for every change, in less than a minute
    python3 dev.py test --full      all tests, with the optional libraries (several 100 MB)
    python3 dev.py lint             formatting, lint, types and language; --commits RANGE
    python3 dev.py paper            measure, draw and typeset the paper; --from-data: no measuring
    python3 dev.py docs             the documentation, in docs/_build/index.html
    python3 dev.py bench            compare the speed with main: minutes, on an idle machine
    python3 dev.py gpu              check and time the kernels on a GPU; --seconds S, --output FILE
    python3 dev.py gpu --wheels DIR the same without an index, from wheels; --dry-run: without a GPU

The first call creates the environment .venv; later calls renew it if its inputs have changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
#: Dependency groups of pyproject.toml that each command needs.
GROUPS = {
    "demo": ["demo"],
    "test": ["test"],
    "full": ["full"],
    "lint": ["test", "lint"],
    "paper": ["demo", "paper"],
    "docs": ["demo", "pages"],
    "bench": ["demo", "bench"],
    "gpu": ["test"],
}


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
    """Create or renew .venv with the project and these dependency groups."""
    kernels = ROOT / "lowrank" / "_kernels"
    sources = (p for end in ("*.pyx", "*.c", "*.h", "*.inc") for p in kernels.glob(end))
    inputs = sorted(p for p in sources if p.name != "_core.c")
    digest = hashlib.sha256(sys.version.encode())
    for path in [ROOT / "pyproject.toml", ROOT / "setup.py", *inputs]:
        digest.update(path.read_bytes())
    stamp = VENV / f"ready-{'-'.join(groups)}"
    if stamp.exists() and stamp.read_text() == digest.hexdigest():
        return
    print(f"setting up {VENV} (about a minute)", file=sys.stderr)
    if not PYTHON.exists():
        # Debian's venv cannot make a pip of its own without python3-venv.
        own_pip = importlib.util.find_spec("ensurepip") is not None
        run(sys.executable, "-m", "venv", *([] if own_pip else ["--without-pip"]), VENV)
        if not own_pip:
            run(sys.executable, "-m", "pip", "--python", PYTHON, "install", "-q", "pip")
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check"]
    quietly(*pip, "install", "--upgrade", "pip>=25.1")
    options = [word for group in groups for word in ("--group", group)]
    quietly(*pip, "install", "-e", ".", *options)
    stamp.write_text(digest.hexdigest())


def set_up_gpu(arguments: list[str]) -> tuple[Path, list[str]]:
    """Install what a GPU needs; return the Python to use and the arguments of the benchmarks.

    A folder of wheels replaces the index; packages of this Python are used where they suffice.
    """
    if "--wheels" not in arguments:
        if "--dry-run" in arguments:
            return Path(sys.executable), arguments
        set_up(GROUPS["gpu"])
        quietly(PYTHON, "-m", "pip", "install", "-e", ".[gpu]")
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


def run(*command: str | Path) -> None:
    """Run a command in the project's folder; exit with its status if it fails."""
    # cython-lint looks for its own tools on the path
    env = os.environ | {"PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"}
    words = [str(word) for word in command]
    status = subprocess.run(words, cwd=ROOT, env=env, check=False).returncode
    if status:
        raise SystemExit(status)


def quietly(*command: str | Path) -> None:
    """Run a command and print its output only if it fails."""
    words = [str(word) for word in command]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{process.stdout}{process.stderr}\nfailed: {' '.join(words)}")


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
    if command not in GROUPS or command == "full":
        print(__doc__, file=sys.stderr)
        raise SystemExit(0 if command in ("help", "-h", "--help") else 2)
    problems = missing()
    if problems:
        raise SystemExit("\n".join(problems))
    if command == "gpu":
        python, rest = set_up_gpu(rest)
        run(python, "-m", "asv_benchmarks.gpu", *rest)
        return
    full = command == "test" and "--full" in rest
    set_up(GROUPS["full" if full else command])
    if command == "demo":
        run(PYTHON, "-m", "lowrank.demo", *rest)
    elif command == "paper":
        if not shutil.which("make"):
            raise SystemExit("make is missing: apt install make.")
        # -k: a figure without its data does not keep the others from being drawn.
        run("make", "-k", "-C", "paper", "from-data" if "--from-data" in rest else "all")
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
