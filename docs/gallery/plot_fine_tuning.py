r"""
Fine-tuning a compressed network
================================

At small budgets, compression without training loses accuracy.  A short training recovers much of
it, without labels (:func:`lowrank.interop.torch.distill`) or with them:
:func:`lowrank.interop.torch.compress` returns an ordinary PyTorch model, whose layers are
``nn.Sequential`` chains of convolutions.

This page needs ``pip install 'lowrank[torch]'``.  The network classifies scikit-learn's 8 x 8
digits; it comes with the package.
"""

import copy
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from lowrank import demo
from lowrank.interop.torch import compress, distill, on_engine
from lowrank.interop.weights import read_weights
from lowrank.report import figures

plt.rcParams.update(figures.STYLE)
torch.manual_seed(0)
EPOCHS = 15
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
x, x_test, y, y_test = train_test_split(x, torch.tensor(labels), test_size=0.25, random_state=0)

# %%
# The network and its weights
# ---------------------------

model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
    nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
)  # fmt: skip
weights = read_weights(demo.WEIGHTS)
names = {"0": "conv1", "2": "conv2", "5": "conv3", "9": "linear"}
keys = {key: "{}.{}".format(names[key.split(".")[0]], key.split(".")[1])
        for key in model.state_dict()}  # fmt: skip
model.load_state_dict({key: torch.tensor(weights[name]) for key, name in keys.items()})
model.eval()


def accuracy(net):
    """Return the accuracy on unseen digits, in %."""
    with torch.inference_mode():
        return 100 * float((net(x_test).argmax(1) == y_test).float().mean())


dense = accuracy(model)
print(f"{dense:.1f} % of {len(x_test)} unseen digits")

# %%
# A twentieth of the MACs
# --------------------------------
#
# A budget is spent over all layers at once, with families and ranks chosen by what they do to the
# outputs of the network for a few hundred examples.  No labels are needed.

done = compress(model, x[:512].split(128), macs=0.05)
small = done.model
print(done.plan)
print(f"{accuracy(small):.1f} % before any training")
print(small)

# %%
# Training without labels
# -----------------------
#
# The compressed network learns the outputs of its original.  Labels are not needed, and no
# setting: the learning rate follows from the error before training.

distilled = distill(small, model, x.split(128), steps=600, batch_size=32)
print(distilled)
print(f"{accuracy(distilled.model):.1f} % after training without labels")

# %%
# Training with labels
# --------------------
#
# Any training loop works on a compressed network.


def epochs(net, count, rate=4e-3):
    """Return the accuracy before the first epoch and after each."""
    found = [accuracy(net)]
    adam = torch.optim.Adam(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, count)
    for _ in range(count):
        net.train()
        for batch in torch.randperm(len(x)).split(32):
            moved = torch.roll(x[batch], torch.randint(-1, 2, (2,)).tolist(), (2, 3))
            loss = nn.functional.cross_entropy(net(moved), y[batch])
            adam.zero_grad()
            loss.backward()
            adam.step()
        schedule.step()
        found.append(accuracy(net.eval()))
    return found


start = time.perf_counter()
curve = epochs(small, EPOCHS)
took = time.perf_counter() - start
print(f"{EPOCHS} epochs in {took:.0f} s: {curve[0]:.1f} % -> {curve[-1]:.1f} %")

# %%
# Epoch 0 is compression alone.  The control trains the same layers from random weights: it stays
# behind, because compression keeps most of what the original has learned.

control = copy.deepcopy(small)
for module in control.modules():
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
scratch = epochs(control, EPOCHS)

figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
axes.axhline(dense, color="black", linestyle="--", linewidth=1, label="dense network")
axes.axhline(
    accuracy(distilled.model), color="#009e73", linestyle=":", label="compressed, without labels"
)
axes.plot(curve, "o-", color="#0072b2", markersize=4, label="compressed, with labels")
axes.plot(scratch, "s-", color="#d55e00", markersize=3.5, label="same layers from scratch")
axes.set(xlabel="epochs", ylabel="accuracy on unseen digits, %", ylim=(0, 100),
         title="1/20 of the MACs")  # fmt: skip
axes.legend(frameon=False, loc="lower right")
plt.show()

# %%
# Inference
# ---------
#
# :func:`lowrank.interop.torch.on_engine` runs the trained model on lowrank's engine, which fuses
# biases, ReLUs and the stages of a layer.

fast = on_engine(small, threads=1)
with torch.inference_mode():
    off = (fast(x_test) - small(x_test)).abs().max()
print(f"largest difference {off:.1e}; {accuracy(fast):.1f} %")
assert np.isfinite(float(off))
