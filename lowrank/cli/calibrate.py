"""Command ``calibrate``: the performance model of this machine."""

from __future__ import annotations

import json
from typing import Annotated

from lowrank import perfmodel
from lowrank.cli.console import AsJson, app, example, print_table, share_bars, typer
from lowrank.core.tables import format_seconds


@app.command(epilog=example("calibrate", "calibrate --show"))
def calibrate(
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUNTIME",
            help=f"Runtime to measure: {', '.join(perfmodel.RUNTIMES)}; may be repeated.",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(metavar="cpu|cuda", help="cpu, or cuda to add the GPU to the stored model."),
    ] = "cpu",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Measure each runtime in five seconds, less accurately."),
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Show the stored model without measuring.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure this machine in about a minute, to predict its times.

    Run it while the machine is idle.  All installed runtimes are measured.  The result is stored
    in the cache folder.
    """
    for name in runtime or ():
        if name not in perfmodel.RUNTIMES:
            known = ", ".join(perfmodel.RUNTIMES)
            raise ValueError(f"--runtime must be one of {known}, got {name!r}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda":
        from lowrank import engine

        engine.check_gpu()
        runtime = [*(runtime or []), "cuda"]
    if show:
        here = perfmodel.current()
    else:
        with share_bars() as step:
            here = perfmodel.calibrate(step, runtime, quick)
    if as_json:
        model = {"calibrated": here.calibrated, **json.loads(here.to_json())}
        if not here.calibrated:  # errors of another machine say nothing about this one
            for entry in model["coefficients"].values():
                entry["error"] = entry["spread"] = None
        print(json.dumps(model, indent=1))
        return
    print(f"{here.cpu}, {here.isa}, 1 and {here.threads} threads")
    if here.calibrated:
        rows = [
            (name, f"{c.error:.1%}", f"{c.spread:.1%}", "quick" if c.is_quick else "full")
            for name, c in here.coefficients.items()
        ]
        print_table(("runtime", "median error", "90th percentile", "calibration"), rows)
        print("Cross-validated relative errors of predicted times.")
    latencies = (f"{format_seconds(s)} ({policy})" for policy, s in here.fork_join.items())
    print(f"Fork/join latency by OMP_WAIT_POLICY: {', '.join(latencies)}")
    if here.calibrated:
        print(f"stored in {perfmodel.path()}")
    else:
        print(
            "These are the coefficients of another machine, which were shipped with lowrank: run "
            "'lowrank calibrate' to measure this one."
        )
