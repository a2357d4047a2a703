"""The time model of this machine."""

from __future__ import annotations

from typing import Annotated

from lowrank import perfmodel
from lowrank.cli.console import AsJson, app, print_table, share_bars, typer


@app.command()
def calibrate(
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Measure only this, of {', '.join(perfmodel.RUNTIMES)}; may be repeated."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="'cpu', or 'cuda' to measure the GPU; what is kept stays.")
    ] = "cpu",
    show: Annotated[
        bool, typer.Option("--show", help="Measure nothing; show what is kept.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure this machine, so that times are predicted; takes less than a minute.

    Run it when the machine has nothing else to do.  The result is kept in the cache folder.
    """
    if runtime and set(runtime) - set(perfmodel.RUNTIMES):
        raise ValueError(f"--runtime must be one of {', '.join(perfmodel.RUNTIMES)}, got {runtime}")
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
            here = perfmodel.calibrate(step, runtime)
    if as_json:
        print(here.to_json())
        return
    print(f"{here.cpu}, {here.isa}, 1 and {here.threads} threads")
    rows = [(n, f"{r.error:.1%}", f"{r.spread:.1%}") for n, r in here.coefficients.items()]
    print_table(("runtime", "median error", "90th percentile"), rows)
    print("Errors of predicted seconds, on work that was left out of the fit.")
    if here.calibrated:
        print(f"kept in {perfmodel.path()}")
    else:
        print("These rates came with lowrank: run 'lowrank calibrate' for those of this machine.")
