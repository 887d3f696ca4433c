"""One readable line out of what onnxruntime says when it refuses a model, or leaves behind when it crashes."""

from __future__ import annotations

import os
import re
import signal
from typing import IO


def informative_line(text: str) -> str:
    """What onnxruntime's message says, on one line: no error codes, source files and C++ signatures."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    line = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", line)
    line = re.sub(r"^Load model from .*? failed:\s*", "", line)
    line = re.sub(r"^This is an invalid model\. (?:Error: )?", "", line)
    line = re.sub(r"^(?:Exception during \w+: |Fatal error: )", "", line)
    line = re.sub(r'^In Node, \("(.*?)", (\w+), ".*?", -?\d+\) : .* , Error ', r"node '\1' (\2): ", line)
    # Once per level, where the node is in a subgraph.
    running = r"Non-zero status code returned while running (\w+) node\. Name:'(.*?)' Status Message: "
    line = re.sub(running, r"node '\2' (\1): ", line)
    return _without_locations(line).strip()


def _without_locations(line: str) -> str:
    """Cut "file.cc:12 function", which GCC and Clang write with its types, and MSVC as one word."""
    while place := re.search(r"(\S+)\.(?:cc|cpp|h):\d+ ", line):
        after = line[place.end() :]
        scope, opened, _ = after.partition("(")
        if place[1].startswith("/") and opened and "::" in scope:
            end = _closing(after, len(scope))
            after = re.sub(r"^(?: const)?(?: \[with .*?\])? ", "", after[end + 1 :])
        else:
            after = after.partition(" ")[2]
        line = line[: place.start()] + after
    return line


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis at ``opening`` closes."""
    depth = 0
    for position in range(opening, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position
    return len(text)


def cause_of_death(status: int | None) -> str:
    if status is None:
        return "stopped answering"
    if status >= 0:
        return f"ended its process (exit status {status})"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"crashed ({name}; out of memory?)" if name == "SIGKILL" else f"crashed ({name})"


def last_line(stderr: IO[bytes]) -> str:
    size = stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, size - 4096))
    lines = [line.strip() for line in stderr.read().decode(errors="replace").splitlines() if line.strip()]
    return informative_line(lines[-1].removeprefix("what():")) if lines else ""
