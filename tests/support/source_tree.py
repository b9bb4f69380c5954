"""Reads the library's files: modules, syntax trees and the imports between them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def source_files(root: Path) -> list[tuple[Path, str]]:
    """Return every Python file with its module name. The link kfac_fx/passes is not read twice."""
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
    """Return the room of a module: kfac_fx.ir.graph is in ir, kfac_fx itself in __init__."""
    return [*module.split("."), "__init__"][1]


def imported_names(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import in a tree, relative imports made absolute.

    `from a import b` gives a.b, whether b is a module or a name in a.
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


def _at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the import statements that run when a module is imported."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from _at_import(node.body)
            yield from _at_import(node.orelse)
        elif isinstance(node, (ast.With, ast.Try)):
            yield from _at_import(node.body)


def import_graph(root: Path, *, late: bool = False) -> dict[str, set[str]]:
    """Return module -> the modules of the library that it names in its imports.

    A package stands for its __init__ file; packages on the way to an imported file are left out.

    Args:
        late: imports for type checkers and within functions count as well.
    """
    files = source_files(root)
    modules = {module for _, module in files}
    graph: dict[str, set[str]] = {}
    for path, module in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        statements = [tree] if late else list(_at_import(tree.body))
        names = [name for one in statements for _, name in imported_names(one, module)]
        found = {_file_of(name, modules) for name in names} - {None, module}
        graph[module] = {name for name in found if name is not None}
    return graph


def _file_of(name: str, modules: set[str]) -> str | None:
    """Return the module that an imported name is, or is defined in."""
    parent = name.rpartition(".")[0]
    candidates = (name, f"{name}.__init__", parent, f"{parent}.__init__")
    return next((module for module in candidates if module in modules), None)


def longest_chain(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the longest chain of modules each of which imports the next; no circle allowed."""
    longest: dict[str, list[str]] = {}

    def below(module: str) -> list[str]:
        if module not in longest:
            chains = [below(other) for other in sorted(graph[module])]
            longest[module] = [module, *max(chains, key=len, default=[])]
        return longest[module]

    return max(map(below, sorted(graph)), key=len)


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that reach each other, each group sorted."""
    reached = {module: _reached_from(module, graph) for module in graph}
    groups = {
        tuple(sorted({module} | {m for m in reached[module] if module in reached[m]}))
        for module in graph
        if module in reached[module]
    }
    return [list(group) for group in sorted(groups)]


def _reached_from(module: str, graph: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    todo = [module]
    while todo:
        new = graph[todo.pop()] - found
        found |= new
        todo += new
    return found
