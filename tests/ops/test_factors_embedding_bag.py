"""Bags of embeddings against a dense layer on each bag's vector of token weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracles
from support.oracles import Categorical, Measure, close
from torch import Tensor, nn

import kfac_fx
from kfac_fx.ops import factor_buffers

pytestmark = pytest.mark.usefixtures("float64")
ROWS, WIDTH = 7, 4


class Bags(nn.Module):
    """A table of bags and a classifier; also as a function of dense count vectors."""

    def __init__(self, rows: int = ROWS, **options: Any) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(rows, WIDTH, **options)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bags(ids)))


class Offset(Bags):
    """With the place where each bag begins."""

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bags(ids, offsets)))


class Weighted(Bags):
    """With weights of the tokens too."""

    def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bags(ids, offsets, weights)))


class Functional(Bags):
    """The same by the function."""

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        table = self.bags.weight
        bags = F.embedding_bag(ids, table, mode="sum", per_sample_weights=weights)
        return self.head(torch.tanh(bags))


class Dense(nn.Module):
    """The model's table as a linear layer."""

    def __init__(self, model: Bags) -> None:
        super().__init__()
        rows, width = model.bags.weight.shape
        self.bags = nn.Linear(rows, width, bias=False)
        self.bags.weight = nn.Parameter(model.bags.weight.detach().T.clone())
        self.head = model.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bags(x)))


def weights_of(
    bags: list[list[int]],
    weights: list[list[float]] | None = None,
    mean: bool = False,
    padding: int | None = None,
    rows: int = ROWS,
) -> Tensor:
    """x [bags, rows] by its definition."""
    x = torch.zeros(len(bags), rows)
    for b, tokens in enumerate(bags):
        kept = [i for i, token in enumerate(tokens) if token != padding]
        for i in kept:
            value = 1.0 if weights is None else weights[b][i]
            x[b, tokens[i]] += value / len(kept) if mean else value
    return x


BAGS = [[0, 3, 3], [1], [], [6, 2, 0, 2], [5, 4]]
SQUARE = [[0, 3, 3], [1, 2, 6], [4, 4, 4], [2, 5, 0]]


def flat(bags: list[list[int]], end: bool = False) -> tuple[Tensor, Tensor]:
    """Ids in one row, and where the bags begin."""
    sizes = torch.tensor([len(bag) for bag in bags])
    ends = sizes.cumsum(0)
    offsets = ends - sizes
    ids = torch.tensor([token for bag in bags for token in bag])
    return ids, torch.cat([offsets, ends[-1:]]) if end else offsets


def check(
    measure: Measure,
    model: Bags,
    given: tuple[Tensor, ...],
    x: Tensor,
    fisher: str = "exact",
    **options: Any,
) -> kfac_fx.CurvatureGraph:
    """Equal outputs, and the factors of the dense layer."""
    dense = Dense(model)
    y = Categorical().draw(model(*given))
    torch.testing.assert_close(model(*given), dense(x))
    net = kfac_fx.transform(model, **options)
    found = measure(net, given, y, Categorical(), fisher).factors["bags"]
    A, G = oracles.kronecker(dense, ["bags"], x, y, Categorical(), fisher)
    close(found, (A.diagonal() if found[0].dim() == 1 else A, G))
    return net.curvature


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("padding", [None, 3, -4])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_rows_of_ids(measure: Measure, mode: str, padding: int | None, fisher: str) -> None:
    model = Bags(mode=mode, padding_idx=padding)
    x = weights_of(SQUARE, None, mode == "mean", None if padding is None else 3)
    curvature = check(measure, model, (torch.tensor(SQUARE),), x, fisher)
    block = curvature.blocks["bags"]
    assert (block.kind, block.approximation, block.reason) == ("embedding", "kronecker", None)


@pytest.mark.parametrize("rows", [ROWS, 1030])
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_offsets(measure: Measure, mode: str, end: bool, rows: int) -> None:
    """Bags of several lengths, an empty one among them; tables of both forms."""
    model = Offset(rows, mode=mode, include_last_offset=end)
    x = weights_of(BAGS, None, mode == "mean", rows=rows)
    check(measure, model, flat(BAGS, end), x)


@pytest.mark.parametrize("offsets", [False, True])
def test_weights_of_tokens(measure: Measure, offsets: bool) -> None:
    bags = BAGS if offsets else SQUARE
    weights = [[float(value) for value in torch.randn(len(bag))] for bag in bags]
    if offsets:
        given = (*flat(bags), torch.tensor([w for row in weights for w in row]))
    else:
        given = (torch.tensor(bags), torch.tensor(weights))
    model = Weighted(mode="sum") if offsets else Functional()
    check(measure, model, given, weights_of(bags, weights))


def test_large_tables_keep_the_diagonal(measure: Measure) -> None:
    """Above the limit A is the diagonal of the dense layer's, and the block says so."""
    rows = 1030
    model = Bags(rows, mode="sum")
    bags = [[1029, 3, 1029, 3], [3, 8, 8, 8], [0, 1, 2, 3]]
    block = check(measure, model, (torch.tensor(bags),), weights_of(bags, rows=rows)).blocks["bags"]
    assert block.reason is not None and "tokens of one bag count as uncorrelated" in block.reason
    assert block.factors[0].diagonal


def test_bags_of_one_token_are_embeddings(measure: Measure) -> None:
    """The diagonal of A, all that there is then, and G are those of ``nn.Embedding``."""
    model, ids = Bags(mode="mean"), torch.tensor([[4], [1], [4], [0], [6]])
    other = nn.Sequential(nn.Embedding(ROWS, WIDTH), nn.Tanh(), model.head)
    other[0].weight = model.bags.weight
    y = torch.randint(3, (5,))
    A, G = measure(kfac_fx.transform(model), ids, y, Categorical()).factors["bags"]
    counts, want = measure(kfac_fx.transform(other), ids[:, 0], y, Categorical()).factors["0"]
    close((A, G), (counts.diag(), want))


@pytest.mark.parametrize("capture", ["export", "eager"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_other_routes(measure: Measure, mode: str, capture: str) -> None:
    """Exported and running models, bags by offsets and in rows."""
    x = weights_of(BAGS, None, mode == "mean")
    options: dict[str, Any] = {"example_inputs": flat(BAGS), "capture": capture}
    check(measure, Offset(mode=mode), flat(BAGS), x, **options)
    x = weights_of(SQUARE, None, mode == "mean")
    options["example_inputs"] = (torch.tensor(SQUARE),)
    model = Bags(mode=mode)
    curvature = check(measure, model, (torch.tensor(SQUARE),), x, **options)
    assert "embedding" in str(curvature) and curvature.route == capture


def test_an_export_takes_other_numbers_of_bags(measure: Measure) -> None:
    model, more = Bags(mode="mean"), SQUARE + SQUARE[:2]
    options: dict[str, Any] = {"example_inputs": (torch.tensor(SQUARE),), "capture": "export"}
    check(measure, model, (torch.tensor(more),), weights_of(more, mean=True), **options)


@pytest.mark.parametrize("rows", [ROWS, 1030])
def test_recording_compiles(rows: int) -> None:
    """One graph, and the statistics of the plain run."""
    net, ids = kfac_fx.transform(Bags(rows, mode="sum")), torch.tensor(SQUARE)
    buffers = factor_buffers(net)["bags"]
    for buffer in buffers:
        buffer.requires_grad_()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    found = [torch.autograd.grad(run(ids).square().sum(), buffers) for run in (net, compiled)]
    close(*found)


def test_two_uses_add_up(measure: Measure) -> None:
    """One table read for two fields: A is the sum, G the mean over both."""

    class Twice(Bags):
        def forward(self, ids: Tensor, more: Tensor) -> Tensor:  # type: ignore[override]
            return self.head(torch.tanh(self.bags(ids)) * torch.tanh(self.bags(more)))

    class DenseTwice(Dense):
        def forward(self, x: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
            return self.head(torch.tanh(self.bags(x)) * torch.tanh(self.bags(z)))

    model = Twice(mode="sum")
    other = [[2, 2], [0, 5], [6, 1], [3, 3]]
    given = torch.tensor(SQUARE), torch.tensor(other)
    y = Categorical().draw(model(*given))
    found = measure(kfac_fx.transform(model), given, y, Categorical()).factors["bags"]
    x = weights_of(SQUARE), weights_of(other)
    close(found[:2], oracles.kronecker(DenseTwice(model), ["bags"], x, y, Categorical()))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "max"}, "mode='max' reads another row in every dimension"),
        ({"mode": "sum", "scale_grad_by_freq": True}, "scale_grad_by_freq=True"),
        ({"mode": "sum", "sparse": True}, "sparse=True changes the gradient"),
        ({"mode": "sum", "max_norm": 1.0}, "max_norm changes the table"),
    ],
)
def test_what_is_no_dense_use_says_so(measure: Measure, options: dict[str, Any], said: str) -> None:
    model, ids = Bags(**options), torch.tensor(SQUARE)
    net = kfac_fx.transform(model)
    block = net.curvature.blocks["bags"]
    assert block.approximation == "diagonal" and block.reason is not None
    assert said in block.reason and said in str(net.curvature)
    y = torch.randint(3, (4,))
    (C,) = measure(net, ids, y, Categorical(), "empirical").factors["bags"]
    weight = model.bags.weight
    assert weight.grad is not None and weight.grad.any() and weight.grad.isfinite().all()
    (g,) = torch.autograd.grad(Categorical().nll(model(ids), y), weight)
    close([C], [g.to_dense().square().flatten() / len(ids)])


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("capture", ["symbolic_trace", "export", "eager"])
def test_sparse_gradients_become_dense_updates(capture: str, fisher: str) -> None:
    """Two steps of a plain embedding too; the second has averages already."""
    ids = torch.tensor(SQUARE)
    model = nn.Sequential(nn.Embedding(ROWS, WIDTH, sparse=True), nn.Flatten(), nn.Linear(12, 3))
    net = kfac_fx.transform(model, ids, capture=capture)
    preconditioner = kfac_fx.Preconditioner(net, "categorical", damping=1e-2, fisher=fisher)
    for _ in range(2):
        model.zero_grad()
        outputs = net(ids)
        preconditioner.observe(outputs, torch.zeros(4).long())
        F.cross_entropy(outputs, torch.zeros(4).long()).backward()
        preconditioner.step()
    gradient = model[0].weight.grad
    assert gradient.layout is torch.strided and gradient.any() and gradient.isfinite().all()
