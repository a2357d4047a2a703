"""What `import lowrank` costs: time, and the modules that nobody asked for yet."""

import subprocess
import sys

#: Libraries that few calls need.
HEAVY = {"tensorly", "matplotlib", "torch", "typer", "rich", "cupy", "onnx", "h5py", "dask"}


def modules(statement="import lowrank"):
    code = f"{statement}; import sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def importing(statement):
    """A recipe of a call that imports in a process of its own."""

    def make():
        command = [sys.executable, "-c", statement]
        return lambda: subprocess.run(command, check=True)

    return make


def heavy_modules():
    return len(HEAVY & {name.split(".")[0] for name in modules()})


def own_modules():
    return sum(name.split(".")[0] == "lowrank" for name in modules())


WORK = {"import lowrank, a process": importing("import lowrank")}
TRACKED = {"optional libraries imported": heavy_modules}


def timeraw_import():
    return "import lowrank"


def timeraw_import_numpy_scipy():
    """What of it is not ours."""
    return "import numpy, scipy.fft, scipy.linalg, scipy.ndimage"


class Modules:
    def track_heavy(self):
        return heavy_modules()

    track_heavy.unit = "optional libraries imported"

    def track_own(self):
        return own_modules()

    track_own.unit = "modules of lowrank imported"
