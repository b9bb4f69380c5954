"""What pyproject.toml, constraints.txt and the git link promise, held against the tree."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kfac_fx

ROOT = Path(__file__).resolve().parents[2]
# Paths of somebody's machine, which mean nothing to a reader of the repository.
MACHINE_PATH = re.compile(r"(?<![\w.~>})])/(?:work|root|home/\w+|Users/\w+)/")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def package_folders() -> dict[str, str]:
    """Package name -> folder, for each folder that holds an __init__.py."""
    found = {}
    for top, name in (("kfac_fx", "kfac_fx"), ("passes", "kfac_fx.passes")):
        for path in (ROOT / top).rglob("__init__.py"):
            inside = path.parent.relative_to(ROOT / top).parts
            if top == "kfac_fx" and inside[:1] == ("passes",):
                continue  # the link
            found[".".join((name, *inside))] = "/".join((top, *inside))
    return found


def text_files() -> list[Path]:
    """The files of the repository: those that git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listing.decode().split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def test_passes_are_imported_from_the_top_level_folder() -> None:
    module = importlib.import_module("kfac_fx.passes")
    assert module.__name__ == "kfac_fx.passes"
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / "passes" / "__init__.py"


def test_the_link_to_passes() -> None:
    link = ROOT / "kfac_fx" / "passes"
    if link.is_symlink():
        assert link.readlink() == Path("../passes")
    else:  # a checkout on a system without links: git writes the target as the file's text
        assert link.read_text(encoding="utf-8").strip() == "../passes"


def test_packages_are_the_folders_with_an_init_file(pyproject: dict[str, Any]) -> None:
    setuptools = pyproject["tool"]["setuptools"]
    folders = package_folders()
    assert sorted(setuptools["packages"]) == sorted(folders)
    moved = {name: folder for name, folder in folders.items() if name.replace(".", "/") != folder}
    assert setuptools["package-dir"] == moved


def test_typed_marker(pyproject: dict[str, Any]) -> None:
    assert (ROOT / "kfac_fx" / "py.typed").is_file()
    assert pyproject["tool"]["setuptools"]["package-data"]["kfac_fx"] == ["py.typed"]


def test_entry_points_resolve(pyproject: dict[str, Any]) -> None:
    for group in pyproject["project"].get("entry-points", {}).values():
        for target in group.values():
            module, _, attribute = target.partition(":")
            assert callable(getattr(importlib.import_module(module), attribute)), target


def pinned() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [line for line in lines if line.strip() and not line.startswith("#")]
    for line in requirements:
        assert re.fullmatch(r"[\w-]+==\d[\w.]*(; .+)?", line), f"not an exact version: {line}"
    return {line.partition("==")[0] for line in requirements}


def test_constraints_pin_torch() -> None:
    assert "torch" in pinned()


def test_constraints_pin_every_direct_dependency(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    assert {re.split(r"[^\w-]", line)[0] for group in groups for line in group} == pinned()


def test_no_machine_paths() -> None:
    found = []
    for path in text_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a picture
        name = path.relative_to(ROOT).as_posix()
        found += [
            f"{name}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(lines, 1)
            if MACHINE_PATH.search(line)
        ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("path", ["work", "root", "home/ada", "Users/ada"])
def test_machine_paths_are_recognised(path: str) -> None:
    assert MACHINE_PATH.search(f"see /{path}/model.py")
    assert MACHINE_PATH.search(f'open("/{path}/model.py")')
    assert not MACHINE_PATH.search(f"https://example.org/{path}/model.py")
    assert not MACHINE_PATH.search(f"./{path}/model.py")


def test_the_version_is_the_same_everywhere(pyproject: dict[str, Any]) -> None:
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None
    assert kfac_fx.__version__ == pyproject["project"]["version"] == cited[1]
