"""Trained nets that other people made, as PyTorch modules with their data.

Weights, images, volumes and audio frames lie in the folder that the environment variable
LOWRANK_DATA names.  Calibration and test data of a case never overlap.
"""

from __future__ import annotations

import gzip
import io
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

try:
    import torch
    from torch import nn

    Module = nn.Module
except ImportError:  # asv imports every module of this folder, whatever is installed
    torch, nn, Module = None, None, object

Data = tuple[Any, Any]  # inputs, and labels or None


class Case(NamedTuple):
    """A trained net, its data, and how well another net does its job.

    Attributes
    ----------
    name : str
        Of its file of weights.
    model : torch.nn.Module
        float32, in evaluation mode.
    calibration : callable
        From a seed to batches of preprocessed inputs.
    test : callable
        To the inputs of the test, and their labels where there are any.
    score : callable
        From a module to a number; higher is better.  Top-1 where there are labels, or else
        agreement with what the original net gives.
    unit : str
        Of the score.
    """

    name: str
    model: Any
    calibration: Callable[[int], list[Any]]
    test: Callable[[], Data]
    score: Callable[[Any], float]
    unit: str


# --- the nets ---------------------------------------------------------------------------------


class BasicBlock(Module):
    """Two 3x3 convolutions; the shortcut drops samples and pads channels (He's option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Any) -> Any:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return torch.relu(y + x)


class ResNet20(Module):
    """CIFAR's ResNet of 20 layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths, layers = (16, 16, 32, 64), []
        for a, b in itertools.pairwise(widths):
            blocks = [BasicBlock(a, b, b // a), BasicBlock(b, b, 1), BasicBlock(b, b, 1)]
            layers.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = layers
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class WithinChannelNorm(Module):
    """Caffe's local response normalisation over 3x3 samples of a channel."""

    def forward(self, x: Any) -> Any:
        return x * (1 + 5e-5 * nn.functional.avg_pool2d(x * x, 3, 1, 1)) ** -0.75


def caffe_cifar10() -> Any:
    """Caffe's cifar10_full; its pools round sizes up."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2), nn.MaxPool2d(3, 2, ceil_mode=True), nn.ReLU(),
        WithinChannelNorm(),
        nn.Conv2d(32, 32, 5, padding=2), nn.ReLU(), nn.AvgPool2d(3, 2, ceil_mode=True),
        WithinChannelNorm(),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip


class Crepe(Module):
    """CREPE tiny: the pitch of 1024 samples at 16 kHz, as 360 bins."""

    def __init__(self) -> None:
        super().__init__()
        widths, layers = (1, 128, 16, 16, 16, 32, 64), []
        for k, (a, b) in enumerate(itertools.pairwise(widths)):
            pad, conv = ((31, 32), (64, 1)) if k else ((254, 254), (512, 4))
            layers += [nn.ConstantPad1d(pad, 0.0), nn.Conv1d(a, b, *conv), nn.ReLU()]
            layers += [nn.BatchNorm1d(b, eps=1e-3), nn.MaxPool1d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(256, 360)

    def forward(self, x: Any) -> Any:
        return torch.sigmoid(self.classifier(self.features(x).transpose(1, 2).flatten(1)))


def espcn() -> Any:
    """ESPCN for an enlargement by 3."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 5, padding=2), nn.ReLU(), nn.Conv2d(64, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 9, 3, padding=1), nn.PixelShuffle(3), nn.Tanh(),
    )  # fmt: skip


def srcnn() -> Any:
    """SRCNN 9-5-5, for images that were enlarged beforehand."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 9, padding=4), nn.ReLU(), nn.Conv2d(64, 32, 5, padding=2), nn.ReLU(),
        nn.Conv2d(32, 1, 5, padding=2),
    )  # fmt: skip


class Residual(Module):
    """What is in it, added to its input."""

    def __init__(self, *layers: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Any) -> Any:
        return x + self.body(x)


class Crop(Module):
    """TensorFlow's SAME after a transposed convolution of stride 2: without the last sample."""

    def forward(self, x: Any) -> Any:
        return x[:, :, :-1, :-1]


class Pixels(Module):
    """Grey levels 0..255."""

    def forward(self, x: Any) -> Any:
        return (torch.tanh(x) * 150 + 127.5).clamp(0, 255)


def style() -> Any:
    """The fast style transfer net; sizes must be multiples of 4."""

    def normed(conv: Any) -> list[Any]:
        return [conv, nn.InstanceNorm2d(conv.out_channels, eps=1e-3, affine=True)]

    def block() -> Any:
        a, b = (normed(nn.Conv2d(128, 128, 3, padding=1, bias=False)) for _ in range(2))
        return Residual(*a, nn.ReLU(), *b)

    return nn.Sequential(
        *normed(nn.Conv2d(3, 32, 9, padding=4, bias=False)), nn.ReLU(),
        nn.ZeroPad2d((0, 1, 0, 1)), *normed(nn.Conv2d(32, 64, 3, 2, bias=False)), nn.ReLU(),
        nn.ZeroPad2d((0, 1, 0, 1)), *normed(nn.Conv2d(64, 128, 3, 2, bias=False)), nn.ReLU(),
        *(block() for _ in range(5)),
        *up(128, 64), nn.ReLU(), *up(64, 32), nn.ReLU(),
        *normed(nn.Conv2d(32, 3, 9, padding=4, bias=False)), Pixels(),
    )  # fmt: skip


def up(inputs: int, outputs: int) -> list[Any]:
    """Twice the size, normed."""
    conv = nn.ConvTranspose2d(inputs, outputs, 3, 2, bias=False)
    return [conv, Crop(), nn.InstanceNorm2d(outputs, eps=1e-3, affine=True)]


def keywords() -> Any:
    """ARM's keyword spotter CNN-L, for 49 frames of 10 coefficients; 12 classes."""
    return nn.Sequential(
        nn.Conv2d(1, 60, (10, 4)), nn.BatchNorm2d(60, eps=1e-3), nn.ReLU(),
        nn.Conv2d(60, 76, (10, 4), (2, 1)), nn.BatchNorm2d(76, eps=1e-3), nn.ReLU(),
        nn.Flatten(), nn.Linear(4864, 58),
        nn.Linear(58, 128), nn.BatchNorm1d(128, eps=1e-3), nn.ReLU(), nn.Linear(128, 12),
    )  # fmt: skip


def meshnet() -> Any:
    """MeshNet: 3 classes of tissue in a T1 volume."""
    layers, inputs = [], 1
    for d in (1, 2, 4, 8, 16, 8, 4, 2, 1):
        layers += [nn.Conv3d(inputs, 20, 3, padding=d, dilation=d), nn.ELU()]
        inputs = 20
    return nn.Sequential(*layers, nn.Conv3d(20, 3, 1))


def mobilenet() -> Any:
    """MobileNet 0.25 of 96x96 samples; TensorFlow's SAME pads the end where the stride is 2."""

    def conv(inputs: int, outputs: int, stride: int, groups: int = 1) -> list[Any]:
        pad = [nn.ZeroPad2d((0, 1, 0, 1))] if stride > 1 else []
        layer = nn.Conv2d(inputs, outputs, 3, stride, 2 - stride, groups=groups)
        return [*pad, layer, nn.BatchNorm2d(outputs, eps=1e-3), nn.ReLU()]

    widths = (8, 16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256)
    layers = conv(3, 8, 2)
    for k, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += conv(a, a, 2 if k in (1, 3, 5, 11) else 1, a)
        layers += [nn.Conv2d(a, b, 1), nn.BatchNorm2d(b, eps=1e-3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(3), nn.Flatten(), nn.Linear(256, 2), nn.Softmax(1))


# --- their weights ----------------------------------------------------------------------------


def folder() -> Path:
    """The folder that LOWRANK_DATA names."""
    if not os.environ.get("LOWRANK_DATA"):
        raise FileNotFoundError("the trained nets lie in the folder that LOWRANK_DATA must name")
    return Path(os.environ["LOWRANK_DATA"])


def loaded(name: str) -> Any:
    """The net of a name, with its weights."""
    from lowrank.interop.weights import read_weights

    make, names = NETS[name]
    tensors = read_weights(folder() / "weights" / f"{name}.safetensors")
    if name == "kws_cnn_l":  # TensorFlow's (in, out), and its samples ahead of its channels
        tensors["W"] = tensors["W"].reshape(16, 4, 76, 58).transpose(3, 2, 0, 1)
        tensors |= {k: tensors[k].T for k in ("Variable_4", "Variable_6")}
    net = make()
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    for (key, value), given in zip(state.items(), names or state, strict=True):
        # CREPE's kernels are stored as (k, 1), and a dense layer may stand as (out, c, h, w)
        value.copy_(torch.tensor(tensors.pop(given if names else key)).reshape(value.shape))
    if tensors:
        raise ValueError(f"{name}: {sorted(tensors)} belong to no layer")
    return net.eval().requires_grad_(False)


KERAS = ("gamma", "beta", "moving_mean", "moving_variance")


def _pairs(weight: str, bias: str, keys: Iterable[object]) -> tuple[str, ...]:
    return tuple(variant.format(k) for k in keys for variant in (weight, bias))


def _style_names() -> Iterator[str]:
    """Weight, scale, shift of every convolution; the file has the shift first."""
    for k in range(0, 48, 3):
        yield f"Variable_{k}" if k else "Variable"
        yield from (f"Variable_{k + 2}", f"Variable_{k + 1}")


def _crepe_names() -> Iterator[str]:
    norm = ("weight", "bias", "running_mean", "running_var")
    for k in range(1, 7):
        yield from (f"conv{k}.weight", f"conv{k}.bias", *(f"conv{k}_BN.{x}" for x in norm))
    yield from ("classifier.weight", "classifier.bias")


def _keyword_names() -> Iterator[str]:
    first = (("Variable", "Variable_1"), ("Variable_2", "Variable_3"))
    for k, names in enumerate(first, 1):
        yield from (*names, *(f"bn{k}/{x}" for x in KERAS))
    yield from ("W", "b", "Variable_4", "Variable_5", *(f"bn3/{x}" for x in KERAS))
    yield from ("Variable_6", "Variable_7")


def _mobilenet_names() -> Iterator[str]:
    for k in range(27):
        number = (k + 1) // 2 if k % 2 == 0 else k // 2
        name = ("depthwise_" if k % 2 else "") + "conv2d" + (f"_{number}" if number else "")
        yield from (f"{name}.weight", f"{name}.bias")
        norm = "batch_normalization" + (f"_{k}" if k else "")
        yield from (f"{norm}.{x}" for x in KERAS)
    yield from ("dense.weight", "dense.bias")


#: The module and its parameters' names in the file, in the module's order; none if they agree.
NETS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "resnet20_cifar10": (ResNet20, ()),
    "caffe_cifar10_full": (
        caffe_cifar10, _pairs("{}.0", "{}.1", ("conv1", "conv2", "conv3", "ip1"))
    ),
    "srcnn_955": (srcnn, _pairs("weights_conv{}", "biases_conv{}", (1, 2, 3))),
    "espcn_x3": (espcn, _pairs("f{}", "b{}", (1, 2, 3))),
    "faststyle_udnie": (style, tuple(_style_names())),
    "crepe_tiny_1d": (Crepe, tuple(_crepe_names())),
    "kws_cnn_l": (keywords, tuple(_keyword_names())),
    "vww_mobilenet_025_96": (mobilenet, tuple(_mobilenet_names())),
    "meshnet3d_model20chan3cls": (
        meshnet,
        _pairs("{}.kernel", "{}.bias", (*(f"conv3d_{k}" for k in range(0, 18, 2)), "output")),
    ),
}  # fmt: skip


# --- their data -------------------------------------------------------------------------------


def cifar(name: str, which: str) -> Data:
    """Preprocessed images and labels of a CIFAR-10 file, such as "test_jpeg_3000", for a net."""
    with np.load(folder() / "cifar10" / f"{which}.npz") as file:
        images, labels = file["images"].astype(np.float32), file["labels"]
    if name.startswith("caffe"):
        images -= np.load(folder() / "cifar10" / "cifar_mean.npy")
    else:
        images = (images / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    return _channels_first(images), torch.tensor(labels.astype(np.int64))


def _cifar_batches(name: str, seed: int) -> list[Any]:
    images, _ = cifar(name, "calibration_lossless_2000")
    chosen = np.random.default_rng(seed).choice(len(images), 256, replace=False)
    return list(images[torch.tensor(chosen)].split(64))


def _channels_first(images: np.ndarray) -> Any:
    """Float32 tensor (n, channels, h, w) of images (n, h, w, channels)."""
    return torch.tensor(np.moveaxis(images, -1, 1).astype(np.float32))


@cache
def image(name: str, mode: str) -> Any:
    """One of the pictures, in Pillow's mode "RGB" or "L"."""
    from PIL import Image

    with Image.open(folder() / "images" / f"{name}.png") as file:
        return file.convert(mode)


IMAGES = ("astronaut", "brick", "coins", "moon", "text")  # to calibrate with
TEST_IMAGES = ("camera", "coffee")
TEST_SEED = 2**20


def crops(n: int, smallest: int, largest: int, mode: str, seed: int | None) -> Iterator[Any]:
    """Square pieces of images to calibrate with, by seed, or of those of the test (None)."""
    rng = np.random.default_rng(TEST_SEED if seed is None else seed)
    names = TEST_IMAGES if seed is None else IMAGES
    for k in range(n):
        whole = image(names[k % len(names)], mode)
        size = min(int(rng.integers(smallest, largest + 1)), *whole.size)
        x, y = (int(rng.integers(n - size + 1)) for n in whole.size)
        yield whole.crop((x, y, x + size, y + size))


def _photos(n: int, seed: int | None) -> Any:
    """Pieces of many sizes, as 96x96 RGB in 0..1: what MobileNet takes."""
    from PIL import Image

    found = [
        np.asarray(piece.resize((96, 96), Image.Resampling.BILINEAR), np.float32) / 255
        for piece in crops(n, 160, 512, "RGB", seed)
    ]
    return _channels_first(np.stack(found))


def _colours(n: int, size: int, seed: int | None) -> Any:
    """RGB pieces in 0..255."""
    return _channels_first(
        np.stack([np.asarray(x, np.float32) for x in crops(n, size, size, "RGB", seed)])
    )


def reduced(image: Any, factor: int, enlarge: bool) -> Any:
    """Luminance in 0..1, (1, 1, h, w), of a grey image made smaller, and larger again."""
    from PIL import Image

    w, h = (n // factor for n in image.size)
    image = image.crop((0, 0, factor * w, factor * h)).resize((w, h), Image.Resampling.BICUBIC)
    if enlarge:
        image = image.resize((factor * w, factor * h), Image.Resampling.BICUBIC)
    return torch.tensor(np.asarray(image, np.float32) / 255)[None, None]


def _reduced(n: int, size: int, factor: int, enlarge: bool, seed: int | None) -> Any:
    pieces = crops(n, size, size, "L", seed)
    return torch.cat([reduced(piece, factor, enlarge) for piece in pieces])


def frames() -> Data:
    """Normalised audio frames (500, 1, 1024), and the activations that the reference gave."""
    with np.load(folder() / "audio" / "crepe_frames.npz") as file:
        return torch.tensor(file["frames"])[:, None], torch.tensor(file["reference_activation"])


def _frames(n: int, seed: int | None) -> Any:
    """Half of the frames, or `n` of the first 240 by seed: a frame shares samples with the next."""
    found = frames()[0]
    if seed is None:
        return found[250:]
    return found[torch.tensor(np.random.default_rng(seed).choice(240, n, replace=False))]


def utterances(n: int, seed: int | None) -> Any:
    """Smooth random inputs in the shape of MFCCs, (n, 1, 49, 10): there is no speech in the data.

    Each coefficient is a sum of six waves over time, of up to five periods; the amplitude falls
    with the coefficient's number as that of speech does.
    """
    rng = np.random.default_rng(TEST_SEED if seed is None else seed)
    time, coefficient = np.arange(49) / 49, np.arange(10)
    waves = rng.uniform(0, 5, (n, 6, 1, 10)) * time[:, None] + rng.uniform(0, 1, (n, 6, 1, 10))
    amplitude = rng.standard_normal((n, 6, 1, 10)) * 20 / (1 + coefficient)
    level = rng.standard_normal((n, 1, 10)) * 30 / (1 + coefficient)
    values = level + (amplitude * np.sin(2 * math.pi * waves)).sum(1)
    return torch.tensor(values.astype(np.float32))[:, None]


@cache
def volume() -> np.ndarray:
    """The T1 volume (256, 256, 256), its 5 % and 95 % quantiles at 0 and 1."""
    with gzip.open(folder() / "volumes" / "t1_crop.nii.gz") as file:
        data = np.frombuffer(file.read()[352:], np.uint8).reshape(256, 256, 256, order="F")
    low, high = np.quantile(data, (0.05, 0.95))
    return ((data - low) / (high - low)).astype(np.float32)


def _blocks(n: int, size: int, seed: int | None) -> Any:
    """The middle of the brain, or `n` cubes by seed from the left and right of it."""
    data = torch.tensor(volume())
    if seed is None:
        return data[None, None, 96:160, 96:160, 96:160]
    rng, found = np.random.default_rng(seed), []
    for k in range(n):
        x = int(rng.integers(32, 97 - size) if k % 2 else rng.integers(160, 225 - size))
        y, z = (int(v) for v in rng.integers(64, 193 - size, 2))
        found.append(data[None, x : x + size, y : y + size, z : z + size])
    return torch.stack(found)


# --- scores -----------------------------------------------------------------------------------


def outputs(model: Any, inputs: Any, batch: int = 50) -> Any:
    """What a module gives for all inputs, a batch at a time."""
    with torch.no_grad():
        return torch.cat([model(x) for x in inputs.split(batch)])


def psnr(found: Any, wanted: Any, peak: float) -> float:
    """Peak signal-to-noise ratio in dB; infinite where nothing differs."""
    error = float(((found - wanted).double() ** 2).mean())
    return 10 * math.log10(peak**2 / error) if error else math.inf


def top1(model: Any, inputs: Any, labels: Any) -> float:
    """Share of right answers, in %."""
    return _share(outputs(model, inputs).argmax(1), labels)


def _share(a: Any, b: Any) -> float:
    return 100 * float((a == b).double().mean())


def _agreement(name: str, test: Callable[[], Data], peak: float | None) -> Callable[[Any], float]:
    """How close a module comes to the original net on the inputs of the test.

    The original is read anew when it is first needed: what is done to the module of a case
    does not touch it.
    """

    @cache
    def original() -> Data:
        inputs, _ = test()
        return inputs, outputs(loaded(name), inputs)

    def score(model: Any) -> float:
        inputs, wanted = original()
        found = outputs(model, inputs)
        return psnr(found, wanted, peak) if peak else _share(found.argmax(1), wanted.argmax(1))

    return score


#: Inputs of the nets whose data have no labels, by seed or of the test (None), and their peak
#: value; None where classes are compared.
DRAWN: dict[str, tuple[Callable[[int | None], Any], float | None]] = {
    "srcnn_955": (lambda seed: _reduced(_few(seed, 16, 4), _few(seed, 64, 128), 4, True, seed), 1),
    "espcn_x3": (lambda seed: _reduced(_few(seed, 32, 8), _few(seed, 96, 192), 3, False, seed), 1),
    "faststyle_udnie": (lambda seed: _colours(_few(seed, 8, 2), _few(seed, 128, 256), seed), 255),
    "crepe_tiny_1d": (lambda seed: _frames(128, seed), None),
    "kws_cnn_l": (lambda seed: utterances(_few(seed, 256, 500), seed), None),
    "vww_mobilenet_025_96": (lambda seed: _photos(_few(seed, 64, 200), seed), None),
    "meshnet3d_model20chan3cls": (lambda seed: _blocks(4, 48, seed), None),
}


def _few(seed: int | None, calibration: int, test: int) -> int:
    return test if seed is None else calibration


def _test(draw: Callable[[int | None], Any]) -> Data:
    return draw(None), None


def _batches(draw: Callable[[int | None], Any], seed: int) -> list[Any]:
    return list(draw(seed).split(32))


def _accuracy(test: Callable[[], Data], model: Any) -> float:
    return top1(model, *test())


def cases(only: str = "") -> Iterator[Case]:
    """The nets whose names have `only` in them, with their weights."""
    for name in NETS:
        if only not in name:
            continue
        if name in DRAWN:
            draw, peak = DRAWN[name]
            test, batches = partial(_test, draw), partial(_batches, draw)
            score = _agreement(name, test, peak)
            unit = "dB PSNR" if peak else "% equal arg-max"
        else:
            test, batches = partial(cifar, name, "test_lossless_500"), partial(_cifar_batches, name)
            score, unit = partial(_accuracy, test), "% top-1"
        yield Case(name, loaded(name), batches, test, score, unit)


# --- ONNX -------------------------------------------------------------------------------------

#: What PyTorch's exporters say of themselves, and of padding and instance norms.
CHATTER = (
    "You are using the legacy TorchScript-based ONNX export",
    "The feature will be removed",
    "Constant folding - Only steps=1 can be constant folded",
    "ONNX export mode is set to TrainingMode.EVAL, but operator 'instance_norm'",
    "Converting a tensor to a Python boolean might cause the trace to be incorrect",  # its size
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def onnx_model(case: Case, dynamo: bool = False) -> Any:
    """The net in ONNX's form, for any number of examples of the size of the calibration data.

    Parameters
    ----------
    case : Case
        One of :func:`cases`.
    dynamo : bool
        With PyTorch's newer exporter, which needs onnxscript, and not with the one by TorchScript.
        The latter leaves more to its readers, such as padding computed by nodes.

    Returns
    -------
    onnx.ModelProto
        From "x", float32, to "y".
    """
    import onnx

    x = case.calibration(0)[0][:2]
    options: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamo": dynamo}
    file = io.BytesIO()
    with warnings.catch_warnings():
        for message in CHATTER:
            warnings.filterwarnings("ignore", message)
        if dynamo:
            options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
            found = torch.onnx.export(case.model, (x,), verbose=False, **options).model_proto
        else:
            options["dynamic_axes"] = {"x": {0: "batch"}, "y": {0: "batch"}}
            torch.onnx.export(case.model, (x,), file, **options)
            found = onnx.load_from_string(file.getvalue())
            # it loses the size behind a crop
            sizes = found.graph.output[0].type.tensor_type.shape.dim
            for size, n in list(zip(sizes, outputs(case.model, x).shape, strict=True))[1:]:
                size.dim_value = n
    onnx.checker.check_model(found)
    return found
