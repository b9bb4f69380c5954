"""The rooms of the library import only downwards; read from the syntax tree of every file."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.source_tree import (
    ROOT,
    circles,
    import_graph,
    imported_names,
    longest_chain,
    room_of,
    source_files,
)

LONGEST_CHAIN = 14

# For each room, the rooms below that it may import. Its own files it may always import.
GROUND = {"errors", "config", "torch_internals"}
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "torch_internals": {"errors"},
    "ir": GROUND,
    "linalg": GROUND,
    "ops": GROUND | {"linalg"},
    "capture": GROUND | {"ir"},
    "passes": GROUND | {"ir", "linalg", "ops", "capture"},
    "codegen": GROUND | {"ir", "linalg"},
}
# Models that run, Dynamo and export do not know of each other: each can be read, and go, alone.
PASSES_AND_BELOW = BELOW["passes"] | {"passes"}
BELOW |= dict.fromkeys(("eager", "dynamo", "export"), PASSES_AND_BELOW)
BELOW["parallel"] = GROUND | {"ir", "linalg", "ops", "codegen"}
BELOW["likelihoods"] = GROUND | {"linalg", "parallel"}
BELOW["curvature"] = PASSES_AND_BELOW | {"codegen", "parallel"}
BELOW["statistics"] = BELOW["curvature"] | {"curvature", "likelihoods"}
BELOW["reading"] = BELOW["statistics"] | {"statistics"}
BELOW["optim"] = BELOW["reading"] | {"reading", "dynamo"}
FACES = {"__init__", "__main__", "api", "backend", "cli", "distributed", "estimate", "viz"}
BELOW |= {face: set(BELOW) | FACES for face in FACES}

# Gathers names of its own room and of three rooms above for people; nothing may import it.
FOR_PEOPLE = "kfac_fx.passes.__init__"

# The picture of a curvature graph is drawn by viz/, which reads ir/: the import waits until a
# picture is asked for, and drawing stays a method of the graph.
LAZY = {("kfac_fx.ir.curvature_graph", "kfac_fx.viz")}

# Names of torch that begin with an underscore and are in its documentation for users to write.
DOCUMENTED = {"torch._assert"}


def violations(root: Path) -> list[str]:
    """One line for each import that does not go downwards."""
    files = source_files(root)
    rooms = {room_of(module) for _, module in files}
    found = []
    for path, module in files:
        room = "__init__" if module == FOR_PEOPLE else room_of(module)
        where = path.relative_to(root).as_posix()
        if room not in BELOW:
            found.append(f"{where}: {room!r} is no room of the library; give it a floor in BELOW")
            continue
        for line, name in imported_names(ast.parse(path.read_text(encoding="utf-8")), module):
            head = name.partition(".")[0]
            if head == "passes":
                found.append(f"{where}:{line}: imports {name}; write kfac_fx.{name}")
            if head != "kfac_fx":
                continue
            target = room_of(name)
            if target not in rooms and target not in BELOW:
                target = "__init__"  # `from kfac_fx import transform`: a name of the top file
            lazy = any(module == a and name.startswith(b) for a, b in LAZY)
            if target != room and target not in BELOW[room] and not lazy:
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
        for line, name in imported_names(tree, module):
            if name.split(".")[0] not in allowed or name.split(".")[:2] == ["torch", "fx"]:
                found.append(f"{where}:{line}: linalg may not import {name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.fx":
                found.append(f"{where}:{node.lineno}: linalg may not use torch.fx")
    return found


def private_names_of_torch(root: Path) -> list[str]:
    """One line for each private name of torch that is used outside of torch_internals/.

    Operators (torch.ops) may begin with an underscore: that is part of their name in ATen.
    """
    found = []
    for path, module in source_files(root):
        if room_of(module) == "torch_internals":
            continue
        where = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {*imported_names(tree, module), *_attributes_of_torch(tree)}
        for line, name in sorted(names):
            parts = name.split(".")
            private = any(part.startswith("_") and not part.startswith("__") for part in parts)
            if parts[0] == "torch" and private and parts[1] != "ops" and name not in DOCUMENTED:
                found.append(f"{where}:{line}: {name} is private: use it in torch_internals/")
    return found


def _attributes_of_torch(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every chain of attributes that begins at an import from torch.

    Of ``torch.a.b`` the chains are ``torch.a`` and ``torch.a.b``: the first is as private as it.
    """
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(a.asname or a.name): a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {(a.asname or a.name): f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        chain = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        head, _, rest = chain.partition(".")
        origin = names.get(head, "")
        if origin.split(".")[0] == "torch" and rest.replace(".", "").isidentifier():
            # What is imported from a private module is told of at its import.
            yield node.lineno, f"torch.{head}.{rest}" if "._" in origin else f"{origin}.{rest}"


def test_imports_go_downwards() -> None:
    assert source_files(ROOT), "no source files found"
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_linalg_knows_tensors_only() -> None:
    found = foreign_to_linalg(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_private_parts_of_torch_are_in_one_room() -> None:
    found = private_names_of_torch(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_no_chain_of_imports_is_long() -> None:
    chain = longest_chain(import_graph(ROOT))
    assert len(chain) <= LONGEST_CHAIN, f"{len(chain)} files: " + " > ".join(chain)


def test_no_imports_go_in_a_circle() -> None:
    """Imports for type checkers and within functions count as well, but for those in LAZY."""
    graph = import_graph(ROOT, late=True)
    for module, room in LAZY:
        graph[module] = {name for name in graph[module] if not name.startswith(room)}
    assert not circles(graph)


def test_names_for_people_are_for_people() -> None:
    graph = import_graph(ROOT, late=True)
    importers = [module for module, found in graph.items() if FOR_PEOPLE in found]
    assert set(importers) <= {"kfac_fx.__init__"}, f"{importers} import the package passes"


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


@pytest.mark.parametrize(
    ("text", "offence"),
    [
        ("from torch._ops import OpOverload\n", "torch._ops.OpOverload"),
        ("from torch.utils import _pytree as pytree\n", "torch.utils._pytree"),
        ("import torch\n\ntorch._foreach_mul_([], 2)\n", "torch._foreach_mul_"),
        ("from torch.autograd import forward_ad as ad\n\nad._current_level\n", "_current_level"),
    ],
)
def test_checker_finds_private_names(tmp_path: Path, text: str, offence: str) -> None:
    hidden = {"kfac_fx/ops/tap.py": text, "kfac_fx/torch_internals/hack.py": text}
    found = private_names_of_torch(build(tmp_path, hidden))
    assert found and all(one.startswith("kfac_fx/ops/tap.py:") for one in found)
    assert offence in found[0]


def test_checker_lets_operators_and_documented_names_pass(tmp_path: Path) -> None:
    text = "import torch\n\ntorch.ops.aten._to_copy.default\ntorch._assert(True, '')\n"
    assert private_names_of_torch(build(tmp_path, {"kfac_fx/ops/tap.py": text})) == []


def test_checker_measures_chains_and_finds_circles(tmp_path: Path) -> None:
    files = {
        "kfac_fx/ops/a.py": "from kfac_fx.ops.b import x\n",
        "kfac_fx/ops/b.py": "from kfac_fx.linalg import x\n",
        "kfac_fx/linalg/c.py": "def late():\n    from kfac_fx.linalg.d import x\n",
        "kfac_fx/linalg/d.py": "if TYPE_CHECKING:\n    from kfac_fx.linalg.c import y\n",
    }
    root = build(tmp_path, files)
    graph = import_graph(root)
    assert longest_chain(graph) == ["kfac_fx.ops.a", "kfac_fx.ops.b", "kfac_fx.linalg.__init__"]
    assert not circles(graph)
    assert circles(import_graph(root, late=True)) == [["kfac_fx.linalg.c", "kfac_fx.linalg.d"]]
