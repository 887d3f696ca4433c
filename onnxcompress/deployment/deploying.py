"""``deploy``: a folder with a model and what runs it on a target, written when it has run there."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from onnxcompress.deployment.native import deploy_native, run_script
from onnxcompress.deployment.ort_format import deploy_ort_format
from onnxcompress.deployment.samples import SAMPLE_FILE, checked_samples
from onnxcompress.deployment.staging import MANIFEST, StagedFolder
from onnxcompress.deployment.targets import LOW_MEMORY, Deployment, DeployOptions, Work
from onnxcompress.deployment.web import check_web, deploy_web
from onnxcompress.model_io import external_files, load, read_proto
from onnxcompress.patterns.decoded_weights import decoding_nodes
from onnxcompress.runtime import Runtime

TIMEOUT_S = 300.0


def deploy(
    model: Path, folder: Path, options: DeployOptions, *, say: Callable[[str], None] = lambda line: None
) -> Deployment:
    """Write a folder with a model and what a target needs to run it.

    Args:
        model: The model.
        folder: Where to write; it appears when everything in it has run.
        options: The target, and how to check.
        say: Told what happens.

    Returns:
        What was written and measured.

    Raises:
        ModelError: The model is missing or damaged, or has inputs or outputs that are no tensors of numbers.
        RuntimeFailure: The target refuses the model.
        EquivalenceError: Outputs differ on the target.
        OutputError: The folder cannot be written.
        RecipeError: Options conflict, or onnxruntime-web is not to be had.
    """
    proto = read_proto(model)
    sources = (model, *external_files(proto, model.parent))
    with StagedFolder(folder, force=options.force, sources=sources) as staged, Runtime(timeout_s=TIMEOUT_S) as runtime:
        say("running the model")
        samples = checked_samples(
            model,
            proto,
            runtime,
            data=options.data,
            preprocess=options.preprocess,
            shapes=options.input_shapes,
            tolerance=options.tolerance,
            seed=options.seed,
        )
        codebooks = bool(decoding_nodes(load(model)))
        manifest = {
            "made_by": f"onnxcompress {_own_version()}",
            "target": options.target,
            "source": model.name,
            "onnxruntime": runtime.version,
            "low_memory": LOW_MEMORY if codebooks else {},
        }
        work = Work(model, proto, codebooks, staged.path, folder, runtime, samples, options, manifest)
        say(f"writing for {options.target}")
        if options.target == "web":
            settings, ran = [], None
            deploy_web(work)
        else:
            settings = (deploy_native if options.target == "onnxruntime" else deploy_ort_format)(work)
            ran = f"onnxruntime {runtime.version}"
        work.manifest |= {"sample_file": SAMPLE_FILE, "samples": samples.write(work.folder)}
        (work.folder / MANIFEST).write_text(json.dumps(work.manifest, indent=1) + "\n", encoding="utf-8")
        say("running what was written")
        if options.target != "web":
            run_script(work)
        elif options.check:
            ran, settings = check_web(work)
        else:
            work.notes.append("not checked on onnxruntime-web: the page says whether its outputs agree")
        files = work.sizes()
        staged.commit()
    limits = [limit for limit in samples.allowed.values() if limit is not None]
    allowed = max(limits, default=options.tolerance)
    return Deployment(model, folder, options.target, ran, files, settings, samples.described, allowed, work.notes)


def _own_version() -> str:
    try:
        return version("onnxcompress")
    except PackageNotFoundError:
        return "of a checkout"
