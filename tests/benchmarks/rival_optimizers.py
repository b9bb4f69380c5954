"""Rivals that are optimizers: stages are differences of steps that do and do not have them."""

from __future__ import annotations

from methods import LAYERS, NEVER, Method, layers, moved, own, positions_of, sgd, split, training
from torch import nn
from workloads import Workload


def singd(work: Workload, variant: str) -> Method:
    """Inverse-free: statistics and the update of the preconditioner are one."""
    from singd.optim.optimizer import SINGD

    work = own(work)
    known, rest = split(work.model)
    average = "batch" if positions_of(work) == 1 else "batch+sequence"
    structure = "diagonal" if variant == "diagonal" else "dense"
    optimizer = SINGD(
        work.model,
        params=known,
        lr=work.lr,
        T=1,
        lr_cov=1e-4,
        loss_average=average,
        structures=(structure, structure),
        kfac_approx="reduce" if variant == "reduce" else "expand",
    )
    optimizers = [optimizer, *([sgd(rest, work.lr)] if rest else [])]
    step = training(work, work.model, *optimizers)

    def every(period: int) -> None:
        for group in optimizer.param_groups:
            group["T"] = period
        step()

    every(1)
    return Method(
        name=f"singd {variant}",
        kind={"dense": "empirical", "reduce": "empirical reduce"}.get(variant, variant),
        calls={"applied": lambda: every(NEVER), "updated": lambda: every(1)},
        stages={"apply": ("applied", "sgd"), "update": ("updated", "applied")},
        probe=lambda: moved(work, lambda: every(1), known),
        note=f"{LAYERS}; products in place of an inverse, at every update",
    )


def soap(work: Workload, variant: str) -> Method:
    from pytorch_optimizer import SOAP

    work = own(work)
    optimizer = SOAP(work.model.parameters(), lr=1e-3, weight_decay=0.0)
    step = training(work, work.model, optimizer)

    def every(period: int) -> None:
        for state in optimizer.state.values():
            state["precondition_frequency"] = period
        step()

    step()  # the first step only initialises
    return Method(
        name="SOAP",
        kind="gradients",
        calls={"applied": lambda: every(NEVER), "refreshed": lambda: every(1)},
        stages={"apply": ("applied", "sgd"), "refresh": ("refreshed", "applied")},
        probe=lambda: moved(work, lambda: every(1), list(work.model.parameters())),
        note="all parameters; moments of gradients in place of statistics, in apply",
    )


def shampoo(work: Workload, variant: str) -> Method:
    from pytorch_optimizer import Shampoo

    work = own(work)
    optimizer = Shampoo(work.model.parameters(), lr=1e-3, momentum=0.9)
    step = training(work, work.model, optimizer)

    def every(period: int) -> None:
        optimizer.preconditioning_compute_steps = period
        step()

    every(1)
    return Method(
        name="Shampoo",
        kind="gradients",
        calls={"applied": lambda: every(NEVER), "refreshed": lambda: every(1)},
        stages={"apply": ("applied", "sgd"), "refresh": ("refreshed", "applied")},
        probe=lambda: moved(work, lambda: every(1), list(work.model.parameters())),
        note="all parameters; moments of gradients in place of statistics, in apply",
    )


def muon(work: Workload, variant: str) -> Method:
    from pytorch_optimizer import Muon

    work = own(work)
    ends = {id(p) for p in layers(work.model)[-1].parameters()}
    ends |= {
        id(p) for m in work.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    ends |= {id(p) for p in work.model.parameters(recurse=False)}
    hidden = [p for p in work.model.parameters() if p.ndim >= 2 and id(p) not in ends]
    ids = {id(p) for p in hidden}
    rest = [p for p in work.model.parameters() if id(p) not in ids]
    groups = [{"params": hidden, "use_muon": True}, {"params": rest, "use_muon": False}]
    step = training(work, work.model, Muon(groups, lr=1e-3, adamw_lr=1e-3))
    step()
    return Method(
        name="Muon",
        kind="gradients",
        calls={"applied": step},
        stages={"apply": ("applied", "sgd")},
        probe=lambda: moved(work, step, hidden),
        note="hidden weights, AdamW for the rest; no statistics, nothing to refresh",
    )
