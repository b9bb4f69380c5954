"""How the library is written, as far as that can be counted; CONTRIBUTING.md has it in words."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from support.source_tree import ROOT, source_files

MAXIMUM_LINES = 500
COMMENTS_PER_1000 = 25
ANY_PER_1000 = 15
PACKED_ASSIGNMENTS = 10
CONSTRUCTOR_ARGUMENTS = 16

PRAGMA = re.compile(r"#\s*(type:|noqa|pragma|mypy|fmt|ruff)")


def too_long(root: Path) -> list[str]:
    """One line for each file with more lines than one reads in one go."""
    counts = (
        (path, len(path.read_text(encoding="utf-8").splitlines())) for path, _ in source_files(root)
    )
    return [
        f"{path.relative_to(root).as_posix()}: {count} lines, more than {MAXIMUM_LINES}"
        for path, count in counts
        if count > MAXIMUM_LINES
    ]


def tokens(root: Path) -> Iterator[tokenize.TokenInfo]:
    """The tokens of all files."""
    for path, _ in source_files(root):
        yield from tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline)


def thousands_of_lines(root: Path) -> float:
    """Lines of all files together, in thousands."""
    return sum(len(p.read_text("utf-8").splitlines()) for p, _ in source_files(root)) / 1000


def nodes(root: Path) -> Iterator[tuple[str, ast.AST]]:
    """(place, node) of all syntax trees."""
    for path, _ in source_files(root):
        where = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            yield f"{where}:{getattr(node, 'lineno', 0)}", node


def packed_assignments(root: Path) -> list[str]:
    """Places of `self.a, self.b = x, y`: two lines in one, and no comment fits either."""
    return [
        where
        for where, node in nodes(root)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Tuple)
        and sum(isinstance(entry, ast.Attribute) for entry in target.elts) > 1
    ]


def starred_literals(root: Path) -> list[str]:
    """Places of `f(*(a, b))`: arguments that are written as a tuple and unpacked at once."""
    return [
        where
        for where, node in nodes(root)
        if isinstance(node, ast.Starred) and isinstance(node.value, (ast.Tuple, ast.List))
    ]


def wide_constructors(root: Path) -> list[str]:
    """Constructors, and data classes, that take more than a reader can keep in mind."""
    found = []
    for where, node in nodes(root):
        count = 0
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = node.args
            count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs) - 1
        elif isinstance(node, ast.ClassDef):
            decorators = " ".join(ast.unparse(one) for one in node.decorator_list)
            if "dataclass" in decorators:
                count = sum(isinstance(one, ast.AnnAssign) for one in node.body)
        if count > CONSTRUCTOR_ARGUMENTS:
            found.append(f"{where}: {count} arguments")
    return found


def test_no_file_is_too_long() -> None:
    found = too_long(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_decisions_are_commented() -> None:
    comments = [t for t in tokens(ROOT) if t.type == tokenize.COMMENT]
    count = sum(not PRAGMA.match(token.string) for token in comments)
    assert count >= COMMENTS_PER_1000 * thousands_of_lines(ROOT)


def test_types_are_named() -> None:
    count = sum(t.type == tokenize.NAME and t.string == "Any" for t in tokens(ROOT))
    assert count <= ANY_PER_1000 * thousands_of_lines(ROOT)


def test_attributes_are_set_one_by_one() -> None:
    found = packed_assignments(ROOT)
    assert len(found) <= PACKED_ASSIGNMENTS, "\n" + "\n".join(found)


def test_arguments_are_not_unpacked_from_literals() -> None:
    found = starred_literals(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_constructors_can_be_kept_in_mind() -> None:
    found = wide_constructors(ROOT)
    assert not found, "\n" + "\n".join(found)


# The checkers themselves, on a small tree.


def test_checkers_see_what_they_look_for(tmp_path: Path) -> None:
    text = (
        "class A:\n"
        "    def __init__(self, a, b):\n"
        "        self.a, self.b = a, b\n"
        "        f(*(a, b), *rest)\n"
    )
    many = ", ".join(f"a{i}" for i in range(CONSTRUCTOR_ARGUMENTS + 1))
    files = {
        "kfac_fx/a.py": text,
        "kfac_fx/long.py": "x = 0\n" * (MAXIMUM_LINES + 1),
        "passes/fits.py": "x = 0\n" * MAXIMUM_LINES,
        "passes/wide.py": f"class B:\n    def __init__(self, {many}): ...\n",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    assert packed_assignments(tmp_path) == ["kfac_fx/a.py:3"]
    assert starred_literals(tmp_path) == ["kfac_fx/a.py:4"]
    assert too_long(tmp_path) == ["kfac_fx/long.py: 501 lines, more than 500"]
    assert wide_constructors(tmp_path) == ["passes/wide.py:2: 17 arguments"]
