"""A detector of torchvision, whose training forward returns a dictionary of losses.

    python examples/recipes/torchvision_detection.py

A RetinaNet of random weights learns to find bright squares in generated images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

import kfac_fx

Target = dict[str, Tensor]


def squares(count: int) -> tuple[list[Tensor], list[Target]]:
    """Return noisy images of 64 x 64 with one bright square each, and where it is."""
    images, targets = [], []
    for _ in range(count):
        left, top = torch.randint(4, 36, (2,)).tolist()
        image = 0.1 * torch.rand(3, 64, 64)
        image[:, top : top + 24, left : left + 24] += 0.8
        images.append(image)
        box = torch.tensor([[left, top, left + 24, top + 24]], dtype=torch.float32)
        targets.append({"boxes": box, "labels": torch.ones(1, dtype=torch.int64)})
    return images, targets


def detector() -> RetinaNet:
    """Return a RetinaNet on a backbone of four convolutions."""
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
    )
    backbone.out_channels = 16
    anchors = AnchorGenerator(sizes=((24,),), aspect_ratios=((1.0,),))
    return RetinaNet(backbone, 2, anchor_generator=anchors, min_size=64, max_size=64)


def train(steps: int) -> tuple[list[float], kfac_fx.Preconditioner]:
    """Return the summed loss of every step, and the preconditioner.

    Args:
        steps: of 8 images.
    """
    torch.manual_seed(0)
    model = detector()
    images, targets = squares(8)
    # Anchors are matched by Python code that no graph holds. The model runs as it is written, and
    # its layers are recorded while it does.
    net = kfac_fx.transform(model, (images, targets), capture="eager")
    # Without momentum: these losses are divided by the number of boxes and the curvature by that of
    # all anchors, so steps are as long as their bounds allow, and momentum would add them up.
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    # The losses are no outputs of a likelihood; what the heads say of every anchor is: a label yes
    # or no, and four numbers of a box. The numbers are their weights.
    likelihood = kfac_fx.likelihoods.Sum(
        {"cls_logits": ("bernoulli", 1.0), "bbox_regression": ("normal", 1.0)}
    )
    preconditioner = kfac_fx.Preconditioner(net, likelihood)
    heads: dict[str, Tensor] = {}
    model.head.register_forward_hook(lambda module, args, result: heads.update(result))

    totals = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses = net(images, targets)
        preconditioner.observe(heads)
        total = sum(losses.values())
        total.backward()
        preconditioner.step()
        optimizer.step()
        totals.append(total.item())
    return totals, preconditioner


def main() -> None:
    """Train for 40 steps."""
    losses, preconditioner = train(40)
    print(preconditioner.curvature)
    print("loss:", *(f"{loss:.3f}" for loss in losses))


if __name__ == "__main__":
    main()
