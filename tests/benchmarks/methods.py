"""What is timed of a method: calls that take turns with plain SGD's, and stages made of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timing import Call
from torch import Tensor, nn
from workloads import Workload

import kfac_fx

NEVER = 10**9
LAYERS = "linear and convolution layers only"


class RefusedError(Exception):
    """A library cannot run a workload; says why."""


@dataclass
class Method:
    """A way to train a workload, in calls to be timed.

    Attributes:
        name: for the table.
        kind: of the statistics, "empirical", "sampled", ... with "reduce" where positions are
            summed first; stages of the same kind are compared.
        calls: by name. All are whole steps of training, or parts of one.
        stages: "training" (forward, backward, SGD), "statistics", "refresh", "apply"; "update":
            statistics and refresh that cannot be told apart; "cholesky": what a refresh can hardly
            be without. Each is the call that has it, and the one that differs only in that (None:
            the call is the stage).
        probe: a gradient, and the step that the method makes of it, both flat.
        whole: the call that is a step with statistics and apply; None for SGD's and the stages.
        base: SGD, or None for the workload's own.
        part: share of the batch that statistics are taken of.
        note: what differs from the others.
    """

    name: str
    kind: str
    calls: Mapping[str, Call]
    stages: Mapping[str, tuple[str, str | None]]
    probe: Callable[[], tuple[Tensor, Tensor]]
    whole: str | None = None
    base: Call | None = None
    part: float = 1.0
    note: str = ""


def own(work: Workload) -> Workload:
    """The same workload with a copy of the network."""
    return Workload(work.name, copy.deepcopy(work.model), work.likelihood, work.batches, work.lr)


def sgd(parameters: Any, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def training(work: Workload, model: nn.Module, *optimizers: Any) -> Call:
    """Forward, loss, backward and the optimizers' steps."""

    def step() -> None:
        x, y = work.next()
        for optimizer in optimizers:
            optimizer.zero_grad()
        work.loss(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def layers(model: nn.Module) -> list[nn.Module]:
    """Those that rivals precondition."""
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of linear and convolution layers, and the others."""
    known = [p for layer in layers(model) for p in layer.parameters()]
    ids = {id(p) for p in known}
    return known, [p for p in model.parameters() if id(p) not in ids]


def positions_of(work: Workload) -> int:
    """Terms of the loss that a case has."""
    return 1 if work.likelihood == "bernoulli" else work.batches[0][1][0].numel()


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def moved(work: Workload, step: Call, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A gradient, and how a step of an optimizer moves the parameters against it."""
    x, y = work.batches[(work._turns + 1) % len(work.batches)]
    gradient = flat(torch.autograd.grad(work.loss(work.model(x), y), parameters))
    before = flat(parameters)
    step()
    return gradient, before - flat(parameters)


def cosine(method: Method) -> float:
    """Between a gradient and the method's step.

    Raises:
        RuntimeError: there is no step, it is not finite, or it is the gradient.
    """
    gradient, step = (vector.double() for vector in method.probe())
    found = float(gradient @ step / (gradient.norm() * step.norm()))
    if not (0 < float(step.norm()) < float("inf") and -1 <= found < 0.9999):
        raise RuntimeError(f"{method.name} does not precondition: cosine {found}")
    return found


class Trained:
    """A network of one's own with a Preconditioner, block-diagonal."""

    def __init__(self, work: Workload, part: float, sharing: str, **options: Any) -> None:
        self.work = own(work)
        x = work.batches[0][0]
        self.net: Any = kfac_fx.transform(
            self.work.model,
            (x,),
            structure="block_diagonal",
            weight_sharing=sharing,
            check=False,
        )
        self.pre = kfac_fx.Preconditioner(self.net, work.likelihood, damping=1e-1, **options)
        self.optimizer = sgd(self.net.parameters(), work.lr)
        self.cases = max(1, round(part * work.cases))

    def step(self) -> None:
        """As users write it; the statistics and the refresh come when they are due."""
        x, y = self.work.next()
        self.optimizer.zero_grad()
        if self.cases < len(x):
            self.pre.observe(inputs=x[: self.cases])
        outputs = self.net(x)
        if self.cases == len(x):
            self.pre.observe(outputs, y)
        self.work.loss(outputs, y).backward()
        self.pre.step()
        self.optimizer.step()

    def gradients(self) -> dict[str, Tensor]:
        """Of a batch, by name."""
        x, y = self.work.next()
        named = {n: self.net.get_parameter(n) for n in self.pre.curvature.covered}
        loss = self.work.loss(self.net(x), y)
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    def probe(self) -> tuple[Tensor, Tensor]:
        gradients = self.gradients()
        return flat(gradients.values()), flat(self.pre.apply(gradients).values())


def inverses(factors: list[Tensor]) -> None:
    """What a refresh can hardly be without: torch's Cholesky inverse of every damped matrix."""
    for factor in factors:
        damped = factor.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(1e-1)
        torch.cholesky_inverse(torch.linalg.cholesky(damped))


def matrices(pre: kfac_fx.Preconditioner, kinds: tuple[str, ...]) -> list[Tensor]:
    """The factors that are inverted, of blocks of some kinds (all if there are none)."""
    blocks = pre.curvature.blocks
    chosen = [n for n in pre.factors if not kinds or blocks[n].kind in kinds]
    shapes = {n: {s for s in blocks[n].dimensions if len(s) > 1} for n in chosen}
    return [f for n in chosen for f in pre.factors[n] if tuple(f.shape) in shapes[n]]


def ours(work: Workload, fisher: str, part: float = 1.0, sharing: str = "expand") -> Method:
    """``Preconditioner`` in front of SGD, its stages from whole steps."""
    options: dict[str, Any] = {"fisher": fisher, "refresh_every": NEVER}
    idle = Trained(work, part, sharing, statistics_every=NEVER, **options)
    busy = Trained(work, part, sharing, statistics_every=1, **options)
    idle.step()  # the first step always records and refreshes
    busy.step()
    gradients = idle.gradients()
    every, shared = matrices(idle.pre, ()), matrices(idle.pre, ("linear", "convolution"))
    reduced = " reduce" if sharing == "reduce" else ""
    share = f" of 1/{round(1 / part)}" if part < 1 else ""
    return Method(
        name=f"kfac_fx, {fisher}{reduced}{share}",
        kind=fisher + reduced + share,
        calls={
            "off": training(idle.work, idle.net, idle.optimizer),
            "applied": idle.step,
            "recorded": busy.step,
            "refresh": idle.pre.refresh,
            "apply": lambda: idle.pre.apply(gradients),
            "every": lambda: inverses(every),
            "shared": lambda: inverses(shared),
        },
        stages={
            "training": ("off", None),
            "statistics": ("recorded", "applied"),
            "refresh": ("refresh", None),
            "apply": ("apply", None),
            "cholesky": ("every", None),
            "cholesky of layers": ("shared", None),
        },
        whole="recorded",
        probe=idle.probe,
        part=part,
        note="all parameters have a block",
    )
