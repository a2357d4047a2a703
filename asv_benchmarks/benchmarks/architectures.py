"""Architectures of third-party networks, as PyTorch modules."""

from __future__ import annotations

import itertools
from typing import Any

try:
    import torch
    from torch import nn

    Module = nn.Module
except ImportError:  # asv imports every module of this folder
    torch, nn, Module = None, None, object


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
    """ResNet-20 for CIFAR-10."""

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


class ShortcutBlock(Module):
    """Two 3x3 convolutions; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first = normed_conv(inputs, outputs, 3, stride)
        self.body = nn.Sequential(*first, nn.ReLU(), *normed_conv(outputs, outputs, 3, 1))
        changes = stride > 1 or inputs != outputs
        self.shortcut = nn.Sequential(*normed_conv(inputs, outputs, 1, stride) if changes else ())

    def forward(self, x: Any) -> Any:
        return torch.relu(self.body(x) + self.shortcut(x))


def normed_conv(inputs: int, outputs: int, kernel: int, stride: int) -> list[Any]:
    """Return a convolution that pads to keep the size, and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def resnet18() -> Any:
    """Return ResNet-18 for images of 224x224; 1000 classes."""
    blocks = [
        block
        for a, b in itertools.pairwise((64, 64, 128, 256, 512))
        for block in (ShortcutBlock(a, b, b // a), ShortcutBlock(b, b, 1))
    ]
    return nn.Sequential(
        *normed_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000),
    )  # fmt: skip


def vgg16() -> Any:
    """Return VGG-16 for images of 224x224; 1000 classes."""
    layers, inputs = [], 3
    for width, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(25088, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(),
        nn.Linear(4096, 1000),
    )  # fmt: skip


class WithinChannelNorm(Module):
    """Caffe's local response normalisation over 3x3 samples of a channel."""

    def forward(self, x: Any) -> Any:
        return x * (1 + 5e-5 * nn.functional.avg_pool2d(x * x, 3, 1, 1)) ** -0.75


def caffe_cifar10() -> Any:
    """Return Caffe's cifar10_full; its pools round sizes up."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2), nn.MaxPool2d(3, 2, ceil_mode=True), nn.ReLU(),
        WithinChannelNorm(),
        nn.Conv2d(32, 32, 5, padding=2), nn.ReLU(), nn.AvgPool2d(3, 2, ceil_mode=True),
        WithinChannelNorm(),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip


class Crepe(Module):
    """CREPE tiny: pitch of 1024 samples at 16 kHz, as 360 bins."""

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
    """Return ESPCN for upscaling by 3."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 5, padding=2), nn.ReLU(), nn.Conv2d(64, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 9, 3, padding=1), nn.PixelShuffle(3), nn.Tanh(),
    )  # fmt: skip


def srcnn() -> Any:
    """Return SRCNN 9-5-5, for images that were upscaled beforehand."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 9, padding=4), nn.ReLU(), nn.Conv2d(64, 32, 5, padding=2), nn.ReLU(),
        nn.Conv2d(32, 1, 5, padding=2),
    )  # fmt: skip


class Residual(Module):
    """Residual branch: its layers' output added to the input."""

    def __init__(self, *layers: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Any) -> Any:
        return x + self.body(x)


class Crop(Module):
    """TensorFlow's SAME after a transposed convolution of stride 2: drop the last sample."""

    def forward(self, x: Any) -> Any:
        return x[:, :, :-1, :-1]


class Pixels(Module):
    """Scaled tanh to grey levels 0..255."""

    def forward(self, x: Any) -> Any:
        return (torch.tanh(x) * 150 + 127.5).clamp(0, 255)


def style() -> Any:
    """Return the fast style transfer network; sizes must be multiples of 4."""

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
    """Return layers that double the size, with instance norm."""
    conv = nn.ConvTranspose2d(inputs, outputs, 3, 2, bias=False)
    return [conv, Crop(), nn.InstanceNorm2d(outputs, eps=1e-3, affine=True)]


def keywords() -> Any:
    """Return ARM's keyword spotter CNN-L, for 49 frames of 10 coefficients; 12 classes."""
    return nn.Sequential(
        nn.Conv2d(1, 60, (10, 4)), nn.BatchNorm2d(60, eps=1e-3), nn.ReLU(),
        nn.Conv2d(60, 76, (10, 4), (2, 1)), nn.BatchNorm2d(76, eps=1e-3), nn.ReLU(),
        nn.Flatten(), nn.Linear(4864, 58),
        nn.Linear(58, 128), nn.BatchNorm1d(128, eps=1e-3), nn.ReLU(), nn.Linear(128, 12),
    )  # fmt: skip


def meshnet() -> Any:
    """Return MeshNet: 3 classes of tissue in a T1 volume."""
    layers, inputs = [], 1
    for d in (1, 2, 4, 8, 16, 8, 4, 2, 1):
        layers += [nn.Conv3d(inputs, 20, 3, padding=d, dilation=d), nn.ELU()]
        inputs = 20
    return nn.Sequential(*layers, nn.Conv3d(20, 3, 1))


def mobilenet() -> Any:
    """Return MobileNet 0.25 at 96x96; TensorFlow's SAME pads the end where the stride is 2."""

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
