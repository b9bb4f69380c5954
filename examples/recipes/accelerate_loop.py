"""Accelerate: a loop of your own, with accumulation, bfloat16 and its checkpoints.

    python examples/recipes/accelerate_loop.py [folder for the checkpoint]

A perceptron learns scikit-learn's digits.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kfac_fx


@dataclass
class Run:
    """What ``train`` leaves.

    Attributes:
        losses: the loss of every micro-batch.
        preconditioner: after the last step.
    """

    losses: list[float]
    preconditioner: kfac_fx.Preconditioner


def train(epochs: int, save: str | None = None, resume: str | None = None) -> Run:
    """Train from the beginning, or from a checkpoint.

    Args:
        epochs: of 8 micro-batches each, two of which make a step.
        save: a folder for the state at the end; None for none.
        resume: the folder of such a state; None for a new network.
    """
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    digits = load_digits()
    images = torch.tensor(digits.data[:512] / 16, dtype=torch.float32)
    loader = DataLoader(TensorDataset(images, torch.tensor(digits.target[:512])), batch_size=64)

    net = kfac_fx.transform(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)))
    # On a GPU prepare() would move the parameters; a preconditioner is made where they will stay.
    net.to(accelerator.device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    preconditioner = kfac_fx.Preconditioner(net, "categorical")
    # Before prepare(), which wraps the optimizer: it then skips steps while gradients accumulate,
    # and what does not step is not preconditioned.
    kfac_fx.attach(preconditioner, optimizer)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    if resume is not None:
        accelerator.load_state(resume)

    losses = []
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(net):
                loss = F.cross_entropy(net(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    if save is not None:
        accelerator.save_state(save)
    return Run(losses, preconditioner)


def main() -> None:
    """Train for 15 epochs, and for one more from the checkpoint."""
    folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
    print("loss:", *(f"{loss:.3f}" for loss in train(15, save=folder).losses))
    print("after a resume:", *(f"{loss:.3f}" for loss in train(1, resume=folder).losses))


if __name__ == "__main__":
    main()
