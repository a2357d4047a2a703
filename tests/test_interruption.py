"""Ctrl-C and kill -9 in the middle of commands, and what --resume makes of the rest."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from lowrank import demo
from lowrank.core.files import set_aside

pytest.importorskip("typer")

START = 120  # seconds until a command is in the middle of its work, on a busy machine
END = 2 + 8  # seconds that it may take to end: 2 are promised, 8 are for a busy machine
QUICK = ("--macs", "0.4", "--families", "spatial_svd,tucker")

#: The command, with a function that stops in the middle: it prints that, and then takes a minute.
DRIVER = """
import itertools, sys, time
from lowrank.cli import main
import {module} as module

original, number, ended = module.{name}, itertools.count(1), []

def slow(*args, **options):
    if next(number) > {finished}:  # no two threads get the same
        while len(ended) < {finished}:  # on another thread
            time.sleep(0.01)
        time.sleep(2)  # until these are kept
        print("in the middle", flush=True)
        {wait}
    found = original(*args, **options)
    ended.append(0)
    return found

module.{name} = slow
main()
"""
SLEEP = "time.sleep(60)"

PLANNING = {"module": "lowrank.compress.planning", "name": "layer_options"}
FITTING = {"module": "lowrank.compress.reconstruct", "name": "fit"}
SWEEPING = {"module": "lowrank.selection.candidates", "name": "_sweep"}
WRITING = {"module": "lowrank.io", "name": "write_tensors"}


@pytest.fixture
def command(tmp_path):
    """Return a function that starts a command, sends a signal in the middle, and awaits its end."""

    def interrupt(words, number, where, finished=1, wait=SLEEP, threads=1):
        code = DRIVER.format(**where, finished=finished, wait=wait)
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            # Jobs in the background of a shell ignore it, and so do their children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            assert process.stdout.readline() == "in the middle\n", process.stderr.read()
            process.send_signal(number)
            _, err = process.communicate(timeout=END)
        finally:
            process.kill()
            process.communicate()
        return process.returncode, err

    return interrupt


def _run(folder, *words):
    found = subprocess.run(
        [sys.executable, "-m", "lowrank.cli", *words], cwd=folder, capture_output=True, text=True,
        timeout=START, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stderr


def _compress(out, *more):
    return ("compress", str(demo.WEIGHTS), *QUICK, "--no-measure", "-o", out, *more)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A folder with a network that was compressed without an interruption, and what it kept."""
    folder = tmp_path_factory.mktemp("whole")
    _run(folder, *_compress("a.safetensors", "--resume", "kept"))
    return folder


@pytest.fixture
def whole(uninterrupted):
    """The bytes of this network."""
    return (uninterrupted / "a.safetensors").read_bytes()


@pytest.mark.parametrize("where", [PLANNING, FITTING], ids=["planning", "fitting"])
def test_ctrl_c_ends_with_one_sentence_and_resumes_to_the_same_result(
    command, whole, tmp_path, where
):
    words = _compress("a.safetensors", "--resume", "kept")
    code, err = command(words, signal.SIGINT, where)
    assert code == 130
    assert err.count("\n") == 1
    kept = "the plan and the fits of" if where is FITTING else "the options of"
    assert err.startswith(f"lowrank: interrupted: kept keeps {kept} 1 layer;")
    assert not (tmp_path / "a.safetensors").exists()
    assert _run(tmp_path, *words) == ""
    assert (tmp_path / "a.safetensors").read_bytes() == whole


def test_ctrl_c_without_resume_says_that_nothing_was_written(command):
    code, err = command(_compress("a.safetensors"), signal.SIGINT, FITTING)
    assert code == 130
    assert (
        err == "lowrank: interrupted: nothing was written; --resume FOLDER keeps finished layers\n"
    )


def test_ctrl_c_while_several_threads_sweep_the_ranks_of_a_layer(command):
    words = ("approximate", str(demo.WEIGHTS), "--layer", "conv2", "--input", "14x14")
    code, err = command(words, signal.SIGINT, SWEEPING, threads=2)
    assert code == 130
    assert err == "lowrank: interrupted\n"


def test_ctrl_c_in_a_call_that_python_cannot_interrupt(command):
    # A mutex that is locked twice blocks in C, and signals do not end the call.
    wait = (
        "import ctypes; mutex = (ctypes.c_ubyte * 128)(); "
        "lock = ctypes.CDLL(None).pthread_mutex_lock; lock(mutex); lock(mutex)"
    )
    code, err = command(_compress("a.safetensors"), signal.SIGINT, FITTING, wait=wait)
    assert code == 130
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("where", "finished"), [(PLANNING, 1), (FITTING, 1), (WRITING, 3)],
    ids=["planning", "fitting", "writing"],
)  # fmt: skip
def test_kill_and_resume_give_the_same_result(command, whole, tmp_path, where, finished):
    words = _compress("a.safetensors", "--resume", "kept")
    code, _ = command(words, signal.SIGKILL, where, finished)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "a.safetensors").exists()
    assert _run(tmp_path, *words) == ""
    assert (tmp_path / "a.safetensors").read_bytes() == whole


def test_a_plan_is_resumed(command, tmp_path):
    words = ("plan", str(demo.WEIGHTS), *QUICK, "--resume", "kept", "-o", "plan.json")
    code, err = command(words, signal.SIGINT, PLANNING)
    assert code == 130
    assert err.startswith("lowrank: interrupted: kept keeps the options of 1 layer;")
    _run(tmp_path, *words)
    resumed = (tmp_path / "plan.json").read_bytes()
    _run(tmp_path, *words[:-4], "-o", "whole.json")
    assert resumed == (tmp_path / "whole.json").read_bytes()


def _damage_all(ending, data):
    def damage(folder):
        for path in folder.rglob(f"*{ending}"):
            if path.is_file():
                path.write_bytes(data)

    return damage


def _replace_by_folders(folder):
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        path.unlink()
        path.mkdir()


def _replace_by_a_file(folder):
    (run,) = folder.iterdir()
    set_aside(run)
    run.write_text("a file")


@pytest.mark.parametrize(
    "damage",
    [
        _damage_all(".json", b'{"version": '),
        _damage_all(".json", b"[" * 100_000),
        _damage_all(".safetensors", b""),
        _damage_all(".error", b"\xff"),
        _damage_all("", b"null"),
        _replace_by_folders,
        _replace_by_a_file,
    ],
    ids=["cut plan", "deep plan", "empty fits", "errors", "all files", "folders", "a file"],
)
def test_damaged_folder_is_set_aside(uninterrupted, whole, tmp_path, damage):
    shutil.copytree(uninterrupted / "kept", tmp_path / "kept")
    damage(tmp_path / "kept")
    _run(tmp_path, *_compress("a.safetensors", "--resume", "kept"))
    assert (tmp_path / "a.safetensors").read_bytes() == whole
    assert list(tmp_path.rglob("*.bad*"))
