"""Calibration and test inputs of the trained networks, from the folder LOWRANK_DATA.

Calibration and test data never overlap.
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

try:
    import torch
except ImportError:  # asv imports every module of this folder
    torch = None

Data = tuple[Any, Any]  # inputs, and labels or None


def folder() -> Path:
    """Return the folder LOWRANK_DATA."""
    if not os.environ.get("LOWRANK_DATA"):
        raise FileNotFoundError("LOWRANK_DATA must name the folder with the trained networks")
    return Path(os.environ["LOWRANK_DATA"])


def cifar(name: str, which: str) -> Data:
    """Return images, preprocessed for a net, and labels of a file such as "test_jpeg_3000"."""
    with np.load(folder() / "cifar10" / f"{which}.npz") as file:
        images, labels = file["images"].astype(np.float32), file["labels"]
    if name.startswith("caffe"):
        images -= np.load(folder() / "cifar10" / "cifar_mean.npy")
    else:
        images = (images / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    return _channels_first(images), torch.tensor(labels.astype(np.int64))


def cifar_batches(name: str, seed: int) -> list[Any]:
    images, _ = cifar(name, "calibration_lossless_2000")
    chosen = np.random.default_rng(seed).choice(len(images), 256, replace=False)
    return list(images[torch.tensor(chosen)].split(64))


def _channels_first(images: np.ndarray) -> Any:
    """Return images (n, h, w, channels) as a float32 tensor (n, channels, h, w)."""
    return torch.tensor(np.moveaxis(images, -1, 1).astype(np.float32))


@cache
def image(name: str, mode: str) -> Any:
    """Return a picture in Pillow's mode "RGB" or "L"."""
    from PIL import Image

    with Image.open(folder() / "images" / f"{name}.png") as file:
        return file.convert(mode)


IMAGES = ("astronaut", "brick", "coins", "moon", "text")  # for calibration
TEST_IMAGES = ("camera", "coffee")
TEST_SEED = 2**20


def crops(n: int, smallest: int, largest: int, mode: str, seed: int | None) -> Iterator[Any]:
    """Yield square crops of calibration images by seed, or of test images (None)."""
    rng = np.random.default_rng(TEST_SEED if seed is None else seed)
    names = TEST_IMAGES if seed is None else IMAGES
    for k in range(n):
        picture = image(names[k % len(names)], mode)
        size = min(int(rng.integers(smallest, largest + 1)), *picture.size)
        x, y = (int(rng.integers(n - size + 1)) for n in picture.size)
        yield picture.crop((x, y, x + size, y + size))


def _photos(n: int, seed: int | None) -> Any:
    """Return crops of many sizes as 96x96 RGB in 0..1, MobileNet's input."""
    from PIL import Image

    found = [
        np.asarray(piece.resize((96, 96), Image.Resampling.BILINEAR), np.float32) / 255
        for piece in crops(n, 160, 512, "RGB", seed)
    ]
    return _channels_first(np.stack(found))


def _colours(n: int, size: int, seed: int | None) -> Any:
    """Return RGB crops in 0..255."""
    return _channels_first(
        np.stack([np.asarray(x, np.float32) for x in crops(n, size, size, "RGB", seed)])
    )


def downscale(image: Any, factor: int, enlarge: bool) -> Any:
    """Return luminance in 0..1, (1, 1, h, w), downscaled and optionally upscaled again."""
    from PIL import Image

    w, h = (n // factor for n in image.size)
    image = image.crop((0, 0, factor * w, factor * h)).resize((w, h), Image.Resampling.BICUBIC)
    if enlarge:
        image = image.resize((factor * w, factor * h), Image.Resampling.BICUBIC)
    return torch.tensor(np.asarray(image, np.float32) / 255)[None, None]


def _reduced(n: int, size: int, factor: int, enlarge: bool, seed: int | None) -> Any:
    pieces = crops(n, size, size, "L", seed)
    return torch.cat([downscale(piece, factor, enlarge) for piece in pieces])


def frames() -> Data:
    """Return normalised audio frames (500, 1, 1024) and the reference activations."""
    with np.load(folder() / "audio" / "crepe_frames.npz") as file:
        return torch.tensor(file["frames"])[:, None], torch.tensor(file["reference_activation"])


def _frames(n: int, seed: int | None) -> Any:
    """Return the second half, or `n` of the first 240 by seed: adjacent frames share samples."""
    found = frames()[0]
    if seed is None:
        return found[250:]
    return found[torch.tensor(np.random.default_rng(seed).choice(240, n, replace=False))]


def utterances(n: int, seed: int | None) -> Any:
    """Return smooth random inputs shaped like MFCCs, (n, 1, 49, 10), since speech data are missing.

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
    """Return the T1 volume (256, 256, 256) with its 5 % and 95 % quantiles at 0 and 1."""
    with gzip.open(folder() / "volumes" / "t1_crop.nii.gz") as file:
        data = np.frombuffer(file.read()[352:], np.uint8).reshape(256, 256, 256, order="F")
    low, high = np.quantile(data, (0.05, 0.95))
    return ((data - low) / (high - low)).astype(np.float32)


def _blocks(n: int, size: int, seed: int | None) -> Any:
    """Return the middle of the brain, or `n` cubes by seed from its left and right."""
    data = torch.tensor(volume())
    if seed is None:
        return data[None, None, 96:160, 96:160, 96:160]
    rng, found = np.random.default_rng(seed), []
    for k in range(n):
        x = int(rng.integers(32, 97 - size) if k % 2 else rng.integers(160, 225 - size))
        y, z = (int(v) for v in rng.integers(64, 193 - size, 2))
        found.append(data[None, x : x + size, y : y + size, z : z + size])
    return torch.stack(found)


#: Inputs of networks without labels, by seed or for the test (None), and their peak value;
#: None where classes are compared.
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
