"""The house: who imports whom, what the packages are, and what importing costs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "sklearn", "netron", "PIL", "rich", "matplotlib"}
# May be imported while a module of the engine is imported; everything else is imported where it is used.
LIGHT = {"onnx", "numpy", "onnx_graphsurgeon", "ml_dtypes", "click", "google", "tomli"}
# From left to right: a module may import those before its own group, and its own group.
LAYERS = (
    ("errors",),
    ("graph", "model_io", "shapes", "sizes", "linear", "cost", "runtime", "interface"),
    ("rewrite", "merging", "patterns"),
    ("passes",),
    ("pipeline",),
    ("codebook",),
    ("channels",),
    ("resolution",),
    ("train",),
    ("compression",),
    ("deployment",),
    ("cli",),
)


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def engine_files() -> list[Path]:
    return sorted(
        p for p in (ROOT / "onnxcompress").rglob("*.py") if "/models/" not in str(p) and "/passes/" not in str(p)
    )


def test_packages_are_those_on_disk():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = set()
    for folder, name in ((ROOT / "onnxcompress", "onnxcompress"), (ROOT / "passes", "onnxcompress.passes")):
        for init in folder.rglob("__init__.py"):
            if folder.name == "onnxcompress" and init.relative_to(folder).parts[0] in ("passes", "models"):
                continue
            folders.add(".".join([name, *init.parent.relative_to(folder).parts]))
    assert set(settings["packages"]) == folders | {"onnxcompress.models"}
    assert (ROOT / "onnxcompress/passes").is_symlink() and (ROOT / "onnxcompress/models").is_symlink()


def test_the_engine_imports_nothing_heavy_on_import():
    for path in [*engine_files(), *(ROOT / "passes").glob("*.py")]:
        outside = {name.split(".")[0] for name in imports(path, top_level=True)} - {"onnxcompress"}
        outside -= set(sys.stdlib_module_names)
        allowed = LIGHT | ({"torch"} if path.is_relative_to(ROOT / "onnxcompress/train") else set())
        assert outside <= allowed, f"{path.name} imports {outside - allowed} at the top"


def test_only_the_clients_of_torch_import_them():
    for path in [*engine_files(), *(ROOT / "passes").glob("*.py")]:
        if not path.is_relative_to(ROOT / "onnxcompress/train"):
            found = {name for name in imports(path, top_level=True) if name.startswith("onnxcompress.train")}
            assert not found, f"{path.name} imports {found} at the top"


def test_only_the_command_line_prints():
    for path in [*engine_files(), *(ROOT / "passes").glob("*.py")]:
        if path.parent.name == "cli":
            continue
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls), path.name


def test_nothing_unpickles():
    for path in [*engine_files(), *(ROOT / "passes").glob("*.py")]:
        names = imports(path)
        assert not {"pickle", "dill", "cloudpickle"} & {name.split(".")[0] for name in names}, path.name
        assert not {"joblib.load", "joblib.dump", "joblib.Memory"} & names, path.name
        assert "allow_pickle=True" not in path.read_text(), path.name


def test_imports_go_from_right_to_left():
    position = {name: i for i, layer in enumerate(LAYERS) for name in layer}

    def layer_of(module: str) -> int | None:
        parts = module.split(".")
        return position.get(parts[1]) if parts[0] == "onnxcompress" and len(parts) > 1 else None

    for path in [*engine_files(), *(ROOT / "passes").glob("*.py")]:
        own_name = "passes" if path.parent.name == "passes" else path.relative_to(ROOT / "onnxcompress").parts[0]
        own = position.get(own_name.removesuffix(".py"))
        if own is None:
            continue
        for name in imports(path, top_level=True):
            other = layer_of(name)
            assert other is None or other <= own, f"{path.name} imports {name}"


@pytest.mark.parametrize("module", ["onnxcompress", "onnxcompress.cli", "onnxcompress.optimizer"])
def test_import_loads_no_heavy_module_and_takes_a_moment(module):
    code = (
        f"import sys, time; t = time.perf_counter(); import {module}; print(time.process_time(), *sorted(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    loaded = set(out.split()[1:])
    assert not loaded & HEAVY
    assert "onnxruntime" not in loaded


def test_modules_and_exports_have_different_names():
    import onnxcompress

    modules = {path.stem for path in (ROOT / "onnxcompress").glob("*.py")}
    assert not modules & set(onnxcompress.__all__)
    for name in onnxcompress.__all__:
        assert getattr(onnxcompress, name) is not None
