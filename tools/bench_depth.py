"""Depth pruning, arm by arm over paired seeds: does each part of the method earn its place?

    python tools/bench_depth.py models/mobilenetv2_mini_digits.onnx --data sklearn:digits:train --test sklearn:digits \
        --blocks 5 --epochs 20 --seeds 3 --out depth.jsonl
    python tools/bench_depth.py --out depth.jsonl --summary

One JSON row a run, appended as it ends: what is in the file is not run again, so a long bench can be run in pieces
(``--arms``, ``--seeds``, and simply by stopping it). With a fifth of --data held out to choose by, --test is looked at
once a run. All arms of a seed share its supernet, its scores and its choice of blocks.

    exhaustive ga greedy draw     subnets by each search; statistics re-estimated, nothing trained
    fitted                        the searched blocks as the tool does it by default: fitted, then trained
    progressive direct            the same blocks from the original weights, with a ramp and without
    random                        random blocks instead, fitted, then trained
    deletion                      blocks deleted and not merged, with a search of their own
    scratch                       the searched structure from random weights
    original                      the original trained for as long
"""

from __future__ import annotations

import argparse
import glob
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from bench_arms import Row, accuracy, mean, read, setting, split

from onnxcompress.data import load_data
from onnxcompress.graph import is_op
from onnxcompress.measure import compare_latency, figures
from onnxcompress.model_io import load, save
from onnxcompress.runtime import Runtime
from onnxcompress.shapes import infer_shapes
from onnxcompress.train.depth.costs import merge
from onnxcompress.train.depth.offers import GoalKind, choose_blocks, parse_goal
from onnxcompress.train.depth.options import DepthOptions, finite
from onnxcompress.train.depth.preparation import prepare
from onnxcompress.train.depth.pruning import prune_depth
from onnxcompress.train.depth.search import SearchSettings
from onnxcompress.train.depth.supernet import build_pruned
from onnxcompress.train.depth.training import Ramp
from onnxcompress.train.finetune import FinetuneOptions, finetune
from onnxcompress.train.settings import TrainSettings
from onnxcompress.train.supervision import Wishes
from onnxcompress.train.torch_graph import TorchGraph
from onnxcompress.validation.equivalence import read_model
from onnxcompress.validation.judge import input_specs

SEARCHES = {"exhaustive": "exhaustive", "ga": "ga", "greedy": "greedy", "draw": "random"}
ARMS = (*SEARCHES, "fitted", "progressive", "direct", "random", "deletion", "scratch", "original")
PAIRS = (
    *(("fitted", other) for other in ("progressive", "direct", "random", "deletion", "scratch")),
    ("progressive", "direct"),
)


class Bench:
    """One model, one seed."""

    def __init__(self, arguments: argparse.Namespace, seed: int) -> None:
        self.arguments, self.seed, self.model = arguments, seed, Path(arguments.model)
        self.folder = Path(arguments.work) / self.model.stem / setting(arguments) / str(seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data, self.val = split(arguments, self.model, self.folder.parent)
        kinds: tuple[GoalKind, ...] = ("blocks", "latency", "macs")
        goal = next(kind for kind in kinds if getattr(arguments, kind))
        training = TrainSettings(
            epochs=arguments.epochs,
            batch=arguments.batch,
            optimizer=arguments.optimizer,
            learning_rate=arguments.lr,
            seed=seed,
            device=arguments.device,
        )
        self.options = DepthOptions(
            data=self.data,
            val=self.val,
            goal=parse_goal(goal, getattr(arguments, goal)),
            only=tuple(arguments.only),
            skip=tuple(arguments.skip),
            wishes=Wishes(labels=arguments.learn != "distill", distill=arguments.learn != "labels"),
            training=training,
            supernet=arguments.supernet,
            supernet_epochs=arguments.supernet_epochs,
            search=SearchSettings(seed=seed),
            jobs=arguments.jobs,
            augment=arguments.augment,
        )
        self.rows: dict[str, Row] = {}

    def run(self, arm: str) -> Row:
        start = time.monotonic()
        row: Row = getattr(self, arm)() if arm not in SEARCHES else self.searched(SEARCHES[arm])
        return {**row, "seconds": time.monotonic() - start}

    def searched(self, method: str) -> Row:
        settings = replace(self.options.search, method=method, evaluations=1 if method == "random" else None)
        return self._prune(method, replace(self.options, stages=("supernet", "search"), search=settings))

    def fitted(self) -> Row:
        return self._prune("fitted", self._chosen(self._choice("auto")))

    def progressive(self) -> Row:
        return self._from_original("progressive", Ramp(self.arguments.ramp, self.arguments.ramp_shape))

    def direct(self) -> Row:
        return self._from_original("direct", Ramp(0.0))

    def _from_original(self, name: str, ramp: Ramp) -> Row:
        return self._prune(name, replace(self._chosen(self._choice("auto")), start="original", ramp=ramp))

    def random(self) -> Row:
        return self._prune("random", self._chosen(self._choice("random")))

    def deletion(self) -> Row:
        graph = prepare(load(self.model))
        blocks, _ = choose_blocks(graph, only=self.options.only, skip=self.options.skip)
        fixed = tuple(glob.escape(block.name) for block in blocks if not block.deletable)
        options = replace(self.options, skip=(*self.options.skip, *fixed), delete=("*",))
        return self._prune("deletion", options, self.folder / "deletion")

    def original(self) -> Row:
        target = self.folder / "original.onnx"
        self._finetune(self.model, target)
        merged = self.folder / "original_merged.onnx"
        save(merge(load(target)), merged)
        return self._measured(merged)

    def scratch(self) -> Row:
        pruned = self._choice("auto")
        graph = prepare(load(self.model))
        blocks, _ = choose_blocks(graph, only=self.options.only, skip=self.options.skip)
        structure = build_pruned(graph, blocks, pruned, flows=self.options.flows)
        twin = TorchGraph(structure)
        initialize(twin, self.seed)
        twin.write_back()
        start, target = self.folder / "scratch_start.onnx", self.folder / "scratch_trained.onnx"
        save(structure, start)
        self._finetune(start, target)
        merged = self.folder / "scratch.onnx"
        save(merge(load(target)), merged)
        return {**self._measured(merged), "pruned": pruned}

    def _finetune(self, source: Path, target: Path) -> None:
        options, wishes = self.options, self.options.wishes
        training = options.training
        if options.supernet == "trained":  # as many steps as supernet and training together
            training = replace(training, epochs=training.epochs + options.supernet_epochs)
        teacher = self.model if wishes.distill else None
        if source == self.model:
            teacher, wishes = None, replace(wishes, distill=False, labels=True)
        given = FinetuneOptions(
            data=self.data, val=self.val, teacher=teacher, wishes=wishes, training=training, augment=options.augment
        )
        finetune(source, target, given)

    def _chosen(self, names: Sequence[str]) -> DepthOptions:
        only = tuple(glob.escape(name) for name in names)
        return replace(self.options, goal=None, stages=("train",), only=only, skip=())

    def _choice(self, method: str) -> list[str]:
        """What a search has chosen: its row where there is one."""
        for arm, name in SEARCHES.items():
            if arm in self.rows and (name == method or (method == "auto" and name in ("exhaustive", "ga"))):
                return list(self.rows[arm]["pruned"])
        return list(self.searched(method)["pruned"])

    def _prune(self, name: str, options: DepthOptions, folder: Path | None = None) -> Row:
        target = self.folder / f"{name}.onnx"
        state = folder or self.folder / ("state" if options.goal is not None else f"state_{name}")
        found = prune_depth(self.model, target, replace(options, checkpoint=state))
        row = self._measured(target)
        row |= {"pruned": found.pruned, "val": found.after, "merge_error": found.merge_error}
        if found.found is not None:
            row |= {"score": found.found.score, "evaluations": found.found.evaluations}
        return row

    def _measured(self, path: Path) -> Row:
        graph = load(path)
        infer_shapes(graph)
        weight = figures(graph, path.stat().st_size)
        with Runtime() as runtime:
            data = load_data(self.arguments.test, inputs=input_specs(read_model(self.model)), limit=1)
            feed, _ = next(iter(data.batches(1)))
            latency = compare_latency(runtime, self.model, path, feed, threads=1, budget_s=3.0, max_runs=2000)
        return {
            "accuracy": accuracy(path, self.arguments.test),
            "original_accuracy": accuracy(self.model, self.arguments.test),
            "speedup": latency.ratio,
            "speedup_low": latency.low,
            "speedup_high": latency.high,
            "macs": weight.macs,
            "nodes": weight.nodes,
            "bytes": weight.size_bytes,
        }


def initialize(twin: TorchGraph, seed: int) -> None:
    """Random kernels and matrices (He et al. 2015); vectors that multiply are 1, others 0; statistics 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    factors = set()
    for node in twin.graph.nodes:
        if is_op(node, "BatchNormalization", "LayerNormalization"):
            factors.add(node.inputs[1].name)
        elif is_op(node, "Mul"):
            factors |= {tensor.name for tensor in node.inputs}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if sum(size > 1 for size in parameter.shape) < 2:
                parameter.fill_(float(name in factors))
                continue
            fan_in = parameter[0].numel() if parameter.dim() != 2 else max(parameter.shape)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * math.sqrt(2 / fan_in))
        for norm in twin.batch_normalizations:
            if norm.mean and norm.variance:
                twin.get_buffer(norm.mean).zero_()
                twin.get_buffer(norm.variance).fill_(1.0)


# -- rows --------------------------------------------------------------------------------------------------------------


def summary(rows: Iterable[Row]) -> str:
    """Markdown: a table for each model and setting, and paired differences."""
    groups: dict[tuple[str, str], dict[str, dict[int, Row]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["setting"]), {}).setdefault(row["arm"], {})[row["seed"]] = row
    lines = []
    for (model, key), arms in groups.items():
        first = next(iter(next(iter(arms.values())).values()))
        lines += [f"## {model}, {first['goal']}, {key}", "", f"original: accuracy {first['original_accuracy']:.4f}", ""]
        lines += ["| arm | seeds | accuracy | speed-up | MACs | nodes | bytes | search score |", "|---" * 8 + "|"]
        for arm in (name for name in ARMS if name in arms):
            found = list(arms[arm].values())
            scores = [row["score"] for row in found if row.get("score") is not None]
            plain = [f"{statistics.mean(row[name] for row in found):,.0f}" for name in ("macs", "nodes", "bytes")]
            figures_of = (mean([row["accuracy"] for row in found]), mean([row["speedup"] for row in found], 2))
            cells = [arm, str(len(found)), *figures_of, *plain, mean(scores) if scores else ""]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
        for ours, other in PAIRS:
            seeds = sorted(arms.get(ours, {}).keys() & arms.get(other, {}).keys())
            if seeds:
                gaps = [arms[ours][seed]["accuracy"] - arms[other][seed]["accuracy"] for seed in seeds]
                lines.append(f"- {ours} - {other}: {mean(gaps)} over {len(seeds)} paired seeds")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--summary", action="store_true", help="print the tables of --out and do nothing else")
    parser.add_argument("--data")
    parser.add_argument("--val", default="", help="to choose by; a fifth of --data when left out")
    parser.add_argument("--test", help="looked at once a run")
    parser.add_argument("--blocks")
    parser.add_argument("--latency")
    parser.add_argument("--macs")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--skip", action="append", default=[])
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--supernet", choices=("fitted", "trained"), default="fitted")
    parser.add_argument("--supernet-epochs", type=float, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--ramp", type=float, default=0.4)
    parser.add_argument("--ramp-shape", default="linear")
    parser.add_argument("--learn", choices=("labels", "distill", "both"), default="labels")
    parser.add_argument("--augment", default="")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--work", default="bench_depth", help="folder for states and models")
    arguments = parser.parse_args()
    if arguments.summary:
        print(summary(read(arguments.out)))
        return
    arms = arguments.arms.split(",")
    if not (arguments.model and arguments.data and arguments.test) or not set(arms) <= set(ARMS):
        parser.error(f"a model, --data and --test are needed; arms: {', '.join(ARMS)}")
    if sum(map(bool, (arguments.blocks, arguments.latency, arguments.macs))) != 1:
        parser.error("give one of --blocks, --latency, --macs")
    key, model = setting(arguments), Path(arguments.model).stem
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        bench = Bench(arguments, seed)
        here = (model, key, seed)
        found = [row for row in read(arguments.out) if (row["model"], row["setting"], row["seed"]) == here]
        bench.rows = {row["arm"]: row for row in found}
        for arm in (arm for arm in arms if arm not in bench.rows):
            goal = bench.options.goal
            assert goal is not None
            row = {"model": model, "setting": key, "arm": arm, "seed": seed, "goal": goal.text, **bench.run(arm)}
            row["settings"] = asdict(bench.options.training) | {"ramp": arguments.ramp}
            bench.rows[arm] = row
            with open(arguments.out, "a", encoding="utf-8") as out:
                out.write(json.dumps(finite(row)) + "\n")
            print(f"{model} seed {seed} {arm}: {row['accuracy']:.4f}, {row['seconds']:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
