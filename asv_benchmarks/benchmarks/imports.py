"""Time of `import lowrank`, and the modules that it imports."""

import subprocess
import sys

#: Optional libraries, which `import lowrank` must not import.
HEAVY = {"tensorly", "matplotlib", "torch", "typer", "rich", "cupy", "onnx", "h5py", "dask"}


def modules():
    code = "import lowrank; import sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def importing(statement):
    """Return a recipe of an import in a new process."""

    def make():
        command = [sys.executable, "-c", statement]
        return lambda: subprocess.run(command, check=True)

    return make


def count_heavy_modules():
    return len(HEAVY & {name.split(".")[0] for name in modules()})


def count_own_modules():
    return sum(name.split(".")[0] == "lowrank" for name in modules())


WORK = {"import lowrank, a process": importing("import lowrank")}
TRACKED = {"optional libraries imported": count_heavy_modules}


def timeraw_import():
    return "import lowrank"


def timeraw_import_numpy_scipy():
    """Return the share that is not ours."""
    return "import numpy, scipy.fft, scipy.linalg, scipy.ndimage"


class Modules:
    def track_heavy(self):
        return count_heavy_modules()

    track_heavy.unit = "optional libraries imported"

    def track_own(self):
        return count_own_modules()

    track_own.unit = "modules of lowrank imported"
