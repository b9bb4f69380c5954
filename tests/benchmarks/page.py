"""Run a benchmark and keep what it prints as a page, with the date, the commit and the machine.

python tests/benchmarks/page.py docs/benchmarks/memory.md tests/benchmarks/memory.py [ARGUMENTS]
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def machine() -> str:
    """Return the processor, the system, and the versions of Python and torch."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    parts = [f"{cpu}, {os.cpu_count()} cores", f"{platform.system()}"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    parts += [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    return ", ".join(parts)


def commit() -> str:
    """Return the commit that is checked out, and whether files differ from it."""

    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return run.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "kfac_fx", "passes")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" (changed)" if changed else "")


def page(title: str, command: str, printed: str, picture: str | None = None) -> str:
    """Return the text of a page.

    Args:
        title: its heading.
        command: what was run, from the root of the repository.
        printed: what the command printed.
        picture: the name of a picture that lies beside the page; None without one.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    lines = [
        f"# {title}",
        "",
        "This page is written by the command that it shows.",
        "",
        "| | |",
        "|---|---|",
        f"| command | `{command}` |",
        f"| date | {now:%Y-%m-%d %H:%M} UTC |",
        f"| commit | {commit()} |",
        f"| machine | {machine()} |",
        "",
    ]
    if picture is not None:
        lines += [f"![{title}]({picture})", ""]
    text = "\n".join(line.rstrip() for line in printed.strip().splitlines())
    return "\n".join([*lines, "```text", text, "```", ""])


def main() -> None:
    """Run the script in a process of its own, show what it prints, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    run = subprocess.run(
        [sys.executable, str(options.script), *options.arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    print(run.stdout)
    title = (options.script.read_text(encoding="utf-8").split('"""')[1]).partition("\n")[0]
    script = options.script.resolve().relative_to(ROOT)
    command = " ".join(["python", str(script), *options.arguments])
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page(title.rstrip("."), command, run.stdout), encoding="utf-8")


if __name__ == "__main__":
    main()
