"""Train the digit network of the demo: three convolutions on scikit-learn's 8x8 digits.

    python lowrank/data/train_digits.py       (30 s; needs PyTorch and scikit-learn)

Writes digits.safetensors and its manifest digits.json, and prints the top-1 accuracy.
`lowrank.demo` has the forward pass in NumPy.
"""

import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from lowrank.io import write_tensors

HERE = Path(__file__).parent
EPOCHS, BATCH_SIZE, LEARNING_RATE = 40, 64, 2e-3


def build_network() -> nn.Sequential:
    """Return the untrained network."""
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


def shift_randomly(x: torch.Tensor) -> torch.Tensor:
    """Shift images by up to one pixel: augmentation, as there are only 1,347 of them."""
    dy, dx = torch.randint(-1, 2, (2,)).tolist()
    return torch.roll(x, (dy, dx), (2, 3))


def main() -> None:
    """Train and test the network, and write its weights and manifest."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    x, x_test, y, y_test = train_test_split(x, torch.tensor(labels), test_size=0.25, random_state=0)
    model = build_network()
    steps = EPOCHS * -(-len(x) // BATCH_SIZE)
    adam = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, LEARNING_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH_SIZE):
            loss = nn.functional.cross_entropy(model(shift_randomly(x[batch])), y[batch])
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    print(f"{accuracy:.2%} top-1 accuracy on {len(x_test)} test digits")
    names = {"0": "conv1", "2": "conv2", "5": "conv3", "9": "linear"}
    tensors = {}
    for key, value in model.state_dict().items():
        layer, parameter = key.split(".")
        tensors[f"{names[layer]}.{parameter}"] = value.numpy()
    write_tensors(HERE / "digits.safetensors", tensors, {"licence": "BSD-3-Clause"})
    manifest = {
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
    (HERE / "digits.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
