"""``--target web``: a page that loads the model with onnxruntime-web from its own folder, and checks it there.

The page and the check in Node share the module that loads and runs the model, and the files of onnxruntime-web.
"""

from __future__ import annotations

import json
import shlex
import shutil
from typing import Any

from onnxcompress.deployment.targets import Setting, Work, last_line, run_program
from onnxcompress.deployment.web_runtime import FILES, copy_web_runtime
from onnxcompress.errors import EquivalenceError, RecipeError, RuntimeFailure

TEMPLATES = ("index.html", "page.mjs", "model.mjs", "check.mjs")


def deploy_web(work: Work) -> None:
    """Copy the model and onnxruntime-web, and write the page.

    Raises:
        RecipeError: There is no onnxruntime-web, or no Node.js to check with.
    """
    if work.options.check and shutil.which("node") is None:
        raise RecipeError("node was not found, so that the page cannot be checked: install Node.js, or give --no-check")
    work.copy_model()
    version = copy_web_runtime(work.folder / "ort", work.options.ort_web)
    sizes = work.sizes()
    work.manifest |= {
        "onnxruntime_web": version,
        "runtime_bytes": sum(sizes[f"ort/{name}"] for name in FILES),
        "model_gzip_bytes": work.model_bytes()[1],
    }
    for name in TEMPLATES:
        work.add_template(name)
    work.notes.append(
        f"a browser needs a server: python -m http.server --directory {shlex.quote(str(work.place))} 8000"
    )


def check_web(work: Work) -> tuple[str, list[Setting]]:
    """Run the folder's samples with its own files in Node; returns onnxruntime-web's version and how it ran.

    Raises:
        RuntimeFailure: onnxruntime-web refused the model.
        EquivalenceError: An output differs.
    """
    node = shutil.which("node")
    assert node is not None, "deploy_web looked for it"
    done = run_program([node, "check.mjs"], work.folder)
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        reason = next((line for line in done.stderr.splitlines() if "Error:" in line), last_line(done))
        raise RuntimeFailure(f"{work.model.name} on onnxruntime-web: {reason.strip()}") from error
    wrong = [one for one in found["outputs"] if not one["agrees"]]
    if wrong or not found["agrees"]:
        one = wrong[0]
        figure = "shape, type or a NaN differs"
        if one["error"] is not None:
            figure = f"error {one['error']:.1e}, allowed {one['allowed']:.0e}; --tolerance allows more"
        raise EquivalenceError(f"onnxruntime-web, sample {one['sample']}, output {one['name']!r}: {figure}")
    size, packed = work.model_bytes()
    worst = max((one["error"] for one in found["outputs"] if one["allowed"] is not None), default=0.0)
    setting = Setting("wasm, 1 thread", worst, found["load_ms"], found["latency_ms"], size, packed)
    return f"onnxruntime-web {found['version']}", [setting]
