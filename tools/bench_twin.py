"""Measure the trainable twin: its numbers against onnxruntime, its training step against hand-written torch.

    python tools/bench_twin.py --speed                           the reference models, each step timed in turns
    python tools/bench_twin.py MODELS --manifest MANIFEST.json   a folder of .onnx files against onnxruntime

Speed: one step is forward, cross entropy, backward and SGD on the same batch; module and twin take turns in one process
on one thread, and the ratio is that of the medians. Equality: max|d| / max|y| of every float output, onnxruntime with
its optimizations off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bench_inputs
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from onnxcompress.errors import OnnxCompressError
from onnxcompress.model_io import load
from onnxcompress.models import convnext, deit, densenet, mobilenetv2, repvgg, resnet, vgg
from onnxcompress.runtime import Runtime
from onnxcompress.testing import relative_error
from onnxcompress.train.export import export_module
from onnxcompress.train.torch_graph import TorchGraph
from onnxcompress.validation.equivalence import run_model

# Networks and the shape of a batch: about half a second a step on one thread.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: resnet.resnet18(classes=10), (2, 3, 224, 224)),
    "resnet20": (lambda: resnet.resnet20(channels=1), (64, 1, 28, 28)),
    "resnet50": (lambda: resnet.resnet50(classes=10), (2, 3, 160, 160)),
    "densenet_mini": (densenet.densenet_mini, (16, 1, 28, 28)),
    "mobilenet_v2": (lambda: mobilenetv2.mobilenet_v2(classes=10, dropout=0.0), (4, 3, 160, 160)),
    "mobilenetv2_mini": (mobilenetv2.mobilenetv2_mini, (128, 1, 28, 28)),
    "convnext_mini": (convnext.convnext_mini, (64, 1, 28, 28)),
    "convnext_tiny": (lambda: convnext.convnext_tiny(classes=10), (2, 3, 160, 160)),
    "deit_mini": (deit.deit_mini, (64, 1, 28, 28)),
    "deit_tiny": (lambda: deit.deit_tiny(classes=10), (4, 3, 224, 224)),
    "repvgg_mini": (repvgg.repvgg_mini, (64, 1, 28, 28)),
    "vgg11_bn": (lambda: vgg.vgg11_bn(classes=10, image_size=64, hidden=256, dropout=0.0), (4, 3, 64, 64)),
}


def stepper(forward: Callable[[], Tensor], module: nn.Module, labels: Tensor) -> Callable[[], float]:
    optimizer = torch.optim.SGD(module.parameters(), 1e-4, momentum=0.9)

    def step() -> float:
        start = time.perf_counter()
        loss = functional.cross_entropy(forward(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def speed(names: list[str], steps: int) -> None:
    torch.set_num_threads(1)
    print(f"{'network':18}{'torch ms':>10}{'twin ms':>10}{'ratio':>8}")
    for name in names:
        torch.manual_seed(0)
        make, shape = NETWORKS[name]
        module, images = make(), torch.randn(shape)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            export_module(module, images[:2], path, input_names=["x"], output_names=["y"], dynamic_batch=True)
            twin = TorchGraph(load(path))
        labels = torch.arange(len(images)) % 10
        module.train(), twin.train()
        ours = stepper(lambda: twin({"x": images})["y"], twin, labels)  # noqa: B023  # used within this turn
        theirs = stepper(lambda: module(images), module, labels)  # noqa: B023
        times: list[tuple[float, float]] = [(theirs(), ours()) for _ in range(steps + 2)][2:]
        a, b = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
        print(f"{name:18}{a:10.1f}{b:10.1f}{b / a:8.3f}", flush=True)


def equality(folder: Path, manifest: Path, seed: int, runtime: Runtime) -> None:
    entries = {entry["name"]: entry for entry in json.loads(manifest.read_text())["models"]}
    print(f"{'model':22}{'nodes':>7}{'parameters':>12}{'max|d|/max|y|':>15}")
    for path in sorted(folder.glob("*.onnx")):
        feeds = bench_inputs.make_inputs(entries[path.stem]["inputs"], seed)
        try:
            graph = load(path)
            twin = TorchGraph(graph)
            with torch.no_grad():
                found = twin({name: torch.from_numpy(np.asarray(array)) for name, array in feeds.items()})
        except OnnxCompressError as error:
            print(f"{path.stem:22} {error}")
            continue
        expected = run_model(runtime, path, [feeds])[0]
        pairs = zip(expected, found.values(), strict=True)
        worst = max(relative_error(np.asarray(a), b.numpy().astype(np.asarray(a).dtype)) for a, b in pairs)
        parameters = sum(p.numel() for p in twin.parameters())
        print(f"{path.stem:22}{len(graph.nodes):7}{parameters:12,}{worst:15.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--manifest", type=Path)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.speed:
        speed(arguments.only, arguments.steps)
    if arguments.folder:
        with Runtime() as runtime:
            equality(arguments.folder, arguments.manifest, arguments.seed, runtime)


if __name__ == "__main__":
    main()
