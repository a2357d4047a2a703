"""Compress architectures of torchvision, timm and transformers, and check the results.

    python -m asv_benchmarks.architectures [PATTERN ...] [--results FILE] [--seconds S] [--retry]
        [--table]

Weights are random, of low rank, so that exact chains exist within the budget of 70 % of the MACs.
Each architecture runs in a process of its own, with a small input, two families and no gradients:
LAYERS_TRIED layers, spread over the network, are compressed, none larger than LARGEST if others
are smaller.  Checked are the output of the compressed model, its deep copy, the saved and loaded
model, its ONNX export in onnxruntime (by PyTorch's older exporter, or by the newer one where that
fails) and its copy on the engine.  Results are appended to FILE, and architectures in it are
not run again; --retry runs those that have failed.  --table only prints the results.  The exit code
is 1 if fewer than SHARE of the architectures pass.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import io
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from asv_benchmarks.zoo import CASES, Case
from lowrank.interop.torch import TorchModel, compress, on_engine
from lowrank.interop.torch.batches import run_model, tensors_in
from lowrank.interop.torch.modules import LAYERS

BUDGET = 0.7  # of the MACs
RANK = 0.25  # of the weights, as a share of the full rank
LARGEST = 192  # rows or columns of a weight as a matrix, whichever are fewer
LONGEST = 768  # the others
LAYERS_TRIED = 6  # of an architecture, so that it takes seconds
FAMILIES = ("channel_svd", "spatial_svd")
CLOSE = 1e-2  # relative RMS error of outputs: rounding is amplified by random networks
EQUAL = 1e-3  # of results that may differ in the order of sums alone
SHARE = 0.99  # of architectures that must pass
CHECKS = ("compress", "close", "copy", "load", "onnx", "engine")


class _Failed(Exception):
    """A result that is not as it should be."""


class _Flat(nn.Module):
    """A model that takes tensors by position and returns a tuple of them, for the export."""

    def __init__(self, model: nn.Module, names: list[str] | None) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = tensors[0] if self.names is None else dict(zip(self.names, tensors))
        return tuple(_outputs(run_model(self.model, x)))


def check(case: Case) -> dict[str, Any]:
    """Return the results of all checks of an architecture.

    Parameters
    ----------
    case : Case
        Architecture.

    Returns
    -------
    dict
        ``"checks"`` has "ok" or a sentence for each check, ``"trace"`` the tracebacks of failures.
    """
    torch.manual_seed(0)
    result: dict[str, Any] = {"name": case.name, "family": case.family, "checks": {}, "trace": {}}
    start = time.perf_counter()
    model, x = case.make()
    model = reduce_ranks(model.eval().requires_grad_(False))
    with torch.inference_mode():
        expected = _outputs(run_model(model, x))
    if not all(bool(t.isfinite().all()) for t in expected):
        raise ValueError(f"outputs of {case.name} itself must be finite")
    small: Any = None

    def run_compress() -> None:
        nonlocal small
        layers = TorchModel(model, [x]).layers
        matrices = {layer.name: _matrix(layer.conv.stages[0].weight.shape) for layer in layers}
        limits = _limits(matrices.values())
        fit = [name for name, matrix in matrices.items() if _is_within(matrix, limits)]
        tried = {fit[i * len(fit) // LAYERS_TRIED] for i in range(LAYERS_TRIED)} if fit else ()
        others = [layer.name for layer in layers if layer.name not in tried]
        small = compress(
            model, [x], macs=BUDGET, families=FAMILIES, gradients=False, left_out=others
        )
        dense, chosen = (small.plan.total("macs")[i] for i in (1, 0))
        result.update(layers=len(layers), tried=len(tried), macs=chosen / dense)
        if dense and chosen > BUDGET * dense:
            raise _Failed(f"the compressed model takes {chosen / dense:.0%} of the MACs")

    steps: dict[str, Callable[[], object]] = {
        "compress": run_compress,
        "close": lambda: _compare(run_model(small.model, x), expected, CLOSE),
        "copy": lambda: _compare(run_model(copy.deepcopy(small.model), x), _run(small.model, x)),
        "load": lambda: _compare(_run(_reloaded(small.model, model), x), _run(small.model, x)),
        "onnx": lambda: _check_onnx(model, small.model, x),
        "engine": lambda: _compare(
            run_model(on_engine(small.model, x if torch.is_tensor(x) else None), x),
            _run(small.model, x),
        ),
    }
    for name, step in steps.items():
        try:
            with warnings.catch_warnings(), torch.inference_mode(name not in ("onnx", "compress")):
                warnings.simplefilter("ignore")
                result["checks"][name] = step() or "ok"
        except Exception as error:
            result["checks"][name] = f"{type(error).__name__}: {_first_line(error)[:300]}"
            result["trace"][name] = traceback.format_exc()[-2500:]
            if name == "compress":
                break
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).split("\n", 1)[0]


def reduce_ranks(model: nn.Module) -> nn.Module:
    """Give the weights of dense layers a low rank, in place, and batch norms random statistics.

    Weights that are all zero, such as those of the last norms of residual branches, are set first:
    nothing before them would change the outputs.
    """
    weights: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, LAYERS) and getattr(module, "groups", 1) == 1:
            weights.append(module.weight)
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            weights += module.in_proj_weight.chunk(3)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
            if module.weight is not None and not bool(module.weight.any()):
                module.weight.data.fill_(1.0)
    limits = _limits(_matrix(weight.shape) for weight in weights)
    for weight in weights:
        if not bool(weight.any()):
            weight.data.normal_(0, 0.02)
        matrix = weight.detach().reshape(_matrix(weight.shape))
        if _is_within(matrix.shape, limits):
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            rank = max(1, int(RANK * len(s)))
            gain = (s.square().sum() / s[:rank].square().sum()).sqrt()
            low = (u[:, :rank] * (gain * s[:rank])) @ vh[:rank]
            with torch.no_grad():
                weight.copy_(low.reshape(weight.shape))
    return model


def _matrix(shape: Any) -> tuple[int, int]:
    """Return the shape of a weight as a matrix of outputs and inputs."""
    rows, *rest = shape
    return rows, torch.Size(rest).numel()


def _limits(matrices: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return LARGEST and LONGEST, or the sides of the smallest matrix if none is within them."""
    sides = [(min(m), max(m)) for m in matrices if min(m) > 1]
    if not sides or any(_is_within(m, (LARGEST, LONGEST)) for m in sides):
        return LARGEST, LONGEST
    return min(sides)


def _is_within(matrix: tuple[int, ...], limits: tuple[int, int]) -> bool:
    return 1 < min(matrix) <= limits[0] and max(matrix) <= limits[1]


def _outputs(result: Any) -> list[torch.Tensor]:
    return [t for t in tensors_in(result) if t.is_floating_point()]


def _run(model: nn.Module, x: Any) -> list[torch.Tensor]:
    return _outputs(run_model(model, x))


def _compare(found: Any, expected: list[torch.Tensor], tolerance: float = EQUAL) -> None:
    """Raise unless tensors agree."""
    found = _outputs(found)
    if [t.shape for t in found] != [t.shape for t in expected]:
        raise _Failed("outputs have other shapes")
    for a, b in zip(found, expected):
        if not bool(a.isfinite().all()):
            raise _Failed("outputs are not finite")
        scale = float(b.double().norm())
        error = float((a.double() - b.double()).norm()) / (scale or 1.0)
        if not error <= tolerance:
            raise _Failed(f"outputs differ by {error:.2g}")


def _reloaded(model: nn.Module, original: nn.Module) -> nn.Module:
    """Return a model whose weights went through a file, as a whole and as a state dict.

    As a state dict alone, where PyTorch does not save the original as a whole.
    """
    loaded: nn.Module = copy.deepcopy(model)
    try:
        torch.save(original, io.BytesIO())
    except Exception:  # such as parametrized modules
        pass
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file))
    return loaded


def _check_onnx(model: nn.Module, small: nn.Module, x: Any) -> str | None:
    """Compare an ONNX export in onnxruntime; return why the original model has none."""
    errors: list[str] = []
    for export in (_export, _export_dynamo):
        try:
            outputs = _run_onnx(export(small, x), x)
        except Exception as of_small:
            try:
                _run_onnx(export(model, x), x)
            except Exception as error:
                cause: BaseException = error
                while cause.__cause__ is not None:
                    cause = cause.__cause__
                errors.append(_first_line(cause)[:120])
            else:
                raise of_small
        else:
            with torch.inference_mode():
                _compare(outputs, _run(small, x))
            return None
    return f"n/a, as PyTorch does not export the original: {'; '.join(errors)}"


def _run_onnx(exported: bytes, x: Any) -> list[torch.Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(exported, options, ["CPUExecutionProvider"])
    given = {f"x{i}": t.numpy() for i, t in enumerate(_inputs(x))}
    feeds = {i.name: given[i.name] for i in session.get_inputs()}
    return [torch.from_numpy(a) for a in session.run(None, feeds)]


def _inputs(x: Any) -> list[torch.Tensor]:
    return list(x.values()) if isinstance(x, Mapping) else [x]


def _export(model: nn.Module, x: Any) -> bytes:
    """Return an export by a trace."""
    file = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(
            _flat(model, x), tuple(_inputs(x)), file, dynamo=False, opset_version=17,
            input_names=[f"x{i}" for i in range(len(_inputs(x)))],
        )  # fmt: skip
    return file.getvalue()


def _export_dynamo(model: nn.Module, x: Any) -> bytes:
    """Return an export by torch.export, which needs onnxscript."""
    with torch.no_grad():
        program = torch.onnx.export(
            _flat(model, x), tuple(_inputs(x)), dynamo=True, verbose=False,
            input_names=[f"x{i}" for i in range(len(_inputs(x)))],
        )  # fmt: skip
    exported: bytes = program.model_proto.SerializeToString()
    return exported


def _flat(model: nn.Module, x: Any) -> nn.Module:
    return _Flat(model, list(x) if isinstance(x, Mapping) else None).eval()


class _Results(NamedTuple):
    """Results in a file of one JSON object per line; the last one of a name counts."""

    path: Path

    def read(self) -> dict[str, dict[str, Any]]:
        """Return the results by name."""
        if not self.path.exists():
            return {}
        rows = map(json.loads, self.path.read_text().splitlines())
        return {row["name"]: row for row in rows}

    def append(self, row: dict[str, Any]) -> None:
        """Add a result."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def run_alone(case: Case, seconds: float) -> dict[str, Any]:
    """Check an architecture in a process of its own."""
    command = [sys.executable, "-m", "asv_benchmarks.architectures", "--one", case.name]
    failed = {"name": case.name, "family": case.family, "trace": {}, "seconds": seconds}
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return failed | {"checks": {"compress": f"TimeoutExpired: more than {seconds:g} s"}}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        failed["trace"] = {"make": done.stderr[-2500:]}
        failed["seconds"] = round(time.perf_counter() - start, 1)
        return failed | {"checks": {"compress": words[:300]}}
    row: dict[str, Any] = json.loads(lines[-1])
    return row


def has_passed(row: Mapping[str, Any]) -> bool:
    """Return whether all checks passed; an export that PyTorch does not have counts as passed."""
    checks = row["checks"]
    return set(checks) == set(CHECKS) and all(
        text == "ok" or text.startswith("n/a") for text in checks.values()
    )


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results by family as a Markdown table, followed by all that is not "ok"."""
    lines = ["| family | architectures | passed | median s |", "| --- | --- | --- | --- |"]
    for family in dict.fromkeys(case.family for case in CASES):
        own = [rows[c.name] for c in CASES if c.family == family and c.name in rows]
        if own:
            passed = sum(map(has_passed, own))
            middle = sorted(row["seconds"] for row in own)[len(own) // 2]
            names = ", ".join(row["name"].partition(":")[2] for row in own)
            lines.append(f"| {family}: {names} | {len(own)} | {passed} | {middle:.0f} |")
    known = [rows[c.name] for c in CASES if c.name in rows]
    passed = sum(map(has_passed, known))
    lines += ["", f"{passed} of {len(known)} architectures passed, of {len(CASES)}."]
    for row in known:
        others = {k: v for k, v in row["checks"].items() if v != "ok"}
        lines += [f"- `{row['name']}`, {check}: {text}" for check, text in others.items()]
    return "\n".join(lines)


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="names, such as timm:*vit*")
    parser.add_argument("--results", type=Path, default=Path("architectures.jsonl"))
    parser.add_argument("--seconds", type=float, default=600, help="limit of one architecture")
    parser.add_argument("--retry", action="store_true", help="run those again that have failed")
    parser.add_argument("--table", action="store_true", help="print the results, run nothing")
    parser.add_argument("--one", help="check one architecture in this process, and print JSON")
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        (case,) = (c for c in CASES if c.name == options.one)
        print(json.dumps(check(case)))
        return 0
    results = _Results(options.results)
    known = results.read()
    for case in () if options.table else CASES:
        is_wanted = not options.patterns or any(
            fnmatch.fnmatch(case.name, p) for p in options.patterns
        )
        is_done = case.name in known and (not options.retry or has_passed(known[case.name]))
        if is_wanted and not is_done:
            known[case.name] = run_alone(case, options.seconds)
            results.append(known[case.name])
            words = Counter(known[case.name]["checks"].values())
            print(case.name, known[case.name]["seconds"], dict(words), flush=True)
    print(table(known))
    rows = [known[c.name] for c in CASES if c.name in known]
    return int(not rows or sum(map(has_passed, rows)) < SHARE * len(rows))


if __name__ == "__main__":
    sys.exit(main())
