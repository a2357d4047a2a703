"""Build of the C extension, whose kernels are compiled once per instruction set."""

import os
import platform
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("lowrank/_kernels")
HEADERS = ["setup.py", *(str(p) for p in (*KERNELS.glob("*.h"), *KERNELS.glob("*.inc")))]
DRIVERS = ["dispatch.c", "program.c"]
WARNINGS = ["-Wall", "-Wextra"]
# Sanitized builds lower it: optimising the added checks takes minutes.
COMMON = [os.environ.get("LOWRANK_OPTIMIZE", "-O3"), "-g0", "-fvisibility=hidden"]

# Vector bytes and flags per instruction set; every x86-64 CPU of interest has the baseline.
X86 = {
    "baseline": (16, ["-msse4.2", "-mpopcnt"]),
    "avx2": (32, ["-mavx2", "-mfma"]),
    "avx512": (
        64,
        [
            *("-mavx512f", "-mavx512cd", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
            "-mprefer-vector-width=512",
        ],
    ),
}
PLAIN = {"baseline": (16, [])}
# A compiler may know -fopenmp where OpenMP's header is missing.
PROBE = """
#ifdef _OPENMP
#include <omp.h>
#endif
int main(void) { return 0; }
"""

# Instruction sets are flags of one architecture, and Python may be built for two of them.
if sys.platform == "darwin":
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")


def _machine() -> str:
    """Return the architecture that is compiled for, in lower case."""
    return (os.environ.get("ARCHFLAGS") or platform.machine()).split()[-1].lower()


class Build(build_ext):
    """build_ext that compiles kernels per instruction set, with flags that the compiler accepts."""

    def build_extension(self, ext):
        """Compile the kernels first and link them into the extension."""
        if self.compiler.compiler_type == "msvc":  # clang-cl has vector extensions
            self.compiler.initialize()
            self.compiler.cc = "clang-cl"
        x86 = _machine() in ("x86_64", "amd64")
        # Copies of a few vectors are faster inline than as calls of memcpy.
        plain = self._first_supported([["-fno-tree-loop-distribute-patterns"]])
        # A product that two branches share must not be hoisted from its sum: it would not be fused
        # into an FMA, and outputs would depend on the branch that computes them.
        plain += self._first_supported([["-fno-code-hoisting"]])
        openmp = self._first_supported([["-fopenmp"], ["-Xpreprocessor", "-fopenmp", "-lomp"]])
        if os.environ.get("LOWRANK_OPENMP") == "0":  # a build for one thread
            openmp = []
        found = {}
        for name, (width, flags) in (X86 if x86 else PLAIN).items():
            if self._supports(flags):
                found[name] = width, flags
            elif name == "baseline":
                found[name] = width, []  # the compiler's default baseline

        def compile_kernels(name):
            width, flags = found[name]
            return self.compiler.compile(
                [str(KERNELS / "isa.c")],
                output_dir=os.path.join(self.build_temp, f"isa-{name}"),
                macros=[("LR_ISA", name), ("LR_BYTES", str(width))],
                extra_postargs=[*COMMON, *WARNINGS, *plain, *flags],
                depends=HEADERS,
            )

        # Each takes half a minute, the widest the longest: it starts first.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [*chain.from_iterable(pool.map(compile_kernels, reversed(found)))]
        objects += self.compiler.compile(
            [str(KERNELS / name) for name in DRIVERS],
            output_dir=self.build_temp,
            macros=[(f"LR_HAVE_{name.upper()}", "1") for name in found],
            extra_postargs=[*COMMON, *WARNINGS, *openmp],
            depends=HEADERS,
        )
        ext.extra_objects = objects
        ext.extra_compile_args = COMMON
        ext.extra_link_args = openmp
        super().build_extension(ext)

    def _first_supported(self, choices):
        return next((c for c in choices if self._supports(c)), [])

    def _supports(self, flags) -> bool:
        """Return whether a small program compiles and links with these flags without warnings."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(PROBE)
            quiet = os.dup(2)
            try:
                with open(os.devnull, "w") as nowhere:
                    sys.stderr.flush()
                    os.dup2(nowhere.fileno(), 2)
                    objects = self.compiler.compile(
                        [str(source)], output_dir=folder, extra_postargs=["-Werror", *flags]
                    )
                    self.compiler.link_executable(
                        objects,
                        str(Path(folder, "probe")),
                        # sanitizers in CFLAGS must be linked, too
                        extra_postargs=[*flags, *os.environ.get("CFLAGS", "").split()],
                    )
            except Exception:
                return False
            finally:
                os.dup2(quiet, 2)
                os.close(quiet)
        return True


# One extension for Python 3.11 and all later versions, where the stable ABI has buffers; builds of
# Python without the GIL have no stable ABI.
IS_STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")

extension = Extension(
    "lowrank._kernels._core",
    [str(KERNELS / "_core.pyx")],
    define_macros=[("Py_LIMITED_API", "0x030B0000")] if IS_STABLE else [],
    py_limited_api=IS_STABLE,
    depends=[
        *HEADERS,
        *map(str, sorted(KERNELS.glob("*.pxi"))),
        *(str(KERNELS / name) for name in ("isa.c", *DRIVERS)),
    ],
)
setup(
    ext_modules=[extension],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if IS_STABLE else {},
)
