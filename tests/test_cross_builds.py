"""Builds for other machines, by the compilers that are there, and with other options here."""

import ast
import importlib.util
import io
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from lowrank.engine import machine

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "lowrank" / "_kernels"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-command-line-argument"]
#: Targets of zig, with the best instruction set of each.
TARGETS = {
    "x86_64-windows-gnu": "avx512",
    "aarch64-windows-gnu": "baseline",
    "x86_64-macos": "avx2",
    "aarch64-macos": "baseline",
    "aarch64-linux-musl": "baseline",
    "x86_64-linux-musl": "avx2",
}
#: Machines of targets whose programs need no libraries, and emulators of these machines.
RUNNERS = {
    "x86_64-linux-musl": ("x86_64", ["qemu-x86_64"]),
    "aarch64-linux-musl": ("aarch64", ["qemu-aarch64"]),
}
#: Python's headers take it from their system's configuration; this is what they need for Windows.
WINDOWS_CONFIGURATION = """
#include <io.h>
#include <stdio.h>
#define MS_WINDOWS
#define MS_WIN32
#define MS_WIN64
#define NT_THREADS
#define Py_ENABLE_SHARED 1
#define HAVE_DECLSPEC_DLL
#define SIZEOF_SHORT 2
#define SIZEOF_INT 4
#define SIZEOF_LONG 4
#define SIZEOF_LONG_LONG 8
#define SIZEOF_VOID_P 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_TIME_T 8
#define SIZEOF_WCHAR_T 2
#define SIZEOF_FLOAT 4
#define SIZEOF_DOUBLE 8
#define SIZEOF_PID_T 4
#define ALIGNOF_MAX_ALIGN_T 16
#define HAVE_PROTOTYPES 1
#define PLATFORM "win32"
"""
PROGRAM = """
#include <stdio.h>

#include "dispatch.h"

int main(void)
{
    int64_t caches[3];
    double peak = 0;
    if (lr_guard_forks()) return 1;
    lr_caches(caches);
    for (int i = 0; i < lr_isa_count(); i++) peak += lr_isa_table(i)->f32.peak(1, 0.5);
    lr_free(lr_allocate(64));
    printf("%s, %d threads, %d\\n", lr_isa_name(0), lr_max_threads(), peak > 0 && lr_now() > 0);
    return lr_fork_join(1) < 0;
}
"""


def instruction_sets(target):
    """Return the vector bytes and flags of each instruction set, as setup.py lists them."""
    wanted = "X86" if target.startswith("x86_64") else "PLAIN"
    for statement in ast.parse((ROOT / "setup.py").read_text("utf-8")).body:
        if isinstance(statement, ast.Assign) and statement.targets[0].id == wanted:
            return eval(compile(ast.Expression(statement.value), "setup.py", "eval"))
    raise LookupError(wanted)


@pytest.fixture(scope="module")
def zig(tmp_path_factory):
    """Return a function that runs zig's C compiler for a target."""
    if not importlib.util.find_spec("ziglang"):
        pytest.skip("ziglang is not installed")
    cache = str(tmp_path_factory.mktemp("zig"))

    def compile_for(target, *arguments):
        command = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-g0", *arguments]
        environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]

    return compile_for


def compile_engine(zig, target, names, folder, optimize="-O0"):
    """Compile the kernels of instruction sets and the drivers; return the objects."""
    sets, objects = instruction_sets(target), []
    for name in names:
        width, flags = sets[name]
        objects.append(folder / f"{name}.o")
        macros = [f"-DLR_ISA={name}", f"-DLR_BYTES={width}"]
        # Without optimization zig adds checks, which take longer than all else.
        options = [optimize, "-fno-sanitize=all", *WARNINGS, *flags, *macros]
        zig(target, *options, "-c", KERNELS / "isa.c", "-o", objects[-1])
    have = [f"-DLR_HAVE_{name.upper()}=1" for name in names]
    for name in ("dispatch", "program"):
        objects.append(folder / f"{name}.o")
        options = [optimize, "-fno-sanitize=all", *WARNINGS, *have]
        zig(target, *options, "-c", KERNELS / f"{name}.c", "-o", objects[-1])
    return objects


@pytest.mark.parametrize("target", TARGETS)
def test_engine_compiles(zig, target, tmp_path):
    objects = compile_engine(zig, target, [TARGETS[target]], tmp_path)
    assert all(path.stat().st_size > 1000 for path in objects)


@pytest.mark.parametrize("target", ["x86_64-windows-gnu", "aarch64-macos"])
def test_bindings_compile(zig, target, tmp_path):
    cython = shutil.which("cython", path=os.path.dirname(sys.executable))
    if cython is None:
        pytest.skip("cython is not installed")
    source = tmp_path / "_core.c"
    subprocess.run([cython, "-3", KERNELS / "_core.pyx", "-o", source], check=True)
    headers = tmp_path / "include"
    shutil.copytree(sysconfig.get_path("include"), headers)
    if "windows" in target:
        (headers / "pyconfig.h").write_text(WINDOWS_CONFIGURATION, "utf-8")
    include = [f"-I{KERNELS}", "-isystem", headers]
    zig(target, "-O0", "-fno-sanitize=all", *include, "-c", source, "-o", tmp_path / "_core.o")


@pytest.mark.full
@pytest.mark.parametrize("target", TARGETS)
def test_engine_links(zig, target, tmp_path):
    """Every instruction set with the drivers and no Python, so that nothing is left undefined."""
    objects = compile_engine(zig, target, instruction_sets(target), tmp_path)
    main, program = tmp_path / "main.c", tmp_path / "main"
    main.write_text(PROGRAM, "utf-8")
    zig(target, f"-I{KERNELS}", main, *objects, "-o", program, "-lm")
    if target in RUNNERS and platform.system() == "Linux":
        processor, runner = RUNNERS[target]
        if processor == platform.machine():
            runner = []
        if not runner or shutil.which(runner[0]):
            output = subprocess.run([*runner, program], capture_output=True, text=True, check=True)
            assert ", 1 threads, 1" in output.stdout


def build(folder, **environment):
    """Build a copy of the project in place with these environment variables."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("lowrank", "tests"):
        ignore = shutil.ignore_patterns("*.so", "_core.c", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    run = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]


def run_here(folder, *arguments):
    """Run Python on the copy of the project; return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, *arguments]
    run = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


@pytest.mark.full
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_kernels_pass_without_openmp_and_optimization(compiler, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    build(tmp_path, CC=compiler, LOWRANK_OPENMP="0", LOWRANK_OPTIMIZE="-O0")
    code = "from lowrank._kernels import _core; print(_core.max_threads())"
    assert run_here(tmp_path, "-c", code).strip() == "1"
    names = "kernels", "passes", "boxes", "channels_last", "program", "gradients"
    files = [f"tests/test_{name}.py" for name in names]
    # Tests of threads ask for two, and compare results: here both are those of one.
    assert " passed" in run_here(tmp_path, "-m", "pytest", "-q", *files, "-k", "not lacked")


@pytest.mark.full
def test_kernels_pass_under_clang(tmp_path):
    if not shutil.which("clang"):
        pytest.skip("clang is not installed")
    build(tmp_path, CC="clang")
    names = "kernels", "passes", "boxes", "channels_last", "program", "gradients"
    files = [f"tests/test_{name}.py" for name in names]
    assert " passed" in run_here(tmp_path, "-m", "pytest", "-q", *files)


@pytest.mark.full
def test_sums_stay_in_registers_under_clang(tmp_path):
    """The innermost loop of the widest block has one FMA per sum, and stores nothing."""
    for tool in ("clang", "objdump"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    width, flags = instruction_sets("x86_64")["avx2"]
    macros = ["-DLR_ISA=avx2", f"-DLR_BYTES={width}"]
    command = ["clang", "--target=x86_64-linux-gnu", "-O3", *flags, *macros, "-c"]
    subprocess.run([*command, KERNELS / "isa.c", "-o", tmp_path / "isa.o"], check=True)
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", tmp_path / "isa.o"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    block = listing[listing.index("<block_4_3_f32>:") :]
    instructions = [
        line.split("\t")[1].split() for line in block[: block.index("\n\n")].split("\n")[1:]
    ]
    sums = [i for i, words in enumerate(instructions) if words[0].startswith("vfmadd")]
    loop = instructions[sums[0] : sums[-1]]
    stores = [words for words in loop if words[0].startswith("vmov") and words[1].endswith(")")]
    assert (len(sums), stores) == (12, [])


def test_arm_processors_have_names_of_their_own(monkeypatch):
    """Calibrations are kept by that name, and Linux tells no model of theirs."""
    facts = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"
    monkeypatch.setattr("builtins.open", lambda *_, **__: io.StringIO(facts))
    assert machine.cpu.__wrapped__() == f"{platform.machine()}, implementer 0x41, part 0xd0c"


def test_loops_unroll_by_a_macro_that_clang_understands():
    for path in sorted(KERNELS.glob("*.inc")):
        assert "GCC unroll" not in path.read_text("utf-8"), f"{path.name}: use LR_UNROLL"


def test_text_files_name_their_encoding():
    """Windows would read and write them in the encoding of its language."""
    missing = []
    for path in sorted((ROOT / "lowrank").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(call, ast.Call) and _opens_text(call):
                missing.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert not missing, missing


def _opens_text(call):
    """Return whether a call opens, reads or writes a text file without an encoding."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if name == "read_text":
        return not call.args
    if name == "write_text":
        return len(call.args) < 2
    return isinstance(call.func, ast.Name) and name == "open" and "b" not in ast.unparse(call)
