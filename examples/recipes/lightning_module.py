"""Lightning with automatic optimisation: the preconditioner comes with the optimizer.

    python examples/recipes/lightning_module.py [folder for the checkpoints]

A small convolutional network learns scikit-learn's digits.
"""

from __future__ import annotations

import sys
import tempfile

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kfac_fx


class Digits(lightning.LightningModule):
    """A classifier of images of 8 x 8 pixels.

    Attributes:
        losses: the loss of every training batch.
    """

    preconditioner: kfac_fx.Preconditioner

    def __init__(self) -> None:
        super().__init__()
        self.net = kfac_fx.transform(
            nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(128, 10),
            )
        )
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.losses.append(loss.item())
        return loss

    # Lightning calls this when the parameters are on their device, which is when a preconditioner
    # may be made. With automatic optimisation the whole step, forward and backward too, is a
    # closure in optimizer.step(); attach() knows that.
    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.3, momentum=0.9)
        self.preconditioner = kfac_fx.Preconditioner(self.net, "categorical")
        kfac_fx.attach(self.preconditioner, optimizer)
        return optimizer


def make(folder: str, steps: int) -> tuple[lightning.Trainer, Digits, DataLoader]:
    """Return a Trainer, the module and its data.

    Args:
        folder: where the Trainer writes its checkpoints.
        steps: the optimizer's steps, of two batches each.
    """
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.images[:512, None] / 16, dtype=torch.float32)
    data = TensorDataset(images, torch.tensor(digits.target[:512]))
    trainer = lightning.Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return trainer, Digits(), DataLoader(data, batch_size=64)


def main() -> None:
    """Train for 40 steps, save, and go on to step 44 from the file."""
    folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
    trainer, module, loader = make(folder, steps=40)
    trainer.fit(module, loader)
    trainer.save_checkpoint(f"{folder}/last.ckpt")
    print("loss:", *(f"{loss:.3f}" for loss in module.losses))
    # The optimizer's state in the checkpoint holds the preconditioner's.
    trainer, module, loader = make(folder, steps=44)
    trainer.fit(module, loader, ckpt_path=f"{folder}/last.ckpt")
    print("after a resume:", *(f"{loss:.3f}" for loss in module.losses))


if __name__ == "__main__":
    main()
