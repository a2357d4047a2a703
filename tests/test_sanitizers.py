"""Kernel tests with the engine built under the address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def library(name):
    """Return the path of a run-time library of gcc, or None."""
    if not shutil.which("gcc"):
        return None
    path = subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.mark.full
@pytest.mark.first
def test_kernels_pass_under_sanitizers(tmp_path):
    libraries = [library("libasan.so"), library("libubsan.so")]
    if None in libraries:
        pytest.skip("gcc has no sanitizers here")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("lowrank", "tests"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "_core.c")
        )
    # What the address sanitizer finds as well would double the time of compiling.
    flags = "-fsanitize=address,undefined -fno-sanitize=object-size,pointer-overflow"
    flags += " -fno-sanitize-recover=undefined"
    build = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=os.environ | {"CFLAGS": flags, "LDFLAGS": flags, "LOWRANK_OPTIMIZE": "-O1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stderr[-2000:]
    # A sanitized process that forks while threads run waits forever for their locks; its shadow
    # memory exceeds any limit of the address space.
    names = "kernels", "passes", "boxes", "multirate", "channels_last", "program"
    files = [f"tests/test_{name}.py" for name in names]
    # Of slow functions some cases suffice: sanitized kernels take five to ten times as long.
    command = [sys.executable, "-m", "pytest", "-q", "--quick", *files]
    command += ["-k", "not forked and not lacked"]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ
        | {
            "LD_PRELOAD": " ".join(map(str, libraries)),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "PYTHONPATH": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert " passed" in run.stdout
