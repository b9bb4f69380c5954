"""``python -m kfac_fx``: what it prints and writes, its messages, its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx import viz
from kfac_fx.cli import main

LINEAR = ["torch.nn:Linear", "--kwargs", '{"in_features": 3, "out_features": 2}']


class Config:
    """As those of transformers are: all arguments have defaults."""

    def __init__(self, width: int = 4, layers: int = 2) -> None:
        self.width, self.layers = width, layers


class Configured(nn.Module):
    """Built from a config, called with keywords."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.table = nn.Embedding(10, config.width)
        self.layers = nn.ModuleList(
            nn.Linear(config.width, config.width) for _ in range(config.layers)
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.table(ids) * mask.unsqueeze(-1)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.mean(1)


def build(width: int = 5) -> nn.Module:
    """A factory."""
    return nn.Sequential(nn.Conv2d(2, width, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))


def broken() -> nn.Module:
    raise RuntimeError("no\nmodel today")


made = nn.Sequential(nn.Linear(2, 2))
number = 3


def test_inspect_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *LINEAR]) == 0
    want = str(kfac_fx.transform(nn.Linear(3, 2)).curvature)
    assert capsys.readouterr().out == want + "\n"


def test_inspect_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks, coverage and couplings of a model that a factory makes from --kwargs."""
    command = ["inspect", "test_cli:Configured", "--kwargs", '{"layers": 3}', "--json"]
    command += ["--input", "ids=int64[N,T=7]", "--input", "mask=float32[N,T]"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert [block["name"] for block in found["blocks"]] == [
        *("table", "layers.0", "layers.1", "layers.2")
    ]
    assert found["coverage"]["parameters"] == 10 * 4 + 3 * 20
    assert found["couplings"][0] == {"child": "layers.0", "parent": "layers.1"}


def test_program_is_python_that_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["program", *LINEAR]) == 0
    printed = capsys.readouterr().out
    names: dict[str, object] = {}
    exec(printed, names)
    assert callable(names["refresh"]) and callable(names["apply"])
    assert main(["program", *LINEAR, "-o", str(tmp_path / "program.py")]) == 0
    assert (tmp_path / "program.py").read_text(encoding="utf-8") == printed
    assert main(["program", *LINEAR, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["code"].rstrip("\n") == printed.rstrip("\n")


def test_structure_reaches_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["program", "test_cli:Configured", "--input", "int64[N,7]", "--input", "float32[N,7]"]
    assert main(model) == 0
    assert "given" in capsys.readouterr().out
    assert main([*model, "--structure", "block_diagonal"]) == 0
    assert "given" not in capsys.readouterr().out


def test_draw_writes_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pydot")
    monkeypatch.chdir(tmp_path)
    assert main(["draw", *LINEAR]) == 0
    assert capsys.readouterr().out == "saved Linear.svg\n"
    assert b"<svg" in Path("Linear.svg").read_bytes()
    assert main(["draw", "test_cli:made", "-o", "made.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": "made.json", "blocks": 1}
    assert viz.load("made.json") == kfac_fx.transform(made).curvature


def test_excluded_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    """What --exclude left out is printed by name."""
    command = ["inspect", "test_cli:Configured", "--input", "int64[N,7]"]
    assert main([*command, "--input", "float32[N,7]", "--exclude", "layers.*"]) == 0
    assert "excluded: layers.0.weight, layers.0.bias" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "no.such.module:x"], "cannot import 'no.such.module': ModuleNotFoundError"),
        (["inspect", ":x"], "is not of the form MODULE:CALLABLE"),
        (["inspect", "torch.nn"], "is not of the form MODULE:CALLABLE"),
        (["inspect", "torch.nn:Lineer"], "'torch.nn' has no 'Lineer'"),
        (["inspect", "test_cli:number"], "is no callable, but int"),
        (["inspect", "test_cli:broken"], "test_cli:broken failed: RuntimeError: no model today"),
        (["inspect", "test_cli:Config"], "made no nn.Module, but Config"),
        (["inspect", "torch.nn:Linear"], "missing 2 required positional arguments"),
        (["inspect", "torch.nn:ReLU"], "no parameter that requires a gradient"),
        (["inspect", *LINEAR[:2], "{"], "--kwargs is no JSON"),
        (["inspect", *LINEAR[:2], "[1]"], "--kwargs must be a JSON object"),
        (
            ["inspect", *LINEAR, "--input", "float32"],
            "'float32' is not of the form dtype",
        ),
        (["inspect", *LINEAR, "--input", "float33[2]"], "'float33' is no dtype of torch"),
        (["inspect", *LINEAR, "--input", "nn[2]"], "'nn' is no dtype of torch"),
        (["inspect", *LINEAR, "--input", "float32[2,-3]"], "'-3' is neither a size nor a name"),
        (["inspect", *LINEAR, "--input", "float32[N=2,N=3]"], "N is 2 already"),
        (["inspect", *LINEAR, "--input", "int8[99999,99999]"], "give a smaller example"),
        (["draw", *LINEAR, "-o", "x.bmp"], "'x.bmp' has no known suffix; valid are .svg"),
        (["draw", *LINEAR, "-o", "no/such/x.svg"], "there is no folder for 'no/such/x.svg'"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on standard error that says what is wrong, and exit code 2."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kfac_fx: error: ") and message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["paint"], ["inspect"], ["draw", "a:b", "--fold"]])
def test_argparse_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: python -m kfac_fx" in capsys.readouterr().err


def test_inputs_that_do_not_fit_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["inspect", "test_cli:Configured", "--input", "float32[N,7]", "--input", "float32[N,7]"]
    assert main([*model, "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kfac_fx: error: ") and err.count("\n") == 1


def test_quiet_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    # torch.export gives up on this model, and says much while it does.
    assert main(["inspect", "support.hard_models:DataBranch", "--input", "float32[N,4]", "-q"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("block") and err == ""


def test_missing_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drawing without pydot names the extra to install, and writes nothing."""
    monkeypatch.setitem(sys.modules, "pydot", None)
    assert main(["draw", *LINEAR, "-o", str(tmp_path / "x.dot")]) == 1
    assert "pip install kfac_fx[viz]" in capsys.readouterr().err
    assert not (tmp_path / "x.dot").exists()


def test_as_a_program() -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "kfac_fx", "inspect", *LINEAR]
    found = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith("block")
    wrong = [sys.executable, "-m", "kfac_fx", "inspect", "nowhere:x"]
    found = subprocess.run(wrong, capture_output=True, text=True, cwd=root)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1)
