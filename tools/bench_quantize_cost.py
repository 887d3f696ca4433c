"""Time and memory of ``quantize`` against the number of weights: one architecture in several widths.

    python tools/bench_quantize_cost.py --data PHOTOS --ratio 19x

ResNet-50 with random weights, 1,000 classes, 224 x 224, its channels times 1/2, 7/10 and 1. Seconds and memory are of
the whole command with all its processes. Cost is linear where the last column is the same in all rows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_process import run_limited

from onnxcompress.models import resnet
from onnxcompress.train.export import export_module

WIDTHS = (64, 128, 256, 512)
LIMIT_S = 3600.0


@dataclass(frozen=True)
class Row:
    """One size."""

    weights: int
    size_bytes: int
    wall_s: float
    cpu_s: float
    peak_mb: float

    def text(self) -> str:
        cells = (
            f"{self.weights / 1e6:.1f} M",
            f"{self.size_bytes / 1e6:.2f} MB",
            f"{self.wall_s:.0f}",
            f"{self.cpu_s:.0f}",
            f"{self.peak_mb / 1024:.1f} GB",
            f"{self.wall_s / self.weights * 1e6:.1f}",
        )
        return f"| {' | '.join(cells)} |"


def export(width: float, target: Path) -> int:
    """Write the network, its channels times ``width``; returns the number of its weights."""
    torch.manual_seed(0)
    module = resnet.resnet50(widths=[round(width * channels) for channels in WIDTHS])
    export_module(module, torch.randn(1, 3, 224, 224), target, input_names=["image"], dynamic_batch=True)
    return sum(parameter.numel() for parameter in module.parameters())


def measure(width: float, folder: Path, wishes: argparse.Namespace) -> Row:
    source, target = folder / f"{width}.onnx", folder / f"{width}.small.onnx"
    weights = export(width, source)
    command = [sys.executable, "-m", "onnxcompress", "quantize", str(source), "-o", str(target), "--quiet"]
    command += ["--data", wishes.data, "--limit", str(wishes.limit), "--ratio", wishes.ratio]
    command += ["--jobs", str(wishes.jobs)] if wishes.jobs else []
    run = run_limited(command, limit_s=LIMIT_S)
    if not run.ok:
        raise SystemExit(f"{weights} weights: {run.failure}")
    return Row(weights, target.stat().st_size, run.wall_s, run.cpu_s, run.peak_mb)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="photographs")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--ratio", default="19x")
    parser.add_argument("--width", nargs="+", type=float, default=[0.5, 0.7, 1.0])
    parser.add_argument("--jobs", type=int)
    wishes = parser.parse_args(arguments)
    print("| weights | file | s | of CPU | peak | s for a million weights |\n|--:|--:|--:|--:|--:|--:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for width in wishes.width:
            print(measure(width, Path(folder), wishes).text(), flush=True)


if __name__ == "__main__":
    main()
