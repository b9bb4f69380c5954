"""What real models brought up: singular factors, odd names, updated buffers, late blocks."""

from __future__ import annotations

import pytest
import torch
from support.inside import refreshed
from torch import Tensor, nn

import kfac_fx
from kfac_fx.linalg.positive import cholesky_inverse, cholesky_whitener, floored_inverse

SPOILT = torch.eye(3)
SPOILT[2, 1] = SPOILT[1, 2] = torch.nan


@pytest.mark.parametrize("bad", [-torch.eye(3), torch.zeros(3, 3), SPOILT, torch.full((3, 3), 2.0)])
def test_failed_cholesky_is_flagged_not_raised(bad: Tensor) -> None:
    inverse, failed = cholesky_inverse(torch.stack([torch.eye(3) * 2, bad]))
    assert failed[0] == 0 and failed[1] != 0
    torch.testing.assert_close(inverse[0], torch.eye(3) / 2)
    assert cholesky_inverse(bad)[1] != 0
    whitener, failed = cholesky_whitener(torch.stack([torch.eye(3) * 4, bad]))
    assert failed[0] == 0 and failed[1] != 0
    torch.testing.assert_close(whitener, torch.stack([torch.eye(3) / 2, torch.eye(3)]))


def test_floored_inverse_is_positive_and_finite() -> None:
    matrix = torch.diag(torch.tensor([1e8, 1.0, -1e-1]))
    inverse, failed = floored_inverse(matrix)
    assert inverse.isfinite().all() and not failed.any()
    assert (torch.linalg.eigvalsh(inverse) > 0).all()


def test_refresh_survives_factors_that_rounding_made_indefinite(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = kfac_fx.transform(nn.Linear(3, 2))
    preconditioner = kfac_fx.Preconditioner(net, "normal", damping=1e-6)
    outputs = net(torch.randn(5, 3))
    preconditioner.observe(outputs)
    outputs.sum().backward()
    preconditioner.step()
    A, _ = preconditioner.factors["weight"]
    A.copy_(torch.diag(torch.tensor([1e6, 1.0, -1.0, 1.0])))
    preconditioner.refresh()
    assert "eigenvalues were raised" in caplog.text
    update = preconditioner.apply({"weight": torch.ones(2, 3)})["weight"]
    assert update.isfinite().all()


@pytest.mark.parametrize("structure", ["block_diagonal", "block_tridiagonal"])
def test_only_what_depends_on_a_failed_factor_is_made_with_eigenvalues(
    structure: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Other inverses are Cholesky's own, bit by bit; a pair shares the fate of both its ends."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    net = kfac_fx.transform(model, structure=structure)
    preconditioner = kfac_fx.Preconditioner(net, "normal", damping=1e-2)
    outputs = net(torch.randn(5, 3))
    preconditioner.observe(outputs)
    outputs.sum().backward()
    preconditioner.step()
    before = dict(refreshed(preconditioner).inverses)
    A, _ = preconditioner.factors["0"]
    A.copy_(torch.diag(torch.tensor([100.0, 1.0, -50.0, 1.0])))
    assert "eigenvalues were raised" not in caplog.text
    preconditioner.refresh()
    assert "Cholesky failed for A_0: eigenvalues were raised" in caplog.text
    after = refreshed(preconditioner).inverses
    assert after.keys() == before.keys() and all(value.isfinite().all() for value in after.values())
    same = {key for key in before if torch.equal(before[key], after[key])}
    slots = {name: block.slot for name, block in net.curvature.blocks.items()}
    own, last = ({key for key in before if key.block == slots[name]} for name in ("0", "4"))
    assert own - same and last and same >= last
    if structure == "block_diagonal":
        assert same >= before.keys() - own


class Counting(nn.Module):
    """Updates a buffer in training, as normalisation layers of model collections do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls.add_(1)
        return self.fc(x)


def test_updates_of_buffers_are_captured_and_do_not_run_while_tracing() -> None:
    model = Counting()
    net = kfac_fx.transform(model)
    assert model.calls == 0
    net(torch.randn(2, 3))
    net.eval()(torch.randn(2, 3))
    assert net.calls == 1


def test_names_that_are_no_identifiers() -> None:
    model = nn.ModuleDict({"block1-0": nn.Linear(3, 3), "block1_0": nn.Linear(3, 2)})
    net = nn.Sequential(*model.values())
    net.__dict__["_modules"] = dict(model.items())
    transformed = kfac_fx.transform(net)
    preconditioner = kfac_fx.Preconditioner(transformed, "normal")
    outputs = transformed(torch.randn(4, 3))
    preconditioner.observe(outputs)
    outputs.sum().backward()
    preconditioner.step()
    assert set(preconditioner.factors) == {"block1-0", "block1_0"}


class Late(nn.Module):
    """One of its layers does not run at first."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.late, self.open = nn.Linear(3, 3), nn.Linear(3, 3), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.always(x)
        return self.late(x) if x.shape[0] > 4 else x


def test_a_block_without_statistics_leaves_gradients_alone_until_its_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Late()
    net = kfac_fx.transform(model, torch.randn(3, 3), capture="eager")
    preconditioner = kfac_fx.Preconditioner(net, "normal", refresh_every=10, damping=1e-3)
    for cases in (3, 6, 6):
        net.zero_grad()
        outputs = net(torch.randn(cases, 3))
        preconditioner.observe(outputs)
        (outputs.square().sum() / cases + 0 * model.late.weight.sum()).backward()
        before = model.late.weight.grad.clone()
        preconditioner.step()
        if cases == 3:
            assert torch.equal(model.late.weight.grad, before)
            assert "no statistics came for late" in caplog.text
        else:
            assert model.late.weight.grad.norm() < 100 * before.norm()
            assert not torch.equal(model.late.weight.grad, before)
