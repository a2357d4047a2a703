"""The command ``lowrank``: what weights and networks hold, how cheap they can be; filters."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated

from lowrank.cli.console import USAGE, app, fail, typer
from lowrank.engine import NoGPU

# Each brings its commands; the order is that of the help.
from lowrank.cli import layers as layers  # isort: skip
from lowrank.cli import models as models  # isort: skip
from lowrank.cli import images as images  # isort: skip
from lowrank.cli import calibrate as calibrate  # isort: skip


def main() -> None:
    """Run the command; a mistake of the caller's gets one line and exit code 2."""
    try:
        status = app(standalone_mode=False)
        raise SystemExit(status if isinstance(status, int) else 0)
    except USAGE as why:
        fail(why.format_message())
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as why:
        fail(f"{why.filename}: {why.strerror}" if why.strerror else str(why))
    except (ValueError, TypeError, ImportError, NoGPU) as why:
        fail(str(why))
    except MemoryError as why:
        fail(f"not enough memory: {why}")
    except (KeyboardInterrupt, typer.Abort):
        raise SystemExit(130) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lowrank {version('lowrank')}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None: ...
