"""``--target onnxruntime``: the model with a program that runs it, and what the memory setting costs and saves."""

from __future__ import annotations

import sys

import numpy as np

from onnxcompress.deployment.targets import Setting, Work, last_line, run_program
from onnxcompress.errors import EquivalenceError
from onnxcompress.runtime import DEPLOYED, RunOptions, peak_memory_bytes
from onnxcompress.validation.equivalence import Model, Reference

TIMED_S = 0.5


def deploy_native(work: Work) -> list[Setting]:
    """Copy the model, write ``run.py``, run it; returns how it runs by default and with weights kept packed.

    Raises:
        EquivalenceError: An output differs in a setting, or ``run.py`` says so.
    """
    work.copy_model()
    work.add_template("run.py")
    size, packed = work.model_bytes()
    path = work.folder / work.manifest["model"]
    settings = [measured(work, "default", path, DEPLOYED, size, packed, memory=True)]
    if work.codebooks:
        low = RunOptions("all", session_config=work.manifest["low_memory"])
        settings.append(measured(work, "low memory", path, low, size, packed, memory=True))
        work.notes.append(advice(*settings))
    return settings


def run_script(work: Work) -> None:
    """Run ``run.py`` as its user will.

    Raises:
        EquivalenceError: It fails, or finds an output that differs.
    """
    for arguments in ([], ["--low-memory"]) if work.codebooks and work.manifest["low_memory"] else ([],):
        done = run_program([sys.executable, "run.py", *arguments], work.folder)
        if done.returncode != 0:
            raise EquivalenceError(f"run.py {' '.join(arguments)}: {last_line(done)}")


def measured(
    work: Work, name: str, model: Model, options: RunOptions, size: int, packed: int | None, *, memory: bool = False
) -> Setting:
    """Run a model on the samples, compare with what is expected, and time it.

    Raises:
        EquivalenceError: An output is off by more than what is allowed.
    """
    samples = work.samples
    reference = Reference(work.model, samples.feeds, work.runtime, outputs=samples.outputs)
    found = reference.compare(model, tolerance=work.options.tolerance, options=options)
    if not found.equivalent:
        raise EquivalenceError(f"{name}: {found.message()}; --tolerance allows more")
    [elapsed] = work.runtime.latency([model], samples.feeds[0], options=options, budget_s=TIMED_S)
    return Setting(
        name,
        max((one.error for one in found.outputs), default=0.0),
        work.runtime.load_time(model, options=options),
        float(np.median(elapsed)),
        size,
        packed,
        peak_memory_bytes(model, samples.feeds[0], options) if memory else None,
    )


def advice(default: Setting, low: Setting) -> str:
    """Which of the two settings to take."""
    assert default.peak_memory_bytes is not None and low.peak_memory_bytes is not None
    saved = default.peak_memory_bytes - low.peak_memory_bytes
    slower = low.latency_ms / default.latency_ms
    if saved <= 0.05 * default.peak_memory_bytes:
        return "keep the default: keeping weights packed (run.py --low-memory) saves no memory that counts here"
    return (
        f"weights are decoded once, at load; run.py --low-memory keeps them packed and saves {saved / 1e6:.1f} MB "
        f"({saved / default.peak_memory_bytes:.0%}) at x{slower:.2f} the latency"
    )
