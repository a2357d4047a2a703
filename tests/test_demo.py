"""The demo, and the first example of the README with nothing but the core dependencies."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lowrank import demo
from lowrank.interop.weights import layers, read_weights

README = Path(__file__).parents[1] / "README.md"
OPTIONAL = ("sklearn", "matplotlib", "typer", "rich", "PIL", "torch", "h5py", "onnx", "dask")
BLOCK_IMPORTS = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run(code, folder):
    command = [sys.executable, "-c", BLOCK_IMPORTS + code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_readme_s_layer_needs_only_core_dependencies(tmp_path):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (example,) = (e for e in examples if "demo.WEIGHTS" in e)
    result = run(example, tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "layer.safetensors").exists()


def test_imports_are_blocked(tmp_path):
    for name in OPTIONAL:
        assert "is blocked" in run(f"import {name}", tmp_path).stderr


def test_accuracy_is_the_share_of_correct_predictions():
    chains = {layer.name: layer.conv for layer in layers(demo.WEIGHTS)}
    weights = read_weights(demo.WEIGHTS)
    x = np.random.default_rng(0).random((20, 1, 8, 8), np.float32)
    predicted = demo.forward(chains, weights, x).argmax(1)
    labels = np.where(np.arange(20) < 5, predicted, predicted + 1)
    assert demo.accuracy(chains, weights, x, labels) == 0.25


def test_demo_prints_top_1_accuracy_and_writes_pictures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["demo", str(tmp_path)])
    monkeypatch.setattr(demo, "SHARES", (1 / 2,))
    monkeypatch.setattr(demo, "REPETITIONS", 1)
    demo.main()
    printed = capsys.readouterr().out
    assert "97.8% top-1 accuracy on 450 test digits" in printed
    assert {p.name for p in tmp_path.iterdir()} == {"digits.svg", "blur.svg"}
