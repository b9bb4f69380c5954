"""The guides work when they are followed literally, in a copy of the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))
BLOCK = re.compile(r'^```(\w+) title="([^"]+)"\n(.*?)^```', re.MULTILINE | re.DOTALL)


class Step(NamedTuple):
    """A block of a guide: what becomes of one file.

    Attributes:
        language: "diff" changes a file, anything else is the whole text of a new one.
        path: from the root of the repository; ``try.py`` is run, and is no part of the change.
    """

    language: str
    path: str
    text: str

    def take(self, root: Path) -> None:
        """Do in a tree what the block says."""
        file = root / self.path
        if self.language != "diff":
            assert not file.exists(), f"{self.path} is there already"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(self.text, encoding="utf-8")
            return
        lines = self.text.splitlines()
        before, after = (
            "".join(f"{line[1:]}\n" for line in lines if line[:1] != sign) for sign in "+-"
        )
        old = file.read_text(encoding="utf-8")
        assert old.count(before) == 1, f"{self.path} does not have these lines once:\n{before}"
        file.write_text(old.replace(before, after), encoding="utf-8")


def steps_of(guide: Path) -> list[Step]:
    return [Step(*found) for found in BLOCK.findall(guide.read_text(encoding="utf-8"))]


def source_files(guide: Path) -> set[str]:
    """The files of the library that a guide touches."""
    paths = {step.path for step in steps_of(guide)}
    return {path for path in paths if path.startswith(("kfac_fx/", "passes/"))}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_a_guide_that_is_followed_works(guide: Path, tmp_path: Path) -> None:
    for folder in ("kfac_fx", "passes"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignored)
    steps = steps_of(guide)
    assert [step.path for step in steps].count("try.py") == 1
    for step in steps:
        step.take(tmp_path)
    run = subprocess.run(
        [sys.executable, "try.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("guide", "most"), [("add_a_layer_kind", 2), ("add_a_likelihood", 1), ("add_a_structure", 4)]
)
def test_what_is_added_touches_few_files(guide: str, most: int) -> None:
    assert 1 <= len(source_files(ROOT / f"docs/guides/{guide}.md")) <= most
