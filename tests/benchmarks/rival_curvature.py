"""Rivals that compute curvature matrices and leave their use to others: stages one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from methods import LAYERS, Method, RefusedError, flat, layers, own, positions_of, sgd, split
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from workloads import Workload, chain_cnn


class ClassesSecond(nn.Module):
    """As curvlinops wants logits of sequences."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).movedim(-1, 1)


def curvlinops(work: Workload, variant: str) -> Method:
    """``KFACLinearOperator``: statistics with a forward and a backward of their own, by hooks."""
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

    fisher, _, sharing = variant.partition(" ")
    work = own(work)
    model: nn.Module = work.model if positions_of(work) == 1 else ClassesSecond(work.model)
    bernoulli = work.likelihood == "bernoulli"
    loss = nn.BCEWithLogitsLoss() if bernoulli else nn.CrossEntropyLoss()
    known, _ = split(work.model)

    def fresh() -> Any:
        return KFACLinearOperator(
            model,
            loss,
            known,
            [work.next()],
            check_deterministic=False,
            fisher_type="mc" if fisher == "sampled" else "empirical",
            kfac_approx=sharing or "expand",
            num_per_example_loss_terms=positions_of(work),
            separate_weight_and_bias=False,
            num_data=work.cases,
        )

    def record() -> Any:
        operator = fresh()
        operator.compute_kronecker_factors()
        return operator

    operator = record()

    def inverted() -> Any:
        """Inverses are computed at the first product, and kept."""
        inverse = KFACInverseLinearOperator(operator, damping=1e-2, use_heuristic_damping=True)
        inverse @ gradients
        return inverse

    gradients = [torch.randn_like(p) for p in known]
    inverse = inverted()
    return Method(
        name=f"curvlinops {variant}",
        kind=variant,
        calls={"recorded": record, "inverted": inverted, "applied": lambda: inverse @ gradients},
        stages={
            "statistics": ("recorded", None),
            "refresh": ("inverted", "applied"),
            "apply": ("applied", None),
        },
        probe=lambda: (flat(gradients), flat(inverse @ gradients)),
        note=f"{LAYERS}; statistics by a forward and a backward of their own",
    )


class Whole(Dataset):
    """A batch that a loader takes as it is, rather than case by case."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor]:
        return (self.x.detach(),)


def nngeometry(work: Workload, variant: str) -> Method:
    """``PMatKFAC`` of log-likelihoods of targets drawn from the model."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatKFAC, PVector

    work = own(work)
    if positions_of(work) > 1:
        raise RefusedError("no linear layers on sequences")
    collection = LayerCollection()
    for layer in layers(work.model):
        collection.add_layer_from_model(work.model, layer)

    def log_likelihood(x: Tensor) -> Tensor:
        """A number a case, as the library's own FIM_MonteCarlo has it."""
        logits = work.model(x)
        if work.likelihood == "bernoulli":
            drawn = torch.bernoulli(logits.detach().sigmoid())
            signed = (2 * drawn - 1) * logits
            return nn.functional.logsigmoid(signed).sum(1, keepdim=True)
        logs = logits.log_softmax(1)
        return logs.gather(1, torch.multinomial(logs.detach().exp(), 1))

    generator = TorchHooksJacobianBackend(
        layer_collection=collection, model=work.model, function=log_likelihood
    )

    def record() -> Any:
        whole = Whole(work.next()[0])
        loader = DataLoader(whole, batch_size=work.cases, collate_fn=lambda batch: batch)
        return PMatKFAC(generator=generator, examples=loader)

    matrix = record()
    inverse = matrix.inverse(1e-2)
    names = {id(m): name for name, m in work.model.named_modules()}
    parts = {
        names[id(m)]: tuple(torch.randn_like(p) for p in m.parameters()) for m in layers(work.model)
    }
    vector = PVector(collection, dict_repr=parts)

    def probe() -> tuple[Tensor, Tensor]:
        made = inverse.mv(vector).to_dict()
        return tuple(flat(t for p in d.values() for t in p) for d in (parts, made))

    return Method(
        name="nngeometry sampled",
        kind="sampled",
        calls={
            "recorded": record,
            "inverted": lambda: matrix.inverse(1e-2),
            "applied": lambda: inverse.mv(vector),
        },
        stages={
            "statistics": ("recorded", None),
            "refresh": ("inverted", None),
            "apply": ("applied", None),
        },
        probe=probe,
        note=f"{LAYERS}; statistics by a forward and a backward of their own",
    )


def backpack(work: Workload, variant: str) -> Method:
    """``KFAC(mc_samples=1)`` during the training's backward."""
    from backpack import backpack, extend
    from backpack.extensions import KFAC
    from backpack.utils.kroneckers import inv_kfacs, kfac_mat_prod

    if work.name not in ("ae", "cnn"):
        raise RefusedError("chains of plain modules only: no LayerNorm, no embedding, no sequences")
    chain = own(work) if work.name == "ae" else chain_cnn(work)
    note = "squared error, as BCE is for scalar outputs and binary targets only"
    if work.name == "cnn":
        note = "a chain of 7 convolutions without BatchNorm or shortcuts, over SGD on the same"
    kind = nn.MSELoss if work.name == "ae" else nn.CrossEntropyLoss
    plain, model = own(chain).model, extend(chain.model)
    plain_loss, loss, kfac = kind(), extend(kind()), KFAC(mc_samples=1)
    optimizer = sgd(plain.parameters(), work.lr)

    def backward(net: nn.Module, criterion: nn.Module) -> None:
        x, y = chain.next()
        net.zero_grad()
        criterion(net(x), y).backward()

    def base() -> None:
        backward(plain, plain_loss)
        optimizer.step()

    def record() -> None:
        with backpack(kfac):
            backward(model, loss)

    def inverted() -> list[Any]:
        return [inv_kfacs(p.kfac, shift=0.1) for p in model.parameters()]

    def applied() -> list[Tensor]:
        pairs = zip(inverses, model.parameters(), strict=True)
        return [kfac_mat_prod(inverse)(p.grad.flatten().unsqueeze(-1)) for inverse, p in pairs]

    record()
    inverses = inverted()
    return Method(
        name="backpack sampled",
        kind="sampled",
        base=base,
        calls={
            "plain": lambda: backward(plain, plain_loss),
            "recorded": record,
            "inverted": inverted,
            "applied": applied,
        },
        stages={
            "statistics": ("recorded", "plain"),
            "refresh": ("inverted", None),
            "apply": ("applied", None),
        },
        probe=lambda: (flat(p.grad for p in model.parameters()), flat(applied())),
        note=f"{note}; inverses by eigh; biases apart",
    )
