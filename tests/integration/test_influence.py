"""Influence scores by EKFAC against kronfluence, which computes its factors itself.

By the empirical Fisher, since its own sampling would be another draw. Its biases are a last column
of a layer's gradient, as they are of a block of kfac_fx.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import kfac_fx

pytestmark = pytest.mark.integration

CASES, QUERIES, OUTPUTS, BATCH = 80, 7, 3, 16


def case_gradients(model: nn.Module, cases: TensorDataset) -> Tensor:
    """Return the gradient of each case's loss, [cases, parameters]."""
    rows = []
    for x, y in cases:
        found = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        rows.append(torch.cat([part.flatten() for part in found]))
    return torch.stack(rows)


def kronfluence_scores(
    model: nn.Module,
    train: TensorDataset,
    queries: TensorDataset,
    damping: float | None,
    folder: Path,
) -> Tensor:
    """Return kronfluence's scores, [queries, cases], with everything in float64."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            assert not sample  # by the empirical Fisher
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task, double = Classification(), torch.float64
    analyzer = Analyzer(
        "test",
        prepare_model(model, task),
        task,
        cpu=True,
        disable_tqdm=True,
        disable_model_save=True,
        output_dir=str(folder),
    )
    analyzer.fit_all_factors(
        "factors",
        train,
        per_device_batch_size=BATCH,
        factor_args=FactorArguments(
            strategy="ekfac",
            use_empirical_fisher=True,
            activation_covariance_dtype=double,
            gradient_covariance_dtype=double,
            per_sample_gradient_dtype=double,
            lambda_dtype=double,
        ),
    )
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        queries,
        train,
        per_device_query_batch_size=QUERIES,
        per_device_train_batch_size=BATCH,
        score_args=ScoreArguments(
            damping_factor=damping,
            score_dtype=double,
            per_sample_gradient_dtype=double,
            precondition_dtype=double,
        ),
    )
    scores: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
    return scores


@pytest.mark.parametrize("damping", [1e-3, 1e-1, None], ids=["small", "large", "by_layer"])
def test_scores_are_those_of_kronfluence(damping: float | None, tmp_path: Path) -> None:
    """None is a tenth of the mean eigenvalue of each layer, kronfluence's own choice."""
    pytest.importorskip("kronfluence")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, OUTPUTS)).double()
    train, queries = (
        TensorDataset(torch.randn(n, 4, dtype=torch.float64), torch.randint(OUTPUTS, (n,)))
        for n in (CASES, QUERIES)
    )
    net = kfac_fx.transform(model, structure="block_diagonal", ekfac=True)
    x, y = train.tensors
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    fisher = kfac_fx.estimate(net, batches, "categorical", fisher="empirical", ekfac=True)
    amount = damping or {n: 0.1 * float(v.mean()) for n, v in fisher.eigenvalues.items()}
    columns = case_gradients(model, train).T
    found = case_gradients(model, queries) @ fisher.operator(amount).solve(columns)

    want = kronfluence_scores(model, train, queries, damping, tmp_path)
    assert want.dtype == torch.float64 and want.shape == (QUERIES, CASES)
    scale = float(want.abs().max())
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6 * scale)
