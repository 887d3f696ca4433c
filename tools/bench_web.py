"""What weights in codebooks cost on onnxruntime-web: bytes to download, time to load, latency, in WebAssembly.

    python tools/bench_web.py MODEL.onnx [--ort-web FOLDER] [--rounds 5]
    python tools/bench_web.py ORIGINAL.onnx --others QUANTIZED.onnx ...

Of MODEL these forms are made, each weight by k-means alone, since the time does not depend on what the numbers are:

    uint8      256 codewords of up to 4 numbers, an index a byte
    2 a byte   16 codewords of 2 numbers, two indices in a byte, taken apart by Div, Mul, Sub and Concat
    uint4      the same with UINT4 indices; the operator set of the copy is raised to 21 for it

Node runs them with the files that a page loads, one thread. Each is loaded and run in the settings

    default    as onnxruntime-web has it
    packed     optimization.constant_folding_max_output_size_in_bytes = 65536: weights are decoded in every run
    off        graphOptimizationLevel = "disabled": the same, and nothing else is optimized

A load is the second one of a file in a process, wall and processor time, the medians over processes. Latency is taken
in turns in one process: its median, and the median ratio of neighbouring runs to the original's in the same setting,
with a 95 % interval. The error is that of the first output, max|d| / max|y|, against the same file in the last setting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter

from onnxcompress.codebook.codebook import Choice
from onnxcompress.codebook.encoding import encode
from onnxcompress.codebook.layer import quantize_layer
from onnxcompress.codebook.layers import find_layers
from onnxcompress.codebook.narrow import to_int8
from onnxcompress.deployment.web_runtime import copy_web_runtime
from onnxcompress.measure import gzip_bytes
from onnxcompress.model_io import load, read_proto, save
from onnxcompress.runtime import Runtime, median_ratio
from onnxcompress.samples import check_samples

PROGRAM = """
import { readFile } from 'node:fs/promises';
const request = JSON.parse(Buffer.concat(await process.stdin.toArray()));
const { folder, task, files, settings, inputs, seconds } = request;
const ort = await import(`${folder}/ort.wasm.min.mjs`);
ort.env.wasm.numThreads = 1;
ort.env.logLevel = 'error';
ort.env.wasm.wasmBinary = await readFile(`${folder}/ort-wasm-simd-threaded.wasm`);
const kinds = { float32: Float32Array, int64: BigInt64Array, int32: Int32Array, float16: Uint16Array, bool: Uint8Array,
  uint8: Uint8Array, float64: Float64Array };
const feed = Object.fromEntries(inputs.map(({ name, type, dims, values }) =>
  [name, new ort.Tensor(type, kinds[type].from(values, type === 'int64' ? BigInt : Number), dims)]));
await ort.InferenceSession.create(new Uint8Array(1)).catch(() => {}); // no model, but the runtime has started
const first = async (session) => Object.values(await session.run(feed))[0];
if (task === 'load') {
  const loads = [];
  for (const file of files) for (const setting of settings) {
    const bytes = await readFile(file);
    const start = performance.now(), before = process.cpuUsage();
    const session = await ort.InferenceSession.create(bytes, setting);
    const { user, system } = process.cpuUsage(before);
    loads.push([performance.now() - start, (user + system) / 1e3]);
    await session.release();
  }
  console.log(JSON.stringify(loads));
} else {
  const sessions = [];
  for (const file of files) for (const setting of settings) {
    const session = await ort.InferenceSession.create(await readFile(file), setting);
    sessions.push({ file, session, times: [], output: Array.from((await first(session)).data, Number) });
  }
  for (let turn = 0; turn < 3; turn++) for (const one of sessions) await one.session.run(feed);
  for (const end = performance.now() + seconds * 1e3; sessions[0].times.length < 5 || performance.now() < end;) {
    for (const one of sessions) {
      const start = performance.now();
      await one.session.run(feed);
      one.times.push(performance.now() - start);
    }
  }
  console.log(JSON.stringify(sessions.map(({ times, output }) => ({ times, output }))));
}
process.exit(0);
"""
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "packed": {"extra": {"optimization": {"constant_folding_max_output_size_in_bytes": "65536"}}},
    "off": {"graphOptimizationLevel": "disabled"},
}
BLOCKS = {16: (2,), 256: (4, 3, 2)}


def make_forms(source: Path, folder: Path) -> dict[str, Path]:
    """Write the model in every form."""
    found = {}
    for name, codewords, opset in (("uint8", 256, 0), ("2 a byte", 16, 0), ("uint4", 16, 21)):
        proto = read_proto(source)
        if opset and all(entry.version < opset for entry in proto.opset_import if not entry.domain):
            proto = onnx.version_converter.convert_version(onnx.load(source), opset)
            proto.ir_version = max(proto.ir_version, 10)
        graph = load(proto, folder=source.parent)
        for layer in find_layers(graph)[0]:
            weight = layer.matrix()
            block = next((size for size in BLOCKS[codewords] if weight.shape[1] % size == 0), None)
            if block is None or weight.size < 4 * block * codewords:
                encode(graph, layer, to_int8(weight))
            else:
                encode(
                    graph, layer, quantize_layer(weight, None, None, Choice(block, codewords), seed=0, method="kmeans")
                )
        found[name] = folder / f"{name}.onnx"
        save(graph, found[name])
    return found


def ask(task: str, **fields: Any) -> Any:
    request = json.dumps({"task": task, **fields})
    command = ["node", "--input-type=module", "-e", PROGRAM]
    done = subprocess.run(command, input=request, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"node failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def feed_of(source: Path) -> list[dict[str, Any]]:
    proto = read_proto(source)
    with Runtime() as runtime:
        feed = check_samples(proto, lambda one: runtime.run(source, [one])[0], count=1, batch=1)[0]
    described = []
    for name, value in feed.items():
        value = value.view(np.uint16) if value.dtype == np.float16 else value
        kind = "float16" if value.dtype == np.uint16 else value.dtype.name
        described.append({"name": name, "type": kind, "dims": value.shape, "values": value.ravel().tolist()})
    return described


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--others", type=Path, nargs="+", default=[], help="compare these, and make no forms")
    parser.add_argument("--ort-web", type=Path, help="the npm package onnxruntime-web; fetched by default")
    parser.add_argument("--rounds", type=int, default=5, help="processes that load each file")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="of onnxruntime-web")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for all runs together")
    wishes = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        version = copy_web_runtime(folder / "ort", wishes.ort_web)
        files = {"original": wishes.model}
        files |= {path.name: path for path in wishes.others} or make_forms(wishes.model, folder)
        common = {"folder": str(folder / "ort"), "inputs": feed_of(wishes.model), "seconds": wishes.seconds}
        paths = [str(path.resolve()) for path in files.values()]
        settings = [SETTINGS[name] for name in wishes.settings]
        # The first round of a process compiles what it calls, so that each process loads all files twice.
        rounds = [ask("load", files=paths * 2, settings=settings, **common) for _ in range(wishes.rounds)]
        loads = np.median([round[len(round) // 2 :] for round in rounds], axis=0).reshape(len(paths), len(settings), 2)
        runs = iter(ask("run", files=paths, settings=settings, **common))
        print(f"{wishes.model.name}, onnxruntime-web {version}, node {subprocess.getoutput('node --version')}")
        print("| form | bytes | after gzip | setting | load ms | load CPU ms | latency ms | ratio | error |")
        print("|---|--:|--:|---|--:|--:|--:|--:|--:|")
        original: dict[str, list[float]] = {}
        for (form, path), load_row in zip(files.items(), loads, strict=True):
            found = {name: next(runs) for name in wishes.settings}
            expected = np.array(found[wishes.settings[-1]]["output"])
            for (name, one), (load_ms, cpu_ms) in zip(found.items(), load_row, strict=True):
                latency = statistics.median(one["times"])
                error = np.max(np.abs(np.array(one["output"]) - expected)) / np.max(np.abs(expected))
                ratio, low, high = median_ratio(one["times"], original.setdefault(name, one["times"]))
                sizes = f"{path.stat().st_size:,} | {gzip_bytes(path) or 0:,}"
                times = f"{load_ms:.0f} | {cpu_ms:.0f} | {latency:.2f} | x{ratio:.2f} ({low:.2f}-{high:.2f})"
                print(f"| {form} | {sizes} | {name} | {times} | {error:.0e} |")


if __name__ == "__main__":
    main()
