"""Build the extension for 64-bit ARM and run tests with it under an emulator, on Debian.

    apt install gcc-aarch64-linux-gnu qemu-user
    python tests/aarch64.py FOLDER tests/test_kernels.py -q

FOLDER receives Debian's Python for arm64 and the wheels that the tests need, some 500 MB, at the
first call.  Times under an emulator mean nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "lowrank" / "_kernels"
COMPILER = "aarch64-linux-gnu-gcc"
EMULATOR = "qemu-aarch64"
PACKAGES = ["python3", "libpython3-dev", "libgomp1", "libstdc++6"]
WHEELS = [
    "numpy", "scipy", "tensorly>=0.10,<0.11", "opt_einsum", "platformdirs", "threadpoolctl",
    "pytest", "hypothesis",
]  # fmt: skip
#: Those of setup.py for gcc.
KERNEL_FLAGS = ["-O3", "-fno-tree-loop-distribute-patterns", "-fno-code-hoisting"]
FLAGS = ["-g0", "-fPIC", "-fwrapv", "-DNDEBUG", "-fvisibility=hidden", "-Wall", "-Wextra"]


def run(*command: str | Path, **options: object) -> None:
    """Run a command; stop at its first error."""
    status = subprocess.run([str(word) for word in command], check=False, **options).returncode
    if status:
        raise SystemExit(status)


def unpack_python(folder: Path) -> Path:
    """Unpack Debian's Python for arm64 and what it needs; return the root folder."""
    root, state = folder / "root", folder / "apt"
    if root.exists():
        return root
    for name in ("lists/partial", "cache/archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    settings = {
        "APT::Architecture": "arm64", "APT::Architectures": "arm64", "Dir::State": state,
        "Dir::State::lists": state / "lists", "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
    }  # fmt: skip
    apt = ["apt-get", "-q", *(f"-o{name}={value}" for name, value in settings.items())]
    run(*apt, "update")
    run(*apt, "install", "-y", "--no-install-recommends", "--download-only", *PACKAGES)
    part = folder / "root.part"
    for package in sorted((state / "cache" / "archives").glob("*.deb")):
        run("dpkg", "-x", package, part)
    part.rename(root)
    return root


def unpack_wheels(folder: Path, version: str) -> Path:
    """Unpack wheels for this version of Python on arm64; return their folder."""
    site = folder / f"site-{version}"
    if not site.exists():
        platforms = [f"--platform=manylinux{name}_aarch64" for name in ("2014", "_2_27", "_2_28")]
        options = [*platforms, "--python-version", version, "--only-binary=:all:"]
        run(sys.executable, "-m", "pip", "install", "-q", "--target", site, *options, *WHEELS)
    return site


def build(folder: Path, root: Path, version: str) -> Path:
    """Build the extension into a copy of the project; return that folder."""
    project, objects = folder / "project", folder / "objects"
    shutil.rmtree(project, ignore_errors=True)
    objects.mkdir(exist_ok=True)
    for name in ("lowrank", "tests"):
        ignore = shutil.ignore_patterns("*.so", "_core.c", "__pycache__")
        shutil.copytree(ROOT / name, project / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", project)
    run(sys.executable, "-m", "cython", "-3", KERNELS / "_core.pyx", "-o", objects / "_core.c")
    include = [f"-I{KERNELS}", f"-I{root}/usr/include/python{version}", f"-I{root}/usr/include"]
    have = ["-O3", "-fopenmp", "-DLR_HAVE_BASELINE=1"]
    sources = {
        KERNELS / "isa.c": [*KERNEL_FLAGS, "-DLR_ISA=baseline", "-DLR_BYTES=16"],
        KERNELS / "dispatch.c": have,
        KERNELS / "program.c": have,
        objects / "_core.c": ["-O1", *include],
    }
    for source, options in sources.items():
        run(COMPILER, *FLAGS, *options, "-c", source, "-o", objects / f"{source.stem}.o")
    extension = f"_core.cpython-{version.replace('.', '')}-aarch64-linux-gnu.so"
    names = [objects / f"{source.stem}.o" for source in sources]
    library = project / "lowrank" / "_kernels" / extension
    run(COMPILER, "-shared", "-fopenmp", *names, "-lm", "-o", library)
    return project


def main(arguments: list[str]) -> None:
    """Prepare the folder, build, and run pytest with the further arguments."""
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(__doc__)
    missing = [tool for tool in (COMPILER, EMULATOR, "apt-get") if not shutil.which(tool)]
    if missing:
        raise SystemExit(f"missing: {', '.join(missing)}; see the top of {__file__}")
    folder = Path(arguments[0]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    root = unpack_python(folder)
    python = next(iter(sorted((root / "usr" / "bin").glob("python3.*[0-9]"))))
    version = python.name.removeprefix("python")
    site = unpack_wheels(folder, version)
    project = build(folder, root, version)
    paths = f"{project}{os.pathsep}{site}"
    command = [
        EMULATOR,
        "-L",
        root,
        python,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        *arguments[1:],
    ]
    run(*command, cwd=project, env=os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"})


if __name__ == "__main__":
    main(sys.argv[1:])
