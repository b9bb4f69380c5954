"""A graph network of torch_geometric that labels the nodes of one graph.

    python examples/recipes/graph_network.py

The graph is drawn from a stochastic block model: nodes of one class have more edges in common.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GCNConv
from torch_geometric.utils import stochastic_blockmodel_graph

import kfac_fx


class GCN(nn.Module):
    """Two graph convolutions."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.first = GCNConv(features, 16)
        self.second = GCNConv(16, classes)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x, edges)), edges)


def train(steps: int) -> tuple[list[float], kfac_fx.Preconditioner]:
    """Return the loss of every step, and the preconditioner.

    Args:
        steps: of the whole graph, a quarter of whose nodes have known labels.
    """
    torch.manual_seed(0)
    within, between = 0.15, 0.02
    rates = torch.full((3, 3), between) + (within - between) * torch.eye(3)
    edges = stochastic_blockmodel_graph([60, 60, 60], rates)
    labels = torch.arange(3).repeat_interleave(60)
    x = torch.randn(180, 8) + F.one_hot(labels, 8)
    known = torch.rand(180) < 0.25

    model = GCN(8, 3)
    net = kfac_fx.transform(model, (x, edges))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    preconditioner = kfac_fx.Preconditioner(net, "categorical")

    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = net(x, edges)[known]
        loss = F.cross_entropy(outputs, labels[known])
        # Nodes are the cases. Those without a label are no terms of the likelihood, though their
        # features reach the others along the edges.
        preconditioner.observe(outputs)
        loss.backward()
        preconditioner.step()
        optimizer.step()
        losses.append(loss.item())
    return losses, preconditioner


def main() -> None:
    """Train for 40 steps."""
    losses, preconditioner = train(40)
    print(preconditioner.curvature)
    print("loss:", *(f"{loss:.3f}" for loss in losses))


if __name__ == "__main__":
    main()
