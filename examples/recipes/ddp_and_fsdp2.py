"""Several processes with torchrun: DistributedDataParallel, or FSDP2 with ``--shard``.

    torchrun --nproc-per-node=2 examples/recipes/ddp_and_fsdp2.py [--shard]

Every process has its share of each batch of scikit-learn's digits.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kfac_fx
import kfac_fx.distributed


def train(shard: bool, steps: int) -> tuple[list[float], kfac_fx.Preconditioner]:
    """Return the loss of every step, of all processes' cases, and the preconditioner.

    Args:
        shard: FSDP2 in place of DistributedDataParallel.
        steps: of 128 cases in all.
    """
    torch.manual_seed(0)
    net = kfac_fx.transform(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)))
    if shard:
        # Layers first, then the whole: a layer's parameters are gathered when it is its turn. It is
        # the transformed network that is sharded, so that the taps are inside.
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in net.children():
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        wrapped: nn.Module = fully_shard(net, mesh=mesh)
    else:
        wrapped = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.3, momentum=0.9)
    preconditioner = kfac_fx.Preconditioner(
        wrapped,
        "categorical",
        workers=kfac_fx.distributed.DataParallel(),  # statistics are summed, inverses divided
    )
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    losses = []
    for step in range(steps):
        cases = torch.arange(step * 128, (step + 1) * 128) % len(images)
        mine = cases[dist.get_rank() :: dist.get_world_size()]
        optimizer.zero_grad()
        outputs = wrapped(images[mine])
        loss = F.cross_entropy(outputs, labels[mine])
        preconditioner.observe(outputs)
        loss.backward()
        preconditioner.step()
        optimizer.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses, preconditioner


def main() -> None:
    """Train for 40 steps, and print from the first process."""
    dist.init_process_group("gloo")
    losses, preconditioner = train("--shard" in sys.argv[1:], steps=40)
    if dist.get_rank() == 0:
        print("loss:", *(f"{loss:.3f}" for loss in losses))
        # A factor's numbers are whole in every process, whatever is sharded.
        print("trace of the curvature:", f"{preconditioner.curvature_operator().trace():.4g}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
