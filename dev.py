"""Set the project up and run it, with nothing but Python, pip and a C compiler at hand.

    python3 dev.py demo             the main job, on a small trained network: a table and a picture
    python3 dev.py test             the tests; what follows goes to pytest
    python3 dev.py test --full      all of them: sanitizers, optional libraries (several 100 MB)
    python3 dev.py lint             formatting, lint and types
    python3 dev.py paper            the paper, measured, drawn and set; --from-data: not measured
    python3 dev.py docs             the pages, in docs/_build/index.html
    python3 dev.py bench            is this commit slower than main? minutes; have the machine alone

The first call makes the environment .venv; later ones renew it only if something that it was
made from has changed.
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
    "full": ["test", "full"],
    "lint": ["test", "lint"],
    "paper": ["demo", "paper"],
    "docs": ["demo", "docs"],
    "bench": ["demo", "bench"],
}


def missing() -> list[str]:
    """What this machine lacks, a sentence each."""
    compiler = os.environ.get("CC", "gcc").split()[0]
    lacks = []
    if sys.version_info < (3, 11):  # noqa: UP036 - whoever has an older one reads it here
        version = ".".join(map(str, sys.version_info[:2]))
        lacks.append(f"Python 3.11 or newer is needed, this is {version}.")
    if not shutil.which(compiler):
        lacks.append(f"The C compiler {compiler} is missing; on Debian: apt install gcc libc6-dev.")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        lacks.append("Python's headers (Python.h) are missing; on Debian: apt install python3-dev.")
    if not importlib.util.find_spec("pip"):
        lacks.append("pip is missing; on Debian: apt install python3-pip.")
    if not importlib.util.find_spec("venv"):
        lacks.append("The module venv is missing; on Debian: apt install python3-venv.")
    return lacks


def set_up(groups: list[str]) -> None:
    """Make .venv, or renew it, with the project and these dependency groups in it."""
    kernels = ROOT / "lowrank" / "_kernels"
    sources = (p for end in ("*.pyx", "*.c", "*.h", "*.inc") for p in kernels.glob(end))
    made_from = sorted(p for p in sources if p.name != "_core.c")
    digest = hashlib.sha256(sys.version.encode())
    for path in [ROOT / "pyproject.toml", ROOT / "setup.py", *made_from]:
        digest.update(path.read_bytes())
    stamp = VENV / f"ready-{'-'.join(groups)}"
    if stamp.exists() and stamp.read_text() == digest.hexdigest():
        return
    print(f"setting up {VENV} (a minute, once)", file=sys.stderr)
    if not PYTHON.exists():
        # Debian's venv cannot make a pip of its own without python3-venv.
        own_pip = importlib.util.find_spec("ensurepip") is not None
        run(sys.executable, "-m", "venv", *([] if own_pip else ["--without-pip"]), VENV)
        if not own_pip:
            run(sys.executable, "-m", "pip", "--python", PYTHON, "install", "-q", "pip")
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check"]
    quietly(*pip, "install", "--upgrade", "pip>=25.1")
    wanted = [word for group in groups for word in ("--group", group)]
    quietly(*pip, "install", "-e", ".", *wanted)
    stamp.write_text(digest.hexdigest())


def run(*command: str | Path) -> None:
    """Run in the project's folder; leave with its exit status if it fails."""
    # cython-lint looks for its own tools on the path
    env = os.environ | {"PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"}
    words = [str(word) for word in command]
    status = subprocess.run(words, cwd=ROOT, env=env, check=False).returncode
    if status:
        raise SystemExit(status)


def quietly(*command: str | Path) -> None:
    """The same, but what it says is shown only if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\nfailed: {' '.join(words)}")


def main(arguments: list[str]) -> None:
    """Do what the command line asks for."""
    command, *rest = arguments or ["help"]
    if command not in GROUPS or command == "full":
        print(__doc__, file=sys.stderr)
        raise SystemExit(0 if command in ("help", "-h", "--help") else 2)
    lacks = missing()
    if lacks:
        raise SystemExit("\n".join(lacks))
    full = command == "test" and "--full" in rest
    set_up(GROUPS["full" if full else command])
    if command == "demo":
        run(PYTHON, "-m", "lowrank.demo", *rest)
    elif command == "paper":
        if not shutil.which("make"):
            raise SystemExit("make is missing; on Debian: apt install make.")
        # A figure without its data fails alone; the paper needs them all.
        run("make", "-k", "-C", "paper", "from-data" if "--from-data" in rest else "all")
    elif command == "test":
        run(PYTHON, "-m", "pytest", *rest)
    elif command == "docs":
        run(PYTHON, "-m", "sphinx", "-W", "-b", "html", "docs", "docs/_build", *rest)
        print(f"the pages: {ROOT / 'docs' / '_build' / 'index.html'}")
    elif command == "bench":
        run(PYTHON, "-m", "asv_benchmarks.gate", *rest)
    else:
        run(PYTHON, "-m", "ruff", "check")
        run(PYTHON, "-m", "ruff", "format", "--check")
        run(PYTHON, "-m", "mypy")
        run(VENV / "bin" / "cython-lint", "--max-line-length=100", "lowrank/_kernels")
        run(VENV / "bin" / "codespell")


if __name__ == "__main__":
    main(sys.argv[1:])
