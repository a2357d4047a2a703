"""Train the small network of the demo: three convolutions on scikit-learn's 8x8 digits.

    python lowrank/data/train_digits.py       (half a minute; needs PyTorch and scikit-learn)

writes digits.safetensors, its description digits.json, and prints the share of unseen digits
that it gets right.  `lowrank.demo` has the forward pass, in NumPy.
"""

import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from lowrank.io import write_tensors

HERE = Path(__file__).parent
EPOCHS, BATCH, RATE = 40, 64, 2e-3


def net() -> nn.Sequential:
    """Convolutions of 1 -> 32 -> 64 -> 64 channels, a pooling between, a mean, a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Digits moved by up to a pixel: there are only 1,347 to learn from."""
    dy, dx = torch.randint(-1, 2, (2,)).tolist()
    return torch.roll(x, (dy, dx), (2, 3))


def main() -> None:
    """Train, test, write."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    split = train_test_split(x, torch.tensor(labels), test_size=0.25, random_state=0)
    x, x_test, y, y_test = split
    model = net()
    steps = EPOCHS * -(-len(x) // BATCH)
    adam = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):
            loss = nn.functional.cross_entropy(model(shifted(x[batch])), y[batch])
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
    with torch.no_grad():
        right = (model(x_test).argmax(1) == y_test).float().mean().item()
    print(f"{right:.4f} of {len(x_test)} unseen digits")
    names = {"0": "conv1", "2": "conv2", "5": "conv3", "9": "linear"}
    tensors = {}
    for key, value in model.state_dict().items():
        layer, what = key.split(".")
        tensors[f"{names[layer]}.{what}"] = value.numpy()
    write_tensors(HERE / "digits.safetensors", tensors, {"licence": "BSD-3-Clause"})
    about = {
        "architecture": "conv1 relu conv2 relu maxpool2 conv3 relu mean linear; input pixel / 16",
        "trained_by": "lowrank/data/train_digits.py on scikit-learn's digits",
        "conv_layers": [
            {
                "name": name,
                "weight": f"{name}.weight",
                "bias": f"{name}.bias",
                "padding": [1, 1],
                "in_size": [size, size],
            }
            for name, size in (("conv1", 8), ("conv2", 8), ("conv3", 4))
        ],
    }
    (HERE / "digits.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
