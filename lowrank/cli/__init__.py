"""Command line ``lowrank``: inspect and approximate layers, compress networks, apply filters."""

from __future__ import annotations


def main() -> None:
    """Run the command line.

    Raises
    ------
    SystemExit
        Always; code 2 for wrong arguments or files, 1 if nothing was done, 130 if interrupted.
    """
    try:
        from lowrank.cli.interruption import EXIT_CODE, end_process
        from lowrank.cli.program import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("typer", "rich"):
            raise
        raise SystemExit(
            "the lowrank command needs typer and rich: pip install 'lowrank[cli]'"
        ) from None
    try:
        run()
    except SystemExit as end:
        if end.code == EXIT_CODE:
            end_process()
        raise
