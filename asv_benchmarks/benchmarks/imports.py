"""What `import lowrank` costs: time, and the modules that nobody asked for yet."""

import subprocess
import sys


def modules():
    code = "import lowrank, sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def timeraw_import():
    return "import lowrank"


def track_heavy_modules():
    heavy = {"tensorly", "matplotlib", "torch", "typer", "rich", "cupy", "onnx"}
    return len(heavy & {name.split(".")[0] for name in modules()})


track_heavy_modules.unit = "optional libraries imported"
