"""Run the sessions of pages again and put their output into them: the ``console`` blocks of Markdown files.

    python tools/run_sessions.py docs/optimize.md docs/bench.md

Lines that start with ``$`` are run by bash, all of a page in one fresh folder; what they print, stdout and stderr in
the order in which it came, takes the place of the lines that follow. A block without such lines stays as it is.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"(^```console\n)(.*?)(^```$)", re.MULTILINE | re.DOTALL)
ROOT = Path(__file__).parents[1]


def run(command: str, folder: Path, environment: dict[str, str]) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(f"{done.returncode:3}  {command}", file=sys.stderr)
    return [line.rstrip() for line in done.stdout.rstrip("\n").split("\n")] if done.stdout.strip() else []


def commands(block: str) -> list[str]:
    """The commands of a block; a line that ends with a backslash goes on in the next."""
    found: list[str] = []
    goes_on = False
    for line in block.splitlines():
        if goes_on:
            found[-1] += f"\n{line}"
        elif line.startswith("$ "):
            found.append(line.removeprefix("$ "))
        goes_on = line.endswith("\\") and (goes_on or line.startswith("$ "))
    return found


def refreshed(text: str, folder: Path, environment: dict[str, str]) -> str:
    def again(found: re.Match[str]) -> str:
        lines = []
        for command in commands(found[2]):
            lines += [f"$ {command}", *run(command, folder, environment)]
        return f"{found[1]}{chr(10).join(lines)}\n{found[3]}" if lines else found[0]

    return BLOCK.sub(again, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path)
    pages = parser.parse_args().pages
    with tempfile.TemporaryDirectory() as name:
        shims = Path(name)
        for tool, call in (("onnxcompress", f"{sys.executable} -m onnxcompress"), ("python", sys.executable)):
            (shims / tool).write_text(f'#!/bin/sh\nexec {call} "$@"\n')
            (shims / tool).chmod(0o755)
        environment = {**os.environ, "PATH": f"{shims}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        for page in pages:
            with tempfile.TemporaryDirectory() as folder:
                page.write_text(refreshed(page.read_text(), Path(folder), environment))


if __name__ == "__main__":
    main()
