"""Whole networks: ``plan`` chooses what every layer is to become, ``compress`` does it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from lowrank import report
from lowrank.cli.console import (
    AsJson,
    app,
    budget_of,
    print_json,
    print_table,
    share_bars,
    typer,
)
from lowrank.compress import CompressibleModel, Nothing, Plan, compress_model, make_plan
from lowrank.compress.options import AXES, QUICK
from lowrank.core import tables
from lowrank.families import FAMILIES
from lowrank.interop import files

Model = Annotated[Path, typer.Argument(help=", ".join(files.ENDINGS))]
Calibrate = Annotated[
    Path | None,
    typer.Option(
        help="Calibration data, .npz: inputs of the network for .onnx, else inputs of its layers, "
        "by their names."
    ),
]
Macs = Annotated[str | None, typer.Option(help="Multiply-adds: a share as 0.5, or as 20M.")]
Params = Annotated[str | None, typer.Option(help="Parameters: a share as 0.3, or as 100k.")]
Seconds = Annotated[
    str | None, typer.Option(help="Predicted time: a share as 0.6, or as 3ms, of one example.")
]
Bytes = Annotated[str | None, typer.Option(help="Bytes of weights: a share as 0.3, or as 1M.")]
Families = Annotated[
    str | None,
    typer.Option(help=f"By commas, of {', '.join(FAMILIES)} [{','.join(QUICK)}]"),
]
Pin = Annotated[
    list[str] | None,
    typer.Option(help="A layer, or a pattern as 'layer1.*', that stays; may be repeated."),
]
LeaveOut = Annotated[
    list[str] | None,
    typer.Option(help="The same, but it does not count in the budget; may be repeated."),
]
Cap = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=SHARE",
        help="The share of its own multiply-adds that a layer or pattern may take; may be "
        "repeated.",
    ),
]
NoGradients = Annotated[
    bool, typer.Option("--no-gradients", help="Errors of all layers count alike.")
]
Seed = Annotated[int | None, typer.Option(help="For every random choice. [0]")]
Batch = Annotated[int, typer.Option(min=1, help="Examples at a time, for seconds.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads, for seconds.")]


@app.command()
def plan(
    model: Model,
    calibrate: Calibrate = None,
    macs: Macs = None,
    params: Params = None,
    seconds: Seconds = None,
    bytes: Bytes = None,
    families: Families = None,
    pin: Pin = None,
    leave_out: LeaveOut = None,
    cap: Cap = None,
    no_gradients: NoGradients = False,
    seed: Seed = None,
    batch: Batch = 1,
    threads: Threads = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the plan as JSON, for compress --plan."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose what every layer of a network is to become within a budget, and change nothing.

    Numbers in (0, 1] are shares of the network; absolute amounts carry a unit.
    """
    if out is not None:
        _check_beside("--out", out, model, calibrate)
    wanted = _wanted(macs, params, seconds, bytes, families, pin, leave_out, cap, no_gradients,
                     seed, batch, threads)  # fmt: skip
    net, notes = _opened(model, calibrate)
    try:
        with share_bars() as step:
            found = make_plan(net, progress=step, **wanted)
    except Nothing as why:
        _give_up(str(why), as_json)
    if out is not None:
        found.save(out)
    if as_json:
        print(found.to_json())
        return
    _print_plan(found, notes)
    if out is not None:
        print(f"wrote {out}")


@app.command()
def compress(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The compressed network, in the form of MODEL.")
    ],
    calibrate: Calibrate = None,
    macs: Macs = None,
    params: Params = None,
    seconds: Seconds = None,
    bytes: Bytes = None,
    families: Families = None,
    pin: Pin = None,
    leave_out: LeaveOut = None,
    cap: Cap = None,
    no_gradients: NoGradients = False,
    seed: Seed = None,
    batch: Batch = 1,
    threads: Threads = None,
    plan: Annotated[
        Path | None, typer.Option(help="A plan that 'lowrank plan' wrote, instead of a budget.")
    ] = None,
    passes: Annotated[int, typer.Option(min=1, help="Over all layers.")] = 1,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="Layers that stay dense make up for errors ahead of them."),
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep finished layers here; the same command, interrupted, goes on from them.",
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="SCRIPT:FUNCTION",
            help="Your own code, which is run: a function from the path of a network to a number, "
            "asked before and after.",
        ),
    ] = None,
    report_to: Annotated[
        Path | None, typer.Option("--report", help="Write a page on it: .html; layers are timed.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a network cheaper within a budget, layer by layer, each fitted to calibration data.

    Numbers in (0, 1] are shares of the network; absolute amounts carry a unit.  Where nothing can
    be won nothing is written, and the exit code is 1.
    """
    files.check_target(out, model)
    _check_beside("--out", out, calibrate, plan)
    if report_to is not None:
        if report_to.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"--report: {report_to} must end in .html")
        _check_beside("--report", report_to, model, calibrate, plan, out)
    score = None if evaluate is None else _scorer(evaluate)
    wanted: dict[str, Any] = {}
    if plan is None:
        wanted = _wanted(macs, params, seconds, bytes, families, pin, leave_out, cap,
                         no_gradients, seed, batch, threads)  # fmt: skip
    else:
        chosen = _read_plan(plan)
        given = {
            "--macs": macs, "--params": params, "--seconds": seconds, "--bytes": bytes,
            "--families": families, "--pin": pin, "--leave-out": leave_out, "--cap": cap,
            "--no-gradients": no_gradients or None, "--seed": seed,
        }  # fmt: skip
        if double := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"--plan has all that is chosen: {', '.join(double)} has no place")
    net, notes = _opened(model, calibrate)
    folder = None
    if resume is not None:
        about = {"passes": passes, "refit": refit, "plan": plan and chosen.to_json(), **wanted}
        name = files.fingerprint(net, model, calibrate) + json.dumps(about, sort_keys=True)
        folder = resume / hashlib.sha256(name.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
    before = None if score is None else score(model)
    try:
        if plan is None:
            chosen = _planned(net, wanted, folder)
    except Nothing as why:
        _give_up(str(why), as_json)
    if not as_json:
        _print_plan(chosen, notes)
    if not chosen.changed:
        _give_up("the network is within the budget as it is", as_json)
    try:
        with share_bars() as step:
            small = compress_model(
                net, chosen, passes=passes, refit=refit, folder=folder, progress=step
            )
            files.save(net.replaced(small.chains), out)
    except KeyboardInterrupt:
        if resume is not None:
            print("interrupted: the same command goes on from here", file=sys.stderr)
        raise
    scores = None
    if score is not None and before is not None:
        scores = (before, score(out))
    if report_to is not None or as_json:
        with share_bars() as step:
            facts = report.gather(
                net, small, model.name, batch=batch, threads=threads, scores=scores, notes=notes,
                measured=report_to is not None, progress=step,
            )  # fmt: skip
    if report_to is not None:
        report.save(facts, report_to)
    if as_json:
        print_json(facts.as_dict() | {"out": str(out)})
        return
    if scores is not None:
        print(f"evaluation: {scores[0]:.6g} before, {scores[1]:.6g} after")
    if report_to is not None and (timed := facts.timed()):
        print(
            f"measured{facts.measured_layers}: {tables.format_seconds(timed[0])} before, "
            f"{tables.format_seconds(timed[1])} after, {timed[0] / timed[1]:.2f} times faster"
        )
    for path in (out, report_to):
        if path is not None:
            print(f"wrote {path}")


def _wanted(
    macs: str | None, params: str | None, seconds: str | None, bytes: str | None,
    families: str | None, pin: Sequence[str] | None, leave_out: Sequence[str] | None,
    cap: Sequence[str] | None, no_gradients: bool, seed: int | None, batch: int,
    threads: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of :func:`lowrank.compress.make_plan`."""
    budgets = {"macs": macs, "params": params, "seconds": seconds, "bytes": bytes}
    asked = {a: budget_of(b) for a, b in budgets.items() if b is not None}
    if not asked:
        raise ValueError("give a budget: --macs, --params, --seconds or --bytes")
    names = QUICK if families is None else [f.strip() for f in families.split(",") if f.strip()]
    if not names:
        raise ValueError(f"--families must name some of {', '.join(FAMILIES)}")
    capped = {}
    for text in cap or ():
        name, _, share = text.rpartition("=")
        try:
            capped[name] = float(share)
        except ValueError:
            capped[name] = math.nan
        if not name or not 0 < capped[name] <= 1:
            raise ValueError(f"--cap must be NAME=SHARE, with a share in (0, 1], got {text!r}")
    return {
        **asked, "families": list(names), "pinned": list(pin or ()),
        "left_out": list(leave_out or ()), "capped": capped, "gradients": not no_gradients,
        "seed": seed or 0, "batch": batch, "threads": threads,
    }  # fmt: skip


def _planned(net: CompressibleModel, wanted: dict[str, Any], folder: Path | None) -> Plan:
    """The plan that an interrupted run had made, or a new one."""
    kept = None if folder is None else folder / "plan.json"
    if kept is not None and kept.exists():
        return _read_plan(kept)
    with share_bars() as step:
        found = make_plan(net, progress=step, **wanted)
    if kept is not None:
        found.save(kept)
    return found


def _read_plan(path: Path) -> Plan:
    try:
        return Plan.from_json(path.read_text("utf-8"))
    except ValueError as why:
        raise ValueError(f"{path}: {why}") from None


def _opened(model: Path, calibrate: Path | None) -> tuple[CompressibleModel, list[str]]:
    """The network, and which of its layers cannot be touched."""
    net = files.open_model(model, calibrate)
    left = getattr(net, "left_out", {})
    if not left:
        return net, []
    some = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:5])
    more = f"; and {len(left) - 5} more" if len(left) > 5 else ""
    if not net.layers:
        raise ValueError(f"{model}: no layer can be changed: {some}{more}")
    return net, [f"Layers that stay as they are, uncounted: {some}{more}."]


def _print_plan(plan: Plan, notes: Sequence[str]) -> None:
    head, *rows = plan.rows()
    print(plan.title())
    print_table(head, rows, left=2)
    now = {a: plan.total(a) for a in AXES}
    said = (f"{a} {n / w:.1%}" for a, (n, w) in now.items() if w)
    print(f"left: {', '.join(said)}")
    if not plan.about.get("calibrated"):
        print("note: no calibration data: kernels are approximated as for white noise")
    for note in notes:
        print(f"note: {note}")


def _give_up(why: str, as_json: bool) -> None:
    """Nothing is written where nothing is won."""
    if as_json:
        print_json({"changed": [], "why": why})
    else:
        print(f"{why}\nNothing was changed, nothing is written.")
    raise typer.Exit(1)


def _check_beside(option: str, path: Path, *others: Path | None) -> None:
    """Refuse a place that cannot be written to, or where something else stands."""
    if path.is_dir():
        raise IsADirectoryError(f"{option}: {path} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option}: {path}: there is no folder {path.parent}")
    for other in others:
        if other is not None and files.same_file(path, other):
            raise ValueError(f"{option}: {path} is another file of this command, too")


def _scorer(text: str) -> Callable[[Path], float]:
    """The user's own function, out of a script; what they print goes to stderr."""
    script, _, name = text.rpartition(":")
    path = Path(script)
    if not script or not name or path.suffix != ".py":
        raise ValueError(f"--evaluate must be SCRIPT.py:FUNCTION, got {text!r}")
    if not path.is_file():
        raise FileNotFoundError(f"--evaluate: {path}: no such file")

    def guarded(run: Callable[[], Any]) -> Any:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return run()
        except Exception as why:  # whatever the user's code raises
            raise ValueError(f"--evaluate: {text}: {type(why).__name__}: {why}") from why

    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # for a .py there is one
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # as if the script were run
    loader = spec.loader
    guarded(lambda: loader.exec_module(module))
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--evaluate: {path} has no function {name!r}")

    def score(model: Path) -> float:
        found = guarded(lambda: float(function(str(model))))
        if not math.isfinite(found):
            raise ValueError(f"--evaluate: {text} gave {found} for {model}, no number to compare")
        return float(found)

    return score
