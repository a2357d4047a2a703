"""Architectures of torchvision, timm and transformers, compressed and checked."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
sys.path.insert(0, str(Path(__file__).parents[1]))

from asv_benchmarks import architectures, zoo

#: Small networks of different kinds.
NAMES = (
    "torchvision:mobilenet_v3_small", "torchvision:shufflenet_v2_x0_5",
    "torchvision:lraspp_mobilenet_v3_large", "torchvision:squeezenet1_1",
    "timm:mobilenetv4_conv_small", "timm:convnext_atto", "timm:ghostnet_100", "timm:pit_ti_224",
    "transformers:bert", "transformers:gpt2", "transformers:t5", "transformers:segformer",
    "transformers:wav2vec2",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of other libraries
@pytest.mark.parametrize("name", NAMES)
def test_architecture(name):
    library = name.partition(":")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    (case,) = (c for c in zoo.CASES if c.name == name)
    result = architectures.check(case)
    assert architectures.has_passed(result), result["checks"]


def test_enough_architectures_of_every_library():
    libraries = [c.name.partition(":")[0] for c in zoo.CASES]
    assert libraries.count("torchvision") + libraries.count("timm") >= 120
    assert libraries.count("transformers") >= 15
    assert len({c.name for c in zoo.CASES}) == len(zoo.CASES)


def test_table_counts_what_passed():
    ok = dict.fromkeys(architectures.CHECKS, "ok")
    first, second, third = zoo.CASES[:3]
    rows = {
        first.name: {"name": first.name, "seconds": 1, "checks": ok},
        second.name: {
            "name": second.name, "seconds": 2,
            "checks": ok | {"onnx": "n/a, as PyTorch does not export the original: it says why"},
        },
        third.name: {"name": third.name, "seconds": 3, "checks": {"compress": "ValueError: no"}},
    }  # fmt: skip
    text = architectures.table(rows)
    assert "2 of 3 architectures passed" in text
    assert f"- `{third.name}`, compress: ValueError: no" in text
    assert [architectures.has_passed(row) for row in rows.values()] == [True, True, False]
