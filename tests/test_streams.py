"""Redirection of file descriptor 1."""

import ctypes
import os
import subprocess
import sys
import threading

import pytest

from lowrank.core.streams import discard_c_stdout


def test_writes_to_the_descriptor_are_discarded(capfd):
    libc = ctypes.CDLL(None)
    libc.puts(b"before")
    print("python before")
    with discard_c_stdout():
        os.write(1, b"descriptor\n")
        libc.puts(b"stdio")
    libc.puts(b"after")
    libc.fflush(None)
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["after", "before", "python before"]
    assert err == ""


def test_stdout_is_restored_after_an_error(capfd):
    def solve():
        with discard_c_stdout():
            os.write(1, b"discarded")
            raise ValueError("solver failed")

    with pytest.raises(ValueError, match="solver"):
        solve()
    os.write(1, b"printed")
    assert capfd.readouterr().out == "printed"


def test_stdout_survives_overlapping_blocks_of_threads(capfd):
    def work():
        for _ in range(50):
            with discard_c_stdout(), discard_c_stdout():
                os.write(1, b"discarded")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(1, b"printed")
    assert capfd.readouterr().out == "printed"


def test_python_text_is_kept_by_capsys(capsys):
    print("before")
    with discard_c_stdout():
        os.write(1, b"discarded")
    assert capsys.readouterr().out == "before\n"


@pytest.mark.parametrize("closing", ["os.close(1)", "sys.stdout.close()", "sys.stdout = None"])
def test_closed_stdout_is_no_error(closing):
    script = (
        f"import os, sys\nfrom lowrank.core.streams import discard_c_stdout\n{closing}\n"
        "with discard_c_stdout():\n    done = True\n"
        "sys.stderr.write(f'{done}')\n"
        "os._exit(0)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert process.stderr == "True"
