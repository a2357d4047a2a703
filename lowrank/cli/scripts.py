"""Functions of the user's own scripts, given as SCRIPT.py:FUNCTION."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def check_reference(option: str, text: str) -> tuple[Path, str]:
    """Split SCRIPT.py:FUNCTION; raise an error that names `option` if there is no such script."""
    script, _, name = text.rpartition(":")
    path = Path(script)
    if not script or not name or path.suffix != ".py":
        raise ValueError(f"{option} must be SCRIPT.py:FUNCTION, got {text!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{option}: {path}: no such file")
    return path, name


def load_function(
    option: str, text: str, convert: Callable[[Any], Any] = lambda value: value
) -> Callable[..., Any]:
    """Return a function of a script, with its result converted.

    Its output goes to stderr, and its errors become ValueErrors.
    """
    path, name = check_reference(option, text)

    def guarded(run: Callable[[], Any]) -> Any:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return run()
        except Exception as error:  # user code may raise anything
            raise ValueError(f"{option}: {text}: {type(error).__name__}: {error}") from error

    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # a .py file always has one
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # for imports of files beside it
    loader = spec.loader
    guarded(lambda: loader.exec_module(module))
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{option}: {path} has no function {name!r}")
    return lambda *arguments: guarded(lambda: convert(function(*arguments)))
