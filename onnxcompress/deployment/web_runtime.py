"""The files of onnxruntime-web that a page needs: out of its npm package, given or fetched with npm."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from onnxcompress.deployment.targets import last_line, run_program
from onnxcompress.errors import RecipeError

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"  # what the templates were tested with
# The WebAssembly build with SIMD; it uses threads where the page may have them.
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
WAY_OUT = (
    f"fetch the npm package where there is a network (`npm pack {PACKAGE}@{VERSION}`), unpack it, and give the folder "
    "with --ort-web"
)


def copy_web_runtime(place: Path, given: Path | None) -> str:
    """Copy onnxruntime-web's files into ``place``; returns its version.

    Args:
        place: A folder that does not exist yet.
        given: Folder of the package, or one whose node_modules has it; None fetches it.

    Raises:
        RecipeError: It is not in the folder given, or cannot be fetched.
    """
    if given is not None:
        return _copy(_package_in(given), place)
    npm = shutil.which("npm")
    if npm is None:
        raise RecipeError(f"npm was not found: install Node.js, or {WAY_OUT}")
    with tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder:
        wanted = f"{PACKAGE}@{VERSION}"
        quiet = ("--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error")
        command = [npm, "install", "--prefix", folder, "--prefer-offline", "--ignore-scripts", *quiet, wanted]
        done = run_program(command, Path(folder))
        if done.returncode != 0:
            raise RecipeError(
                f"npm could not fetch {wanted} ({_npm_reason(done.stderr) or last_line(done)}): {WAY_OUT}"
            )
        return _copy(Path(folder) / "node_modules" / PACKAGE, place)


def _npm_reason(stderr: str) -> str:
    """npm's own line with the reason; its last lines name the log file."""
    lines = [line.removeprefix("npm error").removeprefix("npm ERR!").strip() for line in stderr.splitlines()]
    return next((line for line in lines if line and not line.startswith(("code ", "errno ", "syscall "))), "")


def _package_in(folder: Path) -> Path:
    for place in (folder, folder / "package", folder / "node_modules" / PACKAGE):
        if _name(place) == PACKAGE:
            return place
    if folder.name == "dist" and _name(folder.parent) == PACKAGE:
        return folder.parent
    raise RecipeError(f"--ort-web {folder}: neither the npm package {PACKAGE} nor a folder with it in node_modules")


def _name(place: Path) -> str | None:
    found = _described(place).get("name")
    return str(found) if found is not None else None


def _described(place: Path) -> dict[str, object]:
    try:
        found = json.loads((place / "package.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _copy(package: Path, place: Path) -> str:
    missing = [name for name in FILES if not (package / "dist" / name).is_file()]
    version = str(_described(package).get("version", "of unknown version"))
    if missing:
        raise RecipeError(f"{package}: {PACKAGE} {version} has no dist/{missing[0]}; take version {VERSION}")
    place.mkdir()
    for name in FILES:
        shutil.copyfile(package / "dist" / name, place / name)
    return version
