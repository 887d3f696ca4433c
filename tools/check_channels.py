"""Channel groups of models, how much of them can be pruned, and how exact pruning is.

    python tools/check_channels.py models/*.onnx corpus/*.onnx [--groups] [--share 0.33] [--size NAME=64]

Each model is cleaned up, and a part of every free group is removed. On onnxruntime without its own optimizations,
before a final Softmax or Sigmoid,

    exact        groups whose pruned graph is the one with zeros in what makes their channels: held against that one
    approximate  groups where something takes a mean over the channels that stay, or where a channel with zeros would
                 be another number than 0: all are removed together, and held against the graph with zeros in what
                 makes the channels and in what reads them, means taken over those that stay. How far that is from
                 zeros in what makes them alone is told: it is the size of the approximation, not an error

Exit code 1 when an error is above --tolerance.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import onnx

from onnxcompress.channels.checking import compare_with_zeroed
from onnxcompress.channels.groups import MacsModel, find_channels, share
from onnxcompress.channels.preparing import prepare
from onnxcompress.channels.removing import remove_and_zero
from onnxcompress.cost import count
from onnxcompress.errors import ModelError, OnnxCompressError
from onnxcompress.model_io import load, read_proto, to_proto
from onnxcompress.runtime import REFERENCE, Runtime
from onnxcompress.samples import check_samples
from onnxcompress.shapes import infer_shapes
from onnxcompress.validation.equivalence import for_runtime, run_model


def check(path: Path, part: float, runtime: Runtime, folder: Path, *, show_groups: bool) -> tuple[float, str]:
    """The largest relative error of a model and a line about it."""
    started = time.monotonic()
    graph = load(path)
    infer_shapes(graph)
    base = to_proto(prepare(graph, runtime))
    copy = onnx.ModelProto()
    copy.CopyFrom(base)
    cleaned = load(copy)
    infer_shapes(cleaned)
    channels = find_channels(cleaned)
    if show_groups:
        for group in channels.groups:
            print(f"    {group.name}: {group.size} x {group.width}  {group.frozen or group.approximate}")
    rng = np.random.default_rng(0)
    removed = {
        group.name: sorted(rng.choice(group.size, max(1, int(part * group.size)), replace=False).tolist())
        for group in channels.groups
        if not group.frozen and group.size > 1
    }
    near = {group.name for group in channels.groups if group.approximate}
    exact = {name: chosen for name, chosen in removed.items() if name not in near}
    original = read_proto(path)
    samples = list(check_samples(original, lambda feed: run_model(runtime, for_runtime(path), [feed])[0]))

    def error(chosen: dict[str, list[int]], *, makers_alone: bool) -> float:
        pruned, zeroed = remove_and_zero(base, chosen, makers_alone=makers_alone)
        wishes = {"tolerance": 1e-4, "options": REFERENCE}
        found = compare_with_zeroed(pruned, zeroed, samples, runtime, folder, **wishes)
        if found.failure is not None:
            raise ModelError(f"{path.name}: {found.failure}")
        return found.relative

    errors = [error(exact, makers_alone=True) if exact else 0.0]
    text = f"exact error {errors[0]:.1e}"
    if near & removed.keys():
        errors.append(error(removed, makers_alone=False))
        size = error(removed, makers_alone=True)
        text += f", approximate error {errors[1]:.1e} ({len(near)} groups, {size:.1e} from zeros)"
    pruned_graph = load(remove_and_zero(base, removed)[0])
    infer_shapes(pruned_graph)
    before, after, told = count(cleaned).macs, count(pruned_graph).macs, MacsModel(channels).macs(removed)
    free = [group for group in channels.groups if not group.frozen]
    line = (
        f"{path.name}: {len(free)} of {len(channels.groups)} groups, {share(channels):.1%} of channels; "
        f"MACs {before:,} -> {after:,} (model says {told:,.0f}); {text}; {time.monotonic() - started:.1f} s"
    )
    return max(errors), line


def main() -> int:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--groups", action="store_true", help="list the groups")
    parser.add_argument("--share", type=float, default=1 / 3, help="of each group is removed")
    parser.add_argument("--tolerance", type=float, default=2e-5, help="of max|d| / max|y|")
    given = parser.parse_args()
    worst = 0.0
    with Runtime(timeout_s=600.0) as runtime:
        for path in given.models:
            with tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder:
                try:
                    error, line = check(path, given.share, runtime, Path(folder), show_groups=given.groups)
                except OnnxCompressError as failure:
                    error, line = float("inf"), f"{path.name}: {failure}"
            print(line, flush=True)
            worst = max(worst, error)
    return int(worst > given.tolerance)


if __name__ == "__main__":
    sys.exit(main())
