"""The bound on a step that is taken, against its definition and behind many optimizers."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.networks import mlp
from torch import Tensor, nn

import kfac_fx
from kfac_fx.optim.bounds import LayerSteps
from kfac_fx.optim.taken_step import LARGEST_STEP, TakenStep
from kfac_fx.parallel import ALONE

pytestmark = pytest.mark.usefixtures("float64")
LARGEST = 0.03


# ----------------------------------------------------------------------------- steps that are taken
class Layers(nn.Module):
    """A weight with its bias, weights alone that start at zero, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(6, 5), nn.Linear(5, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(7))
        nn.init.zeros_(self.head.weight)


GROUPS = [["one.weight", "one.bias"], ["head.weight"], ["scale"]]


class Bounded:
    """A bound, and an owner that has made so many steps."""

    def __init__(self, parameters: dict[str, nn.Parameter], layers: list[list[str]]) -> None:
        self.steps = 0
        me = weakref.ref(self)
        self.bound = TakenStep(
            parameters, layers, LARGEST, ALONE, lambda: me().steps, lambda kept: None
        )

    def step(self) -> None:
        self.steps += 1


def bounded(model: nn.Module) -> Bounded:
    return Bounded(dict(model.named_parameters()), GROUPS)


@pytest.fixture(params=["read", "unread"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths are read on the host, or stay where the parameters are, as on a GPU."""
    if request.param == "unread":
        plain = LayerSteps.__init__

        def init(self: LayerSteps, *given: object) -> None:
            plain(self, *given)
            self.reads = False

        monkeypatch.setattr(LayerSteps, "__init__", init)


def backward(model: nn.Module, size: float = 1.0) -> None:
    for parameter in model.parameters():
        parameter.grad = size * torch.randn_like(parameter)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def lengths(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[float]:
    """The length of each layer's step over the largest that it may have."""
    found = []
    for names in GROUPS:
        step = sum((after[n] - before[n]).square().sum() for n in names)
        weights = sum(before[n].square().sum() for n in names)
        least = 1e-4 * sum(before[n].numel() for n in names)
        found.append(float((step / torch.clamp_min(weights, least)).sqrt()) / LARGEST)
    return found


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-2),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.5),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.5, fused=True),
    "loop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.5, foreach=False),
}


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_long_steps_are_shortened_in_their_direction(name: str) -> None:
    torch.manual_seed(1)
    model, twin = Layers(), Layers()
    twin.load_state_dict(model.state_dict())
    bound, optimizer, free = bounded(model), OPTIMIZERS[name](model), OPTIMIZERS[name](twin)
    for _ in range(3):
        backward(model)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        before = values(model)
        twin.load_state_dict(before)
        bound.step()
        optimizer.step()
        free.step()
        after, other = values(model), values(twin)
        assert lengths(before, after) == pytest.approx([1.0, 1.0, 1.0])
        for n in before:
            step, want = (after[n] - before[n]).flatten(), (other[n] - before[n]).flatten()
            assert F.cosine_similarity(step, want, 0) == pytest.approx(1.0)


@pytest.mark.usefixtures("host")
def test_short_steps_are_left_as_they_are_bit_by_bit() -> None:
    model, twin = Layers(), Layers()
    twin.load_state_dict(model.state_dict())
    bound = bounded(model)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        parameter.grad = other.grad = 1e-3 * torch.randn_like(parameter)
    bound.step()
    for each in (model, twin):
        torch.optim.SGD(each.parameters(), lr=0.1).step()
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.usefixtures("host")
def test_one_layer_of_several_is_too_long() -> None:
    model = Layers()
    bound, optimizer = bounded(model), torch.optim.SGD(model.parameters(), lr=1.0)
    backward(model, 1e-5)
    model.scale.grad = torch.ones(7)
    before = values(model)
    bound.step()
    optimizer.step()
    after = values(model)
    assert lengths(before, after)[2] == pytest.approx(1.0)
    for name in ("one.weight", "one.bias", "head.weight"):
        grad = dict(model.named_parameters())[name].grad
        assert torch.equal(after[name], before[name] - grad)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_other_precisions(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.full((20,), 2.0, dtype=dtype))
    bound = Bounded({"weight": weight}, [["weight"]])
    weight.grad = torch.ones_like(weight)
    bound.step()
    torch.optim.SGD([weight], lr=1.0).step()
    assert float((weight.detach() - 2.0).abs().max()) == pytest.approx(2 * LARGEST, rel=0.05)


@pytest.mark.usefixtures("host")
def test_a_step_that_is_not_finite_is_left_as_it_is() -> None:
    model = Layers()
    bound, optimizer = bounded(model), torch.optim.SGD(model.parameters(), lr=1e-3)
    backward(model)
    model.one.weight.grad[0, 0] = math.inf
    before = values(model)
    bound.step()
    optimizer.step()
    after = values(model)
    assert torch.equal(after["one.bias"], before["one.bias"] - 1e-3 * model.one.bias.grad)
    finite = after["one.weight"].isfinite()
    assert not finite[0, 0] and finite.sum() == 29


def test_only_the_step_that_follows_is_looked_at() -> None:
    """Another phase of the training may move the weights as it likes."""
    model = Layers()
    bound, optimizer = bounded(model), torch.optim.SGD(model.parameters(), lr=1.0)
    backward(model)
    before = values(model)
    optimizer.step()
    assert min(lengths(before, values(model))) > 2
    before = values(model)
    bound.step()
    optimizer.step()
    assert max(lengths(before, values(model))) <= 1 + 1e-9
    before = values(model)
    optimizer.step()
    assert min(lengths(before, values(model))) > 2


def test_what_is_changed_between_is_no_step() -> None:
    """A checkpoint that is loaded after a skipped step stays as it is."""
    model = Layers()
    bound, optimizer = bounded(model), torch.optim.SGD(model.parameters(), lr=1e-9)
    backward(model)
    bound.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(5.0)
    before = values(model)
    optimizer.step()
    assert max(lengths(before, values(model))) < 1e-3


def test_several_optimizers_share_the_parameters() -> None:
    model = Layers()
    bound = bounded(model)
    first = torch.optim.SGD(model.one.parameters(), lr=1.0)
    second = torch.optim.Adam([model.head.weight, model.scale], lr=0.5)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    for _ in range(2):
        backward(model)
        before = values(model)
        bound.step()
        first.step()
        other.step()
        second.step()
        assert lengths(before, values(model)) == pytest.approx([1.0, 1.0, 1.0])


def test_groups_that_are_added_later() -> None:
    model = Layers()
    bound, optimizer = bounded(model), torch.optim.SGD(model.one.parameters(), lr=1.0)
    for _ in range(2):
        backward(model)
        before = values(model)
        bound.step()
        optimizer.step()
        assert max(lengths(before, values(model))) <= 1 + 1e-9
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": [model.head.weight, model.scale], "lr": 2.0})
    assert lengths(before, values(model)) == pytest.approx([1.0, 1.0, 1.0])


def test_a_closure_that_preconditions() -> None:
    """Steps are bounded too that began before there was anything to bound."""
    model = Layers()
    bound, optimizer = bounded(model), torch.optim.SGD(model.parameters(), lr=1.0)

    def closure() -> float:
        backward(model)
        bound.step()
        return 0.0

    for _ in range(4):
        before = values(model)
        optimizer.step(closure)
        assert lengths(before, values(model)) == pytest.approx([1.0, 1.0, 1.0])


def test_schedulers_scalers_and_copies() -> None:
    model = Layers()
    bound, optimizer = bounded(model), torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    scaler = torch.amp.GradScaler("cpu")
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert len(twin.param_groups) == 1
    for _ in range(2):
        loss = sum(p.sum() for p in model.parameters())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        before = values(model)
        bound.step()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        assert lengths(before, values(model)) == pytest.approx([1.0, 1.0, 1.0])
    # The scaler leaves out a step: nothing is bounded, and the next step is as ever.
    backward(model, math.inf)
    before = values(model)
    bound.step()
    scaler.step(optimizer)
    assert lengths(before, values(model)) == [0.0, 0.0, 0.0]


def test_a_step_that_is_compiled() -> None:
    model = Layers()
    bound, optimizer = bounded(model), torch.optim.SGD(model.parameters(), lr=1.0)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        backward(model)
        before = values(model)
        bound.step()
        step()
        assert lengths(before, values(model)) == pytest.approx([1.0, 1.0, 1.0])


def test_it_goes_with_whoever_has_it() -> None:
    model = Layers()
    bound = bounded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    backward(model)
    bound.step()
    gone = weakref.ref(bound.bound)
    del bound
    gc.collect()
    assert gone() is None
    before = values(model)
    optimizer.step()
    assert min(lengths(before, values(model))) > 2


# -------------------------------------------------------------------------------- the whole of it
def trained(
    lr: float, momentum: float, steps: int = 30, **options: object
) -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    model = mlp(6, 8, 3)
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    net = kfac_fx.transform(model, structure="block_diagonal")
    pre = kfac_fx.Preconditioner(net, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = net(x)
        loss = F.cross_entropy(outputs, y)
        pre.observe(outputs)
        loss.backward()
        pre.step()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        after = list(model.parameters())
        ratios = [
            sum((after[k] - before[k]).square().sum() for k in layer).sqrt()
            / sum(before[k].square().sum() for k in layer).sqrt()
            for layer in ((0, 1), (2, 3))
        ]
        found.append((loss.item(), max(ratio.item() for ratio in ratios)))
    return pre, found


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("lr", [0.01, 0.1, 1.0])
def test_any_learning_rate_makes_progress(lr: float, momentum: float) -> None:
    _, found = trained(lr, momentum)
    assert found[-1][0] < found[0][0]
    assert max(ratio for _, ratio in found) <= LARGEST_STEP + 1e-9


def test_a_preconditioner_goes_with_its_bound() -> None:
    """Nothing keeps it alive but whoever has it; a state that is loaded starts nothing."""
    pre, _ = trained(0.1, 0.9, steps=3)
    state = pre.state_dict()
    pre.load_state_dict(state)
    gone = weakref.ref(pre), weakref.ref(pre._taken)
    del pre
    gc.collect()
    assert gone[0]() is None and gone[1]() is None


def test_bounds_are_switched_off_by_none() -> None:
    _, found = trained(1.0, 0.9, largest_step=None, trust_region=None)
    assert max(ratio for _, ratio in found[:3]) > 3 * LARGEST_STEP


@pytest.mark.parametrize("lr", [1e-3, 10.0])
def test_a_rate_that_is_too_large_is_made_up_for(lr: float) -> None:
    """Every step that is cut makes the next ones shorter, until none is."""
    pre, found = trained(lr, 0.9, steps=120)
    restraint = pre.state_dict()["length"]["restraint"]
    assert (restraint < 0.1) == (lr == 10.0)
    assert found[-1][0] < found[0][0]
    cut = [ratio > 0.999 * LARGEST_STEP for _, ratio in found]
    assert lr < 1 or (all(cut[:5]) and not any(cut[-5:]))


def test_two_preconditioners_bound_their_own_steps() -> None:
    first, second = mlp(6, 5, 3), mlp(6, 5, 3)
    made = [kfac_fx.Preconditioner(kfac_fx.transform(m)) for m in (first, second)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=100.0) for m in (first, second)]
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    before = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (first, second)]
    for model, pre in zip((first, second), made, strict=True):
        F.cross_entropy(model(x), y).backward()
        if pre is made[0]:
            pre.observe(inputs=x)
            pre.step()
    for optimizer in optimizers:
        optimizer.step()
    after = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (first, second)]
    moved = [float((a - b).norm() / b.norm()) for a, b in zip(after, before, strict=True)]
    assert moved[0] <= LARGEST_STEP + 1e-9 and moved[1] > 1


@pytest.mark.parametrize("option", ["trust_region", "largest_step"])
def test_bounds_are_positive(option: str) -> None:
    with pytest.raises(kfac_fx.errors.UnknownOptionError, match=option):
        kfac_fx.Preconditioner(kfac_fx.transform(mlp()), **{option: 0.0})
