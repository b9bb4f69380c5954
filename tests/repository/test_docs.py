"""What the documentation and the code say of each other: sections, paths and links that exist."""

from __future__ import annotations

import re
import runpy
import subprocess
from collections.abc import Iterator
from importlib import import_module
from inspect import getdoc
from pathlib import Path

import pytest
import torch

import kfac_fx
from kfac_fx.passes.rules import BUILT_IN

ROOT = Path(__file__).resolve().parents[2]
TEXT = {".py", ".md", ".toml", ".txt", ".yml", ".cff", ".html", ""}
SECTION = re.compile(r"(docs/[\w/]+\.md),\s+sections? (\d+)(?:(?:,| and| to)\s+(\d+))?")
PAPER = re.compile(r"\bet al\.|&|\barXiv\b|\bpaper\b|\bits section\b|\bMartens\b", re.IGNORECASE)
BARE = re.compile(r"\((?:see )?[Ss]ections? \d+\)|\"\"\"Section \d+")
NOT_SHIPPED = re.compile(r"\b(?:curvature|design|review|brief|anchors)\.md\b|\bshared/")
LINK = re.compile(r"(?<!!)\[[^\]\n]+\]\(([^)\s]+)\)|!\[[^\]\n]*\]\(([^)\s]+)\)")
VERSION = re.compile(r"\btorch \d[\w.+]*")
PATH = re.compile(r"`((?:kfac_fx|passes|tests|docs|examples|\.ci)/[\w./-]+)`")


def tracked(*suffixes: str) -> list[Path]:
    """Files of the repository, new ones that git does not ignore among them."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("this is no checkout")
    paths = (ROOT / line for line in listed.stdout.splitlines())
    wanted = set(suffixes) or TEXT
    return [path for path in paths if path.suffix in wanted and path.is_file()]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def sections(page: Path) -> set[int]:
    """The numbers of a page's headings."""
    return {int(number) for number in re.findall(r"^## (\d+)\. ", text_of(page), re.MULTILINE)}


def missing_sections(root: Path, text: str) -> Iterator[str]:
    """References to sections that a page does not have, or to no page."""
    for page, first, last in SECTION.findall(re.sub(r"\s*\n\s*(?:#\s*)?", " ", text)):
        if not (root / page).is_file():
            yield f"{page} is no file"
            continue
        wanted = set(range(int(first), int(last or first) + 1))
        yield from (f"{page} has no section {n}" for n in sorted(wanted - sections(root / page)))


def dead_links(page: Path) -> Iterator[str]:
    """Relative links of a page that lead to no file, or to no heading in it."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    for found in LINK.findall(text):
        target = found[0] or found[1]
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists():
            yield f"{page.relative_to(ROOT)}: {target}"
        # The site has only the pages of docs: a link out of them stops its strict build.
        elif leaves_the_site(page, file):
            yield f"{page.relative_to(ROOT)}: {target} lies outside docs/"
        elif anchor and anchor not in map(slug, re.findall(r"^#+ (.*)$", text_of(file), re.M)):
            yield f"{page.relative_to(ROOT)}: {target} has no such heading"


def leaves_the_site(page: Path, file: Path) -> bool:
    pages = ROOT / "docs"
    return page.is_relative_to(pages) and not file.resolve().is_relative_to(pages)


def slug(heading: str) -> str:
    """A heading as the anchor that both the site and the platform make of it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_sections_that_code_cites_exist() -> None:
    found = {
        str(path.relative_to(ROOT)): problems
        for path in tracked(".py", ".md")
        if path != Path(__file__) and (problems := list(missing_sections(ROOT, text_of(path))))
    }
    assert not found


def test_the_mathematics_keeps_its_sections() -> None:
    assert sections(ROOT / "docs/explanation/mathematics.md") >= set(range(1, 12))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("docs/explanation/mathematics.md, section 99", "no section 99"),
        ("docs/explanation/mathematics.md,\n    # section 98", "no section 98"),
        ("docs/explanation/nothing.md, section 1", "no file"),
    ],
)
def test_a_section_that_is_missing_is_found(text: str, problem: str) -> None:
    assert [problem in line for line in missing_sections(ROOT, text)] == [True]


def test_no_section_is_cited_without_its_page() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in tracked(".py")
        if path.relative_to(ROOT).parts[0] in ("kfac_fx", "passes")
        for line in text_of(path).splitlines()
        if BARE.search(line) and not PAPER.search(line)
    ]
    assert not found


def test_no_file_mentions_what_is_not_shipped() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in tracked()
        if path != Path(__file__)
        for line in text_of(path).splitlines()
        if NOT_SHIPPED.search(line)
    ]
    assert not found


def test_paths_in_pages_exist() -> None:
    found = [
        f"{page.relative_to(ROOT)}: {path}"
        for page in tracked(".md")
        if page.name != "CHANGELOG.md"
        for path in PATH.findall(text_of(page))
        if not (ROOT / path).exists()
    ]
    assert not found


def test_files_in_drawings_exist_and_are_drawn() -> None:
    drawings = list((ROOT / "docs/drawings").glob("*.dot"))
    assert drawings
    for drawing in drawings:
        named = re.findall(r"\b((?:kfac_fx|passes)/[\w./]+?)(?=<|\s|$)", text_of(drawing))
        assert named and all((ROOT / path).exists() for path in named)
        shown = text_of(drawing.with_suffix(".svg"))
        assert all(path in shown for path in named)


def test_relative_links_lead_somewhere() -> None:
    assert not [line for page in tracked(".md") for line in dead_links(page)]


def test_every_public_name_has_its_place_in_the_api() -> None:
    page = text_of(ROOT / "docs/reference/api/main.md")
    modules = {path.stem for path in (ROOT / "docs/reference/api").glob("*.md")}
    missing = [
        name
        for name in kfac_fx.__all__
        if name not in modules and not re.search(rf"^::: kfac_fx\.(\w+\.)*{name}$", page, re.M)
    ]
    assert not missing


@pytest.mark.parametrize("module", ["distributed", "likelihoods", "passes", "viz"])
def test_functions_that_share_a_name_with_a_file_are_in_the_api(module: str) -> None:
    """The generator takes such a name for the file, so the page has to ask for the function."""
    page = text_of(ROOT / f"docs/reference/api/{module}.md")
    files = {path.stem for path in (ROOT / "kfac_fx" / module).glob("*.py")}
    names = files & set(import_module(f"kfac_fx.{module}").__all__)
    assert {name for name in names if f".{name}.{name}\n" not in page} == set()


def test_every_page_is_in_the_contents() -> None:
    listed = set(re.findall(r"^\s*- ([\w/]+\.md)$", text_of(ROOT / ".mkdocs.yml"), re.M))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == pages


def test_the_table_of_tests_is_up_to_date() -> None:
    """If it is not: ``python docs/tools/where_is_it_tested.py``."""
    script = runpy.run_path(str(ROOT / "docs/tools/where_is_it_tested.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["page"]()


@pytest.mark.parametrize("name", ["errors", "options", "uses", "command_line"])
def test_a_page_that_is_written_from_the_code_is_up_to_date(name: str) -> None:
    """But for torch's version. If it is not: ``python docs/tools/reference.py``."""
    torch.manual_seed(0)
    script = runpy.run_path(str(ROOT / "docs/tools/reference.py"))
    written = script["path_of"](name).read_text(encoding="utf-8")
    assert VERSION.sub("torch", written) == VERSION.sub("torch", script["page"](name))


def test_every_error_says_what_to_do() -> None:
    silent = [
        name
        for name, kind in vars(kfac_fx.errors).items()
        if isinstance(kind, type) and issubclass(kind, kfac_fx.errors.KFACError)
        if kind is not kfac_fx.errors.KFACError and "\n\nWhat to do: " not in (getdoc(kind) or "")
    ]
    assert not silent


def test_every_rule_has_an_example_among_the_uses() -> None:
    uses = text_of(ROOT / "docs/reference/uses.md").partition("## What each rule")[0]
    kinds = set(re.findall(r"^\| [^|]* \| (\w+) \|", uses, re.M))
    assert {rule.kind for rule in BUILT_IN} <= kinds


def test_the_readme_is_short() -> None:
    text = text_of(ROOT / "README.md")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1200


def test_the_build_of_the_documentation_counts_warnings() -> None:
    """With --quiet mkdocs counts none, and --strict then passes dead links."""
    (line,) = re.findall(r"^step .*mkdocs build.*$", text_of(ROOT / ".ci/run"), re.M)
    assert "--strict" in line and "--quiet" not in line
