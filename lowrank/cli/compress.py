"""Commands for whole networks: ``plan`` and ``compress``."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

from lowrank import report
from lowrank.cli.console import (
    AsJson,
    Batch,
    Bytes,
    Families,
    Macs,
    NoMeasure,
    Params,
    Runtime,
    Seconds,
    Size,
    Threads,
    app,
    calibrate_quickly,
    check_budgets,
    check_output,
    example,
    expand_options,
    fail,
    parse_families,
    parse_runtime,
    parse_size,
    print_json,
    print_table,
    share_bars,
    typer,
)
from lowrank.cli.interruption import describe_interruption
from lowrank.cli.scripts import load_function
from lowrank.compress import (
    FAST_FAMILIES,
    CompressibleModel,
    CompressionPlan,
    NothingToCompressError,
    compress_model,
    make_plan,
)
from lowrank.compress.model import describe_reasons
from lowrank.compress.options import AXES
from lowrank.compress.statistics import Progress
from lowrank.core import tables
from lowrank.core.files import set_aside
from lowrank.interop import files
from lowrank.selection import parse_budget

Model = Annotated[Path, typer.Argument(help=f"Network: {', '.join(files.ENDINGS)}.")]


@dataclass(frozen=True)
class PlanOptions:
    """Options of both commands: the calibration data and what the plan may choose."""

    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Calibration data (.npz): inputs of the network; for weights files, inputs of its "
            "layers, by name.",
        ),
    ] = None
    input: Size = None
    macs: Macs = None
    params: Params = None
    seconds: Seconds = None
    bytes: Bytes = None
    families: Families = None
    pin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER",
            help="Layer, or pattern such as 'layer1.*', to keep dense; may be repeated.",
        ),
    ] = None
    leave_out: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER", help="Like --pin, and excluded from the budget; may be repeated."
        ),
    ] = None
    cap: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SHARE",
            help="Maximum share of its MACs that a layer or pattern keeps; may be repeated.",
        ),
    ] = None
    no_gradients: Annotated[
        bool, typer.Option("--no-gradients", help="Weight the errors of all layers equally.")
    ] = False
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of all random choices. [0]")
    ] = None
    batch: Batch = None
    threads: Threads = None
    runtime: Runtime = None
    no_measure: NoMeasure = False

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of :func:`lowrank.compress.make_plan`."""
        budgets = {axis: getattr(self, axis) for axis in AXES if getattr(self, axis) is not None}
        if not budgets:
            raise ValueError("give a budget: --time, --macs, --params or --bytes")
        check_budgets(**budgets)
        families = parse_families(self.families)
        return {
            **budgets,
            "families": list(FAST_FAMILIES) if families is None else families,
            "pinned": list(self.pin or ()),
            "left_out": list(self.leave_out or ()),
            "capped": dict(map(_parse_cap, self.cap or ())),
            "gradients": not self.no_gradients,
            "seed": self.seed or 0,
            "batch": self.batch or 1,
            "threads": self.threads,
            "runtime": parse_runtime(self.runtime),
            "measure": not self.no_measure,
        }

    def conflicts_with_plan(self) -> list[str]:
        """Return the given options that a plan file decides."""
        names = {"seconds": "time"}
        given = [name for name, value in vars(self).items() if value not in (None, False)]
        return [
            f"--{names.get(name, name).replace('_', '-')}"
            for name in given
            if name not in ("calibrate", "input", "no_measure")
        ]


@app.command(
    epilog=example(
        "plan net.onnx --macs 0.5 --calibrate inputs.npz -o plan.json",
        "plan weights.safetensors --params 50% --pin 'layer1.*'",
    )
)
@expand_options
def plan(
    model: Model,
    options: PlanOptions,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Write the plan as JSON, for compress --plan."
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Store the options of finished layers here; the same command resumes from them.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose a family and rank per layer within a budget, without changing the network.

    A number in (0, 1] or 50% is a share of the network; counts above 1 and 20M are amounts; times
    need a unit (3ms).  A time budget is met by the clock: chains are measured on the runtime.
    """
    check_output("--out", out, model, options.calibrate)
    arguments = options.arguments()
    net, _ = _open(model, options)
    try:
        with describe_interruption(lambda: _kept(resume, resume)), share_bars() as step:
            result = _make_plan(net, arguments, resume, step)
    except NothingToCompressError as error:
        _exit_unchanged(str(error), as_json)
    if out is not None:
        result.save(out)
    if as_json:
        print(result.to_json())
        return
    _print_plan(result, None)
    if out is not None:
        print(f"wrote {out}")


@app.command(
    epilog=example(
        "compress net.onnx --macs 0.5 --calibrate inputs.npz -o small.onnx",
        "compress net.onnx --time 0.65 --runtime onnxruntime -o small.onnx",
        "compress net.onnx --plan plan.json -o small.onnx --report r.html",
    )
)
@expand_options
def compress(
    model: Model,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Compressed network, in the file format of MODEL."
        ),
    ],
    options: PlanOptions,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plan from 'lowrank plan', instead of a budget."),
    ] = None,
    passes: Annotated[int, typer.Option(min=1, metavar="N", help="Passes over all layers.")] = 1,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="Refit dense layers to compensate errors of earlier ones."),
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Store finished layers here; the same command resumes from them.",
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="SCRIPT:FUNCTION",
            help="Your function from the path of a network to a number, run before and after.",
        ),
    ] = None,
    report_to: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Write a report (.html); layers are timed."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compress a network within a budget, each layer fitted to calibration data.

    A number in (0, 1] or 50% is a share of the network; counts above 1 and 20M are amounts; times
    need a unit (3ms).  A time budget is met by the clock: chains are measured on the runtime.

    If nothing can be saved, no file is written and the exit code is 1.
    """
    calibrate = options.calibrate
    files.check_target(out, model)
    check_output("--out", out, calibrate, plan)
    check_output("--report", report_to, model, calibrate, plan, out, endings=(".html", ".htm"))
    score = None if evaluate is None else _load_scorer(evaluate)
    chosen = None if plan is None else _read_plan(plan)
    if chosen is None:
        arguments = options.arguments()
    else:
        arguments = {}
        if conflicts := options.conflicts_with_plan():
            raise ValueError(f"--plan excludes {', '.join(conflicts)}: the plan contains them")
    net, notes = _open(model, options)
    folder = None
    if resume is not None:
        run = {"passes": passes, "refit": refit, "plan": chosen and chosen.to_json(), **arguments}
        key = files.fingerprint(net, model, calibrate) + json.dumps(run, sort_keys=True)
        folder = resume / hashlib.sha256(key.encode()).hexdigest()[:16]
        if folder.exists() and not folder.is_dir():
            set_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
    before = None if score is None else score(model)
    with describe_interruption(lambda: _kept(resume, folder)), share_bars() as step:
        try:
            if chosen is None:
                chosen = _resume_plan(net, arguments, folder, step)
        except NothingToCompressError as error:
            _exit_unchanged(str(error), as_json)
        if not chosen.changed:
            _exit_unchanged("the network is within the budget already", as_json)
        result = compress_model(
            net, chosen, passes=passes, refit=refit, folder=folder,
            timed=not options.no_measure, progress=step,
        )  # fmt: skip
        written = files.save(net.replaced(result.chains), out)
    scores, failure = None, None
    if score is not None and before is not None:
        try:
            scores = before, score(out)
        except ValueError as error:  # of the user's function: hours of fits must not be lost
            failure = f"{error}; the network was written to {out}"
    if report_to is not None or as_json:
        with share_bars() as step:
            comparison = report.compare(
                net,
                result,
                model.name,
                scores=scores,
                notes=notes,
                measure=report_to is not None,
                progress=step,
            )
    if report_to is not None:
        report.save(comparison, report_to)
    if as_json:
        print_json(comparison.as_dict() | {"out": str(out)})
    else:
        _print_plan(result.plan, scores)
        if report_to is not None and (measured := comparison.measured()):
            print(
                f"layers alone, measured{comparison.measured_layers}: "
                f"{tables.format_seconds(measured[0])} before, "
                f"{tables.format_seconds(measured[1])} after, {measured[0] / measured[1]:.2f}x"
            )
        for path in written if report_to is None else (*written, report_to):
            print(f"wrote {path}")
    if failure is not None:
        fail(failure)


def _parse_cap(text: str) -> tuple[str, float]:
    """Parse ``--cap NAME=SHARE``."""
    name, _, number = text.rpartition("=")
    try:
        cap = parse_budget("macs", number)
    except ValueError:
        cap = None
    if not name or cap is None or not cap.is_share:
        raise ValueError(
            f"--cap must be NAME=SHARE with a share in (0, 1], such as 0.5 or 50%, got {text!r}"
        )
    return name, cap.value


def _kept(resume: Path | None, folder: Path | None) -> str:
    """Return what an interrupted run leaves for ``--resume``, in one sentence."""
    if resume is None or folder is None:
        return "interrupted: nothing was written; --resume FOLDER keeps finished layers"
    if (folder / "plan.json").exists():
        what, count = "the plan and the fits of", len(list(folder.glob("*/*.safetensors")))
    else:
        what, count = "the options of", len(list(folder.glob("options-*.json")))
    layers = "1 layer" if count == 1 else f"{count} layers"
    return f"interrupted: {resume} keeps {what} {layers}; run the same command to resume"


def _make_plan(
    net: CompressibleModel, arguments: dict[str, Any], folder: Path | None, step: Progress
) -> CompressionPlan:
    """Make a plan, with a calibration before if times have to be predicted."""
    if arguments.get("seconds") is not None:
        calibrate_quickly(arguments["runtime"])
    return make_plan(net, folder=folder, progress=step, **arguments)


def _resume_plan(
    net: CompressibleModel, arguments: dict[str, Any], folder: Path | None, step: Progress
) -> CompressionPlan:
    """Return the plan of an interrupted run, or make one."""
    path = None if folder is None else folder / "plan.json"
    if path is not None and path.exists():
        try:
            return _read_plan(path)
        except (ValueError, OSError) as error:
            aside = set_aside(path)
            warnings.warn(f"{error}: renamed to {aside.name}; planning anew", stacklevel=2)
    plan = _make_plan(net, arguments, folder, step)
    if path is not None:
        plan.save(path)
    return plan


def _read_plan(path: Path) -> CompressionPlan:
    try:
        return CompressionPlan.from_json(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _open(model: Path, options: PlanOptions) -> tuple[CompressibleModel, list[str]]:
    """Open a network; return it and notes on layers that cannot be compressed."""
    net = files.open_model(model, options.calibrate, parse_size(options.input))
    left = getattr(net, "left_out", {})
    if not left:
        return net, []
    reasons = describe_reasons(left)
    if not net.layers:
        remedy = "; --calibrate or --input gives the sizes" if getattr(net, "unsized", {}) else ""
        raise ValueError(f"{model}: no layer can be compressed: {reasons}{remedy}")
    return net, [f"Layers left unchanged and not counted: {reasons}."]


def _print_plan(plan: CompressionPlan, scores: tuple[float, float] | None) -> None:
    """Print a plan: what matters most first."""
    evaluation = "" if scores is None else f"{scores[0]:.6g} before, {scores[1]:.6g} after"
    is_calibrated = bool(plan.about.get("calibrated"))
    if not is_calibrated:
        found = f" (evaluation: {evaluation})" if evaluation else ""
        print(
            f"warning: no calibration data: accuracy will fall{found}, since kernels are "
            "approximated for white-noise inputs"
        )
    print(plan.headline())
    if is_calibrated and evaluation:
        print(f"evaluation: {evaluation}")
    head, *rows = plan.rows()
    print(plan.title())
    print_table(head, rows, left=2, optional=("params", "error", "rank"))
    totals = [(axis, *plan.total(axis)) for axis in AXES if axis != "seconds"]
    shares = (f"{axis} {after / before:.1%}" for axis, after, before in totals if before > 0)
    print(f"share of the original: {', '.join(shares)}")
    for note in plan.notes():
        print(f"note: {note}")


def _exit_unchanged(reason: str, as_json: bool) -> NoReturn:
    """Print why nothing was written, and exit with code 1."""
    if as_json:
        print_json({"changed": [], "why": reason})
    else:
        print(f"{reason}\nNo file was written.")
    raise typer.Exit(1)


def _load_scorer(text: str) -> Callable[[Path], float]:
    """Return the scoring function that a user's script defines."""
    function = load_function("--evaluate", text, float)

    def score(model: Path) -> float:
        value: float = function(str(model))
        if not math.isfinite(value):
            raise ValueError(f"--evaluate: {text} must return a finite number, got {value}")
        return value

    return score
