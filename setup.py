"""The compiled engine: one C source for each instruction set; the rest is in pyproject.toml."""

import tempfile
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path("lowrank") / "_kernels"
COMMON = ["-O3", "-g0", "-std=gnu11", "-fvisibility=hidden", "-Wall", "-Wextra"]
# name: (bytes of a vector, flags to try in turn); the first name needs no particular processor.
LEVELS = {
    "baseline": (16, [["-march=x86-64-v2"], []]),
    "avx2": (32, [["-march=x86-64-v2", "-mavx2", "-mfma"]]),
    "avx512": (
        64,
        [
            ["-march=x86-64-v2", "-mavx2", "-mfma"]
            + [f"-mavx512{part}" for part in ("f", "cd", "bw", "dq", "vl")]
            + ["-mprefer-vector-width=512"]
        ],
    ),
}


class BuildExt(build_ext):
    """build_ext that compiles isa.c once for every instruction set that the compiler knows."""

    def build_extension(self, ext):
        """Compile isa.c a level at a time, then the rest of `ext` with plain flags."""
        # Objects are older or newer than all of these together.
        ext.depends = sorted(
            str(p) for p in HERE.iterdir() if p.suffix in {".h", ".inc", ".c"} and p.stem != "_core"
        )
        objects = []
        for name, (width, attempts) in LEVELS.items():
            flags = next((a for a in attempts if self.compiles(COMMON + a)), None)
            if flags is None:
                print(f"lowrank: the compiler has no {name}: left out")
                continue
            source = str(HERE / "isa.c")
            target = Path(self.build_temp) / f"isa-{name}"
            (made,) = self.compiler.object_filenames([source], output_dir=str(target))
            if self.force or is_older(made, [*ext.depends, "setup.py"]):
                self.compiler.compile(
                    [source],
                    output_dir=str(target),
                    macros=[("LR_ISA", name), ("LR_BYTES", str(width))],
                    include_dirs=[str(HERE)],
                    extra_postargs=COMMON + flags,
                )
            objects.append(made)
            if name == "baseline":
                ext.extra_compile_args = COMMON + flags
            else:
                ext.define_macros.append((f"LR_HAVE_{name.upper()}", "1"))
        ext.extra_objects = objects
        if self.compiles(["-fopenmp"], link=True):
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args = ["-fopenmp"]
        else:
            print("lowrank: the compiler has no OpenMP: one thread")
        super().build_extension(ext)

    def compiles(self, flags, link=False):
        """Whether the compiler takes `flags`, all of them."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.c"
            source.write_text("int main(void) { return 0; }\n")
            try:
                made = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=[*flags, "-Werror"]
                )
                if link:
                    self.compiler.link_executable(
                        made, str(Path(folder) / "probe"), extra_postargs=flags
                    )
            except Exception:  # compilers and linkers each raise what they like
                return False
        return True


def is_older(made, sources):
    """Whether `made` is missing or older than one of `sources`."""
    made = Path(made)
    return not made.exists() or made.stat().st_mtime < max(Path(s).stat().st_mtime for s in sources)


core = Extension(
    "lowrank._kernels._core",
    [str(HERE / name) for name in ("_core.pyx", "dispatch.c", "plan.c")],
    include_dirs=[str(HERE)],
)
setup(
    ext_modules=cythonize([core], compiler_directives={"language_level": 3}),
    cmdclass={"build_ext": BuildExt},
)
