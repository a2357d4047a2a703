"""Architectures of torchvision, timm and transformers, compressed and checked."""

import importlib.util
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
sys.path.insert(0, str(Path(__file__).parents[1]))

from torch import nn  # noqa: E402

from asv_benchmarks import architectures, zoo  # noqa: E402

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


@pytest.mark.filterwarnings("ignore")  # of the exporters
def test_newer_exporter_is_used_where_the_older_fails():
    pytest.importorskip("onnxscript")

    def make():
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(7))
        return model, torch.randn(1, 3, 12, 12)  # 8 samples in 7 windows

    result = architectures.check(zoo.Case("pool", "pools", make))
    assert result["checks"] == dict.fromkeys(architectures.CHECKS, "ok")


@pytest.mark.filterwarnings("ignore")  # of the exporters
def test_smallest_layers_are_compressed_where_all_are_large():
    def make():
        width = architectures.LARGEST + 8
        return nn.TransformerEncoderLayer(width, 4, 4 * width), torch.randn(6, 2, width)

    result = architectures.check(zoo.Case("wide", "attention", make))
    assert architectures.has_passed(result), result["checks"]
    assert result["layers"] == 6
    assert result["tried"] == 4  # the projections of attention


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
