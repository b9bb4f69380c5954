"""KFAC in use: masks, buffers, groups, schedules, interrupted runs, batches that are no good."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.networks import mlp
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import kfac_fx
from kfac_fx import errors
from kfac_fx.optim import KFACOptions


def conv_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.Conv2d(4, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16, 3)),
    )


def task(n: int = 64, shape: tuple[int, ...] = (6,)) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, *shape)
    return x, (x.flatten(1)[:, :3].cumsum(1)).argmax(1)


@pytest.mark.parametrize("structure", ["block_diagonal", "block_tridiagonal"])
def test_needs_no_tuning(structure: str) -> None:
    model = mlp(6, 8, 5, 3)
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model, structure=structure), damping=1.0)
    losses = [float(optimizer.step(*task(256))) for _ in range(80)]
    assert losses[-1] < 0.15 * losses[0]
    assert "loss" in optimizer.summary() and "damping" in optimizer.summary()


def test_batch_norm_and_dropout() -> None:
    """Buffers change once an iteration, as in a plain forward; the global stream is untouched."""
    model = conv_net()
    plain = copy.deepcopy(model)
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model), damping=1.0)
    x, y = task(32, (1, 6, 6))
    before = torch.get_rng_state()
    optimizer.step(x, y)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(optimizer._objective._seed)
        plain(x)
    for (name, one), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    losses = [float(optimizer.step(x, y)) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_every_pass_of_a_step_sees_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            mask = F.dropout(torch.ones_like(x), 0.5, self.training)
            seen.append(mask.detach().clone())
            return self.layer(x * mask)

    net = kfac_fx.transform(Noisy(), torch.randn(2, 4), capture="eager", check=False)
    options = KFACOptions(statistics_fraction=1.0, products_fraction=1.0, damping_every=1)
    optimizer = kfac_fx.KFAC(net, damping=1.0, options=options)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    masks = []
    for _ in range(2):
        seen.clear()
        optimizer.step(x, y)
        assert len(seen) >= 4
        assert all(torch.equal(mask, seen[0]) for mask in seen)
        masks.append(seen[0])
    assert not torch.equal(*masks)


@pytest.mark.parametrize("lr", [None, 0.1])
def test_interrupted_runs_go_on_bitwise(lr: float | None) -> None:
    x, y = task(48, (1, 6, 6))
    torch.manual_seed(3)
    model = conv_net()
    twin = copy.deepcopy(model)

    def build(model: nn.Module) -> kfac_fx.KFAC:
        net = kfac_fx.transform(model, couplings="data")
        return kfac_fx.KFAC(
            net, damping=1.0, lr=lr, generator=torch.Generator().manual_seed(5), refresh_every=3
        )

    optimizer = build(model)
    for _ in range(20):
        optimizer.step(x, y)
    run = build(twin)
    for _ in range(20):  # a new process after every step
        run.step(x, y)
        file = io.BytesIO()
        torch.save({"model": twin.state_dict(), "optimizer": run.state_dict()}, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        twin = conv_net()
        twin.load_state_dict(state["model"])
        run = build(twin)
        run.load_state_dict(state["optimizer"])
    for one, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other)


class SharedLayer(nn.Module):
    """A layer with several uses, whose positions are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.shared = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.first(x).tanh()
        for _ in range(12):
            found = self.shared(found).tanh()
        return self.last(found)


@pytest.mark.parametrize("lr", [None, 0.1])
def test_a_layer_with_several_uses_goes_on_bitwise(lr: float | None) -> None:
    """Averages of counts are in no state: new counts once were outliers after a run was resumed."""
    x, y = task()

    def build() -> tuple[nn.Module, kfac_fx.KFAC]:
        torch.manual_seed(3)
        model = SharedLayer()
        return model, kfac_fx.KFAC(kfac_fx.transform(model), lr=lr)

    model, optimizer = build()
    for _ in range(53):  # counts were compared once averages were settled
        optimizer.step(x, y)
    other, resumed = build()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(20):
        optimizer.step(x, y)
        resumed.step(x, y)
    assert resumed.skipped_batches == optimizer.skipped_batches
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def adversarial(x: Tensor, y: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    x = x.clone()
    if kind == 0:
        x[0, 0] = float("nan")
    elif kind == 1:
        x[1, 1] = float("inf")
    elif kind == 2:
        x.zero_()
    elif kind == 3:
        x.fill_(1.0)
    elif kind == 4:
        x, y = x[:1], y[:1]
    elif kind == 5:
        x *= 1e8
    else:
        x, y = x[y == 0], y[y == 0]
    return x, y


@pytest.mark.slow
def test_a_thousand_adversarial_batches() -> None:
    """Half of a run's batches are no good: nothing breaks, and little is lost."""
    torch.manual_seed(1)
    clean, mixed = mlp(6, 8, 5, 3), mlp(6, 8, 5, 3)
    mixed.load_state_dict(clean.state_dict())
    test_x, test_y = task(4000)
    finals = []
    for model, bad in ((clean, False), (mixed, True)):
        torch.manual_seed(2)
        generator = torch.Generator().manual_seed(0)
        optimizer = kfac_fx.KFAC(kfac_fx.transform(model), damping=1.0, generator=generator)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        for step in range(1000):
            optimizer.step(*task(512))
            average.update_parameters(model)
            if bad:
                optimizer.step(*adversarial(*task(512), step % 7))
                average.update_parameters(model)
            assert all(p.isfinite().all() for p in model.parameters())
        with torch.no_grad():
            finals.append(float(F.cross_entropy(average(test_x), test_y)))
    print(f"test loss: clean {finals[0]:.4f}, with 1,000 adversarial batches {finals[1]:.4f}")
    assert finals[1] <= 1.1 * finals[0]


@pytest.mark.parametrize("when", [0, 1, 5])
def test_a_huge_batch_leaves_no_trace_in_the_averages(when: int) -> None:
    """Its loss is nothing special, as tanh units saturate; even the first batch may be huge."""
    optimizer = kfac_fx.KFAC(kfac_fx.transform(mlp(6, 8, 5, 3)), damping=1.0)
    for step in range(8):
        x, y = task(256)
        optimizer.step(1e8 * x if step == when else x, y)
    assert optimizer.factors["0"][0].norm() < 10
    assert optimizer.skipped_batches == (when > 0)


def test_data_of_another_scale_are_believed_after_a_while() -> None:
    optimizer = kfac_fx.KFAC(kfac_fx.transform(mlp(6, 8, 5, 3)), damping=1.0)
    for step in range(
        50
    ):  # statistics are of every tenth batch by then, and of each until one is good
        x, y = task(64)
        optimizer.step(x if step < 15 else 1e5 * x, y)
    assert optimizer.skipped_statistics == 10
    assert optimizer.factors["0"][0].norm() > 100


def test_a_batch_that_is_not_finite_changes_nothing() -> None:
    model = conv_net()
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model), damping=1.0)
    x, y = task(32, (1, 6, 6))
    for _ in range(3):
        optimizer.step(x, y)
    before = copy.deepcopy(model.state_dict())
    x[0, 0, 0, 0] = float("nan")
    optimizer.step(x, y)
    assert optimizer.skipped_batches == 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_step_that_was_no_good_is_undone_exactly() -> None:
    model = conv_net()
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model), damping=1.0)
    x, y = task(32, (1, 6, 6))
    for _ in range(2):
        optimizer.step(x, y)
    before = [p.clone() for p in model.parameters()]
    optimizer.step(x, y)
    damping = optimizer.diagnostics["damping"]
    with torch.no_grad():
        for p in model.parameters():  # as if the last step had gone wrong
            p.mul_(1e6)
    optimizer._iteration = 5  # the next iteration does not judge
    undone = []
    optimizer._advance = lambda *args: undone.extend(p.clone() for p in model.parameters())
    optimizer.step(x, y)
    assert optimizer.rejected_steps == 1
    assert all(torch.equal(one, other) for one, other in zip(undone, before, strict=True))
    assert optimizer.diagnostics["damping"] > damping


@pytest.mark.parametrize(
    ("inside", "every", "expected"),
    [(True, None, [1, 2, 3, 5]), (False, None, [*range(1, 9)]), (True, 4, [1, 5])],
)
def test_a_batch_that_cannot_be_cut_is_recorded_where_inverses_are_made(
    inside: bool, every: int | None, expected: list[int]
) -> None:
    """A closure's statistics cost the whole batch; a share of each is recorded of the others."""
    x, y = task(64)
    optimizer = kfac_fx.KFAC(kfac_fx.transform(mlp(6, 8, 3)), statistics_every=every)
    found, folds = [], 0
    for iteration in range(1, 9):  # afterwards a rate is tried
        optimizer.step((lambda net: net(x)) if inside else x, y)
        now = optimizer.inverse.estimate.folds
        found += [iteration] if now > folds else []
        folds = now
    assert found == expected


@pytest.mark.parametrize(("length", "expected"), [(1, 64), (8, 8), (64, 4)])
def test_positions_count_where_statistics_are_of_few_cases(length: int, expected: int) -> None:
    """The first averages are over 64 likelihood terms, and at least over the fraction."""
    seen: list[int] = []

    def forward(net: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        seen.append(len(inputs))
        return net(inputs)

    x = torch.randn(128, length, 4)
    net = kfac_fx.transform(nn.Linear(4, 3))
    options = KFACOptions(statistics_fraction=1 / 32, forward=forward)
    optimizer = kfac_fx.KFAC(net, lr=1e-3, options=options)
    optimizer.step(x, torch.randint(3, (128, length)))
    assert seen == [128, expected]


def test_groups_and_schedulers() -> None:
    model = mlp(6, 8, 5, 3)
    groups = [
        {"params": model[0].parameters(), "lr": 0.05, "weight_decay": 0.0},
        {"params": model[2].parameters()},
    ]
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model), params=groups, lr=0.1, damping=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    last = model[4].weight.clone()
    optimizer.step(*task())
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.05]
    assert torch.equal(model[4].weight, last)  # in no group


@pytest.mark.parametrize(
    "inputs", [lambda x: (x,), lambda x: {"input": x}], ids=["positional", "keywords"]
)
def test_inputs_as_the_network_takes_them(inputs: object) -> None:
    model = mlp(6, 8, 5, 3)
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model), damping=1.0)
    x, y = task()
    first = optimizer.step(inputs(x), y)
    assert float(optimizer.step(x, y)) < float(first)


def test_outputs_of_ones_own_making() -> None:
    """A loss on what is computed from several calls of the network."""
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = kfac_fx.KFAC(
        kfac_fx.transform(model),
        kfac_fx.likelihoods.Normal(),
        damping=1e-2,
        options=KFACOptions(forward=lambda net, inputs: torch.tanh(net(inputs)) + inputs[:, :1]),
    )
    x = torch.rand(128, 2)
    y = torch.sin(3 * x[:, :1])
    losses = [float(optimizer.step(x, y)) for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]


def test_average_of_iterates() -> None:
    """theta_avg <- 0.99 theta_avg + 0.01 theta, of the model that was transformed."""
    model = conv_net()
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model), damping=1.0)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    want: dict[str, Tensor] = {}
    for _ in range(5):
        optimizer.step(*task(32, (1, 6, 6)))
        average.update_parameters(model)
        for name, p in model.named_parameters():
            want[name] = torch.lerp(want.get(name, p.detach()), p.detach(), 0.01)
    found = dict(average.module.named_parameters())
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, msg=name)
    assert any(not torch.equal(found[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("inputs", [20, 25, 100, 400, 784, 1000])
def test_sparse_initialisation_of_the_readme(inputs: int) -> None:
    layer = nn.Linear(inputs, 30)
    torch.nn.init.sparse_(layer.weight.T, 1 - 15.5 / layer.in_features, std=1.0)
    assert (layer.weight != 0).sum(1).tolist() == [15] * 30


@pytest.mark.parametrize("lr", [None, 0.1])
def test_report_and_operator_are_of_the_inverses_in_use(lr: float | None) -> None:
    model = mlp(6, 8, 5, 3)
    net = kfac_fx.transform(model, structure="block_diagonal")
    optimizer = kfac_fx.KFAC(net, damping=1.0, lr=lr, refresh_every=1)
    x, y = task(256)
    for _ in range(4):
        optimizer.step(x, y)
    optimizer.inverse.refresh(optimizer._choice.form.make.damping)
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    applied = optimizer.inverse.apply(gradients)
    solved = optimizer.curvature_operator().solve(gradients)
    for name, value in applied.items():
        torch.testing.assert_close(solved[name].to(value), value, rtol=1e-3, atol=1e-4)
    report = optimizer.report()
    assert set(report.blocks) == {"0", "2", "4"} and "0" in str(report)
    assert set(optimizer.factors) == set(report.blocks) and not optimizer.cross_factors
    pi = report.blocks["0"].pi[0]
    assert report.blocks["0"].factors[0].damping == pytest.approx(
        pi * optimizer._choice.form.make.damping**0.5, rel=1e-4
    )


def test_wrong_arguments() -> None:
    """Options, parameters without blocks, modules without taps, and steps without targets."""
    net = kfac_fx.transform(mlp(6, 8, 5, 3), exclude=("0.*",))
    with pytest.raises(errors.UnknownOptionError, match="statistics_fraction"):
        kfac_fx.KFAC(net, options=KFACOptions(statistics_fraction=0.0))
    with pytest.raises(errors.UnknownOptionError, match="fisher"):
        kfac_fx.KFAC(net, fisher="empirical")
    with pytest.raises(errors.DampingError):
        kfac_fx.KFAC(net, damping=0.0)
    with pytest.raises(errors.UnknownOptionError, match="without a curvature block"):
        kfac_fx.KFAC(net, params=list(net.parameters()))
    with pytest.raises(errors.KFACError, match="transform"):
        kfac_fx.KFAC(mlp(6, 8, 5, 3))
    with pytest.raises(errors.LikelihoodError, match="targets"):
        kfac_fx.KFAC(net).step(torch.randn(4, 6))
