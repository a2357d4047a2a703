"""The program: all commands, and one line on stderr per error."""

from __future__ import annotations

import os
import sys
import warnings
from importlib.metadata import version
from typing import Annotated, Any

from lowrank.cli.console import USAGE_ERROR, app, fail, print_line, typer
from lowrank.cli.interruption import EXIT_CODE, Interrupted, abandon_long_calls, report_interruption
from lowrank.engine import NoGPU

# Importing a module registers its commands; help lists them in this order.
from lowrank.cli import layers as layers  # isort: skip
from lowrank.cli import compress as compress  # isort: skip
from lowrank.cli import time as time  # isort: skip
from lowrank.cli import images as images  # isort: skip
from lowrank.cli import calibrate as calibrate  # isort: skip


def run() -> None:
    """Run the command in ``sys.argv``; report an error in one line and exit."""
    try:
        with warnings.catch_warnings(), abandon_long_calls():
            warnings.showwarning = _print_warning
            status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if status == EXIT_CODE:  # Typer's answer to Ctrl-C
            raise KeyboardInterrupt
        raise SystemExit(status if isinstance(status, int) else 0)
    except USAGE_ERROR as error:
        fail(error.format_message())
    except BrokenPipeError:  # stdout was closed early (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        named = error.strerror and error.filename is not None
        fail(f"{error.filename}: {error.strerror}" if named else error.strerror or str(error))
    except (ValueError, TypeError, ImportError, NotImplementedError, OverflowError, NoGPU) as error:
        fail(str(error))
    except RecursionError:
        fail("an argument or a file is nested too deeply")
    except MemoryError as error:
        fail(f"not enough memory: {error}")
    except Interrupted as why:
        report_interruption(str(why))
        raise SystemExit(EXIT_CODE) from None
    except (KeyboardInterrupt, typer.Abort):
        report_interruption("interrupted")
        raise SystemExit(EXIT_CODE) from None


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print_line(f"warning: {' '.join(str(message).split())}")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
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
