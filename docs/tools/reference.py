"""Write the tables of the reference pages from the code: errors, options, uses, the command line.

Run ``python docs/tools/reference.py`` after an error, an option, a rule or a command has changed.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
import kfac_fx.distributed
from kfac_fx import cli
from kfac_fx.passes.rules import BUILT_IN

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs/reference"
START, END = "<!-- start of what is generated -->", "<!-- end of what is generated -->"

DOCUMENTED: tuple[tuple[str, Callable[..., object]], ...] = (
    ("kfac_fx.transform", kfac_fx.transform),
    ("kfac_fx.Preconditioner", kfac_fx.Preconditioner),
    ("kfac_fx.KFAC", kfac_fx.KFAC),
    ("kfac_fx.KFACOptions", kfac_fx.KFACOptions),
    ("kfac_fx.TrainingStep", kfac_fx.TrainingStep),
    ("kfac_fx.attach", kfac_fx.attach),
    ("kfac_fx.GrowingBatches", kfac_fx.GrowingBatches),
    ("kfac_fx.backend", kfac_fx.backend),
    ("kfac_fx.distributed.DataParallel", kfac_fx.distributed.DataParallel),
    ("kfac_fx.distributed.Checkpoints", kfac_fx.distributed.Checkpoints),
)
"""What has options, by the name that users import."""


def cell(text: str) -> str:
    """Return a text as a cell of a table: one line, code in single backticks."""
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


# Errors.


def errors() -> Iterator[str]:
    """Yield a section for each error: what it says, what to do, and what raises it."""
    tree = ast.parse((ROOT / "kfac_fx/errors.py").read_text(encoding="utf-8"))
    raisers = _raisers()
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name == "KFACError":
            continue
        said, _, to_do = (ast.get_docstring(node) or "").partition("What to do:")
        bases = [ast.unparse(base) for base in node.bases if ast.unparse(base) != "KFACError"]
        yield from ("", f"## {node.name}", "", _linked(said.strip()), "")
        yield f"**What to do:** {_linked(to_do.strip())}"
        kind = f"Whoever catches `{bases[0]}` catches it too."
        yield from ("", f"{kind} {_by(raisers.get(node.name, []))}".rstrip())
    yield ""


def _linked(text: str) -> str:
    """Return a text whose paths of pages are links from docs/reference."""

    def link(found: re.Match[str]) -> str:
        title = (ROOT / found[0]).read_text(encoding="utf-8").partition("\n")[0]
        return f"[{title.removeprefix('# ')}](../{found[1]})"

    return re.sub(r"docs/([\w/]+\.md)", link, " ".join(text.split()).replace("``", "`"))


def _by(names: list[str]) -> str:
    """Return a sentence on who raises an error."""
    return f"Raised by {', '.join(f'`{name}`' for name in names)}." if names else ""


def _raisers() -> dict[str, list[str]]:
    """Return public callables by the errors that the Raises of their docstrings name."""
    found: dict[str, list[str]] = {}
    for name, item in _public():
        for line in re.findall(
            r"^    +(\w+Error(?:, \w+Error)*):", inspect.getdoc(item) or "", re.M
        ):
            for error in line.split(", "):
                found.setdefault(error, []).append(name)
    return found


def _public() -> Iterator[tuple[str, object]]:
    """Yield what users call, with names: functions, classes and the methods that they have."""
    for name, item in DOCUMENTED:
        short = name.removeprefix("kfac_fx.")
        yield short, item
        if inspect.isclass(item):
            for method, function in vars(item).items():
                if not method.startswith("_") and inspect.isfunction(function):
                    yield f"{short}.{method}", function


# Options.


def options() -> Iterator[str]:
    """Yield a table for each callable: its arguments, their defaults, and their sentences."""
    for name, item in DOCUMENTED:
        yield from ("", f"## {name}", "", "| option | default | what it is |", "|---|---|---|")
        sentences = arguments_of(item)
        for parameter in inspect.signature(item).parameters.values():
            sentence = sentences[parameter.name]
            yield f"| `{parameter.name}` | {_default(parameter)} | {cell(sentence)} |"
    yield ""


def arguments_of(item: object) -> dict[str, str]:
    """Return the sentences of a docstring's Args by argument."""
    text = inspect.getdoc(item) or ""
    _, _, rest = text.partition("\nArgs:\n")
    block = re.split(r"^\S", rest, maxsplit=1, flags=re.M)[0]
    found: dict[str, str] = {}
    for line in block.splitlines():
        head = re.match(r"    (\w+): (.*)", line)
        if head:
            name = head[1]
            found[name] = head[2]
        elif line.strip():
            found[name] += " " + line.strip()
    return found


def _default(parameter: inspect.Parameter) -> str:
    """Return the default of an argument in backticks; for objects, only that there is one."""
    value = parameter.default
    if value is parameter.empty:
        return "" if parameter.kind is parameter.VAR_KEYWORD else "(needed)"
    plain = isinstance(value, (str, int, float, tuple)) or value is None
    return f"`{json.dumps(value) if isinstance(value, str) else value}`" if plain else "its own"


# Uses.


class Example(NamedTuple):
    """A use of a parameter: how it is written, the module, and its input where it needs one."""

    words: str
    make: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...] | None = None
    options: Mapping[str, Any] = MappingProxyType({})


Product = Callable[[Tensor, Tensor], Tensor]
"""Of an input and a weight."""


class Computes(nn.Module):
    """Holds a weight, and runs a function of it and of the input."""

    def __init__(
        self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


class Tied(nn.Module):
    """An embedding whose table is the output layer's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.table(tokens)), self.table.weight)


class Recurrent(nn.Module):
    """A recurrent layer with its states as the output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class SelfAttention(nn.Module):
    """nn.MultiheadAttention of one sequence with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def _weight_norm() -> nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))


class Experts(nn.Module):
    """Rows that are sorted by expert, each expert with a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([3, 8], dtype=torch.int32)
        return torch._grouped_mm(x.bfloat16(), self.weight.bfloat16(), offs=ends)


SEQUENCE = (torch.randn(3, 7, 6),)
EXAMPLES = (
    Example("nn.Linear, F.linear", lambda: nn.Linear(4, 3)),
    Example("x @ W", lambda: Computes((4, 3), lambda x, w: x @ w)),
    Example("torch.einsum with one parameter", lambda: Computes((4, 2, 3), _heads)),
    Example("torch.bmm, one matrix an expert", lambda: Computes((5, 4, 3), lambda x, w: x.bmm(w))),
    Example("F.grouped_mm, rows sorted by expert", Experts),
    Example("nn.Bilinear, F.bilinear", lambda: Computes((2, 4, 4), _bilinear)),
    Example("nn.Conv1d", lambda: nn.Conv1d(4, 3, 3)),
    Example("nn.Conv2d", lambda: nn.Conv2d(4, 3, 3)),
    Example("nn.Conv3d", lambda: nn.Conv3d(2, 3, 3)),
    Example("nn.Conv2d with groups=2", lambda: nn.Conv2d(4, 6, 3, groups=2)),
    Example("nn.Conv2d, depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4)),
    Example("nn.ConvTranspose2d", lambda: nn.ConvTranspose2d(4, 3, 3)),
    Example("nn.Embedding", lambda: nn.Embedding(11, 6)),
    Example("a table by index, W[i]", lambda: Computes((11, 6), lambda x, w: w[x])),
    Example("nn.EmbeddingBag", lambda: nn.EmbeddingBag(11, 6, mode="sum")),
    Example("an embedding tied to the output layer", Tied),
    Example("nn.LSTM", lambda: Recurrent(nn.LSTM(6, 5, batch_first=True)), SEQUENCE),
    Example("nn.GRU", lambda: Recurrent(nn.GRU(6, 5, batch_first=True)), SEQUENCE),
    Example("nn.RNN", lambda: Recurrent(nn.RNN(6, 5, batch_first=True)), SEQUENCE),
    Example("nn.MultiheadAttention", SelfAttention, SEQUENCE),
    Example("nn.LayerNorm", lambda: nn.LayerNorm(6)),
    Example("nn.RMSNorm", lambda: nn.RMSNorm(6)),
    Example("nn.BatchNorm2d", lambda: nn.BatchNorm2d(6)),
    Example("nn.GroupNorm", lambda: nn.GroupNorm(2, 6)),
    Example("nn.InstanceNorm2d", lambda: nn.InstanceNorm2d(6, affine=True)),
    Example("weight_norm, other reparametrisations", _weight_norm),
    Example("a masked weight, F.linear(x, W * M)", lambda: Computes((3, 4), _masked)),
    Example("positions, x + P", lambda: Computes((7, 6), lambda x, w: x + w), SEQUENCE),
    Example("a scale of features, x * s", lambda: Computes((6,), lambda x, w: x * w), SEQUENCE),
    Example("a temperature, x * t", lambda: Computes((), lambda x, w: x * w), SEQUENCE),
    Example("nn.PReLU", lambda: nn.PReLU(6)),
    Example(
        "a linear layer above max_factor_dim",
        lambda: nn.Linear(40, 3),
        options={"max_factor_dim": 16},
    ),
    Example(
        'the same with large_factors="blocks"',
        lambda: nn.Linear(40, 3),
        options={"max_factor_dim": 16, "large_factors": "blocks"},
    ),
    Example("anything else, torch.fft of W", lambda: Computes((8,), _filtered)),
)


def _heads(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("ni,iho->nho", x, w)


def _bilinear(x: Tensor, w: Tensor) -> Tensor:
    return F.bilinear(x, x, w)


def _masked(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w * torch.ones(3, 4).tril())


def _filtered(x: Tensor, w: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(w), n=8)


def uses() -> Iterator[str]:
    """Yield the blocks of an example of every use, and the words that each rule is asked about."""
    yield from (
        "",
        "| you write | kind | block | factors | what it says |",
        "|---|---|---|---|---|",
    )
    torch.manual_seed(0)
    logging.getLogger("kfac_fx").setLevel(logging.ERROR)  # warnings are in the last column
    for words, make, inputs, keywords in EXAMPLES:
        model = nn.Sequential(make())  # a layer in a model, which a trace keeps as one call
        graph = kfac_fx.transform(model, inputs, **keywords).curvature
        for at, block in enumerate(graph.blocks.values()):
            shapes = {f.name: "x".join(map(str, f.shape)) or "1" for f in block.factors}
            counts = {f.name for f in block.factors if f.role == "count"}
            kept = {f: shape for f, shape in shapes.items() if f not in counts}
            factors = " ".join(f"`{f} {shape}`" for f, shape in kept.items())
            # A measured share differs in its last place from one machine to another.
            reason = re.sub(r", [\d.]+% of its Jacobian.*", "", block.reason or "")
            row = (words if at == 0 else "", block.kind, block.approximation, factors, reason)
            yield "| " + " | ".join(map(cell, row)) + " |"
    yield from ("", "## What each rule is asked about", "", "| kind | rule | operations |")
    yield "|---|---|---|"
    for rule in sorted(BUILT_IN, key=lambda rule: rule.kind):
        asked = ", ".join(f"`{word}`" for word in sorted(rule.operations))
        said = (inspect.getdoc(rule) or "").partition("\n")[0].rstrip(".")
        yield f"| {rule.kind} | {cell(said)} | {asked} |"
    yield ""


# The command line.


def command_line() -> Iterator[str]:
    """Yield a table of the arguments of each command."""
    commands = next(
        action
        for action in cli._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    said = {choice.dest: choice.help for choice in commands._choices_actions}
    for name, parser in commands.choices.items():
        yield from ("", f"## {name}", "", f"`python -m kfac_fx {name}`: {said[name]}.", "")
        yield from ("| argument | default | what it is |", "|---|---|---|")
        for action in parser._actions:
            if action.dest == "help":
                continue
            names = ", ".join(f"`{option}`" for option in action.option_strings)
            default = "" if action.default in (None, [], False) else f"`{action.default}`"
            what = action.help or ""
            if action.choices:
                what = "one of " + ", ".join(f"`{choice}`" for choice in action.choices)
            yield f"| {names or f'`{action.metavar}`'} | {default} | {cell(what)} |"
    yield from ("", "## Examples and exit codes", "", "```text", cli.EXAMPLES, "```", "")


PAGES: dict[str, Callable[[], Iterator[str]]] = {
    "errors": errors,
    "options": options,
    "uses": uses,
    "command_line": command_line,
}


def path_of(name: str) -> Path:
    """Return the file of a page."""
    return FOLDER / f"{name}.md"


def page(name: str) -> str:
    """Return the text of a page with its tables as they should be."""
    before, _, rest = path_of(name).read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    return before + "\n".join([START, *PAGES[name](), END]) + after


if __name__ == "__main__":
    for name in PAGES:
        path_of(name).write_text(page(name), encoding="utf-8")
