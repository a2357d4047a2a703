"""Time and stability of fits.

    python -m asv_benchmarks.fits [--only WORD] [--json]

One thread.  CP-ALS and TensorLy's, from the same start; memory of CP-ALS at the size of the largest
layers, measured in a separate process; Tucker-2 and TensorLy's partial_tucker; and the effect of
the error-preserving correction on the sensitivity.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from asv_benchmarks.benchmarks.timing import measure_seconds

#: Limits for (512, 512, 3, 3), R = 256, 20 sweeps: seconds, and bytes besides the tensor.
SECONDS, BYTES = 4.0, 400e6

MEMORY = """
import time, tracemalloc
import numpy as np
from lowrank.families import als
rng = np.random.default_rng(0)
tensor = rng.standard_normal((1, 512, 512, 3, 3))
def start(t, r): return [rng.standard_normal((1, n, r)) for n in t.shape[1:]]
als.batched_cp(tensor[:, :8, :8], start(tensor[:, :8, :8], 4), 2)  # imports
first = start(tensor, 256)
begin = time.perf_counter()
als.batched_cp(tensor, first, 20)
took = time.perf_counter() - begin
tracemalloc.start()  # NumPy reports every array
als.batched_cp(tensor, first, 20)
print(took, tracemalloc.get_traced_memory()[1])
"""


def rows() -> Iterator[dict[str, Any]]:
    yield from cp()
    yield from tucker()
    yield from stability()


def cp() -> Iterator[dict[str, Any]]:
    from tensorly.decomposition import parafac

    from lowrank.families import als

    for c, rank, sweeps in ((128, 64, 4), (256, 64, 2)):
        rng = np.random.default_rng(0)
        tensor = rng.standard_normal((c, c, 3, 3))
        start = [rng.standard_normal((n, rank)) for n in tensor.shape]

        def ours(tensor: Any = tensor, start: Any = start, n: int = sweeps) -> Any:
            fit = als.batched_cp(tensor[None], [f[None] for f in start], n)
            return [f[0] for f in fit.factors]

        def theirs(tensor: Any = tensor, start: Any = start, n: int = sweeps) -> Any:
            init = np.ones(start[0].shape[1]), [f.copy() for f in start]
            weights, factors = parafac(tensor, len(init[0]), n_iter_max=n, init=init, tol=0)
            return [factors[0] * weights, *factors[1:]]

        fast, slow = measure_seconds([ours, theirs], 1.0)
        errors = [_relative_error(tensor, f()) for f in (ours, theirs)]
        yield {
            "what": f"CP-ALS ({c}, {c}, 3, 3), R = {rank}, {sweeps} sweeps",
            "seconds": fast, "peer": slow, "faster": slow / fast,
            "wanted": 15.0 if c == 256 else None, "met": slow / fast >= 15 or c != 256,
            "note": f"TensorLy's own; errors differ by {abs(errors[0] - errors[1]):.1g}",
        }  # fmt: skip
    out = subprocess.run(
        [sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True
    ).stdout
    took, allocated = map(float, out.split())
    yield {
        "what": "CP-ALS (512, 512, 3, 3), R = 256, 20 sweeps",
        "seconds": took, "peer": SECONDS, "faster": SECONDS / took,
        "wanted": 1.0, "met": took <= SECONDS and allocated <= BYTES,
        "note": f"limits {SECONDS:g} s and {BYTES / 1e6:.0f} MB; used {allocated / 1e6:.0f} MB",
    }  # fmt: skip


def _relative_error(tensor: np.ndarray, factors: Any) -> float:
    approximation = np.einsum("ar,br,cr,dr->abcd", *factors, optimize=True)
    return float(np.linalg.norm(tensor - approximation) / np.linalg.norm(tensor))


def tucker() -> Iterator[dict[str, Any]]:
    from tensorly.decomposition import partial_tucker

    import lowrank as lr

    for c, rank in ((128, 32), (256, 64), (512, 128)):
        rng = np.random.default_rng(0)
        decay = np.geomspace(1, 0.02, c)
        turn = np.linalg.qr(rng.standard_normal((c, c)))[0]
        tensor = rng.standard_normal((c, c, 3, 3)) * decay[:, None, None, None]
        tensor = np.einsum("ab,bcij->acij", turn, tensor * decay[None, :, None, None])
        conv = lr.dense(tensor, padding=1)

        def ours(conv: Any = conv, rank: int = rank) -> Any:
            return lr.tucker(conv, (rank, rank))

        def theirs(tensor: Any = tensor, rank: int = rank) -> Any:
            return partial_tucker(tensor, rank=[rank, rank], modes=[0, 1])

        fast, slow = measure_seconds([ours, theirs], 1.0)
        (core, factors), _ = theirs()
        whole = np.einsum("abij,ta,sb->tsij", core, *factors, optimize=True)
        error = float(np.linalg.norm(tensor - whole) / np.linalg.norm(tensor))
        yield {
            "what": f"Tucker-2 ({c}, {c}, 3, 3), ranks {rank}, {rank}",
            "seconds": fast, "peer": slow, "faster": slow / fast,
            "wanted": 3.0, "met": slow / fast >= 3,
            "note": f"partial_tucker; errors {ours().error(tensor):.6f} and {error:.6f}",
        }  # fmt: skip


def stability() -> Iterator[dict[str, Any]]:
    import lowrank as lr
    from lowrank.families import als
    from lowrank.interop import weights

    digits = os.path.join(os.path.dirname(lr.__file__), "data", "digits.safetensors")
    for layer in weights.layers(digits):
        if layer.conv.stages[0].kernel == (1, 1) or layer.conv.in_channels < 8:
            continue
        w = layer.conv.to_dense().astype(np.float64)
        tensor = w.reshape(*w.shape[:2], -1)
        rank = max(w.shape[:2])
        fit = als.batched_cp(tensor[None], [f[None] for f in als.start(tensor, rank)], 300)
        best = fit.factors

        def corrected(tensor: Any = tensor, best: Any = best, error: float = fit.error) -> Any:
            return als.corrected(tensor[None], best, als.spared(error))

        (took,) = measure_seconds([corrected], 0.1)
        after = corrected()
        ratio = als.sensitivity(best) / als.sensitivity(after)
        yield {
            "what": f"correction of cp3, {layer.name}, R = {rank}",
            "seconds": took, "peer": None, "faster": ratio,
            "wanted": None, "met": True,
            "note": "sensitivity ratio, "
            f"error {fit.error:.4f} -> {als.batched_error(tensor[None], after):.4f}",
        }  # fmt: skip


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="rows with this in their name")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = []
    for row in rows():
        if given.only not in row["what"]:
            continue
        found.append(row)
        if not given.json:
            wanted = ""
            if row["wanted"] is not None:
                wanted = f"of {row['wanted']:g}: {'met' if row['met'] else 'MISSED'}"
            print(
                f"{row['what']:50} {row['seconds']:8.3f} s {row['faster']:7.2f}x {wanted:15} "
                f"{row['note']}",
                flush=True,
            )
    if given.json:
        json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
