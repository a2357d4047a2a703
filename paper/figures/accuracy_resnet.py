"""Top-1 of ResNet-20 against its multiply-adds, and seconds on our engine and in PyTorch."""

import sys

from accuracy_digits import draw

if __name__ == "__main__":
    times = {
        "lowrank_1": "seconds, lowrank / dense PyTorch",
        "torch_1": "seconds, PyTorch / dense PyTorch",
    }
    draw(*sys.argv[1:], 1, times)
