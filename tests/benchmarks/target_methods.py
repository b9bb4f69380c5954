"""The methods of time_to_target.py: rivals, and kfac_fx as it comes.

A method takes a problem, its network and a learning rate, and returns the network to evaluate and
a step on a batch. Rates lie on a ladder of half decades (1, 3, 10, 30, ...); `first` is where the
search begins, which goes on in both directions until the best rate has a worse one on either side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from problem_parts import Batch, Problem
from torch import Tensor, nn


class Trainer(NamedTuple):
    """The network to evaluate, and one step of training."""

    net: nn.Module
    step: Callable[[Batch], object]


@dataclass(frozen=True)
class Method:
    """A method and where the search for its learning rate begins.

    Attributes:
        first: rates that are always tried; empty where there is none to choose.
        setting: what else is fixed, for the report.
    """

    name: str
    make: Callable[[Problem, nn.Module, float], Trainer]
    first: tuple[float, ...]
    setting: str
    ours: bool = False


def gradient_descent(
    problem: Problem,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    after_backward: Callable[[], None] = lambda: None,
) -> Trainer:
    """Return the loop of every method that needs only gradients."""
    setting = problem.setting()

    def step(batch: Batch) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        _, loss = setting.objective(model, batch)
        loss.backward()
        after_backward()
        for optimizer in optimizers:
            optimizer.step()

    return Trainer(model, step)


# Rivals.


def sgd(problem: Problem, model: nn.Module, lr: float) -> Trainer:
    """torch.optim.SGD with Nesterov momentum."""
    options: Any = {"lr": lr, "momentum": 0.9, "nesterov": True, "fused": True}
    return gradient_descent(problem, model, [torch.optim.SGD(model.parameters(), **options)])


def adam(problem: Problem, model: nn.Module, lr: float) -> Trainer:
    """torch.optim.AdamW."""
    options: Any = {"lr": lr, "weight_decay": 0.0, "fused": True}
    return gradient_descent(problem, model, [torch.optim.AdamW(model.parameters(), **options)])


def muon(problem: Problem, model: nn.Module, lr: float) -> Trainer:
    """torch.optim.Muon for matrices and kernels, AdamW for embeddings and the rest."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables |= {id(p) for p in model.parameters(recurse=False)}
    matrices = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in tables]
    rest = [p for p in model.parameters() if p.dim() < 2 or id(p) in tables]
    # Muon takes matrices only: those of kernels share their memory.
    views = [nn.Parameter(p.detach().flatten(1)) for p in matrices]

    def hand_over() -> None:
        for view, parameter in zip(views, matrices, strict=True):
            view.grad = None if parameter.grad is None else parameter.grad.flatten(1)

    options: Any = {"lr": lr, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [torch.optim.Muon(views, **options)]
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, fused=True))
    trainer = gradient_descent(problem, model, optimizers, hand_over)

    def step(batch: Batch) -> None:
        for parameter in matrices:
            parameter.grad = None
        trainer.step(batch)

    return Trainer(model, step)


def soap(problem: Problem, model: nn.Module, lr: float) -> Trainer:
    """SOAP of pytorch-optimizer; bases every 10 steps."""
    from pytorch_optimizer import SOAP

    optimizer = SOAP(model.parameters(), lr=lr, weight_decay=0.0)
    return gradient_descent(problem, model, [optimizer])


def shampoo(problem: Problem, model: nn.Module, lr: float) -> Trainer:
    """ScalableShampoo of pytorch-optimizer, with the lengths of RMSProp; roots every 10 steps."""
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    optimizer = ScalableShampoo(
        model.parameters(),
        lr=lr,
        betas=(0.9, 0.99),
        moving_average_for_momentum=True,
        start_preconditioning_step=10,
        preconditioning_compute_steps=10,
        graft_type=LayerWiseGrafting.RMSPROP,
    )
    return gradient_descent(problem, model, [optimizer])


# kfac_fx.


def preconditioner(problem: Problem, model: nn.Module, lr: float) -> Trainer:
    """README's loop, with the defaults; SGD is fused, as it is for rivals."""
    import kfac_fx

    setting = problem.setting()
    net = kfac_fx.transform(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=True)
    precondition = kfac_fx.Preconditioner(net, likelihood=problem.likelihood_for_kfac())

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        outputs, loss = setting.objective(net, batch)
        precondition.observe(outputs)
        loss.backward()
        precondition.step()
        optimizer.step()

    return Trainer(net, step)


def kfac_with_rate(problem: Problem, model: nn.Module, lr: float) -> Trainer:
    """KFAC(net, lr=...)."""
    import kfac_fx

    net = kfac_fx.transform(model)
    return _whole(net, kfac_fx.KFAC(net, problem.likelihood_for_kfac(), lr=lr))


def kfac(problem: Problem, model: nn.Module, lr: float) -> Trainer:
    """KFAC(net)."""
    import kfac_fx

    net = kfac_fx.transform(model)
    return _whole(net, kfac_fx.KFAC(net, problem.likelihood_for_kfac()))


def _whole(net: nn.Module, optimizer: Any) -> Trainer:
    def step(batch: Batch) -> Tensor:
        loss: Tensor = optimizer.step(batch.inputs, batch.targets)
        return loss

    return Trainer(net, step)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("SGD", sgd, (0.03, 0.1, 0.3), "Nesterov momentum 0.9"),
        Method("Adam", adam, (0.001, 0.003, 0.01), "AdamW without decay"),
        Method("Muon", muon, (0.003, 0.01, 0.03), "torch.optim.Muon, AdamW for the rest"),
        Method("SOAP", soap, (0.001, 0.003, 0.01), "pytorch-optimizer, bases every 10"),
        Method("Shampoo", shampoo, (0.001, 0.003, 0.01), "pytorch-optimizer's scalable form"),
        Method("Preconditioner", preconditioner, (0.03, 0.1, 0.3), "defaults, fused SGD 0.9", True),
        Method("KFAC(lr)", kfac_with_rate, (0.03, 0.1, 0.3), "defaults", True),
        Method("KFAC()", kfac, (), "no argument", True),
    )
}
