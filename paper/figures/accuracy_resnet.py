"""Top-1 accuracy of ResNet-20 against its MACs and its time on lowrank and in PyTorch."""

import sys

from accuracy_digits import draw

if __name__ == "__main__":
    times = {
        "lowrank_1": "time, lowrank / dense PyTorch",
        "torch_1": "time, PyTorch / dense PyTorch",
    }
    draw(*sys.argv[1:], 1, times)
