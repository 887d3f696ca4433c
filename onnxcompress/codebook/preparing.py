"""The exact passes of ``optimize`` before a model is quantized.

A BatchNormalization that stays costs a small file four vectors, a constant that could be folded its node; and weights
are best quantized as they will run. Folding is done (level 2), merging (level 3) where it makes the file smaller. The
result is checked against the original on onnxruntime; where it fails, the graph is quantized as it is.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from onnxcompress.errors import EquivalenceError, ModelError, PassError, RuntimeFailure
from onnxcompress.optimizer import OptimizeOptions, optimize
from onnxcompress.runtime import Runtime

logger = logging.getLogger(__name__)

LEVELS = (2, 3)


@dataclass(frozen=True)
class Prepared:
    """The graph to quantize.

    Attributes:
        path: Where it is; the original's own where no pass gained anything.
        note: What was done, or why nothing was; "" where there was nothing to do.
    """

    path: Path
    note: str = ""


def prepare(path: Path, folder: Path, runtime: Runtime, *, custom_ops: Path | None = None, seed: int = 0) -> Prepared:
    """Run the passes on a model.

    Args:
        path: The model.
        folder: Where the result goes.
        runtime: Where both are run.
        custom_ops: Shared library with custom operators.
        seed: Of the check's inputs.

    Returns:
        The smallest of the original and the results of both levels.
    """
    least: int | None = None
    prepared = Prepared(path)
    for level in LEVELS:
        target = folder / f"level{level}" / path.name
        target.parent.mkdir()
        wishes = OptimizeOptions(level=level, measure_latency=False, custom_ops=custom_ops, seed=seed)
        try:
            done = optimize(path, target, options=wishes, runtime=runtime)
        except (EquivalenceError, ModelError, PassError, RuntimeFailure) as error:
            # The passes are a help, not a condition: what is wrong with the file itself shows when it is run.
            logger.info("level %s: %s", level, error)
            reason = " ".join(str(error).split())
            return prepared if prepared.note else Prepared(path, f"quantized as it is, not optimized first: {reason}")
        if least is None:
            least = done.before.size_bytes
        if not done.unchanged and done.after.size_bytes < least:
            least = done.after.size_bytes
            nodes = f"{done.before.nodes} -> {done.after.nodes} nodes"
            sizes = f"{done.before.size_bytes:,} -> {done.after.size_bytes:,} bytes"
            prepared = Prepared(target, f"optimized first (level {level}): {nodes}, {sizes}; layers are those of it")
    return prepared
