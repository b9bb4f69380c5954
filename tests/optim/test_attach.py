"""``attach``: loops of others train as one's own does, and their checkpoints hold the state."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from kfac_fx.errors import ObservationError, ParameterChangedError

pytestmark = pytest.mark.usefixtures("float64")


class Run:
    """A network, an optimizer with momentum, and a preconditioner, always of the same numbers."""

    def __init__(self, model: nn.Module | None = None, **options: object) -> None:
        torch.manual_seed(3)
        self.model = model or nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.2), nn.Linear(5, 3))
        self.net = kfac_fx.transform(self.model)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.preconditioner = kfac_fx.Preconditioner(
            self.net, damping=1e-2, refresh_every=2, **options
        )

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.net.parameters()]


BATCHES = [(torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 3, (6,))) for _ in range(8)]


def by_hand(run: Run, batches: list[tuple[Tensor, Tensor]], accumulate: int = 1) -> None:
    for index, (x, y) in enumerate(batches, start=1):
        outputs = run.net(x)
        run.preconditioner.observe(outputs, y)
        F.cross_entropy(outputs, y).backward()
        if index % accumulate == 0:
            run.preconditioner.step()
            run.optimizer.step()
            run.optimizer.zero_grad()


def by_others(run: Run, batches: list[tuple[Tensor, Tensor]], accumulate: int = 1) -> None:
    """A trainer that knows nothing of preconditioners."""
    for index, (x, y) in enumerate(batches, start=1):
        F.cross_entropy(run.net(x), y).backward()
        if index % accumulate == 0:
            run.optimizer.step()
            run.optimizer.zero_grad()


def with_closure(run: Run, batches: list[tuple[Tensor, Tensor]], accumulate: int = 1) -> None:
    for x, y in batches:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            run.optimizer.zero_grad()
            loss = F.cross_entropy(run.net(x), y)
            loss.backward()
            return loss

        assert run.optimizer.step(closure) > 0


def with_scaler(run: Run, batches: list[tuple[Tensor, Tensor]], accumulate: int = 1) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in batches:
        scaler.scale(F.cross_entropy(run.net(x), y)).backward()
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("loop", "accumulate"), [(by_others, 1), (by_others, 2), (with_closure, 1), (with_scaler, 1)]
)
def test_a_loop_of_others_trains_as_ones_own(loop: Callable[..., None], accumulate: int) -> None:
    expected = Run()
    by_hand(expected, BATCHES, accumulate)
    run = Run()
    kfac_fx.attach(run.preconditioner, run.optimizer)
    loop(run, BATCHES, accumulate)
    close(run.values(), expected.values())


def test_targets_come_from_the_arguments_of_the_forward() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.layer(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(1)
    model = WithLoss()
    expected = Run(copy.deepcopy(model), fisher="empirical")
    for x, y in BATCHES:
        outputs = expected.net(x, labels=y)
        expected.preconditioner.observe(outputs["logits"], y)
        outputs["loss"].backward()
        expected.preconditioner.step()
        expected.optimizer.step()
        expected.optimizer.zero_grad()
    run = Run(model, fisher="empirical")
    kfac_fx.attach(
        run.preconditioner,
        run.optimizer,
        outputs=lambda result: result["logits"],
        targets=lambda x, labels: labels,
    )
    for x, y in BATCHES:
        run.net(x, labels=y)["loss"].backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    close(run.values(), expected.values())


def test_a_loss_of_what_the_outputs_were_copied_from_is_one_of_the_forward() -> None:
    """Accelerate returns copies in float32, where the network has formed its loss itself."""
    run = Run()
    for _ in range(2):  # two micro-batches
        outputs = run.net(BATCHES[0][0])
        run.preconditioner.observe(outputs * 1.0)
        F.cross_entropy(outputs, BATCHES[0][1]).backward()
    run.preconditioner.step()
    outputs = run.net(BATCHES[0][0])
    run.preconditioner.observe(outputs * 1.0)
    with pytest.raises(ObservationError, match="twice before"):
        run.preconditioner.observe(outputs * 1.0)


def test_the_optimizers_state_resumes_a_run(tmp_path: object) -> None:
    expected = Run()
    kfac_fx.attach(expected.preconditioner, expected.optimizer)
    by_others(expected, BATCHES[:5])
    file = f"{tmp_path}/state.pt"
    torch.save([expected.net.state_dict(), expected.optimizer.state_dict()], file)
    random = torch.get_rng_state()
    by_others(expected, BATCHES[5:])
    run = Run()
    kfac_fx.attach(run.preconditioner, run.optimizer)
    net, optimizer = torch.load(file, weights_only=True)
    run.net.load_state_dict(net)
    run.optimizer.load_state_dict(optimizer)
    torch.set_rng_state(random)
    by_others(run, BATCHES[5:])
    close(run.values(), expected.values(), 0.0)


def test_a_state_without_the_preconditioner_is_refused() -> None:
    run = Run()
    state = run.optimizer.state_dict()
    kfac_fx.attach(run.preconditioner, run.optimizer)
    with pytest.raises(ParameterChangedError, match="before attach"):
        run.optimizer.load_state_dict(state)


def test_validation_and_the_models_own_forward_are_not_observed() -> None:
    run = Run(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    expected = Run(copy.deepcopy(run.model))
    by_hand(expected, BATCHES)
    kfac_fx.attach(run.preconditioner, run.optimizer)
    for x, y in BATCHES:
        run.net.eval()
        run.net(x)
        run.net.train()
        with torch.no_grad():
            run.net(x)
        run.model(x)
        by_others(run, [(x, y)])
    close(run.values(), expected.values())


def test_remove_leaves_both_as_they_were() -> None:
    run = Run()
    expected = copy.deepcopy(run.model)
    attached = kfac_fx.attach(run.preconditioner, run.optimizer)
    attached.remove()
    x, y = BATCHES[0]
    torch.manual_seed(0)
    by_others(run, [(x, y)])
    plain = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(0)
    F.cross_entropy(expected(x), y).backward()
    plain.step()
    close(run.values(), [p.detach() for p in expected.parameters()])
    assert "kfac_fx" not in run.optimizer.state_dict()


def test_a_compiled_network_is_refused() -> None:
    net = torch.compile(kfac_fx.transform(nn.Linear(2, 2)), backend="eager")
    preconditioner = kfac_fx.Preconditioner(net)
    with pytest.raises(ObservationError, match="not compiled"):
        kfac_fx.attach(preconditioner, torch.optim.SGD(net.parameters(), lr=0.1))
