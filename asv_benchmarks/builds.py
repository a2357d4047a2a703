"""Builds of commits for the gate, in asv_benchmarks/.asv/gate."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "asv_benchmarks" / ".asv" / "gate"
MAX_BUILDS = 6
SOURCES = ("lowrank", "setup.py", "pyproject.toml", "README.md", "LICENSE")
SLOWDOWN = 1.15  # of the plans in the self-test


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def build(commit: str, copy: int = 0) -> Path:
    """Return a folder with a commit's package, built in place; `copy` distinguishes two builds."""
    folder = CACHE / f"{commit[:12]}-{copy}"
    stamp = folder / "built"
    if stamp.exists():
        stamp.touch()
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"building {commit[:12]} (a minute, once)", flush=True)
    words = git("ls-tree", "--name-only", commit).split()
    archive = folder / "source.tar"
    git("archive", "-o", str(archive), commit, *(s for s in SOURCES if s in words))
    shutil.unpack_archive(archive, folder, filter="data")
    archive.unlink()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\n{commit[:12]} cannot be built")
    stamp.touch()
    return folder


def build_both(base: str, head: str) -> tuple[Path, Path]:
    """Build both commits in parallel and delete old builds."""
    with ThreadPoolExecutor(2) as pool:
        folders = tuple(pool.map(build, (base, head), (0, int(base == head))))
    old = [f for f in CACHE.iterdir() if f not in folders]
    old.sort(key=lambda f: (f / "built").stat().st_mtime if (f / "built").exists() else 0)
    for folder in old[: max(0, len(old) + len(folders) - MAX_BUILDS)]:
        shutil.rmtree(folder)
    return folders[0], folders[1]


def slow_copy(folder: Path) -> Path:
    """Return a copy of a build whose plans take SLOWDOWN times as long."""
    other = folder.with_name(f"{folder.name[:12]}-s")
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(folder, other)
    with (other / "lowrank" / "engine" / "cpu.py").open("a") as file:
        file.write(
            f"""

def _slowed(self, x, out=None, run=CpuPlan.__call__):
    start = time.process_time()
    y = run(self, x, out)
    end = time.process_time()
    end += {SLOWDOWN - 1} * (end - start)
    while time.process_time() < end:
        pass
    return y


CpuPlan.__call__ = _slowed
"""
        )
    return other


def revisions(base: str | None, head: str) -> tuple[str, str]:
    """Return the commits to compare; HEAD on main is compared with its parent."""
    new = git("rev-parse", f"{head}^{{commit}}")
    if base is None:
        base = "main"
        if git("rev-parse", "main^{commit}") == new:
            base = f"{head}~1"
    return git("rev-parse", f"{base}^{{commit}}"), new
