"""What `report` says against dense numbers; pictures of spectra, matrices and runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from support.steps import one_step
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx import viz
from kfac_fx.errors import MissingExtraError, StatisticsError, UnknownOptionError
from kfac_fx.optim import KFACOptions
from kfac_fx.viz.picture import Picture, picture

DAMPING = 1e-2


def recorded(
    model: nn.Module, *inputs: Tensor, tikhonov: str = "factored", **options: object
) -> kfac_fx.Preconditioner:
    """A preconditioner after one step on these inputs."""
    net = kfac_fx.transform(model, **{"structure": "block_tridiagonal"} | options)
    pre = kfac_fx.Preconditioner(net, fisher="exact", damping=DAMPING, tikhonov=tikhonov)
    one_step(pre, net, inputs, lambda outputs: outputs.square().sum())
    return pre


def network() -> nn.Module:
    layers = [nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 4), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(4, 3))


def damped_pair(pre: kfac_fx.Preconditioner, name: str) -> tuple[Tensor, Tensor]:
    """(A + pi gamma I, G + gamma / pi I), written out."""
    A, G = pre.factors[name]
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))) ** 0.5
    gamma = DAMPING**0.5
    return A + pi * gamma * torch.eye(len(A)), G + gamma / pi * torch.eye(len(G))


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**-0.5) @ vectors.T


@pytest.mark.usefixtures("float64")
def test_kronecker_blocks() -> None:
    """Numbers of A and G, without damping and with it."""
    pre = recorded(network(), torch.randn(20, 5))
    report = pre.report()
    assert report.gamma == pytest.approx(DAMPING**0.5)
    for name in ("0", "3", "5"):
        block, (A, G) = report.blocks[name], pre.factors[name]
        dampeds = damped_pair(pre, name)
        for found, factor, damped in zip(block.factors, (A, G), dampeds, strict=True):
            values = torch.linalg.eigvalsh(factor).clamp_min(0)
            p = values[values > 0] / values.sum()
            assert found.size == len(factor)
            assert found.trace == pytest.approx(float(factor.trace()))
            assert found.largest == pytest.approx(float(values[-1]))
            assert found.effective_rank == pytest.approx(float((-(p * p.log()).sum()).exp()))
            assert found.damping == pytest.approx(float((damped - factor)[0, 0]))
            assert found.condition == pytest.approx(float(torch.linalg.cond(damped)))
        product = torch.kron(*dampeds)
        assert block.condition == pytest.approx(float(torch.linalg.cond(product)))
        assert block.pi == pytest.approx([block.factors[0].damping / DAMPING**0.5])


@pytest.mark.usefixtures("float64")
def test_strength_is_the_largest_canonical_correlation() -> None:
    pre = recorded(network(), torch.randn(20, 5))
    couplings = pre.report().couplings
    assert set(couplings) == {("0", "3"), ("3", "5")}
    for (child, parent), found in couplings.items():
        pairs = [damped_pair(pre, name) for name in (child, parent)]
        joint = torch.kron(*pre.cross_factors[child, parent])
        Q = root(torch.kron(*pairs[0])) @ joint @ root(torch.kron(*pairs[1]))
        values = torch.linalg.svdvals(Q)
        assert found.strength == pytest.approx(float(values[0]))
        assert found.strength == pytest.approx(found.A[0] * found.G[0])
        information = -0.5 * torch.log1p(-values.square()).sum()
        assert found.mutual_information == pytest.approx(float(information))


@pytest.mark.usefixtures("float64")
def test_other_blocks() -> None:
    """Norms have no pi; groups have one each."""
    norm = recorded(network(), torch.randn(20, 5)).report().blocks["2"]
    assert norm.pi == ()
    assert norm.factors[0].damping == pytest.approx(DAMPING)
    groups = recorded(
        nn.Sequential(nn.Conv2d(4, 6, 1, groups=2), nn.Flatten()), torch.randn(9, 4, 1, 1)
    )
    block, (A, G) = groups.report().blocks["0"], groups.factors["0"]
    assert block.factors[0].size == A.shape[0] * A.shape[1]
    pi = [
        float((a.trace() / len(a) * len(g) / g.trace()) ** 0.5) for a, g in zip(A, G, strict=True)
    ]
    assert block.pi == pytest.approx(pi)


@pytest.mark.usefixtures("float64")
def test_exact_damping_is_of_the_product() -> None:
    options = {"structure": "block_diagonal", "tikhonov": "exact"}
    pre = recorded(network(), torch.randn(20, 5), **options)
    block = pre.report().blocks["3"]
    product = torch.kron(*pre.factors["3"]) + DAMPING * torch.eye(7 * 4)
    assert block.condition == pytest.approx(float(torch.linalg.cond(product)))
    assert (block.damping, block.pi) == (pytest.approx(DAMPING), ())
    assert [factor.damping for factor in block.factors] == [0, 0]
    assert "damping 0.01" in block.lines()


@pytest.mark.usefixtures("float64")
def test_the_fill_of_cut_factors_does_not_count() -> None:
    model = nn.Sequential(nn.Linear(6, 5, bias=False))
    pre = recorded(model, torch.randn(20, 6), large_factors="blocks", max_factor_dim=4)
    A, G = pre.report().blocks["0"].factors
    assert (A.size, G.size) == (6, 5)
    assert pre.factors["0"][1].numel() > 5 * 3  # the last sub-block is filled up
    assert G.smallest > 0


def test_report_in_words_and_as_json() -> None:
    pre = recorded(network(), torch.randn(20, 5))
    text = str(pre.report())
    assert text.splitlines()[0].split() == [
        *("block", "factor", "size", "trace", "eff.", "rank", "damping", "cond", "pi")
    ]
    assert "0 given 3: strength 0." in text
    plain = json.loads(json.dumps(pre.report().plain()))
    assert {c["child"] for c in plain["couplings"]} == {"0", "3"}
    assert set(plain["blocks"]) == set(pre.curvature.blocks)


def test_before_any_statistics(tmp_path: Path) -> None:
    pre = kfac_fx.Preconditioner(kfac_fx.transform(network()))
    report = pre.report()
    assert report.couplings == {}
    assert "no statistics: 0, 2, 3, 5" in str(report)
    assert isinstance(picture(pre.curvature, report), Picture)
    with pytest.raises(StatisticsError):
        viz.draw_spectra(pre, tmp_path / "spectra.png")


def test_spectra_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pre = recorded(network(), torch.randn(20, 5))
    viz.draw_spectra(pre, tmp_path / "spectra.svg")
    text = (tmp_path / "spectra.svg").read_text(encoding="utf-8")
    assert text.count("<!-- A -->") >= 3  # a legend in each panel
    viz.draw_spectra(pre, tmp_path / "one.svg", ["0"])
    with pytest.raises(UnknownOptionError, match="'nobody'"):
        viz.draw_spectra(pre, tmp_path / "x.svg", ["nobody"])


# Dense Fishers.


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
    )


@pytest.mark.usefixtures("float64")
def test_exact_fisher_is_the_mean_over_classes() -> None:
    model, x = chain(), torch.randn(6, 3)
    found = viz.exact_fisher(model, ["0", "2"], x)
    want = torch.zeros_like(found)
    layers = [model[0].weight, model[0].bias, model[2].weight]
    for case in x:
        logits = model(case)
        for label, p in enumerate(logits.softmax(-1)):
            loss = F.cross_entropy(logits, torch.tensor(label))
            W, b, V = torch.autograd.grad(loss, layers, retain_graph=True)
            vec = torch.cat([torch.cat([W, b[:, None]], 1).T.reshape(-1), V.T.reshape(-1)])
            want += p.detach() * torch.outer(vec, vec) / len(x)
    torch.testing.assert_close(found, want)


@pytest.mark.usefixtures("float64")
def test_kronecker_fisher_is_exact_for_one_case() -> None:
    model, x = chain(), torch.randn(1, 3)
    names = ["0", "2", "4"]
    exact, kronecker = (f(model, names, x) for f in (viz.exact_fisher, viz.kronecker_fisher))
    torch.testing.assert_close(exact, kronecker)


@pytest.mark.usefixtures("float64")
def test_dense_inverse_inverts_the_damped_blocks() -> None:
    model, x = chain(), torch.randn(30, 3)
    names = ["0", "2", "4"]
    dense = viz.kronecker_fisher(model, names, x, DAMPING)
    sizes = [16, 20, 18]
    pre = recorded(model, x, structure="block_diagonal")
    breve = torch.linalg.inv(viz.dense_inverse(pre, names))
    place = 0
    for size in sizes:
        part = slice(place, place + size)
        torch.testing.assert_close(breve[part, part], dense[part, part])
        place += size
    hat = torch.linalg.inv(viz.dense_inverse(recorded(model, x), names))
    near = slice(0, 36)  # of two neighbours the conditional is exact
    torch.testing.assert_close(hat[near, near], dense[near, near])


def test_matrices_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    matrices = {"F": torch.eye(30), "G": torch.randn(1000, 1000), "H": torch.zeros(3, 3)}
    viz.draw_matrices(matrices, tmp_path / "maps.png", columns=2, sizes=(10, 20))
    assert (tmp_path / "maps.png").stat().st_size > 1000
    for call in (viz.exact_fisher, viz.kronecker_fisher):
        with pytest.raises(UnknownOptionError, match="'1' is no linear layer"):
            call(chain(), ["1"], torch.randn(2, 3))


# A run's record.


def record() -> list[dict[str, float]]:
    """Of five iterations of the optimizer itself."""
    net = kfac_fx.transform(network())
    optimizer = kfac_fx.KFAC(net, "categorical", damping=1.0, options=KFACOptions(damping_every=2))
    x, y = torch.randn(16, 5), torch.randint(0, 3, (16,))
    made = []
    for _ in range(5):
        optimizer.step(x, y)
        made.append(dict(optimizer.diagnostics))
    return made


def test_a_run_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    viz.draw_training(record(), tmp_path / "run.svg")
    text = (tmp_path / "run.svg").read_text(encoding="utf-8")
    for title in ("loss", "reduction ratio", "damping", "step", "seconds by stage", "gradient"):
        assert f"<!-- {title} -->" in text
    losses = [{"loss": -1.0}, {"loss": float("nan")}, {"loss": -2.0}]
    viz.draw_training(losses, tmp_path / "loss.svg")
    assert "seconds" not in (tmp_path / "loss.svg").read_text(encoding="utf-8")
    with pytest.raises(UnknownOptionError, match="nothing to draw"):
        viz.draw_training([], tmp_path / "x.svg")


def test_tensorboard(tmp_path: Path) -> None:
    """Scalars at the steps at which they were recorded."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = record()
    viz.write_tensorboard(made, tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.value for e in events.Scalars("kfac/loss")] == pytest.approx(
        [m["loss"] for m in made]
    )
    assert [e.step for e in events.Scalars("kfac/rho")] == [2, 4]
    assert "seconds/update" in events.Tags()["scalars"]


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names what to install."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match="pip install tensorboard"):
        viz.write_tensorboard([{"loss": 1.0}], tmp_path)
