"""The optimizers under test: how each one is called, and the few that have no command line of their own.

    python bench_peers.py ARM IN OUT

runs one of the latter in this process. Every peer is imported inside its function: each arm may have its own Python.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

OURS = ("onnxcompress", "onnxcompress-no-check")
PEERS = (
    "onnxsim",
    "onnxslim",
    "onnxslim-check",
    "onnxoptimizer",
    "onnxscript",
    "onnxruntime-extended",
    "onnxruntime-all",
)
ARMS = ("copy", *OURS, *PEERS)
PROTOBUF_LIMIT_BYTES = 2**31 - 1


def distribution(arm: str) -> str | None:
    """The package that an arm belongs to; None for the control."""
    return None if arm == "copy" else arm.split("-")[0]


def command(arm: str, python: str, source: Path, target: Path, samples: Mapping[str, Path]) -> list[str]:
    """The command line of one arm, as its users would type it.

    Args:
        arm: One of ``ARMS``.
        python: Interpreter that has the arm's package.
        source: The original file.
        target: Where the arm writes.
        samples: Input name -> .npy file, for the arm that cannot make inputs for dynamic shapes by itself.
    """
    files = [str(source), str(target)]
    if arm in OURS:
        options = ["--no-check"] if arm.endswith("-no-check") else []
        return [python, "-m", "onnxcompress", "optimize", files[0], "-o", files[1], *options]
    if arm == "onnxslim-check":
        values = [f"{name}:{path}" for name, path in samples.items()]
        inputs = ["--model-check-inputs", *values] if values else []
        return [python, "-m", "onnxslim", *files, "--model-check", *inputs]
    if arm in ("onnxsim", "onnxslim", "onnxoptimizer"):
        return [python, "-m", arm, *files]
    return [python, str(Path(__file__).resolve()), arm, *files]


def run_copy(source: Path, target: Path) -> None:
    """The control: the same bytes, with the external data under the same relative names."""
    from bench_model import external_files

    for file in [source, *external_files(source)]:
        copied = target if file == source else target.parent / file.relative_to(source.parent)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copied)


def run_onnxscript(source: Path, target: Path) -> None:
    import onnx_ir
    from onnxscript import optimizer

    model = optimizer.optimize(onnx_ir.load(str(source)))
    tensors = [value.const_value for value in model.graph.initializers.values()]
    size_bytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    external = f"{target.name}.data" if size_bytes > PROTOBUF_LIMIT_BYTES else None
    onnx_ir.save(model, str(target), external_data=external)


def run_onnxruntime(level: str, source: Path, target: Path) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}")
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def main(arguments: Sequence[str]) -> int:
    arm, source, target = arguments[0], Path(arguments[1]), Path(arguments[2])
    if arm == "copy":
        run_copy(source, target)
    elif arm == "onnxscript":
        run_onnxscript(source, target)
    elif arm in ("onnxruntime-extended", "onnxruntime-all"):
        run_onnxruntime(arm.removeprefix("onnxruntime-"), source, target)
    else:
        print(f"{arm!r} has a command line of its own", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
