"""The rooms of the library import only downwards; read from the syntax tree of every file."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAXIMUM_LINES = 500

# For each room, the rooms below that it may import. Its own files it may always import.
GROUND = {"errors", "config"}
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "ir": GROUND,
    "linalg": GROUND,
    "ops": GROUND | {"linalg"},
    "capture": GROUND | {"ir"},
    "passes": GROUND | {"ir", "linalg", "ops", "capture"},
    "codegen": GROUND | {"ir", "linalg"},
}
BELOW["parallel"] = GROUND | {"ir", "linalg", "ops", "codegen"}
BELOW["likelihoods"] = GROUND | {"parallel"}
BELOW["curvature"] = set(BELOW) - {"likelihoods"}
BELOW["statistics"] = set(BELOW)
BELOW["reading"] = set(BELOW)
BELOW["optim"] = set(BELOW)
FACES = {"__init__", "__main__", "api", "cli", "viz", "backend", "distributed"}
BELOW |= {face: set(BELOW) | FACES for face in FACES}


def source_files(root: Path) -> list[tuple[Path, str]]:
    """Every Python file with its module name. The link kfac_fx/passes is not read twice."""
    found = []
    for folder, prefix in (
        (root / "kfac_fx", ("kfac_fx",)),
        (root / "passes", ("kfac_fx", "passes")),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if prefix == ("kfac_fx",) and parts[0] == "passes":
                continue
            found.append((path, ".".join(prefix + parts)))
    return found


def room_of(module: str) -> str:
    """The room of a module of ours: kfac_fx.ir.graph is in ir, kfac_fx itself in __init__."""
    return [*module.split("."), "__init__"][1]


def imports(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import anywhere in a file, relative imports made absolute.

    `from a import b` gives a.b: whether b is a module or a name in a makes no difference to the
    room, except directly under kfac_fx, which `violations` settles.
    """
    package = module.split(".")[:-1]  # of kfac_fx.ir.__init__ too, as its last part is __init__
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            name = node.args[0]
            if called in {"import_module", "__import__"} and isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def violations(root: Path) -> list[str]:
    """One line for each import that does not go downwards."""
    files = source_files(root)
    rooms = {room_of(module) for _, module in files}
    found = []
    for path, module in files:
        room = room_of(module)
        where = path.relative_to(root).as_posix()
        if room not in BELOW:
            found.append(f"{where}: {room!r} is no room of the library; give it a floor in BELOW")
            continue
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8")), module):
            head = name.partition(".")[0]
            if head == "passes":
                found.append(f"{where}:{line}: imports {name}; write kfac_fx.{name}")
            if head != "kfac_fx":
                continue
            target = room_of(name)
            if target not in rooms and target not in BELOW:
                target = "__init__"  # `from kfac_fx import transform`: a name of the top file
            if target != room and target not in BELOW[room]:
                found.append(f"{where}:{line}: room {room} may not import {name} (room {target})")
    return found


def foreign_to_linalg(root: Path) -> list[str]:
    """One line for each place where linalg/ reaches beyond tensors and the ground floor."""
    allowed = {"torch", "kfac_fx", *sys.stdlib_module_names}
    found = []
    for path, module in source_files(root):
        if room_of(module) != "linalg":
            continue
        where = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, name in imports(tree, module):
            if name.split(".")[0] not in allowed or name.split(".")[:2] == ["torch", "fx"]:
                found.append(f"{where}:{line}: linalg may not import {name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.fx":
                found.append(f"{where}:{node.lineno}: linalg may not use torch.fx")
    return found


def too_long(root: Path) -> list[str]:
    counts = (
        (path, len(path.read_text(encoding="utf-8").splitlines())) for path, _ in source_files(root)
    )
    return [
        f"{path.relative_to(root).as_posix()}: {count} lines, more than {MAXIMUM_LINES}"
        for path, count in counts
        if count > MAXIMUM_LINES
    ]


def test_imports_go_downwards() -> None:
    assert source_files(ROOT), "no source files found"
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_linalg_knows_tensors_only() -> None:
    found = foreign_to_linalg(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_no_file_is_too_long() -> None:
    found = too_long(ROOT)
    assert not found, "\n" + "\n".join(found)


# The checker itself, on a small tree.


def build(root: Path, files: dict[str, str]) -> Path:
    skeleton = dict.fromkeys(
        [
            "kfac_fx/__init__.py",
            "kfac_fx/errors.py",
            "kfac_fx/ir/__init__.py",
            "kfac_fx/linalg/__init__.py",
            "kfac_fx/ops/__init__.py",
            "kfac_fx/optim/__init__.py",
            "passes/__init__.py",
            "passes/rules/__init__.py",
        ],
        "",
    )
    for name, text in (skeleton | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (root / "kfac_fx" / "passes").symlink_to("../passes")
    return root


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("kfac_fx/optim/kfac.py", "from ..passes import insert_taps\nfrom .. import ir, errors\n"),
        ("kfac_fx/ops/tap.py", "import torch.fx\nfrom kfac_fx.linalg.positive import split\n"),
        ("kfac_fx/ir/__init__.py", "from .graph import CurvatureGraph\nfrom . import graph\n"),
        ("kfac_fx/__init__.py", "from .api import transform\nfrom .optim import KFAC\n"),
        ("kfac_fx/viz/table.py", "from kfac_fx import api, transform\n"),
        ("passes/rules/linear.py", "from ...ops import tap\nfrom ..find_uses import uses\n"),
        ("passes/find_uses.py", "from .rules import linear\nimport kfac_fx.passes.rules\n"),
        ("kfac_fx/linalg/forest.py", "import math\nfrom torch import Tensor\n"),
    ],
)
def test_checker_lets_downward_imports_pass(tmp_path: Path, name: str, text: str) -> None:
    root = build(tmp_path, {name: text})
    assert violations(root) == []
    assert foreign_to_linalg(root) == []


@pytest.mark.parametrize(
    ("name", "text", "offence"),
    [
        ("kfac_fx/ir/graph.py", "from ..passes import find_uses\n", "kfac_fx.passes.find_uses"),
        ("kfac_fx/ir/graph.py", "from .. import passes\n", "kfac_fx.passes"),
        ("kfac_fx/ir/__init__.py", "from ..ops import tap\n", "kfac_fx.ops.tap"),
        (
            "kfac_fx/ir/graph.py",
            "import kfac_fx.linalg.forest as forest\n",
            "kfac_fx.linalg.forest",
        ),
        ("kfac_fx/linalg/__init__.py", "from ..ir import graph\n", "kfac_fx.ir.graph"),
        ("kfac_fx/ops/tap.py", "import kfac_fx\n", "kfac_fx (room __init__)"),
        (
            "kfac_fx/ops/tap.py",
            "from kfac_fx import transform\n",
            "kfac_fx.transform (room __init__)",
        ),
        ("kfac_fx/ops/tap.py", "def late():\n    from ..optim import KFAC\n", "kfac_fx.optim.KFAC"),
        (
            "kfac_fx/ops/tap.py",
            "if TYPE_CHECKING:\n    from ..ir import graph\n",
            "kfac_fx.ir.graph",
        ),
        ("kfac_fx/ops/tap.py", "importlib.import_module('kfac_fx.ir')\n", "kfac_fx.ir"),
        ("kfac_fx/errors.py", "from .ir import graph\n", "kfac_fx.ir.graph"),
        ("passes/rules/linear.py", "from ...optim import KFAC\n", "kfac_fx.optim.KFAC"),
        ("passes/find_uses.py", "from ..optim.kfac import KFAC\n", "kfac_fx.optim.kfac.KFAC"),
        ("kfac_fx/optim/kfac.py", "from passes import insert_taps\n", "passes.insert_taps"),
        ("kfac_fx/cellar.py", "", "'cellar' is no room"),
    ],
)
def test_checker_catches(tmp_path: Path, name: str, text: str, offence: str) -> None:
    (message,) = violations(build(tmp_path, {name: text}))
    assert message.startswith(name)
    assert offence in message


@pytest.mark.parametrize(
    "text",
    [
        "import torch.fx\n",
        "from torch import fx\n",
        "from torch.fx import Node\n",
        "import numpy\n",
        "x = torch.fx.Node\n",
    ],
)
def test_checker_keeps_linalg_to_tensors(tmp_path: Path, text: str) -> None:
    (message,) = foreign_to_linalg(build(tmp_path, {"kfac_fx/linalg/forest.py": text}))
    assert message.startswith("kfac_fx/linalg/forest.py:1: ")


def test_checker_counts_lines(tmp_path: Path) -> None:
    files = {
        "passes/long.py": "x = 0\n" * (MAXIMUM_LINES + 1),
        "passes/fits.py": "x = 0\n" * MAXIMUM_LINES,
    }
    (message,) = too_long(build(tmp_path, files))
    assert message.startswith("passes/long.py: 501 lines")
