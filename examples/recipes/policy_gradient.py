"""A policy update in the manner of ACKTR: natural gradients of an actor and a critic.

    python examples/recipes/policy_gradient.py

An agent on a ring of 12 places learns to walk to place 0 by the shorter way. Actor and critic share
their first layer, and the length of a step is bounded by the divergence from the policy before
(Wu et al. 2017, https://arxiv.org/abs/1708.05144).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx

PLACES, STEPS, DISCOUNT = 12, 8, 0.9


class Agent(nn.Module):
    """The logits of the two moves, and the value of a place."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(PLACES, 32)
        self.actor = nn.Linear(32, 2)
        self.critic = nn.Linear(32, 1)

    def forward(self, places: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.shared(places))
        return self.actor(h), self.critic(h)


def episode(agent: nn.Module, walkers: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return places, moves and discounted returns of all walkers, and the mean reward.

    Args:
        agent: is asked, not trained.
        walkers: how many walk at the same time.
    """
    place = torch.randint(0, PLACES, (walkers,))
    places, moves, rewards = [], [], []
    for _ in range(STEPS):
        seen = F.one_hot(place, PLACES).float()
        with torch.no_grad():
            move = torch.distributions.Categorical(logits=agent(seen)[0]).sample()
        place = (place + 2 * move - 1) % PLACES
        places.append(seen)
        moves.append(move)
        rewards.append((place == 0).float())
    returns = [torch.zeros(walkers)]
    for reward in reversed(rewards):
        returns.append(reward + DISCOUNT * returns[-1])
    found = torch.stack(returns[:0:-1]).flatten()
    return torch.cat(places), torch.cat(moves), found, torch.stack(rewards).mean().item()


def train(updates: int) -> tuple[list[float], kfac_fx.Preconditioner]:
    """Return the mean reward before every update, and the preconditioner.

    Args:
        updates: each after an episode of 64 walkers.
    """
    torch.manual_seed(0)
    agent = Agent()
    net = kfac_fx.transform(agent)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    # The outputs are the policy and a normal around the value; their Fisher is the joint one, which
    # is what a layer that both share needs. The trust region shortens a step, so that the learning
    # rate stays 1.
    preconditioner = kfac_fx.Preconditioner(
        net,
        kfac_fx.likelihoods.Sum([("categorical", 1.0), ("normal", 0.5)]),
        trust_region=0.02,
    )
    rewards = []
    for _ in range(updates):
        # The episode asks the agent itself: it has the same parameters, and nothing is recorded.
        places, moves, returns, reward = episode(agent, walkers=64)
        optimizer.zero_grad()
        logits, values = net(places)
        advantage = returns - values.squeeze(1)
        chosen = -F.cross_entropy(logits, moves, reduction="none")
        loss = -(chosen * advantage.detach()).mean() + 0.5 * advantage.square().mean()
        preconditioner.observe((logits, values))
        loss.backward()
        preconditioner.step()
        optimizer.step()
        rewards.append(reward)
    return rewards, preconditioner


def main() -> None:
    """Train for 60 updates."""
    rewards, _ = train(60)
    print("mean reward:", *(f"{reward:.2f}" for reward in rewards))


if __name__ == "__main__":
    main()
